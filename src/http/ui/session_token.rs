//! The session cookie of a signed-in browser: its content, and how it is authenticated.
//!
//! The format is `<id of the API key>.<end, Unix seconds>.<tag>`. The tag is an HMAC by the first
//! signing secret, over the end, the id, and the stored hash of the key. All replicas know these
//! values, so no table of sessions is needed: a session outlives a restart and ends with its key. A
//! cookie does not contain the key, and neither the database alone nor the cookie of another key is
//! enough to forge one.
//!
//! A session has exactly one encoding. If `+5` or `05` were accepted as a time, or upper-case hex
//! digits in the tag, one session would have several cookies, and tools that list or compare
//! cookies would miss some of them.

use subtle::{Choice, ConstantTimeEq};

use crate::domain::stripe::signing_secrets::SigningSecrets;

/// Lifetime of a session, in seconds.
pub const LIFE_S: i64 = 12 * 3600;

/// The content of a session cookie, not yet authenticated.
#[derive(Debug, PartialEq, Eq)]
pub struct Claim<'c> {
    pub key_id: &'c str,
    /// Unix seconds of the end of the session.
    until_s: i64,
    tag: [u8; 32],
}

/// Returns the session cookie for a visitor who has presented this key.
pub fn issue(secrets: &SigningSecrets, key_id: &str, key_sha256: &[u8], now_s: i64) -> String {
    let until_s = now_s.saturating_add(LIFE_S);
    let tag = secrets.tags(&message(key_id, key_sha256, until_s))[0];
    encode(key_id, until_s, &tag)
}

/// Returns the only accepted encoding of a session.
fn encode(key_id: &str, until_s: i64, tag: &[u8; 32]) -> String {
    format!("{key_id}.{until_s}.{}", hex::encode(tag))
}

impl<'c> Claim<'c> {
    /// Parses a cookie. Returns `None` if it is malformed or not in the only accepted encoding.
    pub fn read(cookie: &'c str) -> Option<Claim<'c>> {
        let mut parts = cookie.split('.');
        let (Some(key_id), Some(until), Some(hex), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };

        let mut tag = [0; 32];
        hex::decode_to_slice(hex, &mut tag).ok()?;
        let claim = Claim {
            key_id,
            until_s: until.parse().ok()?,
            tag,
        };

        (encode(key_id, claim.until_s, &tag) == cookie).then_some(claim)
    }

    /// Returns whether one of our secrets issued this session for the key with this hash, and
    /// whether the session has not ended.
    pub fn holds(&self, secrets: &SigningSecrets, key_sha256: &[u8], now_s: i64) -> bool {
        let tags = secrets.tags(&message(self.key_id, key_sha256, self.until_s));
        let is_ours = tags
            .iter()
            .fold(Choice::from(0), |any, tag| any | tag.ct_eq(&self.tag));

        // A skewed clock issued a session that ends implausibly late, so it does not count.
        bool::from(is_ours)
            && (now_s..=now_s.saturating_add(2 * LIFE_S)).contains(&self.until_s)
            && now_s != self.until_s
    }
}

/// Returns the authenticated bytes. They must not begin with a number, because the bytes that
/// Stripe signs do, and a tag must not serve as a signature of a delivery.
fn message(key_id: &str, key_sha256: &[u8], until_s: i64) -> Vec<u8> {
    [
        b"session of a browser\n",
        &until_s.to_be_bytes()[..],
        key_sha256,
        key_id.as_bytes(),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_769_850_000;

    fn secrets(text: &str) -> SigningSecrets {
        SigningSecrets::parse(text).unwrap()
    }

    #[test]
    fn session_is_valid_for_its_key_until_its_end() {
        let (ours, hash) = (secrets("whsec_a"), [7; 32]);
        let cookie = issue(&ours, "key_1", &hash, NOW);
        let claim = Claim::read(&cookie).unwrap();
        assert_eq!(claim.key_id, "key_1");
        assert!(claim.holds(&ours, &hash, NOW) && claim.holds(&ours, &hash, NOW + LIFE_S - 1));
        assert!(
            !claim.holds(&ours, &hash, NOW + LIFE_S),
            "the session has ended"
        );
        assert!(
            !claim.holds(&ours, &[8; 32], NOW),
            "the session belongs to another key"
        );
        assert!(
            !claim.holds(&secrets("whsec_b"), &hash, NOW),
            "the database alone cannot forge a session"
        );
        assert!(
            claim.holds(&secrets("whsec_b,whsec_a"), &hash, NOW),
            "an older secret is still accepted"
        );

        let longer = cookie.replace(&(NOW + LIFE_S).to_string(), &(NOW + LIFE_S + 1).to_string());
        assert!(!Claim::read(&longer).unwrap().holds(&ours, &hash, NOW));

        let other = cookie.replace("key_1", "key_2");
        assert!(!Claim::read(&other).unwrap().holds(&ours, &hash, NOW));
    }

    #[test]
    fn session_has_one_encoding() {
        let cookie = issue(&secrets("whsec_a"), "key_1", &[7; 32], NOW);
        let (until, tag) = (NOW + LIFE_S, &cookie[cookie.len() - 64..]);
        assert!(Claim::read(&cookie).is_some());
        for until in [format!("+{until}"), format!("0{until}")] {
            assert_eq!(Claim::read(&format!("key_1.{until}.{tag}")), None);
        }
        let upper = tag.to_uppercase();
        assert_ne!(upper, tag, "the tag has a letter");
        assert_eq!(Claim::read(&format!("key_1.{until}.{upper}")), None);
    }

    #[test]
    fn malformed_cookie_is_rejected() {
        let cookie = issue(&secrets("whsec_a"), "key_1", &[7; 32], NOW);
        let shorter = &cookie[..cookie.len() - 2];

        for wrong in [
            "",
            "key_1",
            "key_1.5",
            "key_1.x.00",
            shorter,
            &format!("{cookie}00"),
            &format!("{cookie}."),
            "é.1.é",
        ] {
            assert_eq!(Claim::read(wrong), None, "{wrong}");
        }
    }
}

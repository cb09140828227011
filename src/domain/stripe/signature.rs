//! Stripe's webhook signature: `Stripe-Signature: t=<unix seconds>,v1=<hex>[,v1=...]`, HMAC-SHA256 over `{t}.{body}`.
//!
//! Bytes in, never strings. The key is the whole secret, `whsec_` included. Several secrets are configured at once (rotation,
//! test and live mode, Connect), and Stripe sends one `v1` per active secret: every secret is tried against every `v1`, in
//! constant time and without an early exit. Accepted is what all of Stripe's SDKs accept, refused what they all refuse.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::{Choice, ConstantTimeEq};

/// How far the time in a signature may lie from now, either way, in seconds.
pub const TOLERANCE_S: i64 = 300;

/// One signing secret and the name it goes by in logs and reports.
pub struct SigningSecret {
    pub label: String,
    mac: Hmac<Sha256>,
}

/// All secrets that deliveries may be signed with; never empty.
pub struct SigningSecrets(Vec<SigningSecret>);

/// What a secret is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretName {
    pub label: String,
    /// Tells secrets apart that go by one label, one after the other, and shows nothing of them.
    pub mark: String,
}

/// Why a delivery is not believed. The sender is told nothing of it; the operator counts it by reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignatureError {
    /// No `Stripe-Signature` header.
    Missing,
    /// More than one.
    Several,
    /// No or two `t`, a `t` that is no number, no usable `v1`.
    Malformed,
    /// No secret of ours made any of its signatures: a wrong secret, a changed body, or not Stripe.
    Mismatch,
    /// Authentic, but signed too long ago: a replay, or our clock is fast.
    Stale,
    /// Authentic, but from the future: our clock is slow.
    Future,
}

impl SignatureError {
    /// In words, for the person who reads the log.
    pub fn meaning(self) -> &'static str {
        match self {
            SignatureError::Missing => "it has no Stripe-Signature header, so it is not Stripe's",
            SignatureError::Several => {
                "it has several Stripe-Signature headers, so it is not Stripe's"
            }
            SignatureError::Malformed => {
                "its Stripe-Signature header cannot be read, so it is not Stripe's"
            }
            SignatureError::Mismatch => {
                "no secret in STRIPE_WEBHOOK_SECRET signs it: the secret was rolled, or it is not Stripe's"
            }
            SignatureError::Stale => {
                "it is authentic and too old: this machine's clock is ahead, or somebody repeats it"
            }
            SignatureError::Future => {
                "it is authentic and from the future: this machine's clock is behind"
            }
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            SignatureError::Missing => "missing",
            SignatureError::Several => "several",
            SignatureError::Malformed => "malformed",
            SignatureError::Mismatch => "mismatch",
            SignatureError::Stale => "stale",
            SignatureError::Future => "future",
        }
    }
}

impl SigningSecrets {
    /// Reads `live=whsec_a,old=whsec_b`: secrets separated by commas or blanks, each with a label or without. What stands before
    /// the first `=` is a label if it is made of letters, digits, `.`, `_` and `-`; unlabelled secrets are named by their place.
    ///
    /// # Errors
    /// Every mistake, in words that do not show a secret.
    pub fn parse(text: &str) -> Result<SigningSecrets, Vec<String>> {
        let mut secrets: Vec<SigningSecret> = Vec::new();
        let mut keys: Vec<&str> = Vec::new();
        let mut mistakes = Vec::new();
        let parts = text
            .split(|c: char| c == ',' || c.is_whitespace())
            .filter(|part| !part.is_empty());
        for (index, part) in parts.enumerate() {
            let place = index + 1;
            let (label, key) = match part.split_once('=') {
                Some((label, key)) if is_label(label) => (label.to_owned(), key),
                _ => (format!("secret-{place}"), part),
            };
            if key.is_empty() {
                mistakes.push(format!("the signing secret labelled `{label}` is empty"));
            } else if !key.bytes().all(|b| b.is_ascii_graphic()) {
                mistakes.push(format!(
                    "the signing secret `{label}` has characters that are not printable ASCII"
                ));
            } else if keys.contains(&key) {
                mistakes.push(format!("the signing secret `{label}` is given twice"));
            } else if secrets.iter().any(|s| s.label == label) {
                mistakes.push(format!("two signing secrets have the label `{label}`"));
            } else {
                keys.push(key);
                secrets.push(SigningSecret::new(label, key.as_bytes()));
            }
        }
        if secrets.is_empty() && mistakes.is_empty() {
            mistakes.push("no signing secret is given".to_owned());
        }
        if mistakes.is_empty() {
            Ok(SigningSecrets(secrets))
        } else {
            Err(mistakes)
        }
    }

    /// The one that replayed deliveries are signed with.
    pub fn first(&self) -> &SigningSecret {
        &self.0[0]
    }

    pub fn names(&self) -> Vec<SecretName> {
        let mark = |tag: [u8; 32]| hex::encode(&tag[..4]);
        let marks = self
            .tags(b"which secret goes by its label")
            .into_iter()
            .map(mark);
        self.0
            .iter()
            .zip(marks)
            .map(|(secret, mark)| SecretName {
                label: secret.label.clone(),
                mark,
            })
            .collect()
    }

    /// What each secret makes of a message that is not a delivery: it must not begin with a number, as what Stripe signs does.
    pub fn tags(&self, message: &[u8]) -> Vec<[u8; 32]> {
        self.0
            .iter()
            .map(|secret| {
                secret
                    .mac
                    .clone()
                    .chain_update(message)
                    .finalize()
                    .into_bytes()
                    .into()
            })
            .collect()
    }

    /// Begins to verify a body, which may come in parts.
    pub fn verifier<'s, 'h>(&'s self, header: &'h SignatureHeader) -> Verifier<'s, 'h> {
        Verifier {
            header,
            signers: self
                .0
                .iter()
                .map(|secret| (secret, secret.begin(header.timestamp)))
                .collect(),
        }
    }
}

/// Verifies one body against all secrets.
pub struct Verifier<'s, 'h> {
    header: &'h SignatureHeader<'h>,
    signers: Vec<(&'s SigningSecret, Hmac<Sha256>)>,
}

impl<'s> Verifier<'s, '_> {
    /// The next part of the body.
    pub fn update(&mut self, part: &[u8]) {
        self.signers
            .iter_mut()
            .for_each(|(_, mac)| mac.update(part));
    }

    /// The label of the secret that signed this body.
    ///
    /// The signature is judged before its age, so that `Stale` and `Future` are said of authentic deliveries only: they mean a
    /// wrong clock, never a wrong secret.
    ///
    /// # Errors
    /// `Mismatch`, `Stale` or `Future`.
    pub fn finish(self, now_s: i64) -> Result<&'s str, SignatureError> {
        let mut signer = None;
        for (secret, mac) in self.signers {
            let expected: [u8; 32] = mac.finalize().into_bytes().into();
            let matched = self
                .header
                .signatures
                .iter()
                .fold(Choice::from(0), |any, signature| {
                    any | signature.ct_eq(&expected)
                });
            if bool::from(matched) && signer.is_none() {
                signer = Some(secret.label.as_str());
            }
        }
        let label = signer.ok_or(SignatureError::Mismatch)?;
        match now_s.saturating_sub(self.header.timestamp_s) {
            age if age > TOLERANCE_S => Err(SignatureError::Stale),
            age if age < -TOLERANCE_S => Err(SignatureError::Future),
            _ => Ok(label),
        }
    }
}

/// A secret that has a `=` in it is none: labels are shown.
fn is_label(text: &str) -> bool {
    let is_secret = text.starts_with("whsec_");
    !is_secret
        && (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

impl SigningSecret {
    fn new(label: String, key: &[u8]) -> SigningSecret {
        let mac = Hmac::new_from_slice(key).expect("HMAC takes keys of any length");
        SigningSecret { label, mac }
    }

    fn begin(&self, timestamp: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(timestamp);
        mac.update(b".");
        mac
    }

    fn tag(&self, timestamp: &[u8], body: &[u8]) -> [u8; 32] {
        let mut mac = self.begin(timestamp);
        mac.update(body);
        mac.finalize().into_bytes().into()
    }
}

/// The header value that makes `body` authentic at `timestamp_s`.
pub fn sign(secret: &SigningSecret, timestamp_s: i64, body: &[u8]) -> String {
    let tag = secret.tag(timestamp_s.to_string().as_bytes(), body);
    format!("t={timestamp_s},v1={}", hex::encode(tag))
}

/// A header that could be right: what can be known without the body.
pub struct SignatureHeader<'h> {
    /// As it stands in the header: these bytes are signed.
    timestamp: &'h [u8],
    timestamp_s: i64,
    signatures: Vec<[u8; 32]>,
}

impl<'h> SignatureHeader<'h> {
    /// `lines` are the values of all `Stripe-Signature` header lines.
    ///
    /// # Errors
    /// `Missing`, `Several` or `Malformed`.
    pub fn read(lines: &[&'h [u8]]) -> Result<SignatureHeader<'h>, SignatureError> {
        match lines {
            [] => Err(SignatureError::Missing),
            [line] => SignatureHeader::parse(line).ok_or(SignatureError::Malformed),
            _ => Err(SignatureError::Several),
        }
    }

    /// Unknown schemes (`v0`) and elements without `=` are passed over; a `v1` that is not 64 hex digits can match nothing.
    fn parse(header: &'h [u8]) -> Option<SignatureHeader<'h>> {
        let mut timestamp = None;
        let mut signatures = Vec::new();
        for element in header.split(|b| *b == b',') {
            let element = element.trim_ascii();
            let Some(equals) = element.iter().position(|b| *b == b'=') else {
                continue;
            };
            let value = &element[equals + 1..];
            match &element[..equals] {
                b"t" if timestamp.is_some() => return None,
                b"t" => timestamp = Some(value),
                b"v1" => {
                    let mut signature = [0; 32];
                    if hex::decode_to_slice(value, &mut signature).is_ok() {
                        signatures.push(signature);
                    }
                }
                _ => {}
            }
        }
        let timestamp = timestamp
            .filter(|t| (1..=12).contains(&t.len()) && t.iter().all(u8::is_ascii_digit))?;
        let timestamp_s = std::str::from_utf8(timestamp).ok()?.parse().ok()?;
        (!signatures.is_empty()).then_some(SignatureHeader {
            timestamp,
            timestamp_s,
            signatures,
        })
    }
}

impl fmt::Debug for SigningSecrets {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let labels: Vec<&str> = self.0.iter().map(|secret| secret.label.as_str()).collect();
        f.debug_tuple("SigningSecrets").field(&labels).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] = b"{\n  \"id\": \"evt_test_webhook\",\n  \"object\": \"event\"\n}";
    const TAG: &str = "c2f890decbc5ede7c5060bb9a6d31e0626a4342bacb9aeae2adb1bcea72f9812";
    const NOW: i64 = 1_492_774_577;

    fn verify(header: &str) -> Result<String, SignatureError> {
        let secrets = SigningSecrets::parse("whsec_test_secret").unwrap();
        secrets.verify_line(header, BODY, NOW).map(str::to_owned)
    }

    impl SigningSecrets {
        fn verify_line(
            &self,
            header: &str,
            body: &[u8],
            now_s: i64,
        ) -> Result<&str, SignatureError> {
            let header = SignatureHeader::read(&[header.as_bytes()])?;
            let mut verifier = self.verifier(&header);
            body.chunks(7).for_each(|part| verifier.update(part));
            verifier.finish(now_s)
        }
    }

    #[test]
    fn known_vectors_verify() {
        let vectors: [(i64, &str, &[u8], &str); 3] = [
            (NOW, "whsec_test_secret", BODY, TAG),
            (
                1_700_000_000,
                "test_secret",
                b"{}",
                "c561c5814cba8a0cd366ee43292d205cf59c9635ad120894be1ef80c0af72b76",
            ),
            (
                1_614_556_800,
                "whsec_test_secret",
                "{\"id\":\"evt_1\",\"amount\":\"1 234,50 €\"}".as_bytes(),
                "179aa41bcb443f8b1362a19560f369bb5c7e996c6c8e8ee71b5087df4370c2f7",
            ),
        ];
        for (time, secret, body, tag) in vectors {
            let secrets = SigningSecrets::parse(secret).unwrap();
            let header = format!("t={time},v1={tag}");
            assert_eq!(
                secrets.verify_line(&header, body, time),
                Ok("secret-1"),
                "{secret}"
            );
            assert_eq!(sign(secrets.first(), time, body), header);
        }
    }

    #[test]
    fn what_all_sdks_accept_is_accepted() {
        let accepted = [
            format!("t={NOW},v1={TAG}"),
            format!("v1={TAG},t={NOW}"),
            format!("t={NOW},v1={TAG},v0={}", "0".repeat(64)),
            format!("t={NOW},v1={},v1={TAG}", "0".repeat(64)),
            format!("t={NOW},v1={TAG},v1={}", "0".repeat(64)),
            format!("t={NOW},v1={TAG},v1=potato"),
            format!("t={NOW},v1={TAG},"),
            format!("t={NOW},scheme,x=a=b,v1={TAG}"),
            format!("t={NOW}, v1={TAG}"),
            format!("{}t={NOW},v1={TAG}", "x,".repeat(100_000)),
        ];
        for header in accepted {
            assert_eq!(
                verify(&header).as_deref(),
                Ok("secret-1"),
                "{}",
                &header[..header.len().min(200)]
            );
        }
    }

    #[test]
    fn a_header_that_cannot_be_right_is_malformed() {
        let malformed = [
            String::new(),
            format!("v1={TAG}"),
            format!("t=,v1={TAG}"),
            format!("t=abc,v1={TAG}"),
            format!("t={NOW}abc,v1={TAG}"),
            format!("t=-{NOW},v1={TAG}"),
            format!("t={NOW},t={NOW},v1={TAG}"),
            format!("T={NOW},v1={TAG}"),
            format!("t={NOW},V1={TAG}"),
            format!("t={NOW},v0={TAG}"),
            format!("t={NOW},v1="),
            format!("t={NOW}"),
            format!("t=9999999999999,v1={TAG}"),
        ];
        for header in malformed {
            assert_eq!(verify(&header), Err(SignatureError::Malformed), "{header}");
        }
    }

    #[test]
    fn no_header_and_two_headers_are_refused() {
        let header = format!("t={NOW},v1={TAG}");
        let refusal = |lines: &[&[u8]]| SignatureHeader::read(lines).err();
        assert_eq!(refusal(&[]), Some(SignatureError::Missing));
        assert_eq!(
            refusal(&[header.as_bytes(), header.as_bytes()]),
            Some(SignatureError::Several)
        );
        assert_eq!(refusal(&[header.as_bytes()]), None);
    }

    #[test]
    fn another_secret_another_body_and_another_time_do_not_match() {
        let secrets = SigningSecrets::parse("whsec_test_secret").unwrap();
        let other = SigningSecrets::parse("test_secret").unwrap();
        let header = format!("t={NOW},v1={TAG}");
        assert_eq!(
            other.verify_line(&header, BODY, NOW),
            Err(SignatureError::Mismatch)
        );
        assert_eq!(
            secrets.verify_line(&header, b"{}", NOW),
            Err(SignatureError::Mismatch)
        );
        assert_eq!(
            verify(&format!("t={},v1={TAG}", NOW + 1)),
            Err(SignatureError::Mismatch)
        );
        assert_eq!(
            verify(&format!("t=0{NOW},v1={TAG}")),
            Err(SignatureError::Mismatch),
            "t is hashed as it stands"
        );
    }

    #[test]
    fn the_window_is_five_minutes_either_way_and_only_authentic_deliveries_are_called_stale() {
        let secrets = SigningSecrets::parse("whsec_test_secret").unwrap();
        let at = |now| secrets.verify_line(&format!("t={NOW},v1={TAG}"), BODY, now);
        assert_eq!(at(NOW + 300), Ok("secret-1"));
        assert_eq!(at(NOW + 301), Err(SignatureError::Stale));
        assert_eq!(at(NOW - 300), Ok("secret-1"));
        assert_eq!(at(NOW - 301), Err(SignatureError::Future));
        let forged = format!("t={},v1={TAG}", NOW - 1000);
        assert_eq!(
            secrets.verify_line(&forged, BODY, NOW),
            Err(SignatureError::Mismatch)
        );
    }

    #[test]
    fn while_a_secret_is_rotated_either_one_verifies_a_header_with_both() {
        let both = SigningSecrets::parse("new=whsec_new old=whsec_old").unwrap();
        let old = SigningSecrets::parse("old=whsec_old").unwrap();
        let new = SigningSecrets::parse("new=whsec_new").unwrap();
        let tag = |secrets: &SigningSecrets| hex::encode(secrets.first().tag(b"100", BODY));
        for header in [
            format!("t=100,v1={},v1={}", tag(&old), tag(&new)),
            format!("t=100,v1={},v1={}", tag(&new), tag(&old)),
        ] {
            assert_eq!(old.verify_line(&header, BODY, 100), Ok("old"));
            assert_eq!(new.verify_line(&header, BODY, 100), Ok("new"));
            assert_eq!(both.verify_line(&header, BODY, 100), Ok("new"));
        }
        assert_eq!(
            both.verify_line(&format!("t=100,v1={}", tag(&old)), BODY, 100),
            Ok("old")
        );
    }

    #[test]
    fn mistakes_in_the_secrets_are_all_named_and_none_is_shown() {
        let mistakes =
            SigningSecrets::parse("a=whsec_1,a=whsec_2 b=whsec_1,c=,d=whséc").unwrap_err();
        assert_eq!(
            mistakes,
            [
                "two signing secrets have the label `a`",
                "the signing secret `b` is given twice",
                "the signing secret labelled `c` is empty",
                "the signing secret `d` has characters that are not printable ASCII",
            ]
        );
        assert_eq!(
            SigningSecrets::parse(" , ").unwrap_err(),
            ["no signing secret is given"]
        );
    }

    #[test]
    fn debug_output_shows_labels_and_no_secret() {
        let secrets = SigningSecrets::parse("live=whsec_abc").unwrap();
        assert_eq!(format!("{secrets:?}"), "SigningSecrets([\"live\"])");
    }
}

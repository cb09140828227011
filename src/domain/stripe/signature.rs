//! Stripe's webhook signature: `Stripe-Signature: t=<unix seconds>,v1=<hex>[,v1=...]`, HMAC-SHA256
//! over `{t}.{body}`.
//!
//! The verifier works on bytes, never on strings. Several secrets are configured at once (rotation,
//! test and live mode, Connect), and Stripe sends one `v1` per active secret. The verifier tries
//! every secret against every `v1`, in constant time and without an early exit. It accepts what all
//! of Stripe's SDKs accept, and rejects what they all reject.

use hmac::{Hmac, Mac};
use sha2::Sha256;
use subtle::{Choice, ConstantTimeEq};

use super::signing_secrets::{SigningSecret, SigningSecrets};

/// Largest distance of a signature's time from now, in either direction, in seconds. Stripe's SDKs
/// use the same.
pub const TOLERANCE_S: i64 = 300;

/// The reason for rejecting a delivery. The response does not reveal it to the sender; metrics
/// count it for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignatureError {
    /// The request has no `Stripe-Signature` header.
    Missing,
    /// The request has more than one `Stripe-Signature` header.
    Several,
    /// The header has no `t` or two, a `t` that is not a number, or no usable `v1`.
    Malformed,
    /// No configured secret matches any signature: the secret is wrong, the body was changed, or
    /// the sender is not Stripe.
    Mismatch,
    /// Authentic, but signed too long ago: a replayed delivery, or this machine's clock is fast.
    Stale,
    /// Authentic, but signed in the future: this machine's clock is slow.
    Future,
}

impl SignatureError {
    /// Returns the explanation for the server log.
    pub fn meaning(self) -> &'static str {
        match self {
            SignatureError::Missing => "no Stripe-Signature header, so it did not come from Stripe",
            SignatureError::Several => {
                "several Stripe-Signature headers, so it did not come from Stripe"
            }
            SignatureError::Malformed => {
                "malformed Stripe-Signature header, so it did not come from Stripe"
            }
            SignatureError::Mismatch => {
                "no secret in STRIPE_WEBHOOK_SECRET matches: the secret was rolled, or it did not come from Stripe"
            }
            SignatureError::Stale => {
                "authentic but too old: this machine's clock is ahead, or the delivery was replayed"
            }
            SignatureError::Future => {
                "authentic but from the future: this machine's clock is behind"
            }
        }
    }

    /// Returns the label that metrics and stored rejections use.
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
    /// Starts the verification of a body, which may arrive in parts.
    pub fn verifier<'s, 'h>(&'s self, header: &'h SignatureHeader) -> Verifier<'s, 'h> {
        Verifier {
            header,
            signers: self
                .iter()
                .map(|secret| (secret, secret.begin(header.timestamp)))
                .collect(),
        }
    }
}

/// Verification of one body against all secrets.
pub struct Verifier<'s, 'h> {
    header: &'h SignatureHeader<'h>,
    signers: Vec<(&'s SigningSecret, Hmac<Sha256>)>,
}

impl<'s> Verifier<'s, '_> {
    /// Hashes the next part of the body.
    pub fn update(&mut self, part: &[u8]) {
        self.signers
            .iter_mut()
            .for_each(|(_, mac)| mac.update(part));
    }

    /// Returns the label of the secret that signed this body.
    ///
    /// The signature is checked before its age, so only authentic deliveries are `Stale` or
    /// `Future`. These errors mean a wrong clock, never a wrong secret.
    ///
    /// # Errors
    /// Returns `Mismatch`, `Stale` or `Future`.
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

/// Returns the header value that makes `body` authentic at `timestamp_s`.
pub fn sign(secret: &SigningSecret, timestamp_s: i64, body: &[u8]) -> String {
    let tag = secret.tag(timestamp_s.to_string().as_bytes(), body);
    format!("t={timestamp_s},v1={}", hex::encode(tag))
}

/// A well-formed header, checked as far as possible without the body.
pub struct SignatureHeader<'h> {
    /// Bytes of `t` exactly as received, because they are signed.
    timestamp: &'h [u8],
    timestamp_s: i64,
    signatures: Vec<[u8; 32]>,
}

impl<'h> SignatureHeader<'h> {
    /// Parses the header. `lines` are the values of all `Stripe-Signature` header lines.
    ///
    /// # Errors
    /// Returns `Missing`, `Several` or `Malformed`.
    pub fn read(lines: &[&'h [u8]]) -> Result<SignatureHeader<'h>, SignatureError> {
        match lines {
            [] => Err(SignatureError::Missing),
            [line] => SignatureHeader::parse(line).ok_or(SignatureError::Malformed),
            _ => Err(SignatureError::Several),
        }
    }

    /// Parses the elements. Skips unknown schemes (`v0`), elements without `=`, and a `v1` that is
    /// not 64 hex digits, since they cannot match.
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
    fn headers_that_all_sdks_accept_verify() {
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
    fn malformed_headers_are_rejected() {
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
    fn missing_and_repeated_headers_are_rejected() {
        let header = format!("t={NOW},v1={TAG}");
        let error = |lines: &[&[u8]]| SignatureHeader::read(lines).err();
        assert_eq!(error(&[]), Some(SignatureError::Missing));
        assert_eq!(
            error(&[header.as_bytes(), header.as_bytes()]),
            Some(SignatureError::Several)
        );
        assert_eq!(error(&[header.as_bytes()]), None);
    }

    #[test]
    fn other_secret_body_or_time_does_not_match() {
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
            "t is hashed exactly as received"
        );
    }

    #[test]
    fn tolerance_is_five_minutes_for_authentic_deliveries() {
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
    fn either_secret_verifies_during_rotation() {
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
}

//! Signing secrets of the webhook endpoints: their syntax in the settings, their labels, and their
//! keys.
//!
//! The key is the whole secret, `whsec_` included. `signature` verifies deliveries with these
//! secrets.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// A signing secret and its label in logs and reports.
pub struct SigningSecret {
    pub label: String,
    mac: Hmac<Sha256>,
}

/// All secrets that may sign deliveries; never empty.
pub struct SigningSecrets(Vec<SigningSecret>);

/// The public name of a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretName {
    pub label: String,
    /// Mark that distinguishes secrets that had the same label one after the other. It does not
    /// reveal the secret.
    pub mark: String,
}

impl SigningSecrets {
    /// Parses `live=whsec_a,old=whsec_b`: secrets separated by commas or blanks, each with or
    /// without a label. The text before the first `=` is a label if it consists of letters, digits,
    /// `.`, `_` and `-`; a secret without a label is named by its position.
    ///
    /// # Errors
    /// Returns one message for every mistake. No message shows a secret.
    pub fn parse(text: &str) -> Result<SigningSecrets, Vec<String>> {
        let mut secrets: Vec<SigningSecret> = Vec::new();
        let mut keys: Vec<&str> = Vec::new();
        let mut mistakes = Vec::new();
        let parts = text
            .split(|c: char| c == ',' || c.is_whitespace())
            .filter(|part| !part.is_empty());

        for (index, part) in parts.enumerate() {
            let (label, key) = match part.split_once('=') {
                Some((label, key)) if is_label(label) => (label.to_owned(), key),
                _ => (format!("secret-{}", index + 1), part),
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

    pub(super) fn iter(&self) -> impl Iterator<Item = &SigningSecret> {
        self.0.iter()
    }

    /// Returns the secret that signs replayed deliveries.
    pub fn first(&self) -> &SigningSecret {
        &self.0[0]
    }

    /// Returns the names of all secrets, in their configured order.
    pub fn names(&self) -> Vec<SecretName> {
        // The text is arbitrary but must never change: marks are stored.
        let tags = self.tags(b"which secret goes by its label");

        self.0
            .iter()
            .zip(tags)
            .map(|(secret, tag)| SecretName {
                label: secret.label.clone(),
                mark: hex::encode(&tag[..4]),
            })
            .collect()
    }

    /// Returns the HMAC of a message by each secret. The message must not begin with a number, as a
    /// delivery does, so that a tag cannot serve as a signature.
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
}

/// Returns whether the text before a `=` is a label. Labels are logged, so a secret that contains
/// `=` must not be parsed as `label=secret`.
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

    pub(super) fn begin(&self, timestamp: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(timestamp);
        mac.update(b".");
        mac
    }

    pub(super) fn tag(&self, timestamp: &[u8], body: &[u8]) -> [u8; 32] {
        let mut mac = self.begin(timestamp);
        mac.update(body);
        mac.finalize().into_bytes().into()
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

    #[test]
    fn all_mistakes_are_reported_without_secrets() {
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
    fn debug_output_shows_labels_but_not_secrets() {
        let secrets = SigningSecrets::parse("live=whsec_abc").unwrap();
        assert_eq!(format!("{secrets:?}"), "SigningSecrets([\"live\"])");
    }
}

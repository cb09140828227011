//! Checks of a delivery's header, body and secrets: nothing panics, and a second implementation
//! agrees. It was written from Stripe's description, with strings and its own HMAC.
//!
//! An input has the time and the secrets in its first line, then lines of `Stripe-Signature`, an
//! empty line and the body. `$0` in a header stands for the signature by the first secret, `$1` for
//! the second, because no mutation can guess them.

use sha2::{Digest, Sha256};
use stripe_reconciler::domain::stripe::signature::{
    SignatureError, SignatureHeader, TOLERANCE_S, sign,
};
use stripe_reconciler::domain::stripe::signing_secrets::SigningSecrets;

const NOW_S: i64 = 1_700_000_000;

pub fn check(input: &[u8]) {
    let (head, body) = split_once(input, b"\n\n").unwrap_or((input, b""));
    let (first, headers) = split_once(head, b"\n").unwrap_or((head, b""));
    let first = String::from_utf8_lossy(first);
    let (now, secrets) = first.split_once(' ').unwrap_or(("", &first));
    let now_s = now.parse().unwrap_or(NOW_S);
    let Some((secrets, keys)) = secrets_of(secrets) else {
        return;
    };
    let headers = headers
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty());
    let lines: Vec<Vec<u8>> = headers.map(|line| signed(line, &keys, body)).collect();
    let lines: Vec<&[u8]> = lines.iter().map(Vec::as_slice).collect();
    let expected = second_opinion(&lines, body, &keys, now_s);

    for part in [7, body.len().max(1)] {
        assert_eq!(
            verify(&secrets, &lines, body, part, now_s),
            expected.as_deref().map_err(|refusal| *refusal)
        );
    }

    if (0..1_000_000_000_000).contains(&now_s) {
        let header = sign(secrets.first(), now_s, body);
        assert_eq!(
            verify(&secrets, &[header.as_bytes()], body, 64, now_s),
            Ok(&*keys[0].0)
        );
    }
}

fn verify<'s>(
    secrets: &'s SigningSecrets,
    lines: &[&[u8]],
    body: &[u8],
    part: usize,
    now_s: i64,
) -> Result<&'s str, SignatureError> {
    let header = SignatureHeader::read(lines)?;
    let mut verifier = secrets.verifier(&header);
    body.chunks(part).for_each(|part| verifier.update(part));
    verifier.finish(now_s)
}

/// Labels with their keys.
type Keys = Vec<(String, Vec<u8>)>;

/// Returns the secrets as the program parses them, with the label and key of each.
fn secrets_of(text: &str) -> Option<(SigningSecrets, Keys)> {
    let parts: Vec<&str> = text
        .split(|c: char| c == ',' || c.is_whitespace())
        .filter(|part| !part.is_empty())
        .collect();

    match SigningSecrets::parse(text) {
        Ok(secrets) => {
            let labels: Vec<String> = secrets.names().into_iter().map(|name| name.label).collect();
            assert_eq!(labels.len(), parts.len());
            assert_eq!(
                format!("{secrets:?}"),
                format!("SigningSecrets({labels:?})"),
                "labels are shown, and nothing else"
            );
            let key = |label: &String, part: &str| {
                part.strip_prefix(&format!("{label}="))
                    .unwrap_or(part)
                    .as_bytes()
                    .to_vec()
            };
            let keys = labels
                .into_iter()
                .zip(parts)
                .map(|(label, part)| (key(&label, part), label))
                .map(|(k, l)| (l, k))
                .collect();
            Some((secrets, keys))
        }
        Err(mistakes) => {
            assert!(!mistakes.is_empty());
            let labels: Vec<&str> = parts
                .iter()
                .filter_map(|part| part.split_once('='))
                .map(|(label, _)| label)
                .collect();
            for part in parts {
                let key = part
                    .split_once('=')
                    .filter(|(label, _)| !label.starts_with("whsec_"))
                    .map_or(part, |(_, key)| key);
                // A secret that was written in place of a label would be shown.
                let is_secret = key.starts_with("whsec_")
                    && key.len() > 12
                    && !labels.iter().any(|label| label.contains(key));
                assert!(
                    !is_secret || mistakes.iter().all(|mistake| !mistake.contains(key)),
                    "{mistakes:?} show {key}"
                );
            }
            None
        }
    }
}

/// Replaces `$0` and `$1` in the header by signatures for the header's own time.
fn signed(line: &[u8], keys: &Keys, body: &[u8]) -> Vec<u8> {
    let time = line
        .split(|byte| *byte == b',')
        .find_map(|element| element.trim_ascii().strip_prefix(b"t="))
        .unwrap_or_default();
    let mut signed = Vec::new();
    let mut rest = line;

    while let Some((before, after)) = split_once(rest, b"$") {
        signed.extend_from_slice(before);
        let named = after
            .first()
            .and_then(|digit| keys.get(usize::from(digit.wrapping_sub(b'0'))));
        match named {
            Some((_, key)) => signed.extend(hex(&hmac(key, &[time, b".", body].concat())).bytes()),
            None => signed.push(b'$'),
        }
        rest = if named.is_some() { &after[1..] } else { after };
    }

    signed.extend_from_slice(rest);
    signed
}

fn split_once<'a>(text: &'a [u8], by: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = text.windows(by.len()).position(|window| window == by)?;
    Some((&text[..at], &text[at + by.len()..]))
}

/// Returns the label of the secret that signed the delivery, by the description and the contract.
fn second_opinion(
    lines: &[&[u8]],
    body: &[u8],
    keys: &Keys,
    now_s: i64,
) -> Result<String, SignatureError> {
    let line = match lines {
        [] => return Err(SignatureError::Missing),
        [line] => *line,
        _ => return Err(SignatureError::Several),
    };

    // One character per byte, so that any line can be split as text.
    let text: String = line.iter().map(|byte| char::from(*byte)).collect();
    let blank = |c: char| matches!(c, ' ' | '\t' | '\n' | '\r' | '\u{c}');
    let pairs: Vec<(&str, &str)> = text
        .split(',')
        .filter_map(|element| element.trim_matches(blank).split_once('='))
        .collect();
    let values = |name: &str| {
        pairs
            .iter()
            .filter(|pair| pair.0 == name)
            .map(|pair| pair.1.to_owned())
            .collect::<Vec<String>>()
    };

    let [time] = &values("t")[..] else {
        return Err(SignatureError::Malformed);
    };
    let is_hex = |tag: &String| tag.len() == 64 && tag.chars().all(|c| c.is_ascii_hexdigit());
    let tags: Vec<String> = values("v1")
        .into_iter()
        .filter(is_hex)
        .map(|tag| tag.to_ascii_lowercase())
        .collect();

    if time.is_empty()
        || time.len() > 12
        || !time.chars().all(|c| c.is_ascii_digit())
        || tags.is_empty()
    {
        return Err(SignatureError::Malformed);
    }
    let signed = [time.as_bytes(), b".", body].concat();
    let label = keys
        .iter()
        .find(|(_, key)| tags.contains(&hex(&hmac(key, &signed))))
        .map(|(label, _)| label.clone());
    let label = label.ok_or(SignatureError::Mismatch)?;
    let seconds: i128 = time.parse().map_err(|_| SignatureError::Malformed)?;

    match i128::from(now_s) - seconds {
        age if age > i128::from(TOLERANCE_S) => Err(SignatureError::Stale),
        age if age < -i128::from(TOLERANCE_S) => Err(SignatureError::Future),
        _ => Ok(label),
    }
}

/// HMAC (RFC 2104) over SHA-256, which has blocks of 64 bytes.
fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut block = [0; 64];
    if key.len() > block.len() {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let padded = |pad: u8| block.map(|byte| byte ^ pad).to_vec();
    let inner = Sha256::digest([padded(0x36), message.to_vec()].concat());
    Sha256::digest([padded(0x5c), inner.to_vec()].concat()).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

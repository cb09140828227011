//! Checks of text from outside that many people may read: one line, bounded length, no addresses,
//! links, secrets or card numbers, whatever characters they are written with.

use stripe_reconciler::domain::redact::{clean, name};

pub fn check(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let cleaned = clean(&text);
    assert_is_safe(&cleaned);
    assert_is_safe(&name(&text));
    assert!(!has_card_number(&cleaned), "{text:?} became {cleaned:?}");
    assert!(
        !text.trim().is_empty() || cleaned.is_empty(),
        "{text:?} became {cleaned:?}"
    );
}

/// Checks a message, or the part of a message that repeats text from outside.
pub fn assert_is_safe(text: &str) {
    assert!(
        !text.chars().any(char::is_control),
        "{text:?} has a control character"
    );
    assert!(
        !text.split(' ').any(is_private),
        "{text:?} says what nobody should read"
    );
    assert!(text.len() < 8_000, "{text:?} is endless");
}

fn is_private(word: &str) -> bool {
    let is_key = ["sk_live_", "sk_test_", "rk_live_", "whsec_", "_secret_"]
        .iter()
        .any(|mark| word.contains(mark));
    is_key || word.contains('@') || word.contains("://")
}

/// Returns whether the text has twelve digits with no larger gaps than people write between groups.
fn has_card_number(text: &str) -> bool {
    let (mut digits, mut between) = (0, 0);
    for c in text.chars() {
        match c {
            '0'..='9' => (digits, between) = (digits + 1, 0),
            ' ' | '-' | '.' | ',' | '/' | '\u{a0}' if between < 2 => between += 1,
            _ => (digits, between) = (0, 0),
        }
        if digits == 12 {
            return true;
        }
    }

    false
}

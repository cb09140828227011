//! Redacts text from Stripe before many people read it: removes addresses, links, secrets and card
//! numbers, and joins lines.

/// Longest text from Stripe that a message repeats, in characters.
const MAX_CHARACTERS: usize = 300;

/// Redacts a number or an id. The result is one line of at most 300 characters, without addresses
/// or secrets.
pub fn name(text: &str) -> String {
    shown(&on_one_line(text))
}

/// Redacts free text as [`name`] does, and also removes card numbers.
pub fn clean(text: &str) -> String {
    // Join the lines first: a number may be split by a line break.
    shown(&without_card_numbers(&on_one_line(text)))
}

const REMOVED: &str = "[removed]";

fn on_one_line(text: &str) -> String {
    let words = text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

fn shown(line: &str) -> String {
    let mut shown: Vec<&str> = line
        .split(' ')
        .map(|word| if is_private(word) { REMOVED } else { word })
        .collect();
    shown.dedup_by(|word, before| *word == REMOVED && *before == REMOVED);
    shown.join(" ").chars().take(MAX_CHARACTERS).collect()
}

/// Returns whether a word is an address, a link, the token of a hosted page, or a secret.
fn is_private(word: &str) -> bool {
    const MARKS: [&str; 11] = [
        "@",
        "://",
        "_secret_",
        "stripe.com/",
        "/live_",
        "/test_",
        "sk_live_",
        "sk_test_",
        "rk_live_",
        "rk_test_",
        "whsec_",
    ];

    MARKS.iter().any(|mark| word.contains(mark))
}

/// Smallest number of digits of a card number.
const CARD_DIGITS: usize = 12;

/// Removes card numbers, including numbers written in groups with one or two characters between
/// them.
fn without_card_numbers(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let mut cleaned = String::with_capacity(text.len());
    let mut at = 0;
    while at < characters.len() {
        let end = end_of_number(&characters, at);
        let digits = characters[at..end]
            .iter()
            .filter(|c| c.is_ascii_digit())
            .count();
        if digits >= CARD_DIGITS {
            cleaned.push_str(REMOVED);
        } else {
            cleaned.extend(&characters[at..end.max(at + 1)]);
        }
        at = end.max(at + 1);
    }

    cleaned
}

/// Returns the end of the number that starts at `start`, exclusive, or `start` if no number starts
/// there.
fn end_of_number(characters: &[char], start: usize) -> usize {
    let (mut end, mut between) = (start, 0);
    for (at, character) in characters.iter().enumerate().skip(start) {
        match character {
            c if c.is_ascii_digit() => (end, between) = (at + 1, 0),
            ' ' | '-' | '.' | ',' | '/' | '\u{a0}' if end > start && between < 2 => between += 1,
            _ => break,
        }
    }
    end
}

//! Text for pages: external text with escaped control characters, times, durations and addresses.

use std::borrow::Cow;

use maud::{Markup, html};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::domain::time::{readable, timestamp};

/// Characters that a query keeps unescaped.
const IN_QUERY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// Escapes invisible and bidirectional control characters. (The template escapes HTML.)
pub fn visible(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_tricky) {
        return Cow::Borrowed(text);
    }

    let mut escaped = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_tricky(c) {
            escaped.push_str(&format!("\\u{{{:x}}}", u32::from(c)));
        } else {
            escaped.push(c);
        }
    }

    Cow::Owned(escaped)
}

/// Escapes like [`visible`], but keeps line breaks.
pub fn visible_lines(text: &str) -> String {
    text.split('\n')
        .map(|line| visible(line.strip_suffix('\r').unwrap_or(line)))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Returns whether a character is a control character, invisible, or changes the writing direction.
fn is_tricky(c: char) -> bool {
    let is_invisible =
        matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}');
    let is_mark = matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
    (c.is_control() && c != '\t') || is_invisible || is_mark
}

/// Renders external text, isolated from the writing direction of the text around it.
pub fn quoted(text: &str) -> Markup {
    html! { bdi { (visible(text)) } }
}

/// Renders an id.
pub fn id(text: &str) -> Markup {
    html! { code { bdi { (visible(text)) } } }
}

/// Renders Unix milliseconds.
pub fn time(ms: i64) -> Markup {
    html! { time datetime=(timestamp(ms)) { (readable(ms)) } }
}

/// Renders one of our sentences, and prevents line breaks inside dates.
pub fn sentence(text: &str) -> Markup {
    let words: Vec<&str> = text.split(' ').collect();
    let is_date =
        |word: &str| word.len() == 10 && word.bytes().filter(u8::is_ascii_digit).count() == 8;
    html! {
        @for (at, word) in words.iter().enumerate() {
            @if is_date(word) { span.whole { (word) } } @else { (word) }
            @if at + 1 < words.len() { " " }
        }
    }
}

/// Renders one of our texts, in which backticks enclose names.
pub fn marked(text: &str) -> Markup {
    html! {
        @for (at, part) in text.split('`').enumerate() {
            @if at % 2 == 1 { (id(part)) } @else { (quoted(part)) }
        }
    }
}

/// Formats an amount of a document, with two decimals if these are exact.
pub fn amount(number: &serde_json::Number) -> String {
    let rounded = number
        .as_f64()
        .map(|amount| (amount, format!("{amount:.2}")));
    let exact = rounded.filter(|(amount, text)| text.parse() == Ok(*amount) && text.len() < 20);
    exact.map_or_else(|| number.to_string(), |(_, text)| text)
}

/// Renders Unix seconds.
pub fn time_s(s: i64) -> Markup {
    time(s.saturating_mul(1000))
}

/// Formats a duration in its largest whole unit, such as `3 days`.
pub fn duration(ms: i64) -> String {
    let units = [
        (86_400_000, "day"),
        (3_600_000, "hour"),
        (60_000, "minute"),
        (1_000, "second"),
    ];
    let (count, unit) = units
        .iter()
        .find(|(size, _)| ms >= *size)
        .map_or((0, "second"), |(size, unit)| (ms / size, *unit));

    if count == 1 {
        format!("1 {unit}")
    } else {
        format!("{count} {unit}s")
    }
}

/// Builds one of our addresses with its query. Leaves out empty values.
pub fn address(path: &str, query: &[(&str, &str)]) -> String {
    let given = query.iter().filter(|(_, value)| !value.is_empty());
    let pairs: Vec<String> = given
        .map(|(name, value)| format!("{name}={}", encoded(value)))
        .collect();
    if pairs.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{}", pairs.join("&"))
    }
}

/// Percent-encodes a value of a query.
pub fn encoded(value: &str) -> String {
    utf8_percent_encode(value, IN_QUERY).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bidi_controls_are_escaped() {
        assert_eq!(visible("Müller & Co. 请求"), "Müller & Co. 请求");
        assert_eq!(
            visible("a\u{202e}b\u{0}c\u{200d}"),
            "a\\u{202e}b\\u{0}c\\u{200d}"
        );
        assert_eq!(visible_lines("a\r\nb\u{1b}"), "a\nb\\u{1b}");
    }

    #[test]
    fn address_carries_any_id() {
        assert_eq!(address("/ui", &[("q", ""), ("state", "")]), "/ui");
        assert_eq!(
            address("/ui/invoice", &[("uid", "a/b ?&=%é..")]),
            "/ui/invoice?uid=a%2Fb%20%3F%26%3D%25%C3%A9.."
        );
    }

    #[test]
    fn amount_has_two_decimals_unless_it_needs_more() {
        let written = |json: &str| amount(&serde_json::from_str(json).unwrap());
        for (json, text) in [
            ("2500.0", "2500.00"),
            ("2500", "2500.00"),
            ("0.005", "0.005"),
            ("-1.5", "-1.50"),
        ] {
            assert_eq!(written(json), text);
        }
    }

    #[test]
    fn duration_uses_its_largest_unit() {
        let cases = [
            (0, "0 seconds"),
            (1_000, "1 second"),
            (119_000, "1 minute"),
            (7_200_000, "2 hours"),
            (90_000_000, "1 day"),
        ];
        for (ms, text) in cases {
            assert_eq!(duration(ms), text);
        }
    }
}

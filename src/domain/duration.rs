//! Parses durations given in flags.

use jiff::{Span, SpanRelativeTo};

/// Parses a positive duration such as `90d`, `12h`, `30m` or `10s`, and returns milliseconds. A
/// day has 24 hours.
///
/// # Errors
/// Returns a message that quotes the text. Months and years are rejected, because they differ in
/// length.
pub fn parse_ms(text: &str) -> Result<i64, String> {
    let invalid = || {
        format!(
            "invalid duration `{text}`: expected a number and a unit, such as 90d, 12h, 30m or 10s"
        )
    };
    let span: Span = text.parse().map_err(|_| invalid())?;
    if span.get_years() != 0 || span.get_months() != 0 {
        return Err(invalid());
    }
    let duration = span
        .to_duration(SpanRelativeTo::days_are_24_hours())
        .map_err(|_| invalid())?;

    i64::try_from(duration.as_millis())
        .ok()
        .filter(|ms| *ms > 0)
        .ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::parse_ms;

    #[test]
    fn duration_has_number_and_unit() {
        assert_eq!(parse_ms("30d"), Ok(30 * 24 * 3_600_000));
        assert_eq!(parse_ms("90m"), Ok(5_400_000));
        assert_eq!(parse_ms("12h"), Ok(12 * 3_600_000));
        assert_eq!(parse_ms("10s"), Ok(10_000));

        for wrong in [
            "",
            "d",
            "30",
            "-1d",
            "0h",
            "30é",
            "2mo",
            "1y",
            "999999999999d",
        ] {
            let error = parse_ms(wrong).unwrap_err();
            assert!(
                error.starts_with(&format!("invalid duration `{wrong}`")),
                "{error}"
            );
        }
    }
}

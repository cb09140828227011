//! Formats times for the API and for people, and parses times from clients.

/// Latest second that a four-digit year can show (9999-12-30T22:00:00Z, the end of jiff's range).
pub const LAST_SECOND: i64 = 253_402_207_200;
/// Earliest time in Unix milliseconds, 0001-01-01T00:00:00.000Z.
const FIRST_MS: i64 = -62_135_596_800_000;
/// Latest time in Unix milliseconds, the end of jiff's range in the last days of 9999.
const LAST_MS: i64 = LAST_SECOND * 1000;

/// Formats Unix milliseconds as `2026-01-31T09:15:00.000Z`, clamped to the years 0001 to 9999.
pub fn timestamp(ms: i64) -> String {
    let time = jiff::Timestamp::from_millisecond(ms.clamp(FIRST_MS, LAST_MS)).unwrap_or_default();
    format!("{time:.3}")
}

/// Formats Unix milliseconds for people, as `2026-01-31 09:15:00 UTC`.
pub fn readable(ms: i64) -> String {
    let text = timestamp(ms);
    let (date, time) = text.split_once('T').unwrap_or_default();
    format!("{date} {} UTC", time.split('.').next().unwrap_or_default())
}

/// Parses RFC 3339 into Unix milliseconds and truncates finer digits. jiff accepts more than RFC
/// 3339, so the format is checked first.
///
/// # Errors
/// Returns the reason, to be appended to the name of the field.
pub fn parse_time(text: &str) -> Result<i64, String> {
    let bad = || "must be a date-time such as 2026-01-31T09:15:00Z (RFC 3339)".to_owned();
    let bytes = text.as_bytes();
    let (digits, rest) = bytes.split_at_checked(19).ok_or_else(bad)?;
    let fits = digits
        .iter()
        .zip(b"0000-00-00t00:00:00")
        .all(|(byte, shape)| match shape {
            b'0' => byte.is_ascii_digit(),
            separator => byte.to_ascii_lowercase() == *separator,
        });

    let fraction = match rest.strip_prefix(b".") {
        Some(fraction) => fraction.iter().take_while(|b| b.is_ascii_digit()).count(),
        None => 0,
    };
    let zone = &rest[if rest.first() == Some(&b'.') {
        fraction + 1
    } else {
        0
    }..];
    let zone_fits = match zone {
        [b'Z' | b'z'] => true,
        [b'+' | b'-', h1, h2, b':', m1, m2] => {
            [h1, h2, m1, m2].iter().all(|b| b.is_ascii_digit())
                && [*h1, *h2].as_slice() < b"24".as_slice()
                && *m1 < b'6'
        }
        _ => false,
    };

    let leap_second = &bytes[17..19] == b"60";
    if !fits || !zone_fits || leap_second || (rest.first() == Some(&b'.') && fraction == 0) {
        return Err(bad());
    }
    // jiff parses at most nanoseconds, and milliseconds are the finest unit that is stored.
    let exact = format!(
        "{}.{:0<3}{}",
        &text[..19],
        &text[20.min(text.len())..][..fraction.min(3)],
        &text[text.len() - zone.len()..]
    );
    let time: jiff::Timestamp = exact.parse().map_err(|_| bad())?;
    let ms = time.as_millisecond();
    if (FIRST_MS..=LAST_MS).contains(&ms) {
        Ok(ms)
    } else {
        Err("must lie in the years 0001 to 9999".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rfc_3339_is_parsed() {
        let good = [
            ("2026-01-31T09:15:00Z", "2026-01-31T09:15:00.000Z"),
            ("2026-01-31t09:15:00.5z", "2026-01-31T09:15:00.500Z"),
            (
                "2026-01-31T09:15:00.123456789012-00:30",
                "2026-01-31T09:45:00.123Z",
            ),
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
            ("1969-12-31T23:59:59.9999Z", "1969-12-31T23:59:59.999Z"),
        ];
        for (text, normal) in good {
            assert_eq!(
                parse_time(text).map(timestamp).as_deref(),
                Ok(normal),
                "{text}"
            );
        }

        let bad = [
            "",
            "2026-01-31",
            "20260131T091500Z",
            "2026-01-31T09:15Z",
            "2026-01-31T09:15:00",
            "2026-01-31 09:15:00Z",
            "2026-02-30T09:15:00Z",
            "2026-01-31T09:15:60Z",
            "2026-01-31T09:15:00,5Z",
            "2026-01-31T09:15:00.Z",
            "2026-01-31T09:15:00+01",
            "2026-01-31T09:15:00+24:00",
            "2026-01-31T09:15:00Z[UTC]",
            "2026-01-31T25:15:00Z",
            "0001-01-01T00:00:00+01:00",
            "２026-01-31T09:15:00Z",
            "2026-01-31T09:15:00é",
        ];

        for text in bad {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_number_formats_as_time() {
        assert_eq!(timestamp(i64::MIN), "0001-01-01T00:00:00.000Z");
        assert!(timestamp(i64::MAX).starts_with("9999-12-30T"));
    }
}

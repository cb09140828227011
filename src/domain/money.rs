//! Formats amounts by Stripe's exponents, which differ from ISO 4217.

const NO_DECIMALS: [&str; 15] = [
    "BIF", "CLP", "DJF", "GNF", "JPY", "KMF", "KRW", "MGA", "PYG", "RWF", "VND", "VUV", "XAF",
    "XOF", "XPF",
];
const THREE_DECIMALS: [&str; 5] = ["BHD", "JOD", "KWD", "OMR", "TND"];
/// Currencies with two decimals in the API, which are hidden when they are zero.
const UNUSED_DECIMALS: [&str; 2] = ["ISK", "UGX"];

/// Returns the number of decimals of a currency at Stripe, and the number of minor units in one
/// unit.
pub fn unit_of(code: &str) -> (usize, u64) {
    let code = code.to_ascii_uppercase();
    let decimals = match code.as_str() {
        code if NO_DECIMALS.contains(&code) => 0,
        code if THREE_DECIMALS.contains(&code) => 3,
        _ => 2,
    };
    (decimals, 10_u64.pow(decimals as u32))
}

/// Formats minor units with Stripe's currency code, such as `1234.50 EUR`: without grouping, and
/// never through a float. A code other than three ASCII letters is not a currency; the text then
/// shows the minor units.
pub fn amount(minor_units: i64, currency: Option<&str>) -> String {
    let Some(currency) = currency else {
        return format!("{minor_units} minor units");
    };
    let code = currency.to_ascii_uppercase();
    if code.len() != 3 || !code.bytes().all(|b| b.is_ascii_uppercase()) {
        return format!("{minor_units} minor units of {code}");
    }

    let (decimals, unit) = unit_of(&code);
    let sign = if minor_units < 0 { "-" } else { "" };
    let (whole, part) = (
        minor_units.unsigned_abs() / unit,
        minor_units.unsigned_abs() % unit,
    );
    let hides_decimals = decimals == 0 || (part == 0 && UNUSED_DECIMALS.contains(&code.as_str()));
    if hides_decimals {
        format!("{sign}{whole} {code}")
    } else {
        format!("{sign}{whole}.{part:0decimals$} {code}")
    }
}

/// Returns a number with commas between thousands: `5,900`.
pub fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::{amount, thousands};

    #[test]
    fn currency_kind_decides_decimals() {
        let cases = [
            (123_450, "eur", "1234.50 EUR"),
            (-5, "usd", "-0.05 USD"),
            (0, "usd", "0.00 USD"),
            (1234, "jpy", "1234 JPY"),
            (1234, "mga", "1234 MGA"),
            (5120, "kwd", "5.120 KWD"),
            (500, "isk", "5 ISK"),
            (550, "ugx", "5.50 UGX"),
            (100, "huf", "1.00 HUF"),
            (1, "xyz", "0.01 XYZ"),
            (i64::MIN, "jpy", "-9223372036854775808 JPY"),
        ];

        for (minor_units, currency, text) in cases {
            assert_eq!(amount(minor_units, Some(currency)), text);
        }
    }

    #[test]
    fn unknown_currency_is_given_in_minor_units() {
        assert_eq!(amount(1234, Some("usdc")), "1234 minor units of USDC");
        assert_eq!(amount(1234, Some("e1r")), "1234 minor units of E1R");
        assert_eq!(amount(1234, None), "1234 minor units");
    }

    #[test]
    fn thousands_are_grouped_from_the_right() {
        let grouped = [0, 999, 1_000, 5_900, 1_234_567].map(thousands);
        assert_eq!(grouped, ["0", "999", "1,000", "5,900", "1,234,567"]);
    }
}

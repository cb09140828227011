//! The validated settings of Stripe's API. No message or debug output shows the key.

use std::fmt;

use hyper::Uri;
use hyper::header::HeaderValue;

/// Base URL of Stripe's API.
const STRIPE: &str = "https://api.stripe.com";
/// Calls per second and endpoint: a quarter of the number that Stripe allows in live mode.
const DEFAULT_RATE: u32 = 25;

/// The settings of Stripe's API.
#[derive(Clone, Debug)]
pub struct StripeSettings {
    pub key: StripeApiKey,
    /// Scheme, host and port.
    pub base: String,
    /// Calls per second and endpoint.
    pub rate: u32,
    /// Number of retries after the first attempt.
    pub retries: usize,
}

/// A secret or restricted key.
#[derive(Clone)]
pub struct StripeApiKey(HeaderValue);

impl fmt::Debug for StripeApiKey {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

impl StripeApiKey {
    /// Parses a secret or restricted key.
    ///
    /// # Errors
    /// A message that does not show the key.
    pub fn parse(text: &str) -> Result<StripeApiKey, String> {
        let text = text.trim();
        if text.starts_with("pk_") {
            let reason = "is a publishable key (pk_...): \
                          use a secret key (sk_...) or a restricted key (rk_...)";
            return Err(reason.to_owned());
        }

        if text.starts_with("whsec_") {
            let reason = "is a webhook's signing secret (whsec_...): \
                          use a secret key (sk_...) or a restricted key (rk_...)";
            return Err(reason.to_owned());
        }

        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
            let reason = "is not an API key: it contains spaces or other invalid characters";
            return Err(reason.to_owned());
        }

        let mut bearer = HeaderValue::from_str(&format!("Bearer {text}"))
            .map_err(|_| "is not an API key: it is not a valid header value".to_owned())?;
        bearer.set_sensitive(true);

        Ok(StripeApiKey(bearer))
    }

    pub(super) fn bearer(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl StripeSettings {
    /// Parses the base URL of the API. `None` selects Stripe's own.
    ///
    /// # Errors
    /// A message if the text is not an HTTP URL without a path.
    pub fn parse_base(text: Option<&str>) -> Result<String, String> {
        let Some(text) = text else {
            return Ok(STRIPE.to_owned());
        };
        let base = text.trim().trim_end_matches('/');
        let uri: Uri = base
            .parse()
            .map_err(|_| format!("`{text}` is not an address such as {STRIPE}"))?;

        match (uri.scheme_str(), uri.authority(), uri.path()) {
            (Some("http" | "https"), Some(_), "" | "/") => Ok(base.to_owned()),
            _ => Err(format!(
                "`{text}` is not an address such as {STRIPE}: \
                 it needs http:// or https://, a host, and no path"
            )),
        }
    }

    /// Parses the rate. `None` selects the default.
    ///
    /// # Errors
    /// A message if the text is not a number from 1 to 1000.
    pub fn parse_rate(text: Option<&str>) -> Result<u32, String> {
        let Some(text) = text else {
            return Ok(DEFAULT_RATE);
        };
        let rate = text
            .trim()
            .parse()
            .ok()
            .filter(|rate| (1..=1000).contains(rate));
        rate.ok_or_else(|| format!("`{text}` is not a number of calls per second from 1 to 1000"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_is_checked_without_showing_it() {
        assert_eq!(
            format!("{:?}", StripeApiKey::parse("sk_test_123").unwrap()),
            "ApiKey(..)"
        );

        for wrong in ["", "pk_live_xyz", "whsec_xyz", "sk_xyz z", "sk_xyz\u{e9}"] {
            let message = StripeApiKey::parse(wrong).unwrap_err();
            assert!(!message.contains("xyz"), "{message}");
        }
    }

    #[test]
    fn base_url_has_no_path_and_rate_is_positive() {
        assert_eq!(StripeSettings::parse_base(None).unwrap(), STRIPE);
        assert_eq!(
            StripeSettings::parse_base(Some("http://127.0.0.1:9/")).unwrap(),
            "http://127.0.0.1:9"
        );
        for wrong in ["api.stripe.com", "ftp://x", "https://x/v1", ""] {
            assert!(StripeSettings::parse_base(Some(wrong)).is_err(), "{wrong}");
        }

        assert!(StripeSettings::parse_rate(Some("0")).is_err());
        assert_eq!(StripeSettings::parse_rate(Some("7")), Ok(7));
    }
}

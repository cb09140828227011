//! The settings of the trace collector, from the standard variables of OpenTelemetry.

use std::fmt;

use hyper::Uri;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry_sdk::trace::Sampler;
use percent_encoding::percent_decode_str;

/// The collector, and the sampler that selects its spans.
pub struct OtlpSettings {
    pub endpoint: Uri,
    /// May contain the key of the collector.
    pub headers: HeaderMap,
    pub service_name: String,
    pub sampler: Sampler,
}

impl OtlpSettings {
    /// Derives the URL for spans from the base URL of the collector.
    ///
    /// # Errors
    /// A message if the text is not an HTTP URL. It does not repeat the URL.
    pub fn parse_endpoint(text: &str) -> Result<Uri, String> {
        let uri = format!("{}/v1/traces", text.trim_end_matches('/'))
            .parse::<Uri>()
            .ok();

        // The URL may contain a password, so the message does not repeat it.
        uri.filter(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https")) && uri.authority().is_some()
        })
        .ok_or_else(|| "must be a URL such as http://127.0.0.1:4318".to_owned())
    }

    /// Checks that the protocol is `http/protobuf`, the only supported one.
    ///
    /// # Errors
    /// A message for any other protocol.
    pub fn check_protocol(text: &str) -> Result<(), String> {
        match text {
            "http/protobuf" => Ok(()),
            other => Err(format!("must be http/protobuf, not `{other}`")),
        }
    }

    /// Parses `name=value,name=value`, with percent-encoded values.
    ///
    /// # Errors
    /// The number of the invalid header, without its value.
    pub fn parse_headers(text: &str) -> Result<HeaderMap, String> {
        let mut headers = HeaderMap::new();
        for (index, part) in text
            .split(',')
            .enumerate()
            .filter(|(_, part)| !part.trim().is_empty())
        {
            let header = part.split_once('=').and_then(|(name, value)| {
                let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
                let mut value = HeaderValue::from_str(&value).ok()?;
                value.set_sensitive(true);
                Some((name.trim().parse::<HeaderName>().ok()?, value))
            });
            let (name, value) =
                header.ok_or_else(|| format!("header {} is not name=value", index + 1))?;
            headers.append(name, value);
        }

        Ok(headers)
    }

    /// Parses the sampler and its ratio by their standard names.
    ///
    /// # Errors
    /// A message that names the accepted values.
    pub fn parse_sampler(name: Option<&str>, ratio: Option<&str>) -> Result<Sampler, String> {
        let ratio = match ratio.map(str::parse::<f64>) {
            None => 1.0,
            Some(Ok(ratio)) if (0.0..=1.0).contains(&ratio) => ratio,
            Some(_) => {
                return Err("OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1".to_owned());
            }
        };

        Ok(match name {
            None | Some("parentbased_always_on") => {
                Sampler::ParentBased(Box::new(Sampler::AlwaysOn))
            }
            Some("parentbased_always_off") => Sampler::ParentBased(Box::new(Sampler::AlwaysOff)),
            Some("parentbased_traceidratio") => {
                Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio)))
            }
            Some("always_on") => Sampler::AlwaysOn,
            Some("always_off") => Sampler::AlwaysOff,
            Some("traceidratio") => Sampler::TraceIdRatioBased(ratio),
            Some(other) => {
                return Err(format!(
                    "must be always_on, always_off, traceidratio, or parentbased_..., not `{other}`"
                ));
            }
        })
    }
}

impl fmt::Debug for OtlpSettings {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("OtlpSettings")
            .field("host", &self.endpoint.host())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_parsed_and_never_shown() {
        let headers =
            OtlpSettings::parse_headers("api-key=a%20secret%3D, Authorization = Basic%20eA==,")
                .unwrap();
        assert_eq!(headers["api-key"], "a secret=");
        assert_eq!(headers["authorization"], "Basic eA==");
        assert!(!format!("{headers:?}").contains("secret"));

        for wrong in ["secret", "a b=secret", "x=secret%0a", "ok=1,=secret"] {
            let message = OtlpSettings::parse_headers(wrong).unwrap_err();
            assert!(!message.contains("secret"), "{message}");
        }
    }

    #[test]
    fn endpoint_is_derived_from_base_url() {
        let parse = |text: &str| OtlpSettings::parse_endpoint(text).map(|uri| uri.to_string());
        assert_eq!(
            parse("http://127.0.0.1:4318").unwrap(),
            "http://127.0.0.1:4318/v1/traces"
        );
        assert_eq!(
            parse("https://collector/x/").unwrap(),
            "https://collector/x/v1/traces"
        );

        for wrong in [
            "127.0.0.1:4318",
            "grpc://x",
            "http://",
            "http://user:secret@",
        ] {
            assert!(!parse(wrong).unwrap_err().contains("secret"), "{wrong}");
        }
    }

    #[test]
    fn samplers_use_standard_names() {
        for (name, ratio, is_right) in [
            (None, None, true),
            (Some("traceidratio"), Some("0.25"), true),
            (Some("parentbased_traceidratio"), Some("1"), true),
            (Some("traceidratio"), Some("2"), false),
            (Some("sometimes"), None, false),
        ] {
            assert_eq!(
                OtlpSettings::parse_sampler(name, ratio).is_ok(),
                is_right,
                "{name:?} {ratio:?}"
            );
        }
    }
}

//! Settings: from flags and from the environment, which nobody else reads. The flag wins; `X_FILE` names a file with the value
//! of `X`. All mistakes are found before anything starts, and are said together.

use std::io::IsTerminal;
use std::net::{SocketAddr, ToSocketAddrs};

use crate::domain::stripe::signing_secrets::SigningSecrets;
use crate::store::Store;
use crate::stripe_api::{self, StripeApiKey};
use crate::telemetry::{self, LogFormat, OtlpSettings};

/// What was given on the command line.
#[derive(Clone, Default)]
pub struct Flags {
    pub database_url: Option<String>,
    pub log_filter: Option<String>,
    pub log_format: Option<String>,
    pub listen_addr: Option<String>,
    pub max_connections: Option<String>,
    pub metrics_addr: Option<String>,
    pub stripe_webhook_secret: Option<String>,
    pub stripe_api_key: Option<String>,
    pub stripe_api_base: Option<String>,
    pub stripe_api_rate: Option<String>,
    pub ui: Option<String>,
    pub copy_to: Option<String>,
}

pub struct Config {
    pub database_url: String,
    pub telemetry: telemetry::TelemetrySettings,
    pub listen_addr: SocketAddr,
    /// Of the main listener, at a time.
    pub max_connections: usize,
    /// None: metrics are on the main listener.
    pub metrics_addr: Option<SocketAddr>,
    /// None: not configured.
    pub secrets: Option<SigningSecrets>,
    /// None: not configured.
    pub stripe_api: Option<stripe_api::StripeSettings>,
    /// The pages at `/ui` are served.
    pub ui: bool,
    /// None: not configured.
    pub copy_to: Option<String>,
}

/// What the configuration has to be good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Needs a signing secret.
    Signatures,
    /// Needs the key of Stripe's API.
    StripeApi,
    /// Looks at all that is there, and needs none of it.
    Diagnosis,
    /// The settings about the webhook endpoint and Stripe's API are not looked at.
    Database,
    /// Needs a second database, and else as `Database`.
    Copy,
    /// Needs only the address that `serve` listens on.
    Healthcheck,
}

/// Everything that is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n       "))]
pub struct ConfigErrors(pub Vec<String>);

impl Config {
    /// # Errors
    /// Every mistake, in words that show no secret.
    pub fn load(flags: &Flags, purpose: Purpose) -> Result<Config, ConfigErrors> {
        let mut mistakes = Vec::new();
        let mut reader = Reader {
            mistakes: &mut mistakes,
        };
        let database_url = reader
            .setting("DATABASE_URL", &flags.database_url)
            .unwrap_or("sqlite://stripe-reconciler.db".to_owned());
        if let Err(mistake) = Store::check_url(&database_url) {
            reader.mistakes.push(format!("DATABASE_URL: {mistake}"));
        }
        let telemetry = reader.telemetry(flags);
        let serves = purpose == Purpose::Signatures;
        let listens = serves || purpose == Purpose::Healthcheck;
        let listen_addr = reader
            .setting("LISTEN_ADDR", &flags.listen_addr)
            .filter(|_| listens);
        let listen_addr = reader.valid(
            "LISTEN_ADDR",
            parse_address(listen_addr.as_deref().unwrap_or("127.0.0.1:8080")),
        );
        let max_connections = reader
            .setting("MAX_CONNECTIONS", &flags.max_connections)
            .filter(|_| serves);
        let max_connections = reader.valid(
            "MAX_CONNECTIONS",
            parse_connections(max_connections.as_deref()),
        );
        let metrics_addr = reader
            .setting("METRICS_ADDR", &flags.metrics_addr)
            .filter(|_| serves);
        let metrics_addr =
            metrics_addr.and_then(|text| reader.valid("METRICS_ADDR", parse_address(&text)));
        let ui = reader.setting("UI", &flags.ui).filter(|_| serves);
        let ui = reader.valid("UI", parse_switch(ui.as_deref()));
        let secrets = match purpose {
            Purpose::Signatures | Purpose::Diagnosis => {
                reader.secrets(&flags.stripe_webhook_secret, purpose)
            }
            Purpose::StripeApi | Purpose::Database | Purpose::Copy | Purpose::Healthcheck => None,
        };
        let stripe_api = match purpose {
            Purpose::Database | Purpose::Copy | Purpose::Healthcheck => None,
            Purpose::Signatures | Purpose::StripeApi | Purpose::Diagnosis => {
                reader.stripe_api(flags, purpose)
            }
        };
        let copy_to = if purpose == Purpose::Copy {
            reader.copy_to(flags, &database_url)
        } else {
            None
        };
        match (telemetry, listen_addr, max_connections, ui) {
            (Some(telemetry), Some(listen_addr), Some(max_connections), Some(ui))
                if mistakes.is_empty() =>
            {
                Ok(Config {
                    database_url,
                    telemetry,
                    listen_addr,
                    max_connections,
                    metrics_addr,
                    secrets,
                    stripe_api,
                    copy_to,
                    ui,
                })
            }
            _ => Err(ConfigErrors(mistakes)),
        }
    }
}

struct Reader<'m> {
    mistakes: &'m mut Vec<String>,
}

impl Reader<'_> {
    /// The flag, else the variable, else what stands in the file that `{name}_FILE` names. Empty counts as not set.
    fn setting(&mut self, name: &str, flag: &Option<String>) -> Option<String> {
        if flag.is_some() {
            return flag.clone();
        }
        let file_name = format!("{name}_FILE");
        let (value, path) = (self.variable(name), self.variable(&file_name));
        match (value, path) {
            (Some(_), Some(_)) => {
                self.mistakes
                    .push(format!("{name} and {file_name} are both set: keep one"));
                None
            }
            (None, Some(path)) => match std::fs::read_to_string(&path) {
                Ok(text) => Some(text.trim().to_owned()),
                Err(error) => {
                    self.mistakes
                        .push(format!("{file_name}: {path} cannot be read: {error}"));
                    None
                }
            },
            (value, None) => value,
        }
    }

    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    fn variable(&mut self, name: &str) -> Option<String> {
        match std::env::var(name) {
            Ok(value) => Some(value).filter(|value| !value.trim().is_empty()),
            Err(std::env::VarError::NotPresent) => None,
            Err(std::env::VarError::NotUnicode(_)) => {
                self.mistakes.push(format!("{name} is not UTF-8"));
                None
            }
        }
    }

    fn telemetry(&mut self, flags: &Flags) -> Option<telemetry::TelemetrySettings> {
        let filter = self
            .setting("RUST_LOG", &flags.log_filter)
            .unwrap_or("info".to_owned());
        let filter = self.valid("RUST_LOG", telemetry::filter(&filter));
        let format = self.setting("LOG_FORMAT", &flags.log_format);
        let format = self.valid("LOG_FORMAT", parse_format(format.as_deref()));
        let before = self.mistakes.len();
        let otlp = self.otlp();
        (self.mistakes.len() == before).then_some(())?;
        Some(telemetry::TelemetrySettings {
            filter: filter?,
            format: format?,
            otlp,
        })
    }

    /// OpenTelemetry's own variables, which have no flags. None: no collector, or a mistake.
    fn otlp(&mut self) -> Option<OtlpSettings> {
        let endpoint = self.setting("OTEL_EXPORTER_OTLP_ENDPOINT", &None)?;
        let protocol = self
            .setting("OTEL_EXPORTER_OTLP_PROTOCOL", &None)
            .unwrap_or("http/protobuf".to_owned());
        let headers = self
            .setting("OTEL_EXPORTER_OTLP_HEADERS", &None)
            .unwrap_or_default();
        let service_name = self
            .setting("OTEL_SERVICE_NAME", &None)
            .unwrap_or("stripe-reconciler".to_owned());
        let (sampler, ratio) = (
            self.setting("OTEL_TRACES_SAMPLER", &None),
            self.setting("OTEL_TRACES_SAMPLER_ARG", &None),
        );
        let endpoint = self.valid(
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            OtlpSettings::parse_endpoint(&endpoint),
        );
        let protocol = self.valid(
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            OtlpSettings::check_protocol(&protocol),
        );
        let headers = self.valid(
            "OTEL_EXPORTER_OTLP_HEADERS",
            OtlpSettings::parse_headers(&headers),
        );
        let sampler = OtlpSettings::parse_sampler(sampler.as_deref(), ratio.as_deref());
        let sampler = self.valid("OTEL_TRACES_SAMPLER", sampler);
        protocol?;
        Some(OtlpSettings {
            endpoint: endpoint?,
            headers: headers?,
            service_name,
            sampler: sampler?,
        })
    }

    fn valid<T>(&mut self, name: &str, value: Result<T, String>) -> Option<T> {
        value
            .map_err(|mistake| self.mistakes.push(format!("{name}: {mistake}")))
            .ok()
    }

    fn secrets(&mut self, flag: &Option<String>, purpose: Purpose) -> Option<SigningSecrets> {
        let before = self.mistakes.len();
        match self.setting("STRIPE_WEBHOOK_SECRET", flag) {
            Some(text) => match SigningSecrets::parse(&text) {
                Ok(secrets) => return Some(secrets),
                Err(mistakes) => self.mistakes.extend(mistakes.iter().map(|m| format!("STRIPE_WEBHOOK_SECRET: {m}"))),
            },
            None if self.mistakes.len() == before && purpose == Purpose::Signatures => self.mistakes.push(
                "STRIPE_WEBHOOK_SECRET is not set: give the signing secret of the webhook endpoint (whsec_...), \
                 or the one that `stripe listen --print-secret` prints"
                    .to_owned(),
            ),
            None => {}
        }
        None
    }

    fn copy_to(&mut self, flags: &Flags, database_url: &str) -> Option<String> {
        let before = self.mistakes.len();
        let url = self.setting("COPY_TO", &flags.copy_to);
        match &url {
            None if self.mistakes.len() == before => {
                self.mistakes
                    .push("COPY_TO is not set: give the database to copy to (--to sqlite://PATH or postgres://...)".to_owned());
            }
            Some(url) if url == database_url => self
                .mistakes
                .push("COPY_TO is the same as DATABASE_URL".to_owned()),
            Some(url) => drop(self.valid("COPY_TO", Store::check_url(url))),
            None => {}
        }
        url
    }

    fn stripe_api(
        &mut self,
        flags: &Flags,
        purpose: Purpose,
    ) -> Option<stripe_api::StripeSettings> {
        let before = self.mistakes.len();
        let key = self.setting("STRIPE_API_KEY", &flags.stripe_api_key);
        if key.is_none() && purpose == Purpose::StripeApi && self.mistakes.len() == before {
            self.mistakes.push(
                "STRIPE_API_KEY is not set: give a secret key (sk_...) or, better, a restricted key (rk_...) that may read \
                 events, invoices, payments and webhook endpoints"
                    .to_owned(),
            );
        }
        let base = self.setting("STRIPE_API_BASE", &flags.stripe_api_base);
        let rate = self.setting("STRIPE_API_RATE", &flags.stripe_api_rate);
        let base = self.valid(
            "STRIPE_API_BASE",
            stripe_api::StripeSettings::parse_base(base.as_deref()),
        );
        let rate = self.valid(
            "STRIPE_API_RATE",
            stripe_api::StripeSettings::parse_rate(rate.as_deref()),
        );
        let key = key.and_then(|key| self.valid("STRIPE_API_KEY", StripeApiKey::parse(&key)));
        Some(stripe_api::StripeSettings {
            key: key?,
            base: base?,
            rate: rate?,
            retries: stripe_api::RETRIES,
        })
    }
}

fn parse_format(text: Option<&str>) -> Result<LogFormat, String> {
    match text {
        Some("text") => Ok(LogFormat::Text),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => Err(format!("must be text or json, not `{other}`")),
        None if std::io::stderr().is_terminal() => Ok(LogFormat::Text),
        None => Ok(LogFormat::Json),
    }
}

fn parse_switch(text: Option<&str>) -> Result<bool, String> {
    match text {
        Some("on") => Ok(true),
        Some("off") | None => Ok(false),
        Some(other) => Err(format!("must be on or off, not `{other}`")),
    }
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let unfit = |why: &dyn std::fmt::Display| {
        format!("`{text}` is no address such as 127.0.0.1:8080: {why}")
    };
    let mut addresses = text.to_socket_addrs().map_err(|error| unfit(&error))?;
    addresses.next().ok_or_else(|| unfit(&"it has no address"))
}

fn parse_connections(text: Option<&str>) -> Result<usize, String> {
    let Some(text) = text else { return Ok(1024) };
    let connections = text.parse().ok().filter(|n| (16..=65_536).contains(n));
    connections.ok_or_else(|| format!("must be a number from 16 to 65536, not `{text}`"))
}

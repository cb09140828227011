//! Settings from flags and environment variables. No other module reads the environment. A flag
//! wins over its variable; `X_FILE` names a file with the value of `X`. All mistakes are reported
//! together, before anything starts.

use std::io::IsTerminal;
use std::net::{SocketAddr, ToSocketAddrs};

use crate::domain::stripe::signing_secrets::SigningSecrets;
use crate::store::Store;
use crate::stripe_api::{self, StripeApiKey};
use crate::telemetry::{self, LogFormat, OtlpSettings};

/// The unchecked values of the command line.
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

/// The checked settings.
pub struct Config {
    pub database_url: String,
    pub telemetry: telemetry::TelemetrySettings,
    pub listen_addr: SocketAddr,
    /// Largest number of connections of the main listener.
    pub max_connections: usize,
    /// Address of the metrics listener. `None` if the main listener serves the metrics.
    pub metrics_addr: Option<SocketAddr>,
    /// Signing secrets of the webhook endpoint. `None` if not configured, or not needed.
    pub secrets: Option<SigningSecrets>,
    /// Settings of Stripe's API. `None` if not configured, or not needed.
    pub stripe_api: Option<stripe_api::StripeSettings>,
    /// `true` if the pages at `/ui` are served.
    pub ui: bool,
    /// URL of the database that `copy` writes to. `None` if not configured, or not needed.
    pub copy_to: Option<String>,
}

/// The command's use of the settings, which decides what is required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Requires a signing secret.
    Signatures,
    /// Requires the key of Stripe's API.
    StripeApi,
    /// Reads all settings and requires none.
    Diagnosis,
    /// Ignores the settings of the webhook endpoint and Stripe's API.
    Database,
    /// Requires a second database; otherwise the same as `Database`.
    Copy,
    /// Requires only the address that `serve` listens on.
    Healthcheck,
}

/// All mistakes in the configuration.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n       "))]
pub struct ConfigErrors(pub Vec<String>);

impl Config {
    /// Reads the settings that a purpose needs.
    ///
    /// # Errors
    /// Returns all mistakes at once, in messages that show no secret.
    pub fn load(flags: &Flags, purpose: Purpose) -> Result<Config, ConfigErrors> {
        let mut mistakes = Vec::new();
        let mut reader = Reader {
            mistakes: &mut mistakes,
        };
        let database_url = reader
            .setting("DATABASE_URL", &flags.database_url)
            .unwrap_or("sqlite://stripe-reconciler.db".to_owned());
        reader.valid("DATABASE_URL", Store::check_url(&database_url));
        let telemetry = reader.telemetry(flags);
        let listener = reader.listener(flags, purpose);

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

        match (telemetry, listener) {
            (Some(telemetry), Some(listener)) if mistakes.is_empty() => Ok(Config {
                database_url,
                telemetry,
                listen_addr: listener.address,
                max_connections: listener.max_connections,
                metrics_addr: listener.metrics_addr,
                secrets,
                stripe_api,
                copy_to,
                ui: listener.ui,
            }),
            _ => Err(ConfigErrors(mistakes)),
        }
    }
}

/// The settings of `serve` that concern its listeners.
struct Listener {
    address: SocketAddr,
    max_connections: usize,
    metrics_addr: Option<SocketAddr>,
    ui: bool,
}

/// Reader of single settings that collects the mistakes.
struct Reader<'m> {
    mistakes: &'m mut Vec<String>,
}

impl Reader<'_> {
    /// Returns the value of the flag, else of the variable, else of the file that `{name}_FILE`
    /// names. An empty variable counts as not set.
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

    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that reads the environment"
    )]
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

    /// Reads the settings of the listeners. Commands that do not listen get the defaults.
    fn listener(&mut self, flags: &Flags, purpose: Purpose) -> Option<Listener> {
        let serves = purpose == Purpose::Signatures;
        let needs_address = serves || purpose == Purpose::Healthcheck;
        let address = self
            .setting("LISTEN_ADDR", &flags.listen_addr)
            .filter(|_| needs_address);
        let max_connections = self
            .setting("MAX_CONNECTIONS", &flags.max_connections)
            .filter(|_| serves);
        let metrics_addr = self
            .setting("METRICS_ADDR", &flags.metrics_addr)
            .filter(|_| serves);
        let ui = self.setting("UI", &flags.ui).filter(|_| serves);

        let address = parse_address(address.as_deref().unwrap_or("127.0.0.1:8080"));
        let address = self.valid("LISTEN_ADDR", address);
        let max_connections = parse_connections(max_connections.as_deref());
        let max_connections = self.valid("MAX_CONNECTIONS", max_connections);
        let metrics_addr =
            metrics_addr.and_then(|text| self.valid("METRICS_ADDR", parse_address(&text)));
        let ui = self.valid("UI", parse_switch(ui.as_deref()));
        Some(Listener {
            address: address?,
            max_connections: max_connections?,
            metrics_addr,
            ui: ui?,
        })
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

    /// Reads OpenTelemetry's own variables, which have no flags. Returns `None` if no collector is
    /// set or a value is invalid.
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

    /// Returns a valid value, or records the mistake.
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
                Err(mistakes) => {
                    let named = mistakes
                        .iter()
                        .map(|m| format!("STRIPE_WEBHOOK_SECRET: {m}"));
                    self.mistakes.extend(named);
                }
            },
            None if self.mistakes.len() == before && purpose == Purpose::Signatures => {
                let mistake = "STRIPE_WEBHOOK_SECRET is not set: give the signing secret of the \
                               webhook endpoint (whsec_...), or the one that \
                               `stripe listen --print-secret` prints";
                self.mistakes.push(mistake.to_owned());
            }
            None => {}
        }

        None
    }

    fn copy_to(&mut self, flags: &Flags, database_url: &str) -> Option<String> {
        let before = self.mistakes.len();
        let url = self.setting("COPY_TO", &flags.copy_to);
        match &url {
            None if self.mistakes.len() == before => {
                let mistake = "COPY_TO is not set: give the database to copy to \
                               (--to sqlite://PATH or postgres://...)";
                self.mistakes.push(mistake.to_owned());
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
            let mistake = "STRIPE_API_KEY is not set: give a secret key (sk_...) or, better, a \
                           restricted key (rk_...) that may read events, invoices, payments and \
                           webhook endpoints";
            self.mistakes.push(mistake.to_owned());
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
        format!("`{text}` is not an address such as 127.0.0.1:8080: {why}")
    };
    let mut addresses = text.to_socket_addrs().map_err(|error| unfit(&error))?;
    addresses.next().ok_or_else(|| unfit(&"it has no address"))
}

fn parse_connections(text: Option<&str>) -> Result<usize, String> {
    let Some(text) = text else { return Ok(1024) };
    let connections = text.parse().ok().filter(|n| (16..=65_536).contains(n));
    connections.ok_or_else(|| format!("must be a number from 16 to 65536, not `{text}`"))
}

//! `doctor`: prints problems and their remedies.

use clap::Args;
use serde_json::json;

use super::output;
use super::reconcile::StripeFlags;
use super::{Exit, GlobalArgs};
use crate::clock::Clock;
use crate::config::{Config, Flags, Purpose};
use crate::doctor::{self, Check, CheckId, CheckStatus, DoctorInput};
use crate::store::Store;
use crate::stripe_api::{self, StripeApi};
use crate::telemetry;

/// Number of columns for the text of a line.
const WIDTH: usize = 90;
/// Retries of a call to Stripe. Few, because an operator waits for Stripe's answer.
const RETRIES: usize = 2;

/// Report problems and their remedies, without changing or migrating anything
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler doctor                          use the same settings as `serve`
  stripe-reconciler doctor --quiet || mail ...      from cron: prints problems only
  stripe-reconciler doctor --json | jq .state

With STRIPE_API_KEY, doctor requests the webhook endpoint and the time from Stripe; without it,
doctor reports the findings of the last reconcile run. With STRIPE_WEBHOOK_SECRET, it also checks
the use of the configured secrets.
Exit codes: 0 nothing is wrong, 2 a setting is invalid, 3 something is wrong, 4 the database is
unusable.")]
pub struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print problems only
    #[arg(long)]
    quiet: bool,
    /// Signing secrets of `serve` [env: STRIPE_WEBHOOK_SECRET, preferred: flags show in process
    /// lists]
    #[arg(long, value_name = "SECRETS")]
    stripe_webhook_secret: Option<String>,
    #[command(flatten)]
    stripe: StripeFlags,
}

impl Doctor {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let flags = Flags {
            stripe_webhook_secret: self.stripe_webhook_secret.clone(),
            ..self.stripe.clone().fill(settings.flags())
        };
        let config = Config::load(&flags, Purpose::Diagnosis)?;
        telemetry::start(config.telemetry);
        let input = DoctorInput {
            store: Store::connect_to_existing(&config.database_url).await,
            reconciles: config.stripe_api.is_some(),
            api: config.stripe_api.map(|settings| {
                StripeApi::new(stripe_api::StripeSettings {
                    retries: RETRIES,
                    ..settings
                })
            }),
            secrets: config.secrets.map(|secrets| secrets.names()),
            clock: Clock::system(),
        };

        let checks = doctor::examine(&input).await;
        if let Ok(store) = &input.store {
            store.close().await;
        }

        let state = doctor::overall(&checks);
        if self.json {
            output::line(serde_json::to_string_pretty(
                &json!({"state": reported(state), "checks": checks}),
            )?)?;
        } else {
            self.print(&checks)?;
        }
        Ok(match state {
            CheckStatus::Ok | CheckStatus::Unknown => Exit::Done,
            _ if is_database_unusable(&checks) => Exit::Unreachable,
            CheckStatus::Warning | CheckStatus::Failing => Exit::Differs,
        })
    }

    fn print(&self, checks: &[Check]) -> anyhow::Result<()> {
        let is_wrong = |check: &&Check| check.state >= CheckStatus::Warning;
        let wrong = checks.iter().filter(is_wrong).count();
        for check in checks.iter().filter(|check| !self.quiet || is_wrong(check)) {
            let word = match check.state {
                CheckStatus::Ok => "ok".to_owned(),
                CheckStatus::Unknown => "?".to_owned(),
                CheckStatus::Warning => output::bold("warning"),
                CheckStatus::Failing => output::bold("FAILING"),
            };
            // The escape codes for bold occupy no columns.
            let padding = " ".repeat(9 - visible(check.state));

            let texts = [Some(&check.finding), check.remedy.as_ref()]
                .into_iter()
                .flatten();
            for (at, text) in texts.flat_map(|text| output::wrap(text, WIDTH)).enumerate() {
                let head = if at == 0 {
                    format!("{word}{padding}{:<16}", check.id)
                } else {
                    " ".repeat(25)
                };
                output::line(format!("{head}{text}"))?;
            }
        }

        match wrong {
            _ if self.quiet => Ok(()),
            0 => output::line("\nNothing is wrong."),
            1 => output::line("\nOne thing is wrong."),
            _ => output::line(format!("\n{wrong} things are wrong.")),
        }
    }
}

/// Returns the number of columns of a printed status.
fn visible(state: CheckStatus) -> usize {
    match state {
        CheckStatus::Ok => 2,
        CheckStatus::Unknown => 1,
        CheckStatus::Warning | CheckStatus::Failing => 7,
    }
}

/// Returns ok for an unknown status, because missing information is not a problem.
fn reported(state: CheckStatus) -> CheckStatus {
    if state == CheckStatus::Unknown {
        CheckStatus::Ok
    } else {
        state
    }
}

fn is_database_unusable(checks: &[Check]) -> bool {
    checks
        .iter()
        .any(|check| check.id == CheckId::Database && check.state == CheckStatus::Failing)
}

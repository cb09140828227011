//! The command line: one file per command. Output for scripts goes to standard output, everything
//! else to standard error.

mod copy;
mod demo;
mod doctor;
mod document_progress;
mod events;
mod healthcheck;
mod invoices;
mod keys;
mod manual;
mod migrate;
mod openapi;
mod output;
mod rebuild;
mod reconcile;
mod replay;
mod serve;
mod tasks;
mod why;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::clock::Clock;
use crate::config::{Config, ConfigErrors, Flags, Purpose};
use crate::domain::duration;
use crate::ingest::batch_writer::AppendError;
use crate::jobs::replay::ReplayError;
use crate::reconcile::ReconcileError;
use crate::store::{Store, StoreError};
use crate::stripe_api::StripeApiError;
use crate::telemetry;

/// Makes the invoices you store tell the truth about their payment at Stripe.
#[derive(Parser)]
#[command(
    version,
    about,
    max_term_width = 110,
    after_help = "Examples:
  stripe-reconciler demo                                     show the main job without configuration
  stripe-reconciler keys create --operator                   create a key
  stripe-reconciler invoices import --tenant acme in.jsonl   store invoices
  STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler serve    receive Stripe's webhooks
  stripe-reconciler why acme inv-2026-01                     show the proof of an invoice's state
  STRIPE_API_KEY=rk_... stripe-reconciler reconcile          find payments that no webhook reported
  stripe-reconciler doctor                                   report problems and their remedies

Settings can also be set in the environment; NAME_FILE names a file that holds the value of NAME.
Exit codes: 0 done, 1 some of the input was rejected, 2 wrong usage or configuration, 3 something
differs, would change or is wrong, 4 the database, the server or Stripe is unreachable."
)]
pub struct Arguments {
    #[command(flatten)]
    settings: GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Args, Clone)]
struct GlobalArgs {
    /// Database URL: sqlite://PATH (created if missing) or postgres://...
    /// [env: DATABASE_URL] [default: sqlite://stripe-reconciler.db]
    #[arg(long, global = true, value_name = "URL")]
    database_url: Option<String>,
    /// Log filter, such as info or stripe_reconciler=debug [env: RUST_LOG] [default: info]
    #[arg(long, global = true, value_name = "FILTER")]
    log_filter: Option<String>,
    /// Log format, text or json [env: LOG_FORMAT] [default: text on a terminal, else json]
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<String>,
}

/// All commands, in the order of `--help`.
#[derive(Subcommand)]
enum Command {
    Serve(serve::Serve),
    Demo(demo::Demo),
    Invoices(invoices::Invoices),
    Keys(keys::Keys),
    Replay(replay::Replay),
    Rebuild(rebuild::Rebuild),
    Reconcile(reconcile::Reconcile),
    Events(events::Events),
    Why(why::Why),
    Copy(copy::Copy),
    Doctor(doctor::Doctor),
    Migrate(migrate::Migrate),
    Healthcheck(healthcheck::Healthcheck),
    Completions(manual::Completions),
    Man(manual::Man),
    #[command(name = "openapi")]
    OpenApi(openapi::OpenApi),
}

/// Exit status of a command that ran to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Done = 0,
    /// Some of the input was rejected or does not exist.
    Refused = 1,
    /// Something differs, was corrected, would change, or is wrong.
    Differs = 3,
    /// The database or the server is unreachable.
    Unreachable = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Runs the command, then sends the remaining traces.
///
/// # Errors
/// Returns the failure of the command. [`fail`] turns it into an exit code.
pub async fn run(arguments: Arguments) -> anyhow::Result<Exit> {
    let settings = arguments.settings;
    let result = match arguments.command {
        Command::Serve(command) => command.run(settings).await,
        Command::Demo(command) => command.run(settings).await,
        Command::Invoices(command) => command.run(settings).await,
        Command::Keys(command) => command.run(settings).await,
        Command::Replay(command) => command.run(settings).await,
        Command::Rebuild(command) => command.run(settings).await,
        Command::Reconcile(command) => command.run(settings).await,
        Command::Events(command) => command.run(settings).await,
        Command::Why(command) => command.run(settings).await,
        Command::Copy(command) => command.run(settings).await,
        Command::Doctor(command) => command.run(settings).await,
        Command::Migrate(command) => command.run(settings).await,
        Command::Healthcheck(command) => command.run(settings).await,
        Command::Completions(command) => command.run(),
        Command::Man(command) => command.run(),
        Command::OpenApi(command) => command.run(),
    };

    telemetry::finish().await;
    result
}

/// Prints why a command failed and returns the exit code.
pub fn fail(error: &anyhow::Error) -> ExitCode {
    if output::is_closed_pipe(error) {
        return Exit::Done.into();
    }

    let mut printed = error.to_string();
    anstream::eprintln!("error: {printed}");
    for cause in error.chain().skip(1).map(std::string::ToString::to_string) {
        // Some errors already contain the message of their source.
        if !printed.contains(&cause) {
            anstream::eprintln!("caused by: {cause}");
            printed = cause;
        }
    }

    let is_wrong_stripe_key = matches!(
        error.downcast_ref(),
        Some(ReconcileError::Stripe(StripeApiError::Unauthorized(_)))
    );
    if is_wrong_stripe_key
        || error
            .chain()
            .any(<dyn std::error::Error + 'static>::is::<ConfigErrors>)
    {
        ExitCode::from(2)
    } else if error.chain().any(is_unreachable) {
        ExitCode::from(4)
    } else {
        ExitCode::from(1)
    }
}

/// Returns whether the database, the server or Stripe is unreachable.
fn is_unreachable(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.is::<StoreError>()
        || cause.is::<ReplayError>()
        || cause.is::<AppendError>()
        || cause.is::<ReconcileError>()
}

impl GlobalArgs {
    fn flags(&self) -> Flags {
        Flags {
            database_url: self.database_url.clone(),
            log_filter: self.log_filter.clone(),
            log_format: self.log_format.clone(),
            ..Flags::default()
        }
    }

    /// Opens the database for a command that needs no other setting, and migrates it.
    async fn store(&self, access: Access) -> anyhow::Result<Store> {
        open(Config::load(&self.flags(), Purpose::Database)?, access).await
    }
}

/// The access of a command to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Reads,
    /// Ends a copy into this database, so that `copy` cannot overwrite the writes of the command.
    Writes,
}

/// Starts logging, opens the database and migrates it.
async fn open(config: Config, access: Access) -> anyhow::Result<Store> {
    telemetry::start(config.telemetry);
    let store = Store::connect(&config.database_url).await?;
    store.migrate().await?;
    if let Some(mode) = store.exposed_mode() {
        let mode = format!("{mode:o}");
        tracing::warn!(
            mode,
            "every user of this machine can read the database file"
        );
    }

    if access == Access::Writes {
        store.end_copying(Clock::system().now_ms()).await?;
    }

    Ok(store)
}

/// Parses the duration of a flag, in milliseconds.
fn duration_ms(flag: &str, text: &str) -> Result<i64, ConfigErrors> {
    duration::parse_ms(text).map_err(|reason| ConfigErrors(vec![format!("{flag}: {reason}")]))
}

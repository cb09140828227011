//! `migrate`: applies the migrations that this version needs, and stops.

use clap::Args;
use serde_json::json;

use super::output;
use super::{Exit, GlobalArgs};
use crate::config::{Config, Purpose};
use crate::store::Store;
use crate::telemetry;

/// Apply migrations and stop (`serve` also applies them)
#[derive(Args)]
#[command(after_help = "Example:
  stripe-reconciler migrate --database-url sqlite:///var/lib/stripe-reconciler/db")]
pub struct Migrate {
    /// Print the names of the applied migrations as JSON
    #[arg(long)]
    json: bool,
}

impl Migrate {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let config = Config::load(&settings.flags(), Purpose::Database)?;
        telemetry::start(config.telemetry);
        let store = Store::connect(&config.database_url).await?;
        let applied = store.migrate().await?;
        store.close().await;

        if self.json {
            output::line(json!({"applied": applied}))?;
        } else if applied.is_empty() {
            output::line("nothing to apply")?;
        } else {
            output::line(
                applied
                    .iter()
                    .map(|name| format!("applied {name}"))
                    .collect::<Vec<_>>()
                    .join("\n"),
            )?;
        }
        Ok(Exit::Done)
    }
}

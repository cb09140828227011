//! `migrate`: brings the database to what this version needs, and stops.

use clap::Args;

use super::{Exit, Settings, output};
use crate::config::{Config, Purpose};
use crate::store::Store;
use crate::telemetry;

/// Apply migrations and stop (`serve` does it by itself)
#[derive(Args)]
#[command(after_help = "Example:\n  stripe-reconciler migrate --database-url sqlite:///var/lib/stripe-reconciler/db")]
pub struct Migrate {}

impl Migrate {
    pub(super) async fn run(self, settings: Settings) -> anyhow::Result<Exit> {
        let config = Config::load(&settings.flags(), Purpose::Database)?;
        telemetry::start(config.telemetry);
        let store = Store::connect(&config.database_url).await?;
        let applied = store.migrate().await?;
        for name in &applied {
            output::line(format!("applied {name}"))?;
        }
        if applied.is_empty() {
            output::line("nothing to apply")?;
        }
        store.close().await;
        Ok(Exit::Done)
    }
}

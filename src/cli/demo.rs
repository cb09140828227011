//! `demo`: the main job, with nothing configured.

use clap::Args;

use super::{Exit, Settings};

/// Show the main job with nothing configured
#[derive(Args)]
pub struct Demo {}

impl Demo {
    pub(super) async fn run(self, _settings: Settings) -> anyhow::Result<Exit> {
        Ok(Exit::Done)
    }
}

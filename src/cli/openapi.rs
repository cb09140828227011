//! `openapi`: prints the OpenAPI document that the server returns.

use clap::Args;

use super::Exit;
use super::output;
use crate::http;

/// Print the OpenAPI 3.1 document of the HTTP API, the same as GET /openapi.json
#[derive(Args)]
#[command(after_help = "Example:\n  stripe-reconciler openapi > openapi.json")]
pub struct OpenApi {}

impl OpenApi {
    pub(super) fn run(self) -> anyhow::Result<Exit> {
        output::line(http::openapi::document())?;
        Ok(Exit::Done)
    }
}

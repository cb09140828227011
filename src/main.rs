//! Parses the arguments, runs the command, prints the causes of a failure, and exits with a code
//! for scripts.

use std::process::ExitCode;

use clap::Parser;
use stripe_reconciler::cli::{self, Arguments};

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match cli::run(arguments).await {
        Ok(exit) => exit.into(),
        Err(error) => cli::fail(&error),
    }
}

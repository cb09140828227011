//! `replay`: recorded payloads once more, into the database or to an endpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;

use super::output;
use super::{Access, Exit, GlobalArgs};
use crate::clock::Clock;
use crate::config::{Config, ConfigErrors, Flags, Purpose};
use crate::ingest::batch_writer::BatchWriter;
use crate::jobs::replay::{self, Endpoint, ProgressSink, ReplayCounts, Target};

/// Deliver recorded payloads again: to the database, or signed afresh to a URL
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler replay recorded/                    into the database, without a signature, marked as replayed
  stripe-reconciler replay events.jsonl
  curl https://api.stripe.com/v1/events -u $KEY: | stripe-reconciler replay -
  STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler replay --to http://127.0.0.1:8080/webhooks/stripe recorded/

A file holds one event, a list answer of /v1/events, an array, or one event a line. Folders are walked for .json and
.jsonl. Repeating is harmless: what is known already stays one entry.")]
pub struct Replay {
    /// Files and folders; - is standard input
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// POST to this webhook endpoint instead, signed with the first secret of STRIPE_WEBHOOK_SECRET
    #[arg(long, value_name = "URL")]
    to: Option<String>,
    /// Print the counts as JSON
    #[arg(long)]
    json: bool,
}

impl Replay {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let clock = Clock::system();
        let mut counts = ReplayCounts::default();
        let mut screen = Screen(output::progress("events"));
        match self.to.clone() {
            Some(url) => {
                let target = Target::Url(Box::new(endpoint(url, &settings.flags(), &clock)?));
                self.deliver(&target, &clock, &mut screen, &mut counts)
                    .await?;
            }
            None => {
                let store = settings.store(Access::Writes).await?;
                let (inbox, writer) = BatchWriter::start(store.clone(), Arc::default());
                let target = Target::Store(inbox);
                self.deliver(&target, &clock, &mut screen, &mut counts)
                    .await?;
                drop(target);
                writer.finish().await;
                store.close().await;
            }
        }
        screen.0.finish_and_clear();
        self.report(counts)
    }

    async fn deliver(
        &self,
        target: &Target,
        clock: &Clock,
        screen: &mut Screen,
        counts: &mut ReplayCounts,
    ) -> anyhow::Result<()> {
        for path in &self.paths {
            let files = match replay::walk(path) {
                Ok(files) => files,
                Err(error) => {
                    counts.refused += 1;
                    screen.refused(path, 0, &format!("cannot be read: {error}"));
                    continue;
                }
            };
            for file in files {
                replay::file(target, &file, clock, screen, counts).await?;
            }
        }
        Ok(())
    }

    fn report(&self, counts: ReplayCounts) -> anyhow::Result<Exit> {
        let ReplayCounts {
            recorded,
            duplicate,
            no_payment_fact,
            unreadable,
            refused,
        } = counts;
        if self.json {
            output::line(
                json!({"recorded": recorded, "duplicate": duplicate, "no_payment_fact": no_payment_fact,
                "unreadable": unreadable, "refused": refused}),
            )?;
        } else {
            output::line(format!(
                "{recorded} recorded, {duplicate} duplicate, {no_payment_fact} without a payment fact, {refused} refused"
            ))?;
        }
        Ok(if refused > 0 {
            Exit::Refused
        } else {
            Exit::Done
        })
    }
}

fn endpoint(url: String, flags: &Flags, clock: &Clock) -> anyhow::Result<Endpoint> {
    let uri = url
        .parse::<hyper::Uri>()
        .ok()
        .filter(|uri| uri.scheme().is_some() && uri.authority().is_some());
    if uri.is_none() {
        return Err(ConfigErrors(vec![format!(
            "--to: `{url}` is no URL such as http://127.0.0.1:8080/webhooks/stripe"
        )])
        .into());
    }
    let config = Config::load(flags, Purpose::Signatures)?;
    crate::telemetry::start(config.telemetry);
    Ok(Endpoint::new(
        url,
        config.secrets.context("checked with the configuration")?,
        clock.clone(),
    ))
}

struct Screen(ProgressBar);

impl ProgressSink for Screen {
    fn refused(&mut self, file: &Path, line: usize, reason: &str) {
        let place = if line == 0 {
            file.display().to_string()
        } else {
            format!("{}:{line}", file.display())
        };
        self.0
            .suspend(|| output::note(format!("{place}: {reason}")));
    }

    fn progress(&mut self, counts: ReplayCounts) {
        let ReplayCounts {
            recorded,
            duplicate,
            no_payment_fact,
            unreadable,
            refused,
        } = counts;
        self.0
            .set_position(recorded + duplicate + no_payment_fact + unreadable + refused);
    }
}

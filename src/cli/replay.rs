//! `replay`: delivers recorded payloads again, to the database or to an endpoint.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::document_progress::DocumentProgress;
use super::output;
use super::{Access, Exit, GlobalArgs};
use crate::clock::Clock;
use crate::config::{Config, ConfigErrors, Flags, Purpose};
use crate::ingest::batch_writer::BatchWriter;
use crate::jobs::replay::{Endpoint, ReplayCounts, Replayer, Target};

/// Deliver recorded payloads again: to the database, or with a new signature to a URL
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler replay recorded/        to the database, without a signature, marked as replayed
  stripe-reconciler replay events.jsonl
  curl https://api.stripe.com/v1/events -u $KEY: | stripe-reconciler replay -
  STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler replay \\
    --to http://127.0.0.1:8080/webhooks/stripe recorded/

A file holds one event, a list response of /v1/events, an array, or one event per line. Folders are
searched for .json, .jsonl and .ndjson. Repeating is harmless: a known event is a duplicate.")]
pub struct Replay {
    /// Read these files and folders; - is standard input
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
        if let Some(url) = self.to.clone() {
            let endpoint = endpoint(url, &settings.flags(), &clock)?;
            let counts = self
                .deliver(&Target::Url(Box::new(endpoint)), &clock)
                .await?;
            return self.report(counts);
        }

        let store = settings.store(Access::Writes).await?;
        let (batch_writer, writer) = BatchWriter::start_yielding(store.clone(), Arc::default());
        let target = Target::Store(batch_writer);
        let counts = self.deliver(&target, &clock).await?;

        // The writer ends when its last sender is dropped.
        drop(target);
        writer.finish().await;
        store.close().await;
        self.report(counts)
    }

    async fn deliver(&self, target: &Target, clock: &Clock) -> anyhow::Result<ReplayCounts> {
        let mut progress = DocumentProgress::start("events");
        let mut replayer = Replayer {
            target,
            clock,
            sink: &mut progress,
            counts: ReplayCounts::default(),
        };

        for path in &self.paths {
            replayer.replay(path).await?;
        }

        let counts = replayer.counts;
        progress.finish();

        Ok(counts)
    }

    fn report(&self, counts: ReplayCounts) -> anyhow::Result<Exit> {
        let ReplayCounts {
            recorded,
            duplicate,
            no_payment_fact,
            unreadable,
            invalid,
        } = counts;

        if self.json {
            output::line(json!({
                "recorded": recorded,
                "duplicate": duplicate,
                "no_payment_fact": no_payment_fact,
                "unreadable": unreadable,
                "refused": invalid,
            }))?;
        } else {
            output::line(format!(
                "{recorded} recorded, {duplicate} duplicate, \
                 {no_payment_fact} without a payment fact, {invalid} refused"
            ))?;
        }

        Ok(if invalid > 0 {
            Exit::Refused
        } else {
            Exit::Done
        })
    }
}

/// Checks the URL and loads the signing secret.
fn endpoint(url: String, flags: &Flags, clock: &Clock) -> anyhow::Result<Endpoint> {
    let uri = url
        .parse::<hyper::Uri>()
        .ok()
        .filter(|uri| uri.scheme().is_some() && uri.authority().is_some());
    if uri.is_none() {
        return Err(ConfigErrors(vec![format!(
            "--to: invalid URL `{url}`: expected one such as http://127.0.0.1:8080/webhooks/stripe"
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

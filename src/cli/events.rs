//! `events`: lists, shows, exports and prunes received events.

use std::time::Instant;

use clap::{Args, Subcommand};
use serde_json::json;

use super::output;
use super::{Access, Exit, GlobalArgs, duration_ms};
use crate::clock::Clock;
use crate::config::ConfigErrors;
use crate::queries::events::{self, Body, OutcomeFilter, PageRequest, Shown};
use crate::store::{LoggedEvent, Outcome, Store};

/// List, show, export and prune received events
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler events list --outcome unreadable
  stripe-reconciler events export > events.jsonl")]
pub struct Events {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List events, newest receipt first
    #[command(after_help = "Examples:
  stripe-reconciler events list --invoice in_1Q...
  stripe-reconciler events list --outcome unreadable
  stripe-reconciler events list --outcome unmatched
  stripe-reconciler events list --limit 1000 --json")]
    List(List),
    /// Show all received renderings of an event
    #[command(after_help = "Examples:
  stripe-reconciler events show evt_1Q... --json
  stripe-reconciler events list --outcome unreadable --json | jq -r .key | head -1 |
    xargs stripe-reconciler events show")]
    Show {
        /// evt_..., or the key from `events list --json`: an unreadable event has no id
        #[arg(value_name = "ID")]
        id: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write all events to standard output for `replay`, one per line, oldest receipt first
    #[command(after_help = "Example:\n  stripe-reconciler events export > events.jsonl")]
    Export,
    /// Delete the payload bytes of old events; their ids and facts stay
    #[command(after_help = "Example:\n  stripe-reconciler events prune --older-than 90d")]
    Prune(Prune),
}

#[derive(Args)]
struct Prune {
    /// Prune events received longer ago than this: a number and s, m, h or d
    #[arg(long, value_name = "DURATION")]
    older_than: String,
    /// Print the counts as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct List {
    /// Only this type, such as invoice.paid
    #[arg(long = "type", value_name = "TYPE")]
    event_type: Option<String>,
    /// Only events that name this Stripe invoice
    #[arg(long, value_name = "in_...")]
    invoice: Option<String>,
    /// Only with this outcome: recorded, no_payment_fact, unreadable; or unmatched, if the invoice
    /// of the event is not stored
    #[arg(long)]
    outcome: Option<String>,
    /// Print at most this many
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// Print JSON, one event per line
    #[arg(long)]
    json: bool,
}

impl Events {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        match self.command {
            Command::List(list) => list.run(settings).await,
            Command::Show { id, json } => {
                show(&settings.store(Access::Reads).await?, &id, json).await
            }
            Command::Export => export(&settings.store(Access::Reads).await?).await,
            Command::Prune(prune) => prune.run(settings).await,
        }
    }
}

/// Events per page of a read.
const PAGE: u32 = 500;
/// Events per transaction of `prune`. On SQLite a delivery waits for the transaction.
const PRUNE_BATCH: u32 = 50;

impl List {
    async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let outcome = match self.outcome.as_deref().map(OutcomeFilter::parse) {
            None => OutcomeFilter::Any,
            Some(Ok(outcome)) => outcome,
            Some(Err(reason)) => {
                return Err(ConfigErrors(vec![format!("--outcome {reason}")]).into());
            }
        };
        let (event_type, stripe_invoice_id) = (self.event_type, self.invoice);
        let mut request = PageRequest {
            event_type,
            stripe_invoice_id,
            outcome,
            limit: 0,
            after: None,
        };
        let store = settings.store(Access::Reads).await?;

        let (mut rows, mut left) = (Vec::new(), self.limit);
        while left > 0 {
            request.limit = left.min(PAGE) as usize;
            let page = events::page(&store, &request).await?;
            left -= page.events.len() as u32;
            for event in &page.events {
                if self.json {
                    output::line(serde_json::to_string(&events::listed(event))?)?;
                } else {
                    rows.push(row(event));
                }
            }
            request.after = page.next;
            if request.after.is_none() {
                break;
            }
        }

        if !self.json {
            output::line(output::table(
                &[
                    "RECEIVED", "CREATED", "ID", "TYPE", "OUTCOME", "SOURCE", "SECRET",
                ],
                rows,
            ))?;
        }

        Ok(Exit::Done)
    }
}

impl Prune {
    /// Prunes in small transactions, so that deliveries can write in between.
    async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let before_ms = Clock::system()
            .now_ms()
            .saturating_sub(duration_ms("--older-than", &self.older_than)?);
        let store = settings.store(Access::Writes).await?;
        let bar = output::progress("events");

        let (mut after, mut pruned) = (None, 0);
        loop {
            let started = Instant::now();
            let (count, next) = store.forget_bodies(before_ms, after, PRUNE_BATCH).await?;
            pruned += count;

            bar.inc(u64::from(PRUNE_BATCH));
            if next.is_none() {
                break;
            }
            after = next;
            if count > 0 {
                store.pause_after_write(started.elapsed()).await;
            }
        }
        bar.finish_and_clear();
        store.close().await;

        if self.json {
            output::line(json!({"forgotten": pruned}))?;
        } else {
            output::line(format!("{pruned} events pruned; their ids and facts stay"))?;
        }
        Ok(Exit::Done)
    }
}

fn row(event: &LoggedEvent) -> Vec<String> {
    vec![
        output::time(Some(event.received_ms)),
        output::time(event.created_s.map(|s| s * 1000)),
        // `show` finds an event without an id by its key.
        event.id.clone().unwrap_or_else(|| hex::encode(event.key.0)),
        output::or_dash(&event.event_type),
        match &event.unreadable_reason {
            Some(reason) => format!("{}: {reason}", event.outcome.as_str()),
            None => event.outcome.as_str().to_owned(),
        },
        event.source.as_str().to_owned(),
        output::or_dash(&event.secret_label),
    ]
}

async fn show(store: &Store, id: &str, json: bool) -> anyhow::Result<Exit> {
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = events::renderings(store, id, after, events::show).await?;
        found.extend(page.items);
        after = page.next;
        if after.is_none() {
            break;
        }
    }

    if found.is_empty() {
        output::note(format!("error: no event {id} was received"));
        return Ok(Exit::Refused);
    }

    if json {
        output::line(serde_json::to_string_pretty(&found)?)?;
        return Ok(Exit::Done);
    }

    found.iter().try_for_each(print)?;

    Ok(Exit::Done)
}

fn print(shown: &Shown) -> anyhow::Result<()> {
    let fields = serde_json::to_value(&shown.event)?;
    for (name, value) in fields.as_object().into_iter().flatten() {
        if let Some(text) = value.as_str() {
            output::line(format!("{name:<12} {text}"))?;
        }
    }
    output::line(match &shown.body {
        Body::Json(json) => json.get(),
        Body::Text(text) => text,
        Body::Pruned => "(its bytes are pruned)",
    })?;
    output::line("")
}

async fn export(store: &Store) -> anyhow::Result<Exit> {
    let (mut after, mut left_out) = (None, 0);
    loop {
        let page = store.stored_bodies(after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = Some((last.logged.received_ms, last.logged.key));

        let mut lines = Vec::new();
        for stored in &page {
            match &stored.body {
                Some(body) if stored.logged.outcome != Outcome::Unreadable => {
                    lines.extend(on_one_line(body));
                    lines.push(b'\n');
                }
                _ => left_out += 1,
            }
        }
        output::bytes(&lines)?;
    }

    if left_out > 0 {
        output::note(format!(
            "{left_out} events are left out because they are unreadable or pruned"
        ));
    }
    Ok(Exit::Done)
}

/// Removes the line breaks between the parts of a JSON document. Strings and numbers stay verbatim.
fn on_one_line(json: &[u8]) -> Vec<u8> {
    // A line break inside a string is escaped, so every raw line break lies between two parts.
    json.split(|b| *b == b'\n' || *b == b'\r')
        .map(<[u8]>::trim_ascii_start)
        .collect::<Vec<_>>()
        .concat()
}

#[cfg(test)]
mod tests {
    #[test]
    fn pretty_event_becomes_one_line() {
        let pretty = b"{\n  \"a\": \"x  y \\n\",\r\n  \"b\": 1.50\n}\n";
        assert_eq!(
            super::on_one_line(pretty),
            b"{\"a\": \"x  y \\n\",\"b\": 1.50}"
        );
    }
}

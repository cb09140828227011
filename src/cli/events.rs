//! `events`: what was received, in a list, one by one, or all of it for `replay`.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Exit, Settings, duration_ms, output};
use crate::clock::Clock;
use crate::config::Mistakes;
use crate::domain::event::EventKey;
use crate::store::{EventFilter, LoggedEvent, Outcome, Store, StoredBody};

/// List, show, export and prune what was received
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
    /// List events, the latest received first
    #[command(after_help = "Examples:
  stripe-reconciler events list --invoice in_1Q...
  stripe-reconciler events list --outcome unreadable
  stripe-reconciler events list --limit 1000 --json")]
    List(List),
    /// Show an event, in all renderings that were received
    #[command(after_help = "Example:\n  stripe-reconciler events show evt_1Q... --json")]
    Show {
        /// evt_...
        id: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write all events to standard output, one a line, oldest receipt first: what `replay` reads
    #[command(after_help = "Example:\n  stripe-reconciler events export > events.jsonl")]
    Export,
    /// Forget the payload bytes of old events; what they told, and their ids, stay
    #[command(after_help = "Example:\n  stripe-reconciler events prune --older-than 90d")]
    Prune(Prune),
}

#[derive(Args)]
struct Prune {
    /// How long ago they were received: a number and s, m, h or d
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
    /// Only with this outcome: recorded, no_payment_fact, unreadable
    #[arg(long)]
    outcome: Option<String>,
    /// How many at most
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// Print JSON, one event a line
    #[arg(long)]
    json: bool,
}

impl Events {
    pub(super) async fn run(self, settings: Settings) -> anyhow::Result<Exit> {
        match self.command {
            Command::List(list) => list.run(settings).await,
            Command::Show { id, json } => show(&settings.store().await?, &id, json).await,
            Command::Export => export(&settings.store().await?).await,
            Command::Prune(prune) => prune.run(settings).await,
        }
    }
}

/// Rows read at a time.
const PAGE: u32 = 500;

impl List {
    async fn run(self, settings: Settings) -> anyhow::Result<Exit> {
        let filter = EventFilter {
            event_type: self.event_type,
            stripe_invoice_id: self.invoice,
            outcome: self.outcome.as_deref().map(parse_outcome).transpose()?,
        };
        let store = settings.store().await?;
        let mut rows = Vec::new();
        let (mut after, mut left): (Option<(i64, EventKey)>, u32) = (None, self.limit);
        while left > 0 {
            let page = store.events_page(&filter, after, left.min(PAGE)).await?;
            let Some(last) = page.last() else { break };
            after = Some((last.received_ms, last.key));
            left -= page.len() as u32;
            for event in &page {
                if self.json {
                    output::line(as_json(event))?;
                } else {
                    rows.push(row(event));
                }
            }
        }
        if !self.json {
            output::line(output::table(&["RECEIVED", "CREATED", "ID", "TYPE", "OUTCOME", "CAME BY", "SECRET"], rows))?;
        }
        Ok(Exit::Done)
    }
}

impl Prune {
    /// In small steps: deliveries go on in between.
    async fn run(self, settings: Settings) -> anyhow::Result<Exit> {
        let before_ms = Clock::system().now_ms().saturating_sub(duration_ms("--older-than", &self.older_than)?);
        let store = settings.store().await?;
        let bar = output::progress("events");
        let (mut after, mut forgotten) = (None, 0);
        loop {
            let (step, next) = store.forget_bodies(before_ms, after, PAGE).await?;
            forgotten += step;
            bar.inc(u64::from(PAGE));
            if next.is_none() {
                break;
            }
            after = next;
        }
        bar.finish_and_clear();
        store.close().await;
        if self.json {
            output::line(json!({"forgotten": forgotten}))?;
        } else {
            output::line(format!("{forgotten} events forgot their bytes; what they told, and their ids, stay"))?;
        }
        Ok(Exit::Done)
    }
}

fn parse_outcome(text: &str) -> Result<Outcome, Mistakes> {
    let unknown = || Mistakes(vec![format!("--outcome: `{text}` is none of recorded, no_payment_fact, unreadable")]);
    Outcome::parse(text).ok_or_else(unknown)
}

fn row(event: &LoggedEvent) -> Vec<String> {
    vec![
        output::time(Some(event.received_ms)),
        output::time(event.created_s.map(|s| s * 1000)),
        output::or_dash(&event.id),
        output::or_dash(&event.event_type),
        event.outcome.as_str().to_owned(),
        event.source.as_str().to_owned(),
        output::or_dash(&event.secret_label),
    ]
}

fn as_json(event: &LoggedEvent) -> Value {
    json!({
        "key": hex::encode(event.key.0),
        "id": event.id,
        "type": event.event_type,
        "apiVersion": event.api_version,
        "objectId": event.object_id,
        "createdAt": event.created_s.map(|s| output::time(Some(s * 1000))),
        "receivedAt": output::time(Some(event.received_ms)),
        "source": event.source.as_str(),
        "secretLabel": event.secret_label,
        "outcome": event.outcome.as_str(),
        "unreadableReason": event.unreadable_reason,
    })
}

async fn show(store: &Store, id: &str, json: bool) -> anyhow::Result<Exit> {
    let renderings = store.events_by_id(id).await?;
    if renderings.is_empty() {
        output::note(format!("error: no event {id} was received"));
        return Ok(Exit::Refused);
    }
    if json {
        let items: Vec<Value> = renderings.iter().map(with_body).collect();
        output::line(serde_json::to_string_pretty(&items)?)?;
        return Ok(Exit::Done);
    }
    for stored in &renderings {
        for (name, value) in as_json(&stored.logged).as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
            output::line(format!("{name:<12} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned)))?;
        }
        match &stored.body {
            Some(body) => output::line(String::from_utf8_lossy(body))?,
            None => output::line("(its bytes are forgotten)")?,
        }
        output::line("")?;
    }
    Ok(Exit::Done)
}

fn with_body(stored: &StoredBody) -> Value {
    let mut item = as_json(&stored.logged);
    let body = stored.body.as_deref().and_then(|body| serde_json::from_slice(body).ok());
    item["body"] = body.unwrap_or(Value::Null);
    item
}

async fn export(store: &Store) -> anyhow::Result<Exit> {
    let (mut after, mut left_out) = (None, 0);
    loop {
        let page = store.stored_bodies(after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = Some((last.logged.received_ms, last.logged.key));
        let mut lines = Vec::new();
        for stored in &page {
            match stored.body.as_deref().filter(|_| stored.logged.outcome != Outcome::Unreadable) {
                Some(body) => {
                    lines.extend(on_one_line(body));
                    lines.push(b'\n');
                }
                None => left_out += 1,
            }
        }
        output::bytes(&lines)?;
    }
    if left_out > 0 {
        output::note(format!("{left_out} events are left out: unreadable, or their bytes are forgotten"));
    }
    Ok(Exit::Done)
}

/// JSON without the line breaks between its parts; nothing inside strings or numbers is touched.
fn on_one_line(json: &[u8]) -> Vec<u8> {
    // A line break inside a string is escaped, so every raw one stands between two parts.
    json.split(|b| *b == b'\n' || *b == b'\r').map(<[u8]>::trim_ascii_start).collect::<Vec<_>>().concat()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_pretty_event_fits_on_one_line_with_its_strings_untouched() {
        let pretty = b"{\n  \"a\": \"x  y \\n\",\r\n  \"b\": 1.50\n}\n";
        assert_eq!(super::on_one_line(pretty), b"{\"a\": \"x  y \\n\",\"b\": 1.50}");
    }
}

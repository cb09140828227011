//! The log of deliveries: appended, never changed but by `rebuild`, and gathered for a history by what events mention.

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::{Store, StoreError};
use crate::domain::event::{EventKey, Mention};
use crate::domain::history::Known;

/// The way a delivery came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Webhook,
    Replay,
    Api,
}

/// What the reader made of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Recorded,
    NoPaymentFact,
    Unreadable,
}

impl Source {
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Webhook => "webhook",
            Source::Replay => "replay",
            Source::Api => "api",
        }
    }

    fn parse(text: &str) -> Result<Source, StoreError> {
        let all = [Source::Webhook, Source::Replay, Source::Api];
        all.into_iter().find(|s| s.as_str() == text).ok_or_else(|| StoreError::Refused(format!("an event came by `{text}`")))
    }
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Recorded => "recorded",
            Outcome::NoPaymentFact => "no_payment_fact",
            Outcome::Unreadable => "unreadable",
        }
    }

    /// From its name, as flags and queries give it.
    pub fn parse(text: &str) -> Option<Outcome> {
        [Outcome::Recorded, Outcome::NoPaymentFact, Outcome::Unreadable].into_iter().find(|o| o.as_str() == text)
    }
}

/// A delivered body, compressed (lz4, its size in front).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedBody(Vec<u8>);

impl PackedBody {
    pub fn pack(body: &[u8]) -> PackedBody {
        PackedBody(lz4_flex::compress_prepend_size(body))
    }

    /// The bytes as they came; None if the row is damaged.
    pub fn unpack(&self) -> Option<Vec<u8>> {
        lz4_flex::decompress_size_prepended(&self.0).ok()
    }
}

/// One authentic delivery, ready to be appended.
#[derive(Clone, Debug)]
pub struct NewEvent {
    pub key: EventKey,
    /// None: unreadable. So are the four that follow, where the event lacks them.
    pub id: Option<String>,
    pub event_type: Option<String>,
    pub api_version: Option<String>,
    pub object_id: Option<String>,
    /// Unix seconds.
    pub created_s: Option<i64>,
    /// Unix milliseconds.
    pub received_ms: i64,
    pub source: Source,
    pub secret_label: Option<String>,
    pub outcome: Outcome,
    pub unreadable_reason: Option<String>,
    /// A `Telling` as JSON.
    pub telling: Option<String>,
    pub mentions: Vec<Mention>,
    pub body: PackedBody,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    New,
    Duplicate,
}

/// A row of the log, without its body. Fields as in [`NewEvent`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedEvent {
    pub key: EventKey,
    pub id: Option<String>,
    pub event_type: Option<String>,
    pub api_version: Option<String>,
    pub object_id: Option<String>,
    pub created_s: Option<i64>,
    pub received_ms: i64,
    pub source: Source,
    pub secret_label: Option<String>,
    pub outcome: Outcome,
    pub unreadable_reason: Option<String>,
}

/// A row of the log with all that `rebuild` and `export` need. No body: it was pruned.
#[derive(Clone, Debug)]
pub struct StoredBody {
    pub logged: LoggedEvent,
    pub telling: Option<String>,
    pub body: Option<Vec<u8>>,
}

/// Which rows of the log to list; all that is given must hold.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    pub event_type: Option<String>,
    /// The event names this Stripe invoice.
    pub stripe_invoice_id: Option<String>,
    pub outcome: Option<Outcome>,
}

/// Comes before every receipt, in a page that goes forward.
const FIRST: (i64, EventKey) = (i64::MIN, EventKey([0; 16]));
/// Comes after every receipt, in a page that goes back.
const LAST: (i64, EventKey) = (i64::MAX, EventKey([255; 16]));

impl Store {
    /// Appends a batch in one transaction; durable when it returns, or nothing is kept. Answers in the order of the batch.
    /// Repeating is harmless: a key that is there already, or twice in the batch, is a duplicate.
    pub async fn append(&self, batch: &[NewEvent]) -> Result<Vec<Appended>, StoreError> {
        let mut transaction = self.begin().await?;
        let mut answers = Vec::with_capacity(batch.len());
        for event in batch {
            let is_new = insert_event(&mut transaction, event).await?;
            if is_new {
                insert_mentions(&mut transaction, event).await?;
            }
            answers.push(if is_new { Appended::New } else { Appended::Duplicate });
        }
        transaction.commit().await?;
        Ok(answers)
    }

    /// A page of the log, newest receipt first, after the receipt time (ms) and key of the last row of the page before.
    pub async fn events_page(
        &self,
        filter: &EventFilter,
        after: Option<(i64, EventKey)>,
        limit: u32,
    ) -> Result<Vec<LoggedEvent>, StoreError> {
        let (received_ms, key) = after.unwrap_or(LAST);
        let rows = sqlx::query(
            "select key, id, event_type, api_version, object_id, created_s, received_ms, source, secret_label, outcome, unreadable_reason
             from events
             where (received_ms, key) < ($1, $2)
               and ($3 is null or event_type = $3)
               and ($4 is null or outcome = $4)
               and ($5 is null or key in (select event_key from mentions where object_id = $5))
             order by received_ms desc, key desc limit $6",
        )
        .bind(received_ms)
        .bind(&key.0[..])
        .bind(&filter.event_type)
        .bind(filter.outcome.map(Outcome::as_str))
        .bind(&filter.stripe_invoice_id)
        .bind(limit)
        .fetch_all(&self.read)
        .await?;
        rows.iter().map(logged).collect()
    }

    /// All renderings of an event, oldest receipt first, with their bodies (None: pruned).
    pub async fn events_by_id(&self, id: &str) -> Result<Vec<StoredBody>, StoreError> {
        let rows =
            sqlx::query("select * from events where id = $1 order by received_ms, key").bind(id).fetch_all(&self.read).await?;
        rows.iter().map(stored_body).collect()
    }

    /// The log rows of these events, in no order; those that are not there are left out.
    pub async fn events_by_keys(&self, keys: &[EventKey]) -> Result<Vec<LoggedEvent>, StoreError> {
        let mut found = Vec::with_capacity(keys.len());
        for key in keys {
            let row = sqlx::query(
                "select key, id, event_type, api_version, object_id, created_s, received_ms, source, secret_label, outcome, unreadable_reason
                 from events where key = $1",
            )
            .bind(&key.0[..])
            .fetch_optional(&self.read)
            .await?;
            found.extend(row.as_ref().map(logged).transpose()?);
        }
        Ok(found)
    }

    /// A page of the log with bodies, oldest receipt first.
    pub async fn stored_bodies(&self, after: Option<(i64, EventKey)>, limit: u32) -> Result<Vec<StoredBody>, StoreError> {
        let (received_ms, key) = after.unwrap_or(FIRST);
        let rows = sqlx::query("select * from events where (received_ms, key) > ($1, $2) order by received_ms, key limit $3")
            .bind(received_ms)
            .bind(&key.0[..])
            .bind(limit)
            .fetch_all(&self.read)
            .await?;
        rows.iter().map(stored_body).collect()
    }

    /// Replaces what was read in events by what is read in the same bytes now, in one transaction. What became readable has a
    /// new key; when that is in the log already, only the old row goes.
    pub async fn replace_readings(&self, batch: &[(EventKey, NewEvent)]) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        for (old, event) in batch {
            sqlx::query("delete from mentions where event_key = $1").bind(&old.0[..]).execute(&mut *transaction).await?;
            sqlx::query("delete from events where key = $1").bind(&old.0[..]).execute(&mut *transaction).await?;
            if insert_event(&mut transaction, event).await? {
                insert_mentions(&mut transaction, event).await?;
            }
        }
        transaction.commit().await?;
        Ok(())
    }

    /// All that is told about a Stripe invoice: what events tell that mention it, or that mention an object (other than an
    /// invoice) that one of these mentions, over any number of hops. More than belongs to the invoice may be among it.
    pub async fn tellings(&self, stripe_invoice_id: &str) -> Result<Vec<Known>, StoreError> {
        let rows = sqlx::query(
            "with recursive reached (object_id) as (
                 select $1
                 union
                 select further.object_id from reached
                 join mentions as here on here.object_id = reached.object_id
                 join mentions as further on further.event_key = here.event_key and not further.is_invoice
             )
             select key, telling from events
             where telling is not null and key in (select event_key from mentions join reached using (object_id))",
        )
        .bind(stripe_invoice_id)
        .fetch_all(&self.read)
        .await?;
        rows.iter().map(known).collect()
    }
}

async fn insert_event(connection: &mut SqliteConnection, event: &NewEvent) -> Result<bool, StoreError> {
    let inserted = sqlx::query(
        "insert into events (key, id, event_type, api_version, object_id, created_s, received_ms, source, secret_label, outcome,
                             unreadable_reason, telling, body)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) on conflict do nothing",
    )
    .bind(&event.key.0[..])
    .bind(&event.id)
    .bind(&event.event_type)
    .bind(&event.api_version)
    .bind(&event.object_id)
    .bind(event.created_s)
    .bind(event.received_ms)
    .bind(event.source.as_str())
    .bind(&event.secret_label)
    .bind(event.outcome.as_str())
    .bind(&event.unreadable_reason)
    .bind(&event.telling)
    .bind(&event.body.0)
    .execute(connection)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

async fn insert_mentions(connection: &mut SqliteConnection, event: &NewEvent) -> Result<(), StoreError> {
    for mention in &event.mentions {
        sqlx::query("insert into mentions (object_id, event_key, is_invoice) values ($1, $2, $3) on conflict do nothing")
            .bind(&mention.object_id)
            .bind(&event.key.0[..])
            .bind(mention.is_invoice)
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

/// A telling as it stands in a row with the columns `key` and `telling`.
pub(super) fn known(row: &SqliteRow) -> Result<Known, StoreError> {
    let key = event_key(row, "key")?;
    let telling: &str = row.try_get("telling")?;
    let telling = serde_json::from_str(telling).map_err(|e| {
        StoreError::Refused(format!("what event {} tells cannot be read, run `rebuild`: {e}", hex::encode(key.0)))
    })?;
    Ok(Known { key, telling })
}

fn event_key(row: &SqliteRow, column: &str) -> Result<EventKey, StoreError> {
    let bytes: &[u8] = row.try_get(column)?;
    let key = bytes.try_into().map_err(|_| StoreError::Refused("an event's key has not 16 bytes".to_owned()))?;
    Ok(EventKey(key))
}

fn logged(row: &SqliteRow) -> Result<LoggedEvent, StoreError> {
    let outcome: &str = row.try_get("outcome")?;
    Ok(LoggedEvent {
        key: event_key(row, "key")?,
        id: row.try_get("id")?,
        event_type: row.try_get("event_type")?,
        api_version: row.try_get("api_version")?,
        object_id: row.try_get("object_id")?,
        created_s: row.try_get("created_s")?,
        received_ms: row.try_get("received_ms")?,
        source: Source::parse(row.try_get("source")?)?,
        secret_label: row.try_get("secret_label")?,
        outcome: Outcome::parse(outcome).ok_or_else(|| StoreError::Refused(format!("an event's outcome is `{outcome}`")))?,
        unreadable_reason: row.try_get("unreadable_reason")?,
    })
}

fn stored_body(row: &SqliteRow) -> Result<StoredBody, StoreError> {
    let logged = logged(row)?;
    let packed: Option<Vec<u8>> = row.try_get("body")?;
    let damaged = || StoreError::Refused(format!("the body of event {} is damaged", hex::encode(logged.key.0)));
    let body = packed.map(|packed| PackedBody(packed).unpack().ok_or_else(damaged)).transpose()?;
    Ok(StoredBody { logged, telling: row.try_get("telling")?, body })
}

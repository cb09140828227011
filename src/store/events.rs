//! The log of deliveries: appended, never changed but by `rebuild`, and gathered for a history by what events mention.

use std::collections::HashSet;

use super::engine::connection::{Connection, execute, rows};
use super::{Engine, Store, StoreError};
use crate::domain::stripe::event::{EventKey, Link};

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

    pub(super) fn parse(text: &str) -> Result<Source, StoreError> {
        let all = [Source::Webhook, Source::Replay, Source::Api];
        all.into_iter()
            .find(|s| s.as_str() == text)
            .ok_or_else(|| StoreError::damaged(format!("an event came by `{text}`")))
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
        [
            Outcome::Recorded,
            Outcome::NoPaymentFact,
            Outcome::Unreadable,
        ]
        .into_iter()
        .find(|o| o.as_str() == text)
    }
}

/// A delivered body, compressed (lz4, its size in front).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedBody(Vec<u8>);

impl PackedBody {
    pub fn pack(body: &[u8]) -> PackedBody {
        PackedBody(lz4_flex::compress_prepend_size(body))
    }

    /// As it stands in its row.
    pub(super) fn packed(bytes: Vec<u8>) -> PackedBody {
        PackedBody(bytes)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
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
    /// A `Observation` as JSON.
    pub telling: Option<String>,
    pub mentions: Vec<Link>,
    pub body: PackedBody,
}

impl NewEvent {
    /// The objects mentioned that are no invoices, as a JSON array: from them the gathering of a history goes on.
    pub(super) fn linked(&self) -> Option<String> {
        let ids: Vec<&str> = self
            .mentions
            .iter()
            .filter(|m| !m.is_invoice)
            .map(|m| m.object_id.as_str())
            .collect();
        (!ids.is_empty()).then(|| serde_json::to_string(&ids).expect("strings always serialise"))
    }
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
const FIRST: (i64, EventKey) = (i64::MIN, EventKey([0; EventKey::LENGTH]));
/// Comes after every receipt, in a page that goes back.
pub(super) const LAST: (i64, EventKey) = (i64::MAX, EventKey([255; EventKey::LENGTH]));

/// The columns of a [`LoggedEvent`].
macro_rules! logged_columns {
    () => {
        "key, id, event_type, api_version, object_id, created_s, received_ms, source, secret_label, outcome, unreadable_reason"
    };
}
type Text = Option<String>;
type LoggedRow = (
    Vec<u8>,
    Text,
    Text,
    Text,
    Text,
    Option<i64>,
    i64,
    String,
    Text,
    String,
    Text,
);
type ToldRow = (
    Vec<u8>,
    Text,
    Text,
    Text,
    Text,
    Option<i64>,
    i64,
    String,
    Text,
    String,
    Text,
    Text,
);
type BodyRow = (
    Vec<u8>,
    Text,
    Text,
    Text,
    Text,
    Option<i64>,
    i64,
    String,
    Text,
    String,
    Text,
    Text,
    Option<Vec<u8>>,
);

const PAGE: &str = concat!(
    "select ",
    logged_columns!(),
    ", telling from events
      where (received_ms, key) < ($1, $2) and ($3 is null or event_type = $3) and ($4 is null or outcome = $4)
      order by received_ms desc, key desc limit $5"
);
/// The predicate of the partial index, word for word: unreadable events are rare, and the log is long.
const PAGE_OF_UNREADABLE: &str = concat!(
    "select ",
    logged_columns!(),
    ", telling from events
      where (received_ms, key) < ($1, $2) and ($3 is null or event_type = $3) and outcome = 'unreadable'
      order by received_ms desc, key desc limit $4"
);
const PAGE_OF_INVOICE: &str = concat!(
    "select ",
    logged_columns!(),
    ", telling from events
      where (received_ms, key) < ($1, $2) and ($3 is null or event_type = $3) and ($4 is null or outcome = $4)
        and key in (select event_key from mentions where object_id = $6)
      order by received_ms desc, key desc limit $5"
);
/// Found by the start of their keys before they are put in order: else PostgreSQL would look for them in the whole log, in order.
const BY_ID: &str = concat!(
    "with found as materialized (select received_ms, key from events where key between $1 and $2 and id = $3)
     select ",
    logged_columns!(),
    " from events
      where key in (select key from found where (received_ms, key) > ($4, $5) order by received_ms, key limit $6)
      order by received_ms, key"
);
const BODY_BY_KEY: &str = concat!(
    "select ",
    logged_columns!(),
    ", telling, body from events where key = $1"
);
/// Those of a JSON array of keys in hexadecimal digits.
const BY_KEYS_IN_SQLITE: &str = concat!(
    "select ",
    logged_columns!(),
    " from events where events.key in (select unhex(value) from json_each($1))"
);
const BY_KEYS_IN_POSTGRES: &str = concat!(
    "select ",
    logged_columns!(),
    " from jsonb_array_elements_text($1::jsonb) as wanted
      cross join lateral (select * from events where events.key = decode(wanted.value, 'hex') offset 0) as event"
);
const BODIES: &str = concat!(
    "select ",
    logged_columns!(),
    ", telling, body from events where (received_ms, key) > ($1, $2) order by received_ms, key limit $3"
);
const RECEIVED_BEFORE: &str = "
    select received_ms, key from events where (received_ms, key) > ($1, $2) and received_ms < $3
    order by received_ms, key limit $4";
const FORGET: &str = "
    update events set body = null
    where (received_ms, key) > ($1, $2) and (received_ms, key) <= ($3, $4) and body is not null and outcome <> 'unreadable'";
const INSERT_EVENT: &str = concat!(
    "insert into events (",
    logged_columns!(),
    ", telling, linked, body) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) on conflict do nothing"
);
/// Of a JSON array of objects and keys in hexadecimal digits, the keys of those that are not there.
const UNMENTIONED_IN_SQLITE: &str = "
    select distinct unhex(value->>1) from json_each($1)
    where not exists (select 1 from mentions where object_id = value->>0 and event_key = unhex(value->>1))";
const UNMENTIONED_IN_POSTGRES: &str = r#"
    select distinct decode(wanted.value->>1, 'hex') from jsonb_array_elements($1::jsonb) as wanted
    left join lateral (select true as is_there from mentions
                       where object_id = (wanted.value->>0) collate "C" and event_key = decode(wanted.value->>1, 'hex') offset 0) as found
        on true
    where is_there is null"#;
const INSERT_MENTION: &str =
    "insert into mentions (object_id, event_key) values ($1, $2) on conflict do nothing";

impl Store {
    /// A page of the log, newest receipt first, after the receipt time (ms) and key of the last row of the page before.
    pub async fn events_page(
        &self,
        filter: &EventFilter,
        after: Option<(i64, EventKey)>,
        limit: u32,
    ) -> Result<Vec<LoggedEvent>, StoreError> {
        Ok(self
            .told_page(filter, after, limit)
            .await?
            .into_iter()
            .map(|(logged, _)| logged)
            .collect())
    }

    /// The same, with what was read in each: a `Observation` as JSON.
    pub async fn told_page(
        &self,
        filter: &EventFilter,
        after: Option<(i64, EventKey)>,
        limit: u32,
    ) -> Result<Vec<(LoggedEvent, Option<String>)>, StoreError> {
        let (received_ms, key) = after.unwrap_or(LAST);
        let EventFilter {
            event_type,
            stripe_invoice_id,
            outcome,
        } = filter;
        let is_unreadable = *outcome == Some(Outcome::Unreadable);
        let (key, outcome, limit) = (&key.0[..], outcome.map(Outcome::as_str), i64::from(limit));
        let mut session = self.session().await?;
        let rows = match stripe_invoice_id {
            Some(id) => {
                rows!(
                    session,
                    fetch_all,
                    ToldRow,
                    PAGE_OF_INVOICE,
                    received_ms,
                    key,
                    event_type,
                    outcome,
                    limit,
                    id
                )
            }
            None if is_unreadable => {
                rows!(
                    session,
                    fetch_all,
                    ToldRow,
                    PAGE_OF_UNREADABLE,
                    received_ms,
                    key,
                    event_type,
                    limit
                )
            }
            None => rows!(
                session,
                fetch_all,
                ToldRow,
                PAGE,
                received_ms,
                key,
                event_type,
                outcome,
                limit
            ),
        }?;
        session.done().await?;
        rows.into_iter().map(told).collect()
    }

    /// A page of the renderings of an event, oldest receipt first.
    pub async fn events_by_id(
        &self,
        id: &str,
        after: Option<(i64, EventKey)>,
        limit: u32,
    ) -> Result<Vec<LoggedEvent>, StoreError> {
        let (first, last) = EventKey::range(id);
        let (received_ms, key) = after.unwrap_or(FIRST);
        let (first, last, key, limit) = (&first.0[..], &last.0[..], &key.0[..], i64::from(limit));
        let mut session = self.session().await?;
        let rows = rows!(
            session,
            fetch_all,
            LoggedRow,
            BY_ID,
            first,
            last,
            id,
            received_ms,
            key,
            limit
        )?;
        session.done().await?;
        rows.into_iter().map(logged).collect()
    }

    /// An event with its body (None: pruned), by its key.
    pub async fn event_by_key(&self, key: &EventKey) -> Result<Option<StoredBody>, StoreError> {
        let mut session = self.session().await?;
        let row = rows!(session, fetch_optional, BodyRow, BODY_BY_KEY, &key.0[..])?;
        session.done().await?;
        row.map(stored_body).transpose()
    }

    /// The log rows of these events, in no order; those that are not there are left out.
    pub async fn events_by_keys(&self, keys: &[EventKey]) -> Result<Vec<LoggedEvent>, StoreError> {
        let sql = match &self.0 {
            Engine::Sqlite(_) => BY_KEYS_IN_SQLITE,
            Engine::Postgres(_) => BY_KEYS_IN_POSTGRES,
        };
        let keys: Vec<String> = keys.iter().map(|key| hex::encode(key.0)).collect();
        let keys = serde_json::to_string(&keys).expect("strings always serialise");
        let mut session = self.session().await?;
        let found = rows!(session, fetch_all, LoggedRow, sql, keys.as_str())?;
        session.done().await?;
        found.into_iter().map(logged).collect()
    }

    /// A page of the log with bodies, oldest receipt first.
    pub async fn stored_bodies(
        &self,
        after: Option<(i64, EventKey)>,
        limit: u32,
    ) -> Result<Vec<StoredBody>, StoreError> {
        let (received_ms, key) = after.unwrap_or(FIRST);
        let mut session = self.session().await?;
        let rows = rows!(
            session,
            fetch_all,
            BodyRow,
            BODIES,
            received_ms,
            &key.0[..],
            i64::from(limit)
        )?;
        session.done().await?;
        rows.into_iter().map(stored_body).collect()
    }

    /// Those of these events that are not found by everything that they mention.
    pub async fn unmentioned(&self, events: &[&NewEvent]) -> Result<Vec<EventKey>, StoreError> {
        let sql = match &self.0 {
            Engine::Sqlite(_) => UNMENTIONED_IN_SQLITE,
            Engine::Postgres(_) => UNMENTIONED_IN_POSTGRES,
        };
        let wanted = |event: &&NewEvent| -> Vec<(String, String)> {
            let key = hex::encode(event.key.0);
            event
                .mentions
                .iter()
                .map(|mention| (mention.object_id.clone(), key.clone()))
                .collect()
        };
        let wanted: Vec<(String, String)> = events.iter().flat_map(wanted).collect();
        let wanted = serde_json::to_string(&wanted).expect("strings always serialise");
        let mut session = self.session().await?;
        let found = rows!(session, fetch_all, (Vec<u8>,), sql, wanted.as_str())?;
        session.done().await?;
        found.into_iter().map(|(key,)| event_key(key)).collect()
    }

    /// Forgets the bytes of up to `limit` events that were received before `before_ms`, in the order of their receipt, and says how
    /// many had any, and where the next step begins (None: this was the last). Unreadable ones keep theirs: nothing else is
    /// known of them.
    pub async fn forget_bodies(
        &self,
        before_ms: i64,
        after: Option<(i64, EventKey)>,
        limit: u32,
    ) -> Result<(u64, Option<(i64, EventKey)>), StoreError> {
        let (received_ms, key) = after.unwrap_or(FIRST);
        let mut session = self.transaction().await?;
        let found = rows!(
            session,
            fetch_all,
            (i64, Vec<u8>),
            RECEIVED_BEFORE,
            received_ms,
            &key.0[..],
            before_ms,
            i64::from(limit)
        )?;
        let Some((last_ms, last_key)) = found.last() else {
            session.commit().await?;
            return Ok((0, None));
        };
        let forgotten = execute!(
            session,
            FORGET,
            received_ms,
            &key.0[..],
            *last_ms,
            &last_key[..]
        )?;
        session.commit().await?;
        Ok((forgotten, Some((*last_ms, event_key(last_key.clone())?))))
    }

    /// Replaces what was read in events by what is read in the same bytes now, in one transaction. What became readable has a
    /// new key; when that is in the log already, only the old row goes. What was mentioned stays mentioned: it does no harm.
    pub async fn replace_readings(&self, batch: &[(EventKey, NewEvent)]) -> Result<(), StoreError> {
        let mut session = self.transaction().await?;
        for (old, event) in batch {
            execute!(session, "delete from events where key = $1", &old.0[..])?;
            insert(&mut session, event).await?;
        }
        session.commit().await
    }
}

/// The first of each key: the others are duplicates, and nothing of them is kept. Sorted by key: neighbours go to the same page of
/// an index, and batches of several replicas take their locks in one order.
pub(super) fn firsts(batch: &[NewEvent]) -> Vec<&NewEvent> {
    let mut keys = HashSet::with_capacity(batch.len());
    let mut firsts: Vec<&NewEvent> = batch
        .iter()
        .filter(|event| keys.insert(event.key))
        .collect();
    firsts.sort_unstable_by_key(|event| event.key);
    firsts
}

/// What to answer for each of a batch. `is_new` is asked in its order: the second of two that are equal is no longer new.
pub(super) fn answers(
    batch: &[NewEvent],
    mut is_new: impl FnMut(&EventKey) -> bool,
) -> Vec<Appended> {
    batch
        .iter()
        .map(|event| {
            if is_new(&event.key) {
                Appended::New
            } else {
                Appended::Duplicate
            }
        })
        .collect()
}

async fn insert(session: &mut Connection, event: &NewEvent) -> Result<(), StoreError> {
    let key = &event.key.0[..];
    execute!(
        session,
        INSERT_EVENT,
        key,
        &event.id,
        &event.event_type,
        &event.api_version,
        &event.object_id,
        event.created_s,
        event.received_ms,
        event.source.as_str(),
        &event.secret_label,
        event.outcome.as_str(),
        &event.unreadable_reason,
        &event.telling,
        event.linked(),
        event.body.as_bytes()
    )?;
    for mention in &event.mentions {
        execute!(session, INSERT_MENTION, &mention.object_id, key)?;
    }
    Ok(())
}

pub(super) fn event_key(bytes: Vec<u8>) -> Result<EventKey, StoreError> {
    let key = bytes
        .try_into()
        .map_err(|_| StoreError::damaged("the key of an event"))?;
    Ok(EventKey(key))
}

fn logged(row: LoggedRow) -> Result<LoggedEvent, StoreError> {
    let (
        key,
        id,
        event_type,
        api_version,
        object_id,
        created_s,
        received_ms,
        source,
        secret_label,
        outcome,
        unreadable_reason,
    ) = row;
    let unknown = || StoreError::damaged(format!("the outcome of an event is `{outcome}`"));
    Ok(LoggedEvent {
        key: event_key(key)?,
        id,
        event_type,
        api_version,
        object_id,
        created_s,
        received_ms,
        source: Source::parse(&source)?,
        secret_label,
        outcome: Outcome::parse(&outcome).ok_or_else(unknown)?,
        unreadable_reason,
    })
}

fn told(row: ToldRow) -> Result<(LoggedEvent, Option<String>), StoreError> {
    let (a, b, c, d, e, f, g, h, i, j, k, telling) = row;
    Ok((logged((a, b, c, d, e, f, g, h, i, j, k))?, telling))
}

fn stored_body(row: BodyRow) -> Result<StoredBody, StoreError> {
    let (a, b, c, d, e, f, g, h, i, j, k, telling, packed) = row;
    let logged = logged((a, b, c, d, e, f, g, h, i, j, k))?;
    let damaged = || {
        StoreError::damaged(format!(
            "the body of event {} is damaged",
            hex::encode(logged.key.0)
        ))
    };
    let body = packed
        .map(|packed| PackedBody(packed).unpack().ok_or_else(damaged))
        .transpose()?;
    Ok(StoredBody {
        logged,
        telling,
        body,
    })
}

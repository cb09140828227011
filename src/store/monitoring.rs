//! Totals for operators: last seen times, busy hours, invoices that events are waiting for, and
//! counts of rare rows.
//!
//! A scanner derives the totals from the log in the background, at no cost to deliveries. An index
//! and a limit bound every statement even if the log is long.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::engine::connection::{execute, rows};
use super::events::{LAST, PackedBody, Source, event_key};
use super::{COUNT_LIMIT, Engine, Store, StoreError};
use crate::clock::MAX_SKEW_MS;
use crate::domain::history::{DamagedObservation, StoredObservation};
use crate::domain::stripe::event::EventKey;

/// A row of the event log, with the columns that the scanner reads.
#[derive(Clone, Debug)]
pub struct LogRow {
    pub key: EventKey,
    pub received_ms: i64,
    pub source: Source,
    pub secret_label: Option<String>,
    /// The stored observation, as JSON.
    pub observation: Option<String>,
    /// The packed body, present only if the row has no observation and the body was not pruned.
    pub body: Option<PackedBody>,
}

impl LogRow {
    /// Parses the observation; `None` if the row has none.
    pub fn parse_observation(&self) -> Option<Result<StoredObservation, DamagedObservation>> {
        let json = self.observation.as_deref()?;
        Some(StoredObservation::parse(self.key, json))
    }
}

/// The activity in a section of the log. Times in Unix milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActivityDelta {
    /// Last seen times, by stored key.
    pub last_seen: BTreeMap<String, i64>,
    /// Hours since 1970 in which webhooks were received.
    pub hours: BTreeSet<i64>,
    /// Stripe invoices that events name, with the receipt of the first such event.
    pub named_invoices: BTreeMap<String, i64>,
}

/// A Stripe invoice that events name and that is not stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnmatchedInvoice {
    pub stripe_invoice_id: String,
    /// Unix milliseconds when its first event was received.
    pub received_ms: i64,
    pub events: i64,
}

/// A count up to [`COUNT_LIMIT`], and the earliest time, in Unix milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    pub count: i64,
    pub since_ms: Option<i64>,
}

/// Space that the database uses and has, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    pub database: u64,
    /// Size of SQLite's WAL; `None` on PostgreSQL.
    pub wal: Option<u64>,
    /// The file system of the database; `None` if it is on another machine.
    pub disk: Option<Disk>,
}

/// Space of a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    pub free: u64,
    pub size: u64,
}

const LOG_ROWS: &str = "
    select key, received_ms, source, secret_label, telling,
           case when telling is null and outcome <> 'unreadable' then body end
    from events where (received_ms, key) > ($1, $2) and received_ms <= $3
    order by received_ms, key limit $4";
/// Columns of a [`LogRow`]: key, received, source, secret label, observation, body.
type LogRowColumns = (
    Vec<u8>,
    i64,
    String,
    Option<String>,
    Option<String>,
    Option<Vec<u8>>,
);

const LAST_SEEN: &str = "select name, at_ms from moments order by name limit 10000";
/// A stored time later than `$3` was written under a skewed clock and is replaced.
const RECORD_LAST_SEEN: &str = "
    insert into moments (name, at_ms) values ($1, $2)
    on conflict (name) do update set at_ms = excluded.at_ms
    where moments.at_ms < excluded.at_ms or moments.at_ms > $3";
const HOURS: &str = "select hour from delivery_hours where hour >= $1 order by hour limit 10000";
const RECORD_HOUR: &str = "insert into delivery_hours (hour) values ($1) on conflict do nothing";
const DELETE_HOURS: &str = "delete from delivery_hours where hour < $1";

/// Looks up invoices one by one, because for `not exists`, PostgreSQL may choose a join that reads
/// all of them. `$1`: pairs of a Stripe invoice id and a time, as JSON.
macro_rules! record_unmatched {
    ($id:literal, $at:literal, $pairs:literal) => {
        concat!(
            "insert into awaited (stripe_invoice_id, received_ms) select ",
            $id,
            ", ",
            $at,
            " from ",
            $pairs,
            " as pair where (select 1 from invoices where stripe_invoice_id = ",
            $id,
            ") is null on conflict do nothing"
        )
    };
}
const RECORD_UNMATCHED_IN_SQLITE: &str =
    record_unmatched!("value->>0", "value->>1", "json_each($1)");
const RECORD_UNMATCHED_IN_POSTGRES: &str = record_unmatched!(
    r#"(pair.value->>0) collate "C""#,
    "(pair.value->>1)::bigint",
    "jsonb_array_elements($1::jsonb)"
);
const DELETE_UNMATCHED: &str = "delete from awaited where received_ms < $1";
/// Selects unmatched invoices. Checks again whether the invoice is stored: the invoice may have
/// been stored concurrently with the insert.
const UNMATCHED: &str = "
    select stripe_invoice_id, received_ms,
           (select count(*) from mentions where object_id = stripe_invoice_id) as events
    from awaited
    where (select 1 from invoices
           where invoices.stripe_invoice_id = awaited.stripe_invoice_id) is null
    order by received_ms, stripe_invoice_id limit $1";

const UNREADABLE: &str = "
    select count(*), min(received_ms) from (
        select received_ms from events where outcome = 'unreadable' and received_ms >= $2
        order by received_ms limit $1
    ) as counted";
const DIFFERING: &str = "
    select count(*), min(differs_since_ms) from (
        select differs_since_ms from invoices where differs_since_ms is not null
        order by differs_since_ms limit $1
    ) as counted";

impl Store {
    /// Returns a page of the log, oldest receipt first: rows received later than `after_ms`, or
    /// after the last row of the page before, and not later than now.
    pub async fn log_rows(
        &self,
        after_ms: i64,
        after: Option<(i64, EventKey)>,
        now_ms: i64,
        limit: u32,
    ) -> Result<Vec<LogRow>, StoreError> {
        let (received_ms, key) = after.unwrap_or((after_ms, LAST.1));
        let latest_ms = now_ms + MAX_SKEW_MS;
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            LogRowColumns,
            LOG_ROWS,
            received_ms,
            &key.0[..],
            latest_ms,
            i64::from(limit)
        )?;
        session.done().await?;

        found.into_iter().map(log_row).collect()
    }

    /// Saves the activity of a section of the log. Deletes hours before `first_hour`, and unmatched
    /// invoices whose first event was received before `unmatched_from_ms`.
    pub async fn save_activity(
        &self,
        delta: &ActivityDelta,
        now_ms: i64,
        first_hour: i64,
        unmatched_from_ms: i64,
    ) -> Result<(), StoreError> {
        let pairs: Vec<_> = delta
            .named_invoices
            .iter()
            .map(|(id, at_ms)| json!([id, at_ms]))
            .collect();
        let record_unmatched = match &self.0 {
            Engine::Sqlite(_) => RECORD_UNMATCHED_IN_SQLITE,
            Engine::Postgres(_) => RECORD_UNMATCHED_IN_POSTGRES,
        };

        let mut session = self.writing().await?;
        // Always in the same order, so that processes that save at the same time cannot deadlock.
        for (name, at_ms) in &delta.last_seen {
            execute!(session, RECORD_LAST_SEEN, name, at_ms, now_ms + MAX_SKEW_MS)?;
        }
        for hour in &delta.hours {
            execute!(session, RECORD_HOUR, hour)?;
        }
        execute!(session, record_unmatched, json!(pairs).to_string())?;
        execute!(session, DELETE_HOURS, first_hour)?;
        execute!(session, DELETE_UNMATCHED, unmatched_from_ms)?;
        session.commit().await
    }

    /// Records last seen times, by stored key.
    ///
    /// A later stored time stays, unless it lies in the future: then a skewed clock wrote it.
    pub async fn record_last_seen(
        &self,
        times: &BTreeMap<String, i64>,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        for (name, at_ms) in times {
            execute!(session, RECORD_LAST_SEEN, name, at_ms, now_ms + MAX_SKEW_MS)?;
        }
        session.commit().await
    }

    /// Returns the last seen times, by stored key.
    pub async fn last_seen(&self) -> Result<BTreeMap<String, i64>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(session, fetch_all, (String, i64), LAST_SEEN)?;
        session.done().await?;

        Ok(found.into_iter().collect())
    }

    /// Returns the hours since 1970, from this one on, in which webhooks were received.
    pub async fn delivery_hours(&self, from: i64) -> Result<BTreeSet<i64>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(session, fetch_all, (i64,), HOURS, from)?;
        session.done().await?;

        Ok(found.into_iter().map(|(hour,)| hour).collect())
    }

    /// Returns Stripe invoices that events name and that are not stored, the longest waiting first.
    pub async fn unmatched_invoices(
        &self,
        limit: u32,
    ) -> Result<Vec<UnmatchedInvoice>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            (String, i64, i64),
            UNMATCHED,
            i64::from(limit)
        )?;
        session.done().await?;

        Ok(found
            .into_iter()
            .map(
                |(stripe_invoice_id, received_ms, events)| UnmatchedInvoice {
                    stripe_invoice_id,
                    received_ms,
                    events,
                },
            )
            .collect())
    }

    /// Counts the unreadable events that were received since then.
    pub async fn count_unreadable(&self, from_ms: i64) -> Result<Counted, StoreError> {
        let mut session = self.session().await?;
        let (count, since_ms) = rows!(
            session,
            fetch_one,
            (i64, Option<i64>),
            UNREADABLE,
            i64::from(COUNT_LIMIT),
            from_ms
        )?;
        session.done().await?;

        Ok(Counted { count, since_ms })
    }

    /// Counts the invoices that differ from Stripe's.
    pub async fn count_differing(&self) -> Result<Counted, StoreError> {
        let mut session = self.session().await?;
        let (count, since_ms) = rows!(
            session,
            fetch_one,
            (i64, Option<i64>),
            DIFFERING,
            i64::from(COUNT_LIMIT)
        )?;
        session.done().await?;

        Ok(Counted { count, since_ms })
    }

    /// Returns the space that the database uses and has left.
    pub async fn space(&self) -> Result<Space, StoreError> {
        match &self.0 {
            Engine::Sqlite(store) => store.space(),
            Engine::Postgres(_) => {
                let mut session = self.session().await?;
                let (bytes,) = rows!(
                    session,
                    fetch_one,
                    (i64,),
                    "select pg_database_size(current_database())"
                )?;
                session.done().await?;

                Ok(Space {
                    database: u64::try_from(bytes).unwrap_or_default(),
                    wal: None,
                    disk: None,
                })
            }
        }
    }

    /// Returns the clock of the database server, in Unix milliseconds, or `None` on SQLite, which
    /// uses this machine's clock.
    pub async fn time_ms(&self) -> Result<Option<i64>, StoreError> {
        if matches!(self.0, Engine::Sqlite(_)) {
            return Ok(None);
        }

        let mut session = self.session().await?;
        let now = "select cast(extract(epoch from clock_timestamp()) * 1000 as bigint)";
        let (now_ms,) = rows!(session, fetch_one, (i64,), now)?;
        session.done().await?;

        Ok(Some(now_ms))
    }
}

fn log_row(
    (key, received_ms, source, secret_label, observation, body): LogRowColumns,
) -> Result<LogRow, StoreError> {
    Ok(LogRow {
        key: event_key(key)?,
        received_ms,
        source: Source::parse(&source)?,
        secret_label,
        observation,
        body: body.map(PackedBody::packed),
    })
}

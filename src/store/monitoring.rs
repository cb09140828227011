//! What the person on call is told: when things last happened, which hours are busy, which invoices events wait for, and counts of
//! what is rare. Kept beside the deliveries, from what the log says, and never by them: it costs them nothing.
//!
//! Every statement is bounded by an index and a limit, however long the log is.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::engine::connection::{execute, rows};
use super::events::{LAST, PackedBody, Source, event_key};
use super::reconcile::CLOCKS_DIFFER_MS;
use super::{Engine, Store, StoreError};
use crate::domain::stripe::event::EventKey;

/// What is counted is counted as far as this; there may be more.
pub const COUNTED: u32 = 10_000;

/// A row of the log, with what the signs are read from.
#[derive(Clone, Debug)]
pub struct LogRow {
    pub key: EventKey,
    pub received_ms: i64,
    pub source: Source,
    pub secret_label: Option<String>,
    pub telling: Option<String>,
    /// Only where nothing is told, and it was not pruned.
    pub body: Option<PackedBody>,
}

/// What a part of the log adds to the signs. Times in Unix milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActivityDelta {
    /// When things last happened, by their names.
    pub moments: BTreeMap<String, i64>,
    /// Hours since 1970 in which webhooks came.
    pub hours: BTreeSet<i64>,
    /// The Stripe invoices that events name, and when the first of them came.
    pub named: BTreeMap<String, i64>,
}

/// A Stripe invoice that events name and that nobody stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnmatchedInvoice {
    pub stripe_invoice_id: String,
    /// When the first of its events came, Unix milliseconds.
    pub received_ms: i64,
    pub events: i64,
}

/// How many there are, up to [`COUNTED`], and since when, Unix milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    pub count: i64,
    pub since_ms: Option<i64>,
}

/// Room that the database takes and has, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    pub database: u64,
    /// SQLite: its log (WAL).
    pub log: Option<u64>,
    /// The file system that it is on, where we can see it.
    pub disk: Option<Disk>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    pub free: u64,
    pub size: u64,
}

const LOG_LINES: &str = "
    select key, received_ms, source, secret_label, telling, case when telling is null and outcome <> 'unreadable' then body end
    from events where (received_ms, key) > ($1, $2) and received_ms <= $3 order by received_ms, key limit $4";
type LogLineRow = (
    Vec<u8>,
    i64,
    String,
    Option<String>,
    Option<String>,
    Option<Vec<u8>>,
);

const MOMENTS: &str = "select name, at_ms from moments order by name limit 10000";
const NOTE_MOMENT: &str = "
    insert into moments (name, at_ms) values ($1, $2)
    on conflict (name) do update set at_ms = excluded.at_ms
    where moments.at_ms < excluded.at_ms or moments.at_ms > $3";
const HOURS: &str = "select hour from delivery_hours where hour >= $1 order by hour limit 10000";
const NOTE_HOUR: &str = "insert into delivery_hours (hour) values ($1) on conflict do nothing";
const FORGET_HOURS: &str = "delete from delivery_hours where hour < $1";

/// Whether an invoice is stored is looked up one by one: of `not exists`, PostgreSQL may make a join that reads all invoices.
/// `$1`: pairs of a Stripe invoice's id and a time, as JSON.
macro_rules! note_awaited {
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
const NOTE_AWAITED_IN_SQLITE: &str = note_awaited!("value->>0", "value->>1", "json_each($1)");
const NOTE_AWAITED_IN_POSTGRES: &str = note_awaited!(
    r#"(pair.value->>0) collate "C""#,
    "(pair.value->>1)::bigint",
    "jsonb_array_elements($1::jsonb)"
);
const FORGET_AWAITED: &str = "delete from awaited where received_ms < $1";
/// Who stored the invoice at the same moment may have been overlooked when it was noted.
const AWAITED: &str = "
    select stripe_invoice_id, received_ms, (select count(*) from mentions where object_id = stripe_invoice_id) as events
    from awaited
    where (select 1 from invoices where invoices.stripe_invoice_id = awaited.stripe_invoice_id) is null
    order by received_ms, stripe_invoice_id limit $1";

const UNREADABLE: &str = "
    select count(*), min(received_ms) from (
        select received_ms from events where outcome = 'unreadable' and received_ms >= $2 order by received_ms limit $1
    ) as counted";
const DIFFERING: &str = "
    select count(*), min(differs_since_ms)
    from (select differs_since_ms from invoices where differs_since_ms is not null order by differs_since_ms limit $1) as counted";

impl Store {
    /// A page of the log with what signs are read from, oldest receipt first: what was received later than `after_ms`, or comes
    /// after a row of the page before; and not later than now.
    pub async fn log_lines(
        &self,
        after_ms: i64,
        after: Option<(i64, EventKey)>,
        now_ms: i64,
        limit: u32,
    ) -> Result<Vec<LogRow>, StoreError> {
        let (received_ms, key) = after.unwrap_or((after_ms, LAST.1));
        let latest_ms = now_ms + CLOCKS_DIFFER_MS;
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            LogLineRow,
            LOG_LINES,
            received_ms,
            &key.0[..],
            latest_ms,
            i64::from(limit)
        )?;
        session.done().await?;
        found.into_iter().map(log_line).collect()
    }

    /// Keeps what a part of the log adds. Forgets hours before `first_hour`, and what was named before `named_from_ms`.
    pub async fn keep_news(
        &self,
        news: &ActivityDelta,
        now_ms: i64,
        first_hour: i64,
        named_from_ms: i64,
    ) -> Result<(), StoreError> {
        let pairs: Vec<_> = news
            .named
            .iter()
            .map(|(id, at_ms)| json!([id, at_ms]))
            .collect();
        let note_awaited = match &self.0 {
            Engine::Sqlite(_) => NOTE_AWAITED_IN_SQLITE,
            Engine::Postgres(_) => NOTE_AWAITED_IN_POSTGRES,
        };
        let mut session = self.writing().await?;
        // In one order, so that processes that keep news at the same time do not wait for each other in a circle.
        for (name, at_ms) in &news.moments {
            execute!(session, NOTE_MOMENT, name, at_ms, now_ms + CLOCKS_DIFFER_MS)?;
        }
        for hour in &news.hours {
            execute!(session, NOTE_HOUR, hour)?;
        }
        execute!(session, note_awaited, json!(pairs).to_string())?;
        execute!(session, FORGET_HOURS, first_hour)?;
        execute!(session, FORGET_AWAITED, named_from_ms)?;
        session.commit().await
    }

    /// Notes when things last happened, by their names. What is known to have happened later stays, unless that is later than now:
    /// a clock was ahead.
    pub async fn note_moments(
        &self,
        moments: &BTreeMap<String, i64>,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        for (name, at_ms) in moments {
            execute!(session, NOTE_MOMENT, name, at_ms, now_ms + CLOCKS_DIFFER_MS)?;
        }
        session.commit().await
    }

    /// When things last happened, by their names.
    pub async fn moments(&self) -> Result<BTreeMap<String, i64>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(session, fetch_all, (String, i64), MOMENTS)?;
        session.done().await?;
        Ok(found.into_iter().collect())
    }

    /// The hours since 1970, from this one on, in which webhooks came.
    pub async fn delivery_hours(&self, from: i64) -> Result<BTreeSet<i64>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(session, fetch_all, (i64,), HOURS, from)?;
        session.done().await?;
        Ok(found.into_iter().map(|(hour,)| hour).collect())
    }

    /// The Stripe invoices that events name and that nobody stored, whose first event came longest ago first.
    pub async fn awaited(&self, limit: u32) -> Result<Vec<UnmatchedInvoice>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            (String, i64, i64),
            AWAITED,
            i64::from(limit)
        )?;
        session.done().await?;
        let awaited = |(stripe_invoice_id, received_ms, events)| UnmatchedInvoice {
            stripe_invoice_id,
            received_ms,
            events,
        };
        Ok(found.into_iter().map(awaited).collect())
    }

    /// Events that came since and could not be read.
    pub async fn count_unreadable(&self, from_ms: i64) -> Result<Counted, StoreError> {
        let mut session = self.session().await?;
        let (count, since_ms) = rows!(
            session,
            fetch_one,
            (i64, Option<i64>),
            UNREADABLE,
            i64::from(COUNTED),
            from_ms
        )?;
        session.done().await?;
        Ok(Counted { count, since_ms })
    }

    /// Invoices that differ from Stripe's.
    pub async fn count_differing(&self) -> Result<Counted, StoreError> {
        let mut session = self.session().await?;
        let (count, since_ms) = rows!(
            session,
            fetch_one,
            (i64, Option<i64>),
            DIFFERING,
            i64::from(COUNTED)
        )?;
        session.done().await?;
        Ok(Counted { count, since_ms })
    }

    /// The room that the database takes, and that is left for it.
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
                    log: None,
                    disk: None,
                })
            }
        }
    }

    /// What time it is where the database is, in Unix milliseconds; None: where we are.
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

fn log_line(
    (key, received_ms, source, secret_label, telling, body): LogLineRow,
) -> Result<LogRow, StoreError> {
    let (key, source) = (event_key(key)?, Source::parse(&source)?);
    Ok(LogRow {
        key,
        received_ms,
        source,
        secret_label,
        telling,
        body: body.map(PackedBody::packed),
    })
}

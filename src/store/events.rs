//! The event log: reads pages and single events, and makes the few allowed changes.
//!
//! Deliveries are appended by `engine`. After that, only `prune` and `rebuild` change a row.

use super::engine::connection::{Connection, execute, rows};
use super::event_rows::{
    BodyRow, EventFilter, LoggedEvent, LoggedRow, NewEvent, ObservedRow, Outcome, StoredBody,
    logged, logged_columns, observed, stored_body,
};
pub(super) use super::event_rows::{PackedBody, Source, answers, event_key, firsts};
use super::{Engine, Store, StoreError};
use crate::domain::stripe::event::EventKey;

/// Position before every row, for pages in ascending order.
const FIRST: (i64, EventKey) = (i64::MIN, EventKey([0; EventKey::LENGTH]));
/// Position after every row, for pages in descending order.
pub(super) const LAST: (i64, EventKey) = (i64::MAX, EventKey([255; EventKey::LENGTH]));

/// A page of events with their observations, limited in number and in bytes.
#[derive(Clone, Debug)]
pub struct ObservedPage {
    /// Each event with its `Observation` as JSON.
    pub events: Vec<(LoggedEvent, Option<String>)>,
    /// `true` if more events may follow.
    pub has_more: bool,
}

const PAGE: &str = concat!(
    "select ",
    logged_columns!(),
    " from events
      where (received_ms, key) < ($1, $2) and ($3 is null or event_type = $3) and ($4 is null or outcome = $4)
      order by received_ms desc, key desc limit $5"
);
/// Selects unreadable events. Repeats the predicate of the partial index word for word, or planners
/// do not use the index: unreadable events are rare, and the log is long.
const PAGE_OF_UNREADABLE: &str = concat!(
    "select ",
    logged_columns!(),
    " from events
      where (received_ms, key) < ($1, $2) and ($3 is null or event_type = $3) and outcome = 'unreadable'
      order by received_ms desc, key desc limit $4"
);
const PAGE_OF_INVOICE: &str = concat!(
    "select ",
    logged_columns!(),
    " from events
      where (received_ms, key) < ($1, $2) and ($3 is null or event_type = $3) and ($4 is null or outcome = $4)
        and key in (select event_key from mentions where object_id = $6)
      order by received_ms desc, key desc limit $5"
);
/// Selects rows with their observations, up to the observation that reaches `$6` bytes, at least
/// one. `octet_length` reads the length without the text.
macro_rules! observed_page {
    ($filter:literal) => {
        concat!(
            "with page as (
                 select received_ms, key, coalesce(octet_length(telling), 0) as bytes from events
                 where (received_ms, key) < ($1, $2) and ($3 is null or event_type = $3)
                   and ($4 is null or outcome = $4) ",
            $filter,
            " order by received_ms desc, key desc limit $5
             ), counted as (
                 select key as counted_key, count(*) over () as found,
                        sum(bytes) over (order by received_ms desc, key desc) - bytes as bytes_before
                 from page
             )
             select ",
            logged_columns!(),
            ", telling, found from counted cross join events where key = counted_key and bytes_before < $6
             order by received_ms desc, key desc"
        )
    };
}
const OBSERVED_PAGE: &str = observed_page!("");
const OBSERVED_PAGE_OF_INVOICE: &str =
    observed_page!("and key in (select event_key from mentions where object_id = $7)");
/// Statement that first finds the rows by the start of their keys, then sorts them. Otherwise
/// PostgreSQL would scan the whole log in sort order.
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
/// Selects `$columns` of the events whose keys, in hexadecimal digits, are in the JSON array `$1`.
macro_rules! by_keys_in_sqlite {
    ($columns:expr) => {
        concat!(
            "select ",
            $columns,
            " from events where events.key in (select unhex(value) from json_each($1))"
        )
    };
}
macro_rules! by_keys_in_postgres {
    ($columns:expr) => {
        concat!(
            "select ",
            $columns,
            " from jsonb_array_elements_text($1::jsonb) as wanted
              cross join lateral (
                  select * from events where events.key = decode(wanted.value, 'hex') offset 0) as event"
        )
    };
}
const BY_KEYS_IN_SQLITE: &str = by_keys_in_sqlite!(logged_columns!());
const BY_KEYS_IN_POSTGRES: &str = by_keys_in_postgres!(logged_columns!());
const TIMES_IN_SQLITE: &str = by_keys_in_sqlite!("key, received_ms");
const TIMES_IN_POSTGRES: &str = by_keys_in_postgres!("key, received_ms");
const BODIES: &str = concat!(
    "select ",
    logged_columns!(),
    ", telling, body from events where (received_ms, key) > ($1, $2) order by received_ms, key limit $3"
);
const RECEIVED_BEFORE: &str = "
    select received_ms, key from events where (received_ms, key) > ($1, $2) and received_ms < $3
    order by received_ms, key limit $4";
const PRUNE: &str = "
    update events set body = null
    where (received_ms, key) > ($1, $2) and (received_ms, key) <= ($3, $4)
      and body is not null and outcome <> 'unreadable'";
const INSERT_EVENT: &str = concat!(
    "insert into events (",
    logged_columns!(),
    ", telling, linked, body) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
     on conflict do nothing"
);
/// Selects the keys of the pairs that are not stored. `$1` is a JSON array of pairs: an object, and
/// an event key in hexadecimal digits.
const UNMENTIONED_IN_SQLITE: &str = "
    select distinct unhex(value->>1) from json_each($1)
    where not exists (
        select 1 from mentions where object_id = value->>0 and event_key = unhex(value->>1))";
const UNMENTIONED_IN_POSTGRES: &str = r#"
    select distinct decode(wanted.value->>1, 'hex') from jsonb_array_elements($1::jsonb) as wanted
    left join lateral (
        select true as is_there from mentions
        where object_id = (wanted.value->>0) collate "C" and event_key = decode(wanted.value->>1, 'hex')
        offset 0) as found on true
    where is_there is null"#;
const INSERT_MENTION: &str =
    "insert into mentions (object_id, event_key) values ($1, $2) on conflict do nothing";

impl Store {
    /// Returns a page of the log, newest receipt first, after the receipt time (Unix milliseconds)
    /// and key of the last row of the previous page.
    pub async fn events_page(
        &self,
        filter: &EventFilter,
        after: Option<(i64, EventKey)>,
        limit: u32,
    ) -> Result<Vec<LoggedEvent>, StoreError> {
        let (received_ms, key) = after.unwrap_or(LAST);
        let event_type = &filter.event_type;
        let (key, outcome) = (&key.0[..], filter.outcome.map(Outcome::as_str));
        let limit = i64::from(limit);
        let mut session = self.session().await?;

        let rows = match &filter.stripe_invoice_id {
            Some(id) => {
                let sql = PAGE_OF_INVOICE;
                type Row = LoggedRow;
                rows!(
                    session,
                    fetch_all,
                    Row,
                    sql,
                    received_ms,
                    key,
                    event_type,
                    outcome,
                    limit,
                    id
                )
            }
            None if filter.outcome == Some(Outcome::Unreadable) => {
                let sql = PAGE_OF_UNREADABLE;
                rows!(
                    session,
                    fetch_all,
                    LoggedRow,
                    sql,
                    received_ms,
                    key,
                    event_type,
                    limit
                )
            }
            None => {
                let sql = PAGE;
                type Row = LoggedRow;
                rows!(
                    session,
                    fetch_all,
                    Row,
                    sql,
                    received_ms,
                    key,
                    event_type,
                    outcome,
                    limit
                )
            }
        }?;
        session.done().await?;
        rows.into_iter().map(logged).collect()
    }

    /// Returns a page as [`Store::events_page`] does, with the observation of each event. The page
    /// ends with the observation that reaches `max_bytes`.
    pub async fn observed_page(
        &self,
        filter: &EventFilter,
        after: Option<(i64, EventKey)>,
        limit: u32,
        max_bytes: usize,
    ) -> Result<ObservedPage, StoreError> {
        let (ms, key) = after.unwrap_or(LAST);
        let kind = &filter.event_type;
        let (key, outcome) = (&key.0[..], filter.outcome.map(Outcome::as_str));
        let bytes = i64::try_from(max_bytes).unwrap_or(i64::MAX);
        let max = i64::from(limit);
        let mut session = self.session().await?;

        type Row = ObservedRow;
        let rows = if let Some(id) = &filter.stripe_invoice_id {
            let sql = OBSERVED_PAGE_OF_INVOICE;
            rows!(
                session, fetch_all, Row, sql, ms, key, kind, outcome, max, bytes, id
            )
        } else {
            let sql = OBSERVED_PAGE;
            rows!(
                session, fetch_all, Row, sql, ms, key, kind, outcome, max, bytes
            )
        }?;
        session.done().await?;

        let found = rows.first().map_or(0, |row| row.12);
        let has_more = found > rows.len() as i64 || found == max;
        let events = rows.into_iter().map(observed).collect::<Result<_, _>>()?;
        Ok(ObservedPage { events, has_more })
    }

    /// Returns a page of the renderings of an event, oldest receipt first.
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
        let sql = BY_ID;
        let rows = rows!(
            session,
            fetch_all,
            LoggedRow,
            sql,
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

    /// Returns an event with its body, by its key.
    pub async fn event_by_key(&self, key: &EventKey) -> Result<Option<StoredBody>, StoreError> {
        let mut session = self.session().await?;
        let row = rows!(session, fetch_optional, BodyRow, BODY_BY_KEY, &key.0[..])?;
        session.done().await?;
        row.map(stored_body).transpose()
    }

    /// Returns the rows of these events, in no order. Keys that are not in the log are left out.
    pub async fn events_by_keys(&self, keys: &[EventKey]) -> Result<Vec<LoggedEvent>, StoreError> {
        let sql = match &self.0 {
            Engine::Sqlite(_) => BY_KEYS_IN_SQLITE,
            Engine::Postgres(_) => BY_KEYS_IN_POSTGRES,
        };
        let mut session = self.session().await?;
        let keys = json_of(keys);
        let found = rows!(session, fetch_all, LoggedRow, sql, keys.as_str())?;
        session.done().await?;
        found.into_iter().map(logged).collect()
    }

    /// Returns the receipt times of these events in Unix milliseconds, in no order. Keys that are
    /// not in the log are left out.
    pub async fn received_times(
        &self,
        keys: &[EventKey],
    ) -> Result<Vec<(EventKey, i64)>, StoreError> {
        let sql = match &self.0 {
            Engine::Sqlite(_) => TIMES_IN_SQLITE,
            Engine::Postgres(_) => TIMES_IN_POSTGRES,
        };
        let mut session = self.session().await?;
        let keys = json_of(keys);
        let found = rows!(session, fetch_all, (Vec<u8>, i64), sql, keys.as_str())?;
        session.done().await?;

        found
            .into_iter()
            .map(|(key, received_ms)| Ok((event_key(key)?, received_ms)))
            .collect()
    }

    /// Returns a page of the log with bodies, oldest receipt first.
    pub async fn stored_bodies(
        &self,
        after: Option<(i64, EventKey)>,
        limit: u32,
    ) -> Result<Vec<StoredBody>, StoreError> {
        let (received_ms, key) = after.unwrap_or(FIRST);
        let (key, limit) = (&key.0[..], i64::from(limit));
        let mut session = self.session().await?;
        let rows = rows!(session, fetch_all, BodyRow, BODIES, received_ms, key, limit)?;
        session.done().await?;
        rows.into_iter().map(stored_body).collect()
    }

    /// Returns the keys of those events that are not stored with all their mentions.
    pub async fn unmentioned(&self, events: &[&NewEvent]) -> Result<Vec<EventKey>, StoreError> {
        let sql = match &self.0 {
            Engine::Sqlite(_) => UNMENTIONED_IN_SQLITE,
            Engine::Postgres(_) => UNMENTIONED_IN_POSTGRES,
        };
        let mut wanted: Vec<(&str, String)> = Vec::new();
        for event in events {
            let key = hex::encode(event.key.0);
            for mention in &event.mentions {
                wanted.push((&mention.object_id, key.clone()));
            }
        }
        let wanted = serde_json::to_string(&wanted).expect("strings always serialise");

        let mut session = self.session().await?;
        let found = rows!(session, fetch_all, (Vec<u8>,), sql, wanted.as_str())?;
        session.done().await?;
        found.into_iter().map(|(key,)| event_key(key)).collect()
    }

    /// Deletes the bodies of up to `limit` events that were received before `before_ms`, in the
    /// order of their receipt.
    ///
    /// Returns how many events had a body, and where the next step begins, or `None` after the last
    /// step. Unreadable events keep their body, because it is the only information about them.
    ///
    /// The position is read before the transaction, which then holds the write lock for one
    /// statement.
    pub async fn forget_bodies(
        &self,
        before_ms: i64,
        after: Option<(i64, EventKey)>,
        limit: u32,
    ) -> Result<(u64, Option<(i64, EventKey)>), StoreError> {
        let (received_ms, key) = after.unwrap_or(FIRST);
        let (key, limit) = (&key.0[..], i64::from(limit));
        let mut session = self.session().await?;
        type Row = (i64, Vec<u8>);
        let sql = RECEIVED_BEFORE;
        let found = rows!(
            session,
            fetch_all,
            Row,
            sql,
            received_ms,
            key,
            before_ms,
            limit
        )?;
        session.done().await?;
        let Some((last_ms, last_key)) = found.last() else {
            return Ok((0, None));
        };

        let mut session = self.writing().await?;
        let pruned = execute!(session, PRUNE, received_ms, key, *last_ms, &last_key[..])?;
        session.commit().await?;
        Ok((pruned, Some((*last_ms, event_key(last_key.clone())?))))
    }

    /// Replaces events by the result of reading the same bytes with this version, in one
    /// transaction.
    ///
    /// An event that became readable gets a new key. If that key is in the log already, only the
    /// old row is deleted. Old mentions stay; they lead to no row and are harmless.
    pub async fn replace_readings(&self, batch: &[(EventKey, NewEvent)]) -> Result<(), StoreError> {
        let mut session = self.transaction().await?;
        for (old, event) in batch {
            execute!(session, "delete from events where key = $1", &old.0[..])?;
            insert(&mut session, event).await?;
        }
        session.commit().await
    }
}

/// Returns a JSON array of the keys in hexadecimal digits.
fn json_of(keys: &[EventKey]) -> String {
    let keys: Vec<String> = keys.iter().map(|key| hex::encode(key.0)).collect();
    serde_json::to_string(&keys).expect("strings always serialise")
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
        &event.observation,
        event.linked(),
        event.body.as_bytes()
    )?;
    for mention in &event.mentions {
        execute!(session, INSERT_MENTION, &mention.object_id, key)?;
    }

    Ok(())
}

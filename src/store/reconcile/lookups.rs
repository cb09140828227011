//! Events that need a call to Stripe's API, and when each is due.

use crate::domain::history::{DamagedObservation, StoredObservation};
use crate::domain::stripe::event::EventKey;
use crate::store::engine::connection::{execute, rows};
use crate::store::events::{PackedBody, event_key};
use crate::store::{COUNT_LIMIT, Engine, Store, StoreError};

use super::checks::COUNT_DUE;

/// An event that needs a call to Stripe's API.
#[derive(Clone, Debug)]
pub struct PendingLookup {
    pub key: EventKey,
    /// The stored observation, as JSON.
    pub observation: Option<String>,
    /// The stored bytes; absent after pruning.
    pub body: Option<Vec<u8>>,
    /// Number of lookups so far.
    pub attempts: i64,
}

impl PendingLookup {
    /// Parses the observation; `None` if the event has none.
    pub fn parse_observation(&self) -> Option<Result<StoredObservation, DamagedObservation>> {
        let json = self.observation.as_deref()?;
        Some(StoredObservation::parse(self.key, json))
    }
}

/// The subject of a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupKind {
    /// The object of a thin event.
    Object,
    /// The invoice that a payment belongs to.
    Invoice,
}

/// The state of the lookup for an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookupState {
    pub key: EventKey,
    /// Unix milliseconds of the next lookup; `None` if no further one is planned.
    pub due_ms: Option<i64>,
    /// Number of lookups so far, all without success.
    pub attempts: i64,
}

/// Pending calls to Stripe's API, each count up to [`COUNT_LIMIT`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Thin events whose object is to be fetched.
    pub objects: i64,
    /// Payment events whose invoice may be unknown.
    pub links: i64,
    /// Invoices that are due to be compared.
    pub checks: i64,
}

/// Columns of a pending lookup: key, observation, body, attempts.
type LookupRow = (Vec<u8>, Option<String>, Option<Vec<u8>>, i64);

/// The predicates repeat those of the partial indexes word for word; otherwise the planner does not
/// use the indexes.
macro_rules! due_lookups {
    ($which:literal) => {
        [
            concat!(
                "select key, telling, body, ask_attempts from events where ",
                $which,
                " and ask_due_ms is not null and ask_due_ms <= $1 order by ask_due_ms limit $2"
            ),
            concat!(
                "select count(*) from (select 1 from events where ",
                $which,
                " and ask_due_ms is not null and ask_due_ms <= $1 limit $2) as counted"
            ),
        ]
    };
}
/// Pairs of a statement that reads lookups and one that counts them.
const OBJECT_LOOKUPS: [[&str; 2]; 1] = [due_lookups!("event_type >= 'v1.' and event_type < 'v1/'")];
const INVOICE_LOOKUPS: [[&str; 2]; 3] = [
    due_lookups!("event_type >= 'charge.' and event_type < 'charge/' and outcome = 'recorded'"),
    due_lookups!(
        "event_type >= 'payment_intent.' and event_type < 'payment_intent/' and outcome = 'recorded'"
    ),
    due_lookups!("event_type >= 'refund.' and event_type < 'refund/' and outcome = 'recorded'"),
];
const LOOKUP_STATE: &str = "select key, ask_due_ms, ask_attempts from events where key = $1";
const MARK_LOOKUP: &str = "update events set ask_due_ms = $2, ask_attempts = $3 where key = $1";

const KNOWN_ID: &str = "select id from events where key between $1 and $2 and id = $3 limit 1";

/// Most events name no account, so matching the text is cheaper than parsing the JSON of each.
macro_rules! accounts_since {
    ($account:literal) => {
        concat!(
            "select distinct ",
            $account,
            " from events where received_ms >= $1 and telling like '%\"account\":\"acct_%'"
        )
    };
}
const ACCOUNTS_IN_SQLITE: &str = accounts_since!("telling->>'$.account'");
const ACCOUNTS_IN_POSTGRES: &str = accounts_since!("telling::jsonb->>'account'");

impl Store {
    /// Returns events whose lookup is due, the longest due first, up to `limit` per event family.
    pub async fn due_lookups(
        &self,
        kind: LookupKind,
        now_ms: i64,
        limit: u32,
    ) -> Result<Vec<PendingLookup>, StoreError> {
        let statements: &[[&'static str; 2]] = match kind {
            LookupKind::Object => &OBJECT_LOOKUPS,
            LookupKind::Invoice => &INVOICE_LOOKUPS,
        };

        let mut session = self.session().await?;
        let mut found = Vec::new();
        for &[statement, _] in statements {
            found.extend(rows!(
                session,
                fetch_all,
                LookupRow,
                statement,
                now_ms,
                i64::from(limit)
            )?);
        }
        session.done().await?;

        found.into_iter().map(pending_lookup).collect()
    }

    /// Counts the pending calls to Stripe's API.
    pub async fn backlog(&self, now_ms: i64) -> Result<Backlog, StoreError> {
        let mut session = self.session().await?;
        let mut counts = Vec::new();
        for statement in OBJECT_LOOKUPS
            .iter()
            .chain(&INVOICE_LOOKUPS)
            .map(|[_, count]| *count)
            .chain([COUNT_DUE])
        {
            let (count,) = rows!(
                session,
                fetch_one,
                (i64,),
                statement,
                now_ms,
                i64::from(COUNT_LIMIT)
            )?;
            counts.push(count);
        }
        session.done().await?;

        let [objects, charges, intents, refunds, checks] = counts[..] else {
            unreachable!("there is one count per statement")
        };
        Ok(Backlog {
            objects,
            links: charges + intents + refunds,
            checks,
        })
    }

    /// Records when these events are to be looked up next, and how often they were.
    pub async fn mark_lookup(&self, lookups: &[LookupState]) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        for lookup in lookups {
            execute!(
                session,
                MARK_LOOKUP,
                &lookup.key.0[..],
                lookup.due_ms,
                lookup.attempts
            )?;
        }
        session.commit().await
    }

    /// Returns the lookup states of these events, in no particular order. Unknown events are left
    /// out.
    pub async fn lookup_states(&self, keys: &[EventKey]) -> Result<Vec<LookupState>, StoreError> {
        let mut found = Vec::with_capacity(keys.len());
        let mut session = self.session().await?;
        for key in keys {
            found.extend(rows!(
                session,
                fetch_optional,
                (Vec<u8>, Option<i64>, i64),
                LOOKUP_STATE,
                &key.0[..]
            )?);
        }
        session.done().await?;

        found
            .into_iter()
            .map(|(key, due_ms, attempts)| {
                Ok(LookupState {
                    key: event_key(key)?,
                    due_ms,
                    attempts,
                })
            })
            .collect()
    }

    /// Returns the events among these that the log has with exactly these bytes.
    pub async fn known_keys(&self, keys: &[EventKey]) -> Result<Vec<EventKey>, StoreError> {
        let mut found = Vec::new();
        let mut session = self.session().await?;
        for key in keys {
            found.extend(rows!(
                session,
                fetch_optional,
                (Vec<u8>,),
                "select key from events where key = $1",
                &key.0[..]
            )?);
        }
        session.done().await?;

        found.into_iter().map(|(key,)| event_key(key)).collect()
    }

    /// Returns the event ids among these that the log has, with any bytes.
    pub async fn known_ids(&self, ids: &[&str]) -> Result<Vec<String>, StoreError> {
        let mut found = Vec::new();
        let mut session = self.session().await?;
        for &id in ids {
            let (first, last) = EventKey::range(id);
            found.extend(rows!(
                session,
                fetch_optional,
                (String,),
                KNOWN_ID,
                &first.0[..],
                &last.0[..],
                id
            )?);
        }
        session.done().await?;

        Ok(found.into_iter().map(|(id,)| id).collect())
    }

    /// Returns the connected accounts named by events that were received since then.
    pub async fn accounts_since(&self, received_ms: i64) -> Result<Vec<String>, StoreError> {
        let sql = match &self.0 {
            Engine::Sqlite(_) => ACCOUNTS_IN_SQLITE,
            Engine::Postgres(_) => ACCOUNTS_IN_POSTGRES,
        };
        let mut session = self.session().await?;
        let found = rows!(session, fetch_all, (Option<String>,), sql, received_ms)?;
        session.done().await?;

        Ok(found.into_iter().filter_map(|(account,)| account).collect())
    }
}

fn pending_lookup(
    (key, observation, packed, attempts): LookupRow,
) -> Result<PendingLookup, StoreError> {
    let key = event_key(key)?;
    let body = packed
        .map(|packed| {
            PackedBody::packed(packed).unpack().ok_or_else(|| {
                StoreError::damaged(format!("the body of event {}", hex::encode(key.0)))
            })
        })
        .transpose()?;

    Ok(PendingLookup {
        key,
        observation,
        body,
        attempts,
    })
}

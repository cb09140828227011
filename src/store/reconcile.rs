//! What reconciliation with Stripe's API keeps: how far it has come, what remains to be asked, when each invoice was compared,
//! who is at it, and the reports of the last passes.

use serde_json::value::RawValue;

use super::engine::connection::{execute, rows};
use super::events::{PackedBody, event_key};
use super::monitoring::COUNTED;
use super::{Engine, Store, StoreError};
use crate::domain::stripe::event::EventKey;

/// An event that something is to be asked about.
#[derive(Clone, Debug)]
pub struct PendingLookup {
    pub key: EventKey,
    pub telling: Option<String>,
    /// None: it was pruned.
    pub body: Option<Vec<u8>>,
    /// How often it was tried.
    pub attempts: i64,
}

/// Which events something is to be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupKind {
    /// Thin events, whose object is to be fetched.
    Object,
    /// Events of payments, whose invoice may be unknown.
    Invoice,
}

/// How far asking about an event has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookupState {
    pub key: EventKey,
    /// When it is due, Unix milliseconds; None: never again.
    pub due_ms: Option<i64>,
    /// How often it was tried in vain.
    pub attempts: i64,
}

/// How an invoice stands to Stripe's. Times in Unix milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// None: it is settled, and only compared by samples.
    pub check_due_ms: Option<i64>,
    /// When Stripe's API last agreed.
    pub confirmed_ms: Option<i64>,
    pub differs_since_ms: Option<i64>,
}

/// A stored invoice that is to be compared with Stripe's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckCandidate {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: String,
    /// Unix milliseconds; None: never.
    pub differs_since_ms: Option<i64>,
}

/// What comparing an invoice came to. Times in Unix milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckResult {
    pub stripe_invoice_id: String,
    pub checked_ms: i64,
    /// None: it is settled.
    pub check_due_ms: Option<i64>,
    pub differs_since_ms: Option<i64>,
    pub agrees: bool,
}

/// A pass that ended.
#[derive(Clone, Debug)]
pub struct Run {
    pub id: String,
    /// Unix milliseconds. So is the next.
    pub started_ms: i64,
    pub ended_ms: i64,
    /// JSON.
    pub report: Box<RawValue>,
}

/// What waits to be asked at Stripe, each up to [`COUNTED`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Thin events, whose object is to be fetched.
    pub objects: i64,
    /// Events of payments, whose invoice may be unknown.
    pub links: i64,
    /// Invoices whose time to be compared has come.
    pub checks: i64,
}

/// Passes that are kept.
const RUNS: i64 = 200;

/// The predicates are those of the partial indices, word for word: only then are these used.
macro_rules! to_ask {
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
/// The events, and how many there are.
const TO_FETCH: [[&str; 2]; 1] = [to_ask!("event_type >= 'v1.' and event_type < 'v1/'")];
const TO_LINK: [[&str; 2]; 3] = [
    to_ask!("event_type >= 'charge.' and event_type < 'charge/' and outcome = 'recorded'"),
    to_ask!(
        "event_type >= 'payment_intent.' and event_type < 'payment_intent/' and outcome = 'recorded'"
    ),
    to_ask!("event_type >= 'refund.' and event_type < 'refund/' and outcome = 'recorded'"),
];
type ToAskRow = (Vec<u8>, Option<String>, Option<Vec<u8>>, i64);
const ASKED_ABOUT: &str = "select key, ask_due_ms, ask_attempts from events where key = $1";
const ASKED: &str = "update events set ask_due_ms = $2, ask_attempts = $3 where key = $1";

const ID: &str = "select id from events where key between $1 and $2 and id = $3 limit 1";

const WITH_STRIPE_INVOICE: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, differs_since_ms from invoices
    where stripe_invoice_id > $1 order by stripe_invoice_id limit $2";
const DUE: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, differs_since_ms from invoices
    where check_due_ms is not null and check_due_ms <= $1 and stripe_invoice_id is not null and stored_ms <= $3
    order by check_due_ms limit $2";
const COUNT_DUE: &str = "
    select count(*) from (
        select 1 from invoices where check_due_ms is not null and check_due_ms <= $1 and stripe_invoice_id is not null limit $2
    ) as counted";
const SAMPLE: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, differs_since_ms from invoices
    where check_due_ms is null and stripe_invoice_id is not null and checked_ms <= $1 order by checked_ms limit $2";
const ONE: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, differs_since_ms from invoices where stripe_invoice_id = $1";
const COMPARISON: &str = "select check_due_ms, confirmed_ms, differs_since_ms from invoices where tenant_uid = $1 and invoice_uid = $2";
type ComparisonRow = (Option<i64>, Option<i64>, Option<i64>);
type ToCheckRow = (String, String, String, Option<i64>);
const CHECKED: &str = "
    update invoices set checked_ms = $2, check_due_ms = $3, differs_since_ms = $4,
                        confirmed_ms = case when $5 then $2 else confirmed_ms end
    where stripe_invoice_id = $1";

/// Most events name no account: the text tells that sooner than the JSON does.
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

const PROGRESS: &str =
    "select name, value from progress where name >= $1 and name < $2 order by name limit 10000";
const SET_PROGRESS: &str = "insert into progress (name, value) values ($1, $2) on conflict (name) do update set value = excluded.value";

/// How much the clocks of processes on the same database may differ.
pub const CLOCKS_DIFFER_MS: i64 = 60_000;
/// One statement, so that two cannot both take it.
const TAKE_LEASE: &str = "
    insert into leases (name, holder, expires_ms) values ($1, $2, $3)
    on conflict (name) do update set holder = excluded.holder, expires_ms = excluded.expires_ms
    where leases.holder = excluded.holder or leases.expires_ms <= $4 or leases.expires_ms > $5";
const LEASE: &str = "select holder, expires_ms from leases where name = $1";
const RELEASE: &str = "delete from leases where name = $1 and holder = $2";

const KEEP_RUN: &str =
    "insert into runs (id, started_ms, ended_ms, report) values ($1, $2, $3, $4)";
const FORGET_RUNS: &str =
    "delete from runs where id not in (select id from runs order by started_ms desc, id limit $1)";
const LAST_RUNS: &str = "select id, started_ms, ended_ms, report from runs where started_ms <= $2 order by started_ms desc, id limit $1";

impl Store {
    /// Events whose time to be asked about has come, the longest due first.
    pub async fn to_ask(
        &self,
        asked: LookupKind,
        now_ms: i64,
        limit: u32,
    ) -> Result<Vec<PendingLookup>, StoreError> {
        let mut session = self.session().await?;
        let mut found = Vec::new();
        let statements: &[[&'static str; 2]] = match asked {
            LookupKind::Object => &TO_FETCH,
            LookupKind::Invoice => &TO_LINK,
        };
        for &[statement, _] in statements {
            found.extend(rows!(
                session,
                fetch_all,
                ToAskRow,
                statement,
                now_ms,
                i64::from(limit)
            )?);
        }
        session.done().await?;
        found.into_iter().map(to_ask).collect()
    }

    /// How much waits to be asked at Stripe.
    pub async fn backlog(&self, now_ms: i64) -> Result<Backlog, StoreError> {
        let mut session = self.session().await?;
        let mut counts = Vec::new();
        for statement in TO_FETCH
            .iter()
            .chain(&TO_LINK)
            .map(|[_, count]| *count)
            .chain([COUNT_DUE])
        {
            let (count,) = rows!(
                session,
                fetch_one,
                (i64,),
                statement,
                now_ms,
                i64::from(COUNTED)
            )?;
            counts.push(count);
        }
        session.done().await?;
        let [objects, charges, intents, refunds, checks] = counts[..] else {
            unreachable!("as many as there are statements")
        };
        Ok(Backlog {
            objects,
            links: charges + intents + refunds,
            checks,
        })
    }

    /// Notes when to ask about these events again (None: never), and how often it was tried.
    pub async fn mark_lookup(
        &self,
        asked: &[(EventKey, Option<i64>, i64)],
    ) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        for (key, due_ms, attempts) in asked {
            execute!(session, ASKED, &key.0[..], due_ms, attempts)?;
        }
        session.commit().await
    }

    /// How far asking about these events has come, in no order; those that are not there are left out.
    pub async fn asked_about(&self, keys: &[EventKey]) -> Result<Vec<LookupState>, StoreError> {
        let mut found = Vec::with_capacity(keys.len());
        let mut session = self.session().await?;
        for key in keys {
            found.extend(rows!(
                session,
                fetch_optional,
                (Vec<u8>, Option<i64>, i64),
                ASKED_ABOUT,
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

    /// Which of these events are in the log, in this rendering.
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

    /// Which of these event ids are in the log, in any rendering.
    pub async fn known_ids(&self, ids: &[&str]) -> Result<Vec<String>, StoreError> {
        let mut found = Vec::new();
        let mut session = self.session().await?;
        for &id in ids {
            let (first, last) = EventKey::range(id);
            found.extend(rows!(
                session,
                fetch_optional,
                (String,),
                ID,
                &first.0[..],
                &last.0[..],
                id
            )?);
        }
        session.done().await?;
        Ok(found.into_iter().map(|(id,)| id).collect())
    }

    /// A page of the invoices that name a Stripe invoice, by its id, after this one.
    pub async fn all_to_check(
        &self,
        after: &str,
        limit: u32,
    ) -> Result<Vec<CheckCandidate>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            ToCheckRow,
            WITH_STRIPE_INVOICE,
            after,
            i64::from(limit)
        )?;
        session.done().await?;
        Ok(found.into_iter().map(to_check).collect())
    }

    /// Invoices that are not settled, whose time to be compared has come, the longest due first; none that was stored later than
    /// `stored_before_ms`.
    pub async fn due_to_check(
        &self,
        now_ms: i64,
        stored_before_ms: i64,
        limit: u32,
    ) -> Result<Vec<CheckCandidate>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            ToCheckRow,
            DUE,
            now_ms,
            i64::from(limit),
            stored_before_ms
        )?;
        session.done().await?;
        Ok(found.into_iter().map(to_check).collect())
    }

    /// Settled invoices that were compared last before this time, the longest ago first.
    pub async fn sample_to_check(
        &self,
        before_ms: i64,
        limit: u32,
    ) -> Result<Vec<CheckCandidate>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            ToCheckRow,
            SAMPLE,
            before_ms,
            i64::from(limit)
        )?;
        session.done().await?;
        Ok(found.into_iter().map(to_check).collect())
    }

    /// The invoices that name these Stripe invoices.
    pub async fn to_check(
        &self,
        stripe_invoice_ids: &[&str],
    ) -> Result<Vec<CheckCandidate>, StoreError> {
        let mut found = Vec::new();
        let mut session = self.session().await?;
        for &id in stripe_invoice_ids {
            found.extend(rows!(session, fetch_optional, ToCheckRow, ONE, id)?);
        }
        session.done().await?;
        Ok(found.into_iter().map(to_check).collect())
    }

    /// How an invoice stands to Stripe's; None: there is no such invoice.
    pub async fn comparison(
        &self,
        tenant_uid: &str,
        invoice_uid: &str,
    ) -> Result<Option<Comparison>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_optional,
            ComparisonRow,
            COMPARISON,
            tenant_uid,
            invoice_uid
        )?;
        session.done().await?;
        Ok(found.map(
            |(check_due_ms, confirmed_ms, differs_since_ms)| Comparison {
                check_due_ms,
                confirmed_ms,
                differs_since_ms,
            },
        ))
    }

    pub async fn note_checked(&self, checked: &[CheckResult]) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        for CheckResult {
            stripe_invoice_id,
            checked_ms,
            check_due_ms,
            differs_since_ms,
            agrees,
        } in checked
        {
            execute!(
                session,
                CHECKED,
                stripe_invoice_id,
                checked_ms,
                check_due_ms,
                differs_since_ms,
                agrees
            )?;
        }
        session.commit().await
    }

    /// The connected accounts that events name which were received since.
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

    /// How far the work has come whose name begins so.
    pub async fn progress(&self, prefix: &str) -> Result<Vec<(String, i64)>, StoreError> {
        let mut session = self.session().await?;
        let end = format!("{prefix}\u{7f}");
        let found = rows!(
            session,
            fetch_all,
            (String, i64),
            PROGRESS,
            prefix,
            end.as_str()
        )?;
        session.done().await?;
        Ok(found)
    }

    pub async fn set_progress(&self, name: &str, value: i64) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        execute!(session, SET_PROGRESS, name, value)?;
        session.commit().await
    }

    /// Takes or keeps a lease until `expires_ms`. False: another holds it. One that lasts much longer than this one would was taken
    /// by a clock that was ahead, and is none.
    pub async fn take_lease(
        &self,
        name: &str,
        holder: &str,
        now_ms: i64,
        expires_ms: i64,
    ) -> Result<bool, StoreError> {
        let mut session = self.writing().await?;
        let too_late_ms = expires_ms + CLOCKS_DIFFER_MS;
        let taken = execute!(
            session,
            TAKE_LEASE,
            name,
            holder,
            expires_ms,
            now_ms,
            too_late_ms
        )?;
        session.commit().await?;
        Ok(taken == 1)
    }

    /// Who holds a lease, and until when, whatever the clock was that it was taken by.
    pub async fn lease(&self, name: &str) -> Result<Option<(String, i64)>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(session, fetch_optional, (String, i64), LEASE, name)?;
        session.done().await?;
        Ok(found)
    }

    pub async fn release_lease(&self, name: &str, holder: &str) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        execute!(session, RELEASE, name, holder)?;
        session.commit().await
    }

    /// Keeps the report of a pass; of the oldest passes it forgets theirs.
    pub async fn keep_run(&self, run: &Run) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        execute!(
            session,
            KEEP_RUN,
            &run.id,
            run.started_ms,
            run.ended_ms,
            run.report.get()
        )?;
        execute!(session, FORGET_RUNS, RUNS)?;
        session.commit().await
    }

    /// The last passes that began no later than then, the latest first.
    pub async fn last_runs(&self, limit: u32, until_ms: i64) -> Result<Vec<Run>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            (String, i64, i64, String),
            LAST_RUNS,
            i64::from(limit),
            until_ms
        )?;
        session.done().await?;
        found.into_iter().map(run).collect()
    }
}

fn to_ask((key, telling, packed, attempts): ToAskRow) -> Result<PendingLookup, StoreError> {
    let key = event_key(key)?;
    let damaged = || {
        StoreError::damaged(format!(
            "the body of event {} is damaged",
            hex::encode(key.0)
        ))
    };
    let body = packed
        .map(|packed| PackedBody::packed(packed).unpack().ok_or_else(damaged))
        .transpose()?;
    Ok(PendingLookup {
        key,
        telling,
        body,
        attempts,
    })
}

fn to_check(
    (tenant_uid, invoice_uid, stripe_invoice_id, differs_since_ms): ToCheckRow,
) -> CheckCandidate {
    CheckCandidate {
        tenant_uid,
        invoice_uid,
        stripe_invoice_id,
        differs_since_ms,
    }
}

fn run((id, started_ms, ended_ms, report): (String, i64, i64, String)) -> Result<Run, StoreError> {
    let damaged = |e: serde_json::Error| {
        StoreError::damaged(format!("the report of pass {id} is damaged: {e}"))
    };
    let report = RawValue::from_string(report).map_err(damaged)?;
    Ok(Run {
        id,
        started_ms,
        ended_ms,
        report,
    })
}

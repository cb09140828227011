//! Invariants of the database that must hold at every point, because a crash leaves exactly that
//! state.
//!
//! The observation and the objects of each logged event equal those of reading its bytes again. The
//! log has everything that Stripe listed up to the saved progress, and the object of every thin
//! event without a pending lookup.

use std::collections::{BTreeMap, BTreeSet};

use stripe_reconciler::domain::stripe::event::{EventKey, FETCHED, Observation, Reading, read};
use stripe_reconciler::ingest::{Delivery, prepare};
use stripe_reconciler::store::{
    LoggedEvent, LookupKind, NewEvent, ProgressKey, Store, StoredBody, Table, Value,
};

use testkit::stripe::{Event, Stripe};

/// Events read from the log per page.
const PAGE: u32 = 500;
/// Limit on thin events with a pending lookup.
const WAITING: u32 = 10_000;
/// The next run still finds events that are listed late by at most this many seconds.
const OVERLAP_S: i64 = 3600;

/// State of the database as another process sees it.
pub struct Durable {
    /// Progress of the runs in Stripe's list of events, in Unix seconds, by account (`None` is
    /// ours).
    progress: Vec<(Option<String>, i64)>,
    /// Thin events whose object is still to be fetched.
    waiting: BTreeSet<EventKey>,
    /// Logged events, oldest receipt first.
    pub log: Vec<StoredBody>,
    /// Objects with the keys of the events that mention them.
    mentions: BTreeSet<(String, Vec<u8>)>,
}

impl Durable {
    /// Reads the state. Promises are read before the data they promise, because the program may
    /// continue meanwhile.
    pub async fn read(store: &Store) -> Durable {
        let mut progress = Vec::new();
        if let Some(until) = store.progress(&ProgressKey::Events).await.unwrap() {
            progress.push((None, until));
        }

        for account in store.known_accounts(u32::MAX).await.unwrap() {
            let key = ProgressKey::AccountEvents(account.clone());
            if let Some(until) = store.progress(&key).await.unwrap() {
                progress.push((Some(account), until));
            }
        }

        let waiting = store
            .due_lookups(LookupKind::Object, i64::MAX, WAITING)
            .await
            .unwrap();
        let waiting = waiting.into_iter().map(|event| event.key).collect();
        let (mut log, mut after) = (Vec::new(), None);

        loop {
            let page = store.stored_bodies(after, PAGE).await.unwrap();
            let Some(last) = page.last() else { break };
            after = Some((last.logged.received_ms, last.logged.key));
            log.extend(page);
        }

        Durable {
            progress,
            waiting,
            log,
            mentions: mentions(store).await,
        }
    }
}

async fn mentions(store: &Store) -> BTreeSet<(String, Vec<u8>)> {
    let table = Table::ALL
        .into_iter()
        .find(|table| table.name == "mentions")
        .expect("it is one of them");
    let (mut mentions, mut after) = (BTreeSet::new(), None);

    loop {
        let page = store.rows_after(table, after.as_deref()).await.unwrap();
        for row in &page.rows {
            let [Value::Text(Some(object)), Value::Bytes(Some(key))] = row.key() else {
                panic!("no mention: {row:?}")
            };
            mentions.insert((object.clone(), key.clone()));
        }
        after = page.rows.last().map(|row| row.key().to_vec());
        if page.is_last {
            return mentions;
        }
    }
}

#[derive(Default)]
pub struct Invariants {
    /// Immutable rows of the log, and the objects that each mentions.
    rows: BTreeMap<EventKey, (StoredBody, Vec<String>)>,
    /// Stripe's events at the start of the last run that may have saved progress.
    listed_at_stripe: Vec<Event>,
    /// Events missing from the lagging list at the start of a run that may have been the last to
    /// request them.
    unlisted: BTreeSet<String>,
    /// Whether a run was abandoned whose last statement may still be executed.
    is_given_up: bool,
    progress: BTreeMap<Option<String>, i64>,
    /// Events that the runs have passed, by key: event and type.
    result: BTreeMap<EventKey, String>,
}

impl Invariants {
    pub fn begin_run(&mut self, stripe: &Stripe) {
        let events = stripe.events();
        let listed: BTreeSet<String> = stripe.listed().into_iter().map(|event| event.id).collect();
        for event in &events {
            let known = self
                .progress
                .get(&event.account.map(str::to_owned))
                .copied()
                .unwrap_or(i64::MIN);
            if !listed.contains(&event.id) {
                self.unlisted.insert(event.id.clone());
            } else if !self.is_given_up && event.created >= known.saturating_sub(OVERLAP_S) {
                // The event was listed late, but within the overlap.
                self.unlisted.remove(&event.id);
            }
        }

        if !self.is_given_up {
            self.listed_at_stripe = events;
        }
    }

    pub fn end_run(&mut self, is_given_up: bool) {
        self.is_given_up = is_given_up;
    }

    /// Checks the state against everything seen before.
    ///
    /// # Errors
    /// A description of the violated invariant.
    pub fn check(&mut self, durable: &Durable) -> Result<(), String> {
        // New events may have arrived after the pending lookups were read.
        let crossed_off: Vec<EventKey> = self
            .rows
            .keys()
            .filter(|key| !durable.waiting.contains(key))
            .copied()
            .collect();
        for row in &durable.log {
            self.check_row(row)?;
        }

        self.check_fetched(&crossed_off)?;
        for (key, (row, objects)) in &self.rows {
            let missing = objects.iter().find(|object| {
                !durable
                    .mentions
                    .contains(&((*object).clone(), key.0.to_vec()))
            });
            if let Some(object) = missing {
                return Err(format!(
                    "{} is in the log, and not found by {object}, which it names",
                    named(row)
                ));
            }
        }

        self.check_progress(&durable.progress)
    }

    fn check_row(&mut self, row: &StoredBody) -> Result<(), String> {
        if let Some((before, _)) = self.rows.get(&row.logged.key) {
            let is_same = (&before.logged, &before.observation, &before.body)
                == (&row.logged, &row.observation, &row.body);
            return if is_same {
                Ok(())
            } else {
                Err(format!(
                    "the log is changed: it was {before:?}, and is {row:?}"
                ))
            };
        }

        let (source, secret_label) = (row.logged.source, row.logged.secret_label.clone());
        let body = row
            .body
            .clone()
            .ok_or_else(|| format!("{} has no bytes", named(row)))?;
        let event = prepare(Delivery {
            body: body.into(),
            source,
            secret_label,
            received_ms: row.logged.received_ms,
        });

        if (&row.logged, &row.observation) != (&logged(&event), &event.observation) {
            return Err(format!(
                "in the log is {:?} {:?}, and its bytes say {event:?}",
                row.logged, row.observation
            ));
        }

        let objects = event
            .mentions
            .into_iter()
            .map(|mention| mention.object_id)
            .collect();
        self.rows.insert(row.logged.key, (row.clone(), objects));
        Ok(())
    }

    /// Checks that the object of a thin event, or the event's twin with that object, is logged.
    fn check_fetched(&self, crossed_off: &[EventKey]) -> Result<(), String> {
        for row in crossed_off
            .iter()
            .map(|key| &self.rows[key].0)
            .filter(|row| is_type(row, "v1."))
        {
            let observation = row
                .observation
                .as_deref()
                .map(|text| serde_json::from_str::<Observation>(text).unwrap());
            let Some(twin) = observation.and_then(|observation| observation.snapshot_event) else {
                continue;
            };
            let has_it = |(other, _): &(StoredBody, Vec<String>)| {
                let is_twin = other.logged.id.as_ref() == Some(&twin);
                is_twin
                    || (is_type(other, FETCHED) && other.logged.object_id == row.logged.object_id)
            };
            if !self.rows.values().any(has_it) {
                return Err(format!(
                    "nothing is to be fetched for {}, and the log lacks its object",
                    named(row)
                ));
            }
        }

        Ok(())
    }

    fn check_progress(&mut self, progress: &[(Option<String>, i64)]) -> Result<(), String> {
        for (account, until) in progress {
            if self.progress.insert(account.clone(), *until) == Some(*until) {
                continue;
            }
            let is_passed = |event: &&Event| {
                event.account == account.as_deref() && event.created < *until && event.generated
            };
            for event in self
                .listed_at_stripe
                .iter()
                .filter(is_passed)
                .filter(|event| !self.unlisted.contains(&event.id))
            {
                if let Reading::Event(read) = read(event.as_listed().to_string().as_bytes())
                    && read.observation.is_some()
                {
                    self.result
                        .insert(read.key, format!("{} {}", event.id, event.kind));
                }
            }
        }

        match self
            .result
            .iter()
            .find(|(key, _)| !self.rows.contains_key(key))
        {
            Some((_, event)) => Err(format!(
                "a pass has come past {event}, which Stripe listed and the log lacks: {progress:?}"
            )),
            None => Ok(()),
        }
    }
}

fn is_type(row: &StoredBody, begins: &str) -> bool {
    row.logged
        .event_type
        .as_deref()
        .is_some_and(|kind| kind.starts_with(begins))
}

fn named(row: &StoredBody) -> String {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    format!(
        "{} {} ({})",
        text(&row.logged.id),
        text(&row.logged.event_type),
        row.logged.source.as_str()
    )
}

/// Returns the event as its row describes it.
fn logged(event: &NewEvent) -> LoggedEvent {
    LoggedEvent {
        key: event.key,
        id: event.id.clone(),
        event_type: event.event_type.clone(),
        api_version: event.api_version.clone(),
        object_id: event.object_id.clone(),
        created_s: event.created_s,
        received_ms: event.received_ms,
        source: event.source,
        secret_label: event.secret_label.clone(),
        outcome: event.outcome,
        unreadable_reason: event.unreadable_reason.clone(),
    }
}

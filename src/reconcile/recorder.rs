//! Records the findings of a run, the histories that they change, and the events that only Stripe's
//! API had.
//!
//! A dry run takes the same steps, but stages its findings in memory instead of appending them.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;
use futures_util::future::try_join_all;
use serde_json::Value;

use super::report::{ApiOnlyEvent, Change, Healed, Invoice, Proof};
use super::{ReconcileContext, ReconcileError, WriteMode};
use crate::domain::history::{Entry, StoredObservation};
use crate::domain::invoice::comparison::same_entries;
use crate::domain::stripe::event::{EventKey, FETCHED, Observation, envelope};
use crate::domain::time::timestamp;
use crate::ingest::batch_writer::{AppendError, BatchWriter};
use crate::ingest::{self, Delivery};
use crate::monitoring::missed_webhooks::should_be_sent;
use crate::queries::invoices::{fold_known, known, parse_observations, with_history};
use crate::store::{NewEvent, Outcome, Source, StoreError, StoredInvoice};

/// Objects whose invoices are looked up in one query.
const OBJECTS_PER_QUERY: usize = 500;
/// Limit on the steps between stored and staged observations during the collection of a history.
const MAX_HOPS: usize = 10;

/// The recorder of a run's findings.
pub(super) struct Recorder<'t> {
    context: &'t ReconcileContext,
    mode: WriteMode,
    /// The earlier state of the histories that may change, by tenant and uid.
    before: BTreeMap<(String, String), Before>,
    /// Events that a dry run found, by key.
    staged: HashMap<EventKey, NewEvent>,
    /// The staged events that mention an object, by its id.
    staged_by_object: HashMap<String, Vec<EventKey>>,
    /// Events that no webhook delivered.
    pub(super) api_only: Vec<ApiOnlyEvent>,
}

/// A history before the run.
struct Before {
    stripe_invoice_id: String,
    history: Vec<Entry>,
}

impl<'t> Recorder<'t> {
    pub fn new(context: &'t ReconcileContext, mode: WriteMode) -> Recorder<'t> {
        Recorder {
            context,
            mode,
            before: BTreeMap::new(),
            staged: HashMap::new(),
            staged_by_object: HashMap::new(),
            api_only: Vec::new(),
        }
    }

    /// Prepares an event that Stripe's API returned.
    pub fn prepare_body(&self, body: Bytes) -> NewEvent {
        ingest::prepare(Delivery {
            body,
            source: Source::Api,
            secret_label: None,
            received_ms: self.context.clock.now_ms(),
        })
    }

    /// Prepares an object that Stripe's API returned.
    pub fn prepare_object(&self, object: &Value, account: Option<&str>) -> NewEvent {
        let event = envelope(object, self.context.clock.now_s(), account);
        self.prepare_body(event.to_string().into())
    }

    /// Records the new events. Returns when they are durable.
    pub async fn record(&mut self, events: Vec<NewEvent>) -> Result<(), ReconcileError> {
        let events = self.without_known(events).await?;
        if events.is_empty() {
            return Ok(());
        }

        self.remember_histories(&events).await?;
        let undelivered = self.collect_api_only(&events).await?;
        match self.mode {
            WriteMode::DryRun => events.into_iter().for_each(|event| self.stage(event)),
            WriteMode::Save => {
                // Append concurrently, so that the events share a commit.
                let appending: Vec<_> = events
                    .into_iter()
                    .map(|event| append(self.context.inbox.clone(), event))
                    .collect();
                try_join_all(appending).await?;
                // Count now and not at the end of the run, because the run may still fail.
                let metrics = &self.context.metrics.reconcile;
                metrics.api_only_events.inc_by(undelivered);
            }
        }
        Ok(())
    }

    /// Drops events that are unreadable, repeated, staged or stored.
    async fn without_known(&self, mut events: Vec<NewEvent>) -> Result<Vec<NewEvent>, StoreError> {
        let mut seen: HashSet<EventKey> = HashSet::new();
        events.retain(|event| {
            event.outcome != Outcome::Unreadable
                && !self.staged.contains_key(&event.key)
                && seen.insert(event.key)
        });

        let keys: Vec<EventKey> = events.iter().map(|event| event.key).collect();
        let stored = self.context.store.known_keys(&keys).await?;
        let stored: HashSet<EventKey> = stored.into_iter().collect();
        events.retain(|event| !stored.contains(&event.key));
        Ok(events)
    }

    fn stage(&mut self, event: NewEvent) {
        for mention in &event.mentions {
            self.staged_by_object
                .entry(mention.object_id.clone())
                .or_default()
                .push(event.key);
        }
        self.staged.insert(event.key, event);
    }

    /// Saves the present histories that these events may change.
    async fn remember_histories(&mut self, events: &[NewEvent]) -> Result<(), ReconcileError> {
        let store = &self.context.store;
        let invoices = self.invoices_of(events).await?;
        let invoices: Vec<&str> = invoices.iter().map(String::as_str).collect();
        for candidate in store.check_candidates(&invoices).await? {
            let id = (candidate.tenant_uid, candidate.invoice_uid);
            if self.before.contains_key(&id) {
                continue;
            }
            if let Some(stored) = store.invoice(&id.0, &id.1).await? {
                let before = Before {
                    stripe_invoice_id: stored.stripe_invoice_id.clone().unwrap_or_default(),
                    history: with_history(stored).await?.1,
                };
                self.before.insert(id, before);
            }
        }

        Ok(())
    }

    /// Returns the Stripe invoices that these events belong to, directly or through other objects.
    async fn invoices_of(&self, events: &[NewEvent]) -> Result<HashSet<String>, ReconcileError> {
        let mut objects: HashSet<String> = HashSet::new();
        let mut invoices: HashSet<String> = HashSet::new();
        for mention in events.iter().flat_map(|event| &event.mentions) {
            let named = if mention.is_invoice {
                &mut invoices
            } else {
                &mut objects
            };
            named.insert(mention.object_id.clone());
        }

        let objects: Vec<String> = objects.into_iter().collect();
        for chunk in objects.chunks(OBJECTS_PER_QUERY) {
            let rows = self.context.store.observations_for(chunk).await?;
            for stored in parse_observations(&rows)? {
                let mentions = stored.observation.mentions();
                invoices.extend(
                    mentions
                        .into_iter()
                        .filter(|mention| mention.is_invoice)
                        .map(|mention| mention.object_id),
                );
            }
        }
        Ok(invoices)
    }

    /// Collects the events that no webhook delivered. Returns the number of those that a webhook
    /// should have delivered.
    async fn collect_api_only(&mut self, events: &[NewEvent]) -> Result<u64, StoreError> {
        let from_list: Vec<&NewEvent> = events
            .iter()
            .filter(|event| event.created_s.is_some() && !is_fetched_object(event))
            .collect();
        let ids: Vec<&str> = from_list
            .iter()
            .filter_map(|event| event.id.as_deref())
            .collect();
        let stored = self.context.store.known_ids(&ids).await?;
        let stored: HashSet<String> = stored.into_iter().collect();

        let mut undelivered = 0;
        for event in from_list {
            let Some(id) = event.id.clone().filter(|id| !stored.contains(id)) else {
                continue;
            };
            let event_type = event.event_type.clone().unwrap_or_default();
            undelivered += u64::from(should_be_sent(&event_type));
            self.api_only.push(ApiOnlyEvent {
                event_id: id,
                event_type,
                created: timestamp(event.created_s.unwrap_or_default() * 1000),
                stripe_invoice_id: event
                    .mentions
                    .iter()
                    .find(|mention| mention.is_invoice)
                    .map(|mention| mention.object_id.clone()),
            });
        }
        Ok(undelivered)
    }

    /// Returns all observations of a stored invoice, including those that a dry run found.
    pub async fn observations_of(
        &self,
        stored: &StoredInvoice,
    ) -> Result<Vec<StoredObservation>, ReconcileError> {
        let mut observations = known(stored)?;
        let id = stored
            .stripe_invoice_id
            .clone()
            .filter(|_| !self.staged.is_empty());
        let Some(id) = id else {
            return Ok(observations);
        };

        let mut reached: HashSet<String> = HashSet::from([id]);
        let mut taken: HashSet<EventKey> = HashSet::new();
        for _ in 0..MAX_HOPS {
            reached.extend(objects_of(&observations));
            let keys = reached
                .iter()
                .filter_map(|id| self.staged_by_object.get(id))
                .flatten()
                .filter(|key| taken.insert(**key));
            let mut found = Vec::new();
            for event in keys.filter_map(|key| self.staged.get(key)) {
                found.extend(as_stored(event)?);
            }
            if found.is_empty() {
                break;
            }

            let new_objects: Vec<String> = objects_of(&found)
                .filter(|id| !reached.contains(id))
                .collect();
            observations.extend(found);
            let rows = self.context.store.observations_for(&new_objects).await?;
            let mut keys: HashSet<EventKey> = observations.iter().map(|known| known.key).collect();
            for observation in parse_observations(&rows)? {
                if keys.insert(observation.key) {
                    observations.push(observation);
                }
            }
        }
        Ok(observations)
    }

    /// Returns the histories that this run changed, with the changes.
    pub async fn healed(&self) -> Result<Vec<Healed>, ReconcileError> {
        let mut healed = Vec::new();
        for ((tenant_uid, invoice_uid), before) in &self.before {
            let stored = self.context.store.invoice(tenant_uid, invoice_uid).await?;
            let Some(stored) = stored else {
                continue;
            };
            let observations = self.observations_of(&stored).await?;
            let (observations, after) = fold_known(&stored, observations).await?;
            if same_entries(&before.history, &after) {
                continue;
            }

            let by_key: HashMap<EventKey, &Observation> = observations
                .iter()
                .map(|stored| (stored.key, &stored.observation))
                .collect();
            healed.push(Healed {
                invoice: Invoice {
                    stripe_invoice_id: before.stripe_invoice_id.clone(),
                    tenant_uid: tenant_uid.clone(),
                    invoice_uid: invoice_uid.clone(),
                },
                state: after.last().map(|entry| entry.state),
                added: changes(&after, &before.history, &by_key),
                removed: changes(&before.history, &after, &by_key),
            });
        }
        Ok(healed)
    }
}

async fn append(inbox: BatchWriter, event: NewEvent) -> Result<(), AppendError> {
    ingest::keep(&inbox, event).await.map(drop)
}

fn is_fetched_object(event: &NewEvent) -> bool {
    event.event_type.as_deref() == Some(FETCHED)
}

/// Returns the observation of a new event as the store will return it, or `None` if the event has
/// no observation.
pub(super) fn as_stored(event: &NewEvent) -> Result<Option<StoredObservation>, StoreError> {
    event
        .observation
        .as_deref()
        .map(|json| StoredObservation::parse(event.key, json))
        .transpose()
        .map_err(|damaged| StoreError::damaged(damaged.to_string()))
}

/// Returns the ids of the objects that these observations mention, other than invoices.
fn objects_of(observations: &[StoredObservation]) -> impl Iterator<Item = String> {
    observations
        .iter()
        .flat_map(|stored| stored.observation.mentions())
        .filter(|mention| !mention.is_invoice)
        .map(|mention| mention.object_id)
}

/// Returns the entries that are not in `others`, with their proofs.
fn changes(
    entries: &[Entry],
    others: &[Entry],
    by_key: &HashMap<EventKey, &Observation>,
) -> Vec<Change> {
    let others: HashSet<_> = others.iter().map(shown).collect();
    entries
        .iter()
        .filter(|entry| !others.contains(&shown(entry)))
        .map(|entry| change(entry, by_key))
        .collect()
}

/// Returns the parts of an entry that a reader sees.
fn shown(entry: &Entry) -> (&'static str, i64, Option<&str>) {
    (
        entry.state.as_str(),
        entry.timestamp_ms,
        entry.message.as_deref(),
    )
}

fn change(entry: &Entry, by_key: &HashMap<EventKey, &Observation>) -> Change {
    Change {
        state: entry.state,
        timestamp: timestamp(entry.timestamp_ms),
        payment_msg: entry.message.clone(),
        proofs: entry
            .proofs
            .iter()
            .filter_map(|key| by_key.get(key))
            .map(|observation| proof_of(observation))
            .collect(),
    }
}

fn proof_of(observation: &Observation) -> Proof {
    let what = if observation.fetched {
        "read from Stripe's API"
    } else {
        observation.kind.as_str()
    };
    Proof {
        id: observation.id.clone(),
        what: what.to_owned(),
    }
}

//! Where all that a pass finds goes in: is it new, whose history does it change, and was it only Stripe's API that told it?
//!
//! A dry run goes the same way, but holds what it found beside the store instead of appending it.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;
use futures_util::future::try_join_all;
use serde_json::Value;

use super::report::{ApiOnlyEvent, Change, Healed, Invoice, Proof};
use super::{ReconcileContext, ReconcileError, WriteMode};
use crate::domain::history::{Entry, StoredObservation, fold};
use crate::domain::invoice::comparison::same_entries;
use crate::domain::payment_state::ImportedState;
use crate::domain::stripe::event::{EventKey, Observation, envelope};
use crate::domain::time::timestamp;
use crate::ingest::batch_writer::{AppendError, BatchWriter};
use crate::ingest::{Delivery, keep, prepare};
use crate::monitoring::missed_webhooks::should_be_sent;
use crate::queries::invoices::{history, imported_states, known, parse_observations};
use crate::store::{NewEvent, Outcome, Source, StoreError, StoredInvoice};

/// Objects whose invoices are looked up at a time.
const SEEDS: usize = 500;
/// How often a dry run goes back and forth between what is stored and what it found.
const HOPS: usize = 10;

pub(super) struct Recorder<'t> {
    tools: &'t ReconcileContext,
    mode: WriteMode,
    /// The histories that may change, as they were: by tenant and uid.
    before: BTreeMap<(String, String), Before>,
    /// What a dry run found, and which of it mentions an object.
    beside: HashMap<EventKey, NewEvent>,
    mentioned: HashMap<String, Vec<EventKey>>,
    /// Events that only Stripe's API told.
    pub(super) api_only: Vec<ApiOnlyEvent>,
}

struct Before {
    stripe_invoice_id: String,
    history: Vec<Entry>,
}

impl<'t> Recorder<'t> {
    pub fn new(tools: &'t ReconcileContext, mode: WriteMode) -> Recorder<'t> {
        Recorder {
            tools,
            mode,
            before: BTreeMap::new(),
            beside: HashMap::new(),
            mentioned: HashMap::new(),
            api_only: Vec::new(),
        }
    }

    /// Something that Stripe's API returned, ready to be kept.
    pub fn read(&self, body: Bytes) -> NewEvent {
        prepare(Delivery {
            body,
            source: Source::Api,
            secret_label: None,
            received_ms: self.tools.clock.now_ms(),
        })
    }

    /// An object that Stripe's API returned, ready to be kept.
    pub fn read_object(&self, object: &Value, account: Option<&str>) -> NewEvent {
        self.read(
            envelope(object, self.tools.clock.now_s(), account)
                .to_string()
                .into(),
        )
    }

    /// Keeps what is new of it: returns when that is durable.
    pub async fn keep(&mut self, mut events: Vec<NewEvent>) -> Result<(), ReconcileError> {
        let mut seen: HashSet<EventKey> = HashSet::new();
        let beside = &self.beside;
        let is_new = |event: &NewEvent| {
            event.outcome != Outcome::Unreadable && !beside.contains_key(&event.key)
        };
        events.retain(|event| is_new(event) && seen.insert(event.key));
        let keys: Vec<EventKey> = events.iter().map(|event| event.key).collect();
        let known: HashSet<EventKey> = self
            .tools
            .store
            .known_keys(&keys)
            .await?
            .into_iter()
            .collect();
        events.retain(|event| !known.contains(&event.key));
        if events.is_empty() {
            return Ok(());
        }
        self.remember(&events).await?;
        let missed = self.note_api_only(&events).await?;
        match self.mode {
            WriteMode::DryRun => events.into_iter().for_each(|event| self.stage(event)),
            WriteMode::Save => {
                // Together, so that they share a commit.
                let appending: Vec<_> = events
                    .into_iter()
                    .map(|event| append(self.tools.inbox.clone(), event))
                    .collect();
                try_join_all(appending).await?;
                // At once: a pass that fails later found them all the same.
                self.tools.metrics.reconcile.api_only_events.inc_by(missed);
            }
        }
        Ok(())
    }

    fn stage(&mut self, event: NewEvent) {
        for mention in &event.mentions {
            self.mentioned
                .entry(mention.object_id.clone())
                .or_default()
                .push(event.key);
        }
        self.beside.insert(event.key, event);
    }

    /// The histories that these events may change, as they are before.
    async fn remember(&mut self, events: &[NewEvent]) -> Result<(), ReconcileError> {
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
        for some in objects.chunks(SEEDS) {
            for known in parse_observations(&self.tools.store.observations_for(some).await?)? {
                let mentions = known
                    .telling
                    .mentions()
                    .into_iter()
                    .filter(|mention| mention.is_invoice);
                invoices.extend(mentions.map(|mention| mention.object_id));
            }
        }
        let invoices: Vec<&str> = invoices.iter().map(String::as_str).collect();
        for stored in self.tools.store.to_check(&invoices).await? {
            let place = (stored.tenant_uid, stored.invoice_uid);
            if self.before.contains_key(&place) {
                continue;
            }
            if let Some(stored) = self.tools.store.invoice(&place.0, &place.1).await? {
                let stripe_invoice_id = stored.stripe_invoice_id.clone().unwrap_or_default();
                self.before.insert(
                    place,
                    Before {
                        stripe_invoice_id,
                        history: history(&stored)?,
                    },
                );
            }
        }
        Ok(())
    }

    /// How many of them a webhook should have brought.
    async fn note_api_only(&mut self, events: &[NewEvent]) -> Result<u64, StoreError> {
        let is_event = |event: &&NewEvent| event.created_s.is_some() && !is_fetched(event);
        let ids: Vec<&str> = events
            .iter()
            .filter(is_event)
            .filter_map(|event| event.id.as_deref())
            .collect();
        let known: HashSet<String> = self
            .tools
            .store
            .known_ids(&ids)
            .await?
            .into_iter()
            .collect();
        let mut missed = 0;
        for event in events.iter().filter(is_event) {
            let Some(id) = event.id.clone().filter(|id| !known.contains(id)) else {
                continue;
            };
            let invoice = event
                .mentions
                .iter()
                .find(|mention| mention.is_invoice)
                .map(|mention| mention.object_id.clone());
            missed += u64::from(event.event_type.as_deref().is_some_and(should_be_sent));
            self.api_only.push(ApiOnlyEvent {
                event_id: id,
                event_type: event.event_type.clone().unwrap_or_default(),
                created: timestamp(event.created_s.unwrap_or_default() * 1000),
                stripe_invoice_id: invoice,
            });
        }
        Ok(missed)
    }

    /// All that is known about a stored invoice, with what a dry run found.
    pub async fn known_about(
        &self,
        stored: &StoredInvoice,
    ) -> Result<Vec<StoredObservation>, ReconcileError> {
        let mut known = known(stored)?;
        let Some(id) = stored
            .stripe_invoice_id
            .clone()
            .filter(|_| !self.beside.is_empty())
        else {
            return Ok(known);
        };
        let mut reached: HashSet<String> = HashSet::from([id]);
        let mut taken: HashSet<EventKey> = HashSet::new();
        for _ in 0..HOPS {
            let objects = known
                .iter()
                .flat_map(|k| k.telling.mentions())
                .filter(|mention| !mention.is_invoice);
            reached.extend(objects.map(|mention| mention.object_id));
            let keys = reached
                .iter()
                .filter_map(|id| self.mentioned.get(id))
                .flatten()
                .filter(|key| taken.insert(**key));
            let found: Vec<StoredObservation> = keys
                .filter_map(|key| self.beside.get(key))
                .filter_map(as_known)
                .collect();
            if found.is_empty() {
                break;
            }
            let objects = found
                .iter()
                .flat_map(|k| k.telling.mentions())
                .filter(|mention| !mention.is_invoice);
            let seeds: Vec<String> = objects
                .map(|mention| mention.object_id)
                .filter(|id| !reached.contains(id))
                .collect();
            known.extend(found);
            for telling in parse_observations(&self.tools.store.observations_for(&seeds).await?)? {
                if !known.iter().any(|k| k.key == telling.key) {
                    known.push(telling);
                }
            }
        }
        Ok(known)
    }

    /// The histories that this pass changed, and by what.
    pub async fn healed(&self) -> Result<Vec<Healed>, ReconcileError> {
        let mut healed = Vec::new();
        for ((tenant_uid, invoice_uid), before) in &self.before {
            let Some(stored) = self.tools.store.invoice(tenant_uid, invoice_uid).await? else {
                continue;
            };
            let known = self.known_about(&stored).await?;
            let imported: Vec<ImportedState> = imported_states(&stored)?;
            let after = fold(Some(&before.stripe_invoice_id), &imported, &known);
            if same_entries(&before.history, &after) {
                continue;
            }
            let is_same = |a: &Entry, b: &Entry| {
                (a.state, a.timestamp_ms, &a.message) == (b.state, b.timestamp_ms, &b.message)
            };
            let is_new = |entry: &&Entry| !before.history.iter().any(|was| is_same(was, entry));
            let is_gone = |entry: &&Entry| !after.iter().any(|now| is_same(now, entry));
            healed.push(Healed {
                invoice: Invoice {
                    stripe_invoice_id: before.stripe_invoice_id.clone(),
                    tenant_uid: tenant_uid.clone(),
                    invoice_uid: invoice_uid.clone(),
                },
                state: after.last().map(|entry| entry.state),
                added: after
                    .iter()
                    .filter(is_new)
                    .map(|entry| change(entry, &known))
                    .collect(),
                removed: before
                    .history
                    .iter()
                    .filter(is_gone)
                    .map(|entry| change(entry, &known))
                    .collect(),
            });
        }
        Ok(healed)
    }
}

async fn append(inbox: BatchWriter, event: NewEvent) -> Result<(), AppendError> {
    keep(&inbox, event).await.map(drop)
}

fn is_fetched(event: &NewEvent) -> bool {
    event.event_type.as_deref() == Some(crate::domain::stripe::event::FETCHED)
}

pub(super) fn as_known(event: &NewEvent) -> Option<StoredObservation> {
    let telling: Observation = serde_json::from_str(event.telling.as_deref()?).ok()?;
    Some(StoredObservation {
        key: event.key,
        telling,
    })
}

fn change(entry: &Entry, known: &[StoredObservation]) -> Change {
    let proof = |key: &EventKey| {
        known
            .iter()
            .find(|k| k.key == *key)
            .map(|k| &k.telling)
            .map(describe)
    };
    Change {
        state: entry.state,
        timestamp: timestamp(entry.timestamp_ms),
        payment_msg: entry.message.clone(),
        proofs: entry.proofs.iter().filter_map(proof).collect(),
    }
}

fn describe(telling: &Observation) -> Proof {
    let what = if telling.fetched {
        "what Stripe's API says now"
    } else {
        telling.kind.as_str()
    };
    Proof {
        id: telling.id.clone(),
        what: what.to_owned(),
    }
}

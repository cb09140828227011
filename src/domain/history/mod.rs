//! The history of an invoice: from everything known about it to its payment states.
//!
//! A function of a *set*: order, duplicates, twins and the way a telling came make no difference. One fact is one entry.
//! `links` decides what belongs to the invoice, `fact` what one telling tells, `tries` what is one failure, `message` how it
//! is said; here it is put together, timed and put in order.

pub mod fact;
mod failed_attempts;
mod message;
pub mod payment_links;
mod refunds_and_disputes;

use std::collections::{BTreeMap, HashSet};

use super::history::fact::{InvoiceFact, SHOWN_BY_SNAPSHOTS, by_snapshot, by_type, contradicts};
use super::history::failed_attempts::{FailedAttempt, failed_attempts};
use super::history::payment_links::PaymentLinks;
use super::payment_state::{ImportedState, PaymentState};
use super::stripe::event::{EventKey, Observation};
use super::stripe::object::{Invoice, Object};
use message::InvoiceContext;
use refunds_and_disputes::RefundsAndDisputes;

/// A telling, and the stored event that it came with.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredObservation {
    pub key: EventKey,
    pub telling: Observation,
}

/// A stored observation that cannot be read. `rebuild` repairs it from the stored bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the observation of event {} cannot be read, run `rebuild`: {reason}", hex::encode(key.0))]
pub struct DamagedObservation {
    pub key: EventKey,
    pub reason: String,
}

impl StoredObservation {
    /// Parses a stored observation. This is the only parser.
    ///
    /// # Errors
    /// Returns [`DamagedObservation`] if the text is not an observation. A read of one invoice
    /// fails with it; a scan skips the row, counts it and logs one warning.
    pub fn parse(key: EventKey, json: &str) -> Result<StoredObservation, DamagedObservation> {
        match serde_json::from_str(json) {
            Ok(telling) => Ok(StoredObservation { key, telling }),
            Err(error) => Err(DamagedObservation {
                key,
                reason: error.to_string(),
            }),
        }
    }
}

/// One entry of `status.states`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub state: PaymentState,
    /// Unix milliseconds.
    pub timestamp_ms: i64,
    pub message: Option<String>,
    /// The events that tell it, earliest first; empty for an entry that came with the stored invoice.
    pub proofs: Vec<EventKey>,
}

/// Where in a history an entry stands: what leads nowhere further is last, then time, then what is usual within a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::domain) enum Phase {
    Open,
    Voided,
    Paid,
    Information,
}

/// The usual order of things that happen in the same second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::domain) enum TieBreak {
    FinalizationFailed,
    Finalized,
    AttemptRequired,
    ActionRequired,
    Overdue,
    InFlight,
    PartlyFunded,
    PartPaid,
    Failed,
    WrittenOff,
    Settled,
    Refunded,
    RefundFailed,
    CreditNote,
    CreditNoteVoided,
    DisputeOpened,
    FundsWithdrawn,
    FundsReinstated,
    DisputeClosed,
}

/// An entry before it is put in its place.
pub(in crate::domain) struct PendingEntry<'a> {
    pub stage: Phase,
    /// Unix seconds.
    pub time: i64,
    pub rank: TieBreak,
    /// The attempt's number, else 0.
    pub number: i64,
    pub object_id: &'a str,
    pub state: PaymentState,
    pub message: String,
    pub sources: Vec<&'a StoredObservation>,
}

/// Folds what is known into the history. `known` may hold more than belongs to the invoice, in any order, repeated.
pub fn fold(
    stripe_invoice_id: Option<&str>,
    imported: &[ImportedState],
    known: &[StoredObservation],
) -> Vec<Entry> {
    let computed = match stripe_invoice_id {
        Some(invoice_id) => compute(invoice_id, imported, known),
        None => Vec::new(),
    };
    let imported_paid = imported.iter().any(|i| i.state == PaymentState::Paid);
    let mut entries: Vec<Entry> = imported.iter().map(imported_entry).collect();
    for draft in computed {
        let counts = match draft.stage {
            Phase::Open | Phase::Voided => !imported_paid,
            Phase::Paid | Phase::Information => true,
        };
        let timestamp_ms = draft.time * 1000;
        let came_with_the_invoice = imported
            .iter()
            .any(|i| i.state == draft.state && i.timestamp_ms == timestamp_ms);
        if !counts || came_with_the_invoice {
            continue;
        }
        let proofs = draft.sources.iter().map(|k| k.key).collect();
        let entry = Entry {
            state: draft.state,
            timestamp_ms,
            message: Some(draft.message),
            proofs,
        };
        match entries.iter_mut().find(|e| {
            e.state == entry.state && e.timestamp_ms == timestamp_ms && e.message == entry.message
        }) {
            Some(same) => same.proofs.extend(entry.proofs),
            None => entries.push(entry),
        }
    }
    entries
}

/// Whether Stripe's API may know why the latest attempt to collect this invoice failed, which no event told.
pub fn lacks_reason(stripe_invoice_id: &str, known: &[StoredObservation]) -> bool {
    let known = without_twins(known);
    let links = PaymentLinks::read(known.iter().map(|k| &k.telling));
    let is_own =
        |k: &&StoredObservation| links.invoice_of(&k.telling.object) == Some(stripe_invoice_id);
    super::history::failed_attempts::lacks_reason(
        &known.iter().copied().filter(is_own).collect::<Vec<_>>(),
    )
}

fn imported_entry(state: &ImportedState) -> Entry {
    Entry {
        state: state.state,
        timestamp_ms: state.timestamp_ms,
        message: state.message.clone(),
        proofs: Vec::new(),
    }
}

fn compute<'a>(
    invoice_id: &'a str,
    imported: &[ImportedState],
    known: &'a [StoredObservation],
) -> Vec<PendingEntry<'a>> {
    let known = without_twins(known);
    let links = PaymentLinks::read(known.iter().map(|k| &k.telling));
    let own: Vec<&StoredObservation> = known
        .into_iter()
        .filter(|k| links.invoice_of(&k.telling.object) == Some(invoice_id))
        .collect();
    let attempts = failed_attempts(&own);
    let gathered = HistoryBuilder::new(&own, &links, &attempts);
    let facts = InvoiceContext::gather(invoice_id, &own, &links);

    let mut drafts = gathered.stated(&facts);
    drafts.extend(gathered.action_required(&facts));
    drafts.extend(gathered.in_flight(&facts));
    drafts.extend(gathered.partly_funded(&facts));
    drafts.extend(gathered.part_paid(&facts));
    drafts.extend(gathered.finalization_failed(&facts));
    drafts.extend(attempts.iter().map(|attempt| failed(attempt, &own, &facts)));

    let paid_by_import = imported
        .iter()
        .filter(|i| i.state == PaymentState::Paid)
        .map(|i| i.timestamp_ms);
    let paid_by_stripe = drafts
        .iter()
        .filter(|d| d.stage == Phase::Paid)
        .map(|d| d.time * 1000);
    if let Some(paid_ms) = paid_by_import.chain(paid_by_stripe).min() {
        let returned = RefundsAndDisputes { own: &own, paid_ms };
        drafts.extend(refunds_and_disputes::entries(&returned, &facts));
    }
    drafts.sort_by(|a, b| a.place().cmp(&b.place()));
    drafts
}

impl PendingEntry<'_> {
    fn place(&self) -> (Phase, i64, TieBreak, i64, &str, &str) {
        (
            self.stage,
            self.time,
            self.rank,
            self.number,
            self.object_id,
            &self.message,
        )
    }
}

/// A thin event whose snapshot twin is known says nothing of its own. Earliest first, in an order that does not depend on
/// how the tellings came.
fn without_twins(known: &[StoredObservation]) -> Vec<&StoredObservation> {
    let snapshots: HashSet<&str> = known
        .iter()
        .filter(|k| !k.telling.thin && !k.telling.fetched)
        .map(|k| k.telling.id.as_str())
        .collect();
    let is_twin = |t: &Observation| {
        t.snapshot_event
            .as_deref()
            .is_some_and(|id| snapshots.contains(id))
    };
    let mut kept: Vec<&StoredObservation> = known.iter().filter(|k| !is_twin(&k.telling)).collect();
    kept.sort_by(|a, b| {
        (a.telling.created, &a.telling.id, a.key).cmp(&(b.telling.created, &b.telling.id, b.key))
    });
    kept.dedup_by_key(|k| k.key);
    kept
}

/// Transition times, and who told what, of one invoice.
struct HistoryBuilder<'a, 'k> {
    own: &'k [&'a StoredObservation],
    links: &'k PaymentLinks<'a>,
    /// When attempts failed, ascending: what rounds are counted by.
    failures: Vec<i64>,
}

impl<'a, 'k> HistoryBuilder<'a, 'k> {
    fn new(
        own: &'k [&'a StoredObservation],
        links: &'k PaymentLinks<'a>,
        attempts: &[FailedAttempt],
    ) -> Self {
        let mut failures: Vec<i64> = attempts.iter().map(FailedAttempt::time).collect();
        failures.sort_unstable();
        HistoryBuilder {
            own,
            links,
            failures,
        }
    }

    fn invoices(&self) -> impl Iterator<Item = (&'a StoredObservation, &'a Invoice)> {
        self.own.iter().filter_map(|&k| match &k.telling.object {
            Object::Invoice(invoice) => Some((k, &**invoice)),
            _ => None,
        })
    }

    /// How many attempts failed before this second: an invoice keeps its PaymentIntent over retries.
    fn round(&self, second: i64) -> usize {
        self.failures.partition_point(|&failure| failure < second)
    }

    /// Facts that stand once in a history.
    fn stated(&self, facts: &InvoiceContext<'a, '_>) -> Vec<PendingEntry<'a>> {
        use InvoiceFact::*;
        let once = [
            (
                Finalized,
                Phase::Open,
                TieBreak::Finalized,
                PaymentState::PaymentPending,
            ),
            (
                AttemptRequired,
                Phase::Open,
                TieBreak::AttemptRequired,
                PaymentState::PaymentPending,
            ),
            (
                Overdue,
                Phase::Open,
                TieBreak::Overdue,
                PaymentState::PaymentPending,
            ),
            (
                WrittenOff,
                Phase::Open,
                TieBreak::WrittenOff,
                PaymentState::PaymentFailed,
            ),
            (
                Voided,
                Phase::Voided,
                TieBreak::Settled,
                PaymentState::PaymentFailed,
            ),
            (Paid, Phase::Paid, TieBreak::Settled, PaymentState::Paid),
        ];
        let told = once.map(|(fact, ..)| self.tellers(fact));
        let is_told = |fact| {
            once.iter()
                .zip(&told)
                .any(|(row, sources)| row.0 == fact && !sources.is_empty())
        };
        let written_off = is_told(WrittenOff);
        let mut drafts = Vec::new();
        for ((fact, stage, rank, state), sources) in once.into_iter().zip(&told) {
            if sources.is_empty() {
                continue;
            }
            let message = match fact {
                Finalized => message::finalized(facts, sources),
                AttemptRequired => message::attempt_required(facts, sources),
                Overdue => message::overdue(facts, sources),
                WrittenOff => message::written_off(facts, sources),
                Voided => message::voided(facts, sources),
                _ => message::paid(facts, sources, written_off),
            };
            let time = time_of(fact, sources);
            let sources = sources.iter().map(|(k, _)| *k).collect();
            drafts.push(PendingEntry {
                stage,
                time,
                rank,
                number: 0,
                object_id: facts.invoice_id,
                state,
                message,
                sources,
            });
        }
        drafts
    }

    fn tellers(&self, fact: InvoiceFact) -> Vec<(&'a StoredObservation, &'a Invoice)> {
        let shown = SHOWN_BY_SNAPSHOTS.contains(&fact);
        let tells = |k: &StoredObservation, i: &Invoice| {
            by_type(&k.telling, i) == Some(fact) || (shown && by_snapshot(&k.telling, i, fact))
        };
        self.invoices().filter(|(k, i)| tells(k, i)).collect()
    }

    fn action_required(&self, facts: &InvoiceContext<'a, '_>) -> Vec<PendingEntry<'a>> {
        let of_type = |kind: &str| -> Vec<&'a StoredObservation> {
            self.own
                .iter()
                .copied()
                .filter(|k| k.telling.kind == kind)
                .collect()
        };
        let by_invoice = of_type("invoice.payment_action_required");
        let by_intent = of_type("payment_intent.requires_action");
        let mut rounds: BTreeMap<usize, Vec<&'a StoredObservation>> = BTreeMap::new();
        for (tellers, siblings) in [(&by_invoice, &by_intent), (&by_intent, &by_invoice)] {
            for known in tellers {
                let second = known.telling.created;
                // The two come together, a second or two apart: a failure in between must not part them.
                let earlier = siblings
                    .iter()
                    .map(|k| k.telling.created)
                    .filter(|s| (second - 2..=second).contains(s))
                    .min();
                rounds
                    .entry(self.round(earlier.unwrap_or(second)))
                    .or_default()
                    .push(known);
            }
        }
        let drafts = rounds.into_values().map(|sources| {
            let sources = in_order(sources);
            open(
                TieBreak::ActionRequired,
                PaymentState::PaymentPending,
                "",
                message::action_required(facts, &sources),
                sources,
            )
        });
        drafts.collect()
    }

    fn in_flight(&self, facts: &InvoiceContext<'a, '_>) -> Vec<PendingEntry<'a>> {
        let mut flights: BTreeMap<(&'a str, usize), Vec<&'a StoredObservation>> = BTreeMap::new();
        for &known in self.own {
            let payment = match (&known.telling.object, known.telling.kind.as_str()) {
                (Object::PaymentIntent(intent), "payment_intent.processing") => intent.id.as_str(),
                (Object::Charge(charge), "charge.pending") => charge
                    .payment_intent
                    .as_deref()
                    .or(self.links.intent_of(&charge.id))
                    .unwrap_or(&charge.id),
                _ => continue,
            };
            flights
                .entry((payment, self.round(known.telling.created)))
                .or_default()
                .push(known);
        }
        let drafts = flights.into_iter().map(|((payment, _), sources)| {
            open(
                TieBreak::InFlight,
                PaymentState::PaymentInProgress,
                payment,
                message::in_flight(facts, &sources),
                sources,
            )
        });
        drafts.collect()
    }

    fn partly_funded(&self, facts: &InvoiceContext<'a, '_>) -> Vec<PendingEntry<'a>> {
        let mut funded: BTreeMap<(&'a str, i64), Vec<&'a StoredObservation>> = BTreeMap::new();
        for &known in self.own {
            if let (Object::PaymentIntent(intent), "payment_intent.partially_funded") =
                (&known.telling.object, known.telling.kind.as_str())
                && let Some(amount) = intent.funded()
            {
                funded.entry((&intent.id, amount)).or_default().push(known);
            }
        }
        let drafts = funded.into_iter().map(|((intent, amount), sources)| {
            open(
                TieBreak::PartlyFunded,
                PaymentState::PaymentInProgress,
                intent,
                message::partly_funded(facts, amount, &sources),
                sources,
            )
        });
        drafts.collect()
    }

    /// Left out when it is no part, but the payment: it covers at least what a paid invoice was due.
    fn part_paid(&self, facts: &InvoiceContext<'a, '_>) -> Vec<PendingEntry<'a>> {
        let paid = self.tellers(InvoiceFact::Paid);
        let shown_paid = paid
            .iter()
            .filter(|(k, i)| by_snapshot(&k.telling, i, InvoiceFact::Paid));
        let lowest_due = shown_paid.filter_map(|(_, i)| i.amount_due).min();
        let mut parts: BTreeMap<&'a str, Vec<&'a StoredObservation>> = BTreeMap::new();
        for &known in self.own {
            if let (Object::InvoicePayment(part), "invoice_payment.paid") =
                (&known.telling.object, known.telling.kind.as_str())
            {
                parts.entry(&part.id).or_default().push(known);
            }
        }
        let drafts = parts.into_iter().filter_map(|(id, sources)| {
            let amount = facts.amount_of_payment(id);
            let is_all = amount.is_none_or(|amount| lowest_due.is_some_and(|due| amount >= due));
            let message = message::part_paid(facts, amount, &sources);
            (paid.is_empty() || !is_all).then(|| {
                open(
                    TieBreak::PartPaid,
                    PaymentState::PaymentInProgress,
                    id,
                    message,
                    sources,
                )
            })
        });
        drafts.collect()
    }

    fn finalization_failed(&self, facts: &InvoiceContext<'a, '_>) -> Vec<PendingEntry<'a>> {
        let mut seconds: BTreeMap<i64, Vec<(&'a StoredObservation, &'a Invoice)>> = BTreeMap::new();
        for (known, invoice) in self.tellers(InvoiceFact::FinalizationFailed) {
            seconds
                .entry(known.telling.created)
                .or_default()
                .push((known, invoice));
        }
        let drafts = seconds.into_values().map(|tellers| {
            let message = message::finalization_failed(facts, &tellers);
            let sources = tellers.into_iter().map(|(k, _)| k).collect();
            open(
                TieBreak::FinalizationFailed,
                PaymentState::PaymentFailed,
                facts.invoice_id,
                message,
                sources,
            )
        });
        drafts.collect()
    }
}

fn failed<'a>(
    attempt: &FailedAttempt<'a>,
    own: &[&'a StoredObservation],
    facts: &InvoiceContext<'a, '_>,
) -> PendingEntry<'a> {
    let sources = attempt
        .sources
        .iter()
        .chain(attempt.tries.iter().flat_map(|t| &t.sources))
        .copied()
        .collect();
    PendingEntry {
        stage: Phase::Open,
        time: attempt.time(),
        rank: TieBreak::Failed,
        number: attempt.number.unwrap_or(0),
        object_id: attempt.object_id(),
        state: PaymentState::PaymentFailed,
        message: message::attempt_failed(facts, attempt, own),
        sources: in_order(sources),
    }
}

/// A draft whose time is the earliest `created` of those who tell it.
fn open<'a>(
    rank: TieBreak,
    state: PaymentState,
    object_id: &'a str,
    message: String,
    sources: Vec<&'a StoredObservation>,
) -> PendingEntry<'a> {
    let time = sources
        .iter()
        .map(|k| k.telling.created)
        .min()
        .unwrap_or_default();
    PendingEntry {
        stage: Phase::Open,
        time,
        rank,
        number: 0,
        object_id,
        state,
        message,
        sources,
    }
}

pub(in crate::domain) fn in_order(mut known: Vec<&StoredObservation>) -> Vec<&StoredObservation> {
    known.sort_by(|a, b| {
        (a.telling.created, &a.telling.id, a.key).cmp(&(b.telling.created, &b.telling.id, b.key))
    });
    known
}

/// When a fact became true: Stripe's own transition time where a snapshot has it, else the earliest event of its row, else
/// the earliest event that shows it; where only the API tells it, what its snapshot says, simulated or not.
fn time_of(fact: InvoiceFact, sources: &[(&StoredObservation, &Invoice)]) -> i64 {
    let transition = |i: &Invoice| match fact {
        InvoiceFact::Finalized => i.finalized_at,
        InvoiceFact::WrittenOff => i.marked_uncollectible_at,
        InvoiceFact::Voided => i.voided_at,
        InvoiceFact::Paid => i.paid_at,
        _ => None,
    };
    let believed = || sources.iter().filter(|(k, i)| !contradicts(&k.telling, i));
    let real = believed()
        .filter(|(_, i)| i.test_clock.is_none())
        .filter_map(|(_, i)| transition(i))
        .min();
    let events = || sources.iter().filter(|(k, _)| !k.telling.fetched);
    let in_row = || {
        events()
            .filter(|(k, i)| by_type(&k.telling, i) == Some(fact))
            .map(|(k, _)| k.telling.created)
            .min()
    };
    let shown = || events().map(|(k, _)| k.telling.created).min();
    let simulated = || believed().filter_map(|(_, i)| transition(i)).min();
    let made = || sources.iter().filter_map(|(_, i)| i.created).min();
    real.or_else(in_row)
        .or_else(shown)
        .or_else(simulated)
        .or_else(made)
        .unwrap_or_default()
}

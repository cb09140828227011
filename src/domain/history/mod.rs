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
use super::history::failed_attempts::{Attempt, failed_attempts};
use super::history::payment_links::Links;
use super::invoice::document::{ImportedState, State};
use super::stripe::event::{EventKey, Telling};
use super::stripe::object::{Invoice, Object};
use message::Facts;
use refunds_and_disputes::Returned;

/// A telling, and the stored event that it came with.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    pub key: EventKey,
    pub telling: Telling,
}

/// One entry of `status.states`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub state: State,
    /// Unix milliseconds.
    pub timestamp_ms: i64,
    pub message: Option<String>,
    /// The events that tell it, earliest first; empty for an entry that came with the stored invoice.
    pub proofs: Vec<EventKey>,
}

/// Where in a history an entry stands: what leads nowhere further is last, then time, then what is usual within a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::domain) enum Stage {
    Open,
    Voided,
    Paid,
    Information,
}

/// The usual order of things that happen in the same second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::domain) enum Rank {
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
pub(in crate::domain) struct Draft<'a> {
    pub stage: Stage,
    /// Unix seconds.
    pub time: i64,
    pub rank: Rank,
    /// The attempt's number, else 0.
    pub number: i64,
    pub object_id: &'a str,
    pub state: State,
    pub message: String,
    pub told_by: Vec<&'a Known>,
}

/// Folds what is known into the history. `known` may hold more than belongs to the invoice, in any order, repeated.
pub fn fold(
    stripe_invoice_id: Option<&str>,
    imported: &[ImportedState],
    known: &[Known],
) -> Vec<Entry> {
    let computed = match stripe_invoice_id {
        Some(invoice_id) => compute(invoice_id, imported, known),
        None => Vec::new(),
    };
    let imported_paid = imported.iter().any(|i| i.state == State::Paid);
    let mut entries: Vec<Entry> = imported.iter().map(imported_entry).collect();
    for draft in computed {
        let counts = match draft.stage {
            Stage::Open | Stage::Voided => !imported_paid,
            Stage::Paid | Stage::Information => true,
        };
        let timestamp_ms = draft.time * 1000;
        let came_with_the_invoice = imported
            .iter()
            .any(|i| i.state == draft.state && i.timestamp_ms == timestamp_ms);
        if !counts || came_with_the_invoice {
            continue;
        }
        let proofs = draft.told_by.iter().map(|k| k.key).collect();
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
pub fn lacks_reason(stripe_invoice_id: &str, known: &[Known]) -> bool {
    let known = without_twins(known);
    let links = Links::read(known.iter().map(|k| &k.telling));
    let is_own = |k: &&Known| links.invoice_of(&k.telling.object) == Some(stripe_invoice_id);
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
    known: &'a [Known],
) -> Vec<Draft<'a>> {
    let known = without_twins(known);
    let links = Links::read(known.iter().map(|k| &k.telling));
    let own: Vec<&Known> = known
        .into_iter()
        .filter(|k| links.invoice_of(&k.telling.object) == Some(invoice_id))
        .collect();
    let attempts = failed_attempts(&own);
    let gathered = Gathered::new(&own, &links, &attempts);
    let facts = Facts::gather(invoice_id, &own, &links);

    let mut drafts = gathered.stated(&facts);
    drafts.extend(gathered.action_required(&facts));
    drafts.extend(gathered.in_flight(&facts));
    drafts.extend(gathered.partly_funded(&facts));
    drafts.extend(gathered.part_paid(&facts));
    drafts.extend(gathered.finalization_failed(&facts));
    drafts.extend(attempts.iter().map(|attempt| failed(attempt, &own, &facts)));

    let paid_by_import = imported
        .iter()
        .filter(|i| i.state == State::Paid)
        .map(|i| i.timestamp_ms);
    let paid_by_stripe = drafts
        .iter()
        .filter(|d| d.stage == Stage::Paid)
        .map(|d| d.time * 1000);
    if let Some(paid_ms) = paid_by_import.chain(paid_by_stripe).min() {
        let returned = Returned { own: &own, paid_ms };
        drafts.extend(refunds_and_disputes::entries(&returned, &facts));
    }
    drafts.sort_by(|a, b| a.place().cmp(&b.place()));
    drafts
}

impl Draft<'_> {
    fn place(&self) -> (Stage, i64, Rank, i64, &str, &str) {
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
fn without_twins(known: &[Known]) -> Vec<&Known> {
    let snapshots: HashSet<&str> = known
        .iter()
        .filter(|k| !k.telling.thin && !k.telling.fetched)
        .map(|k| k.telling.id.as_str())
        .collect();
    let is_twin = |t: &Telling| {
        t.snapshot_event
            .as_deref()
            .is_some_and(|id| snapshots.contains(id))
    };
    let mut kept: Vec<&Known> = known.iter().filter(|k| !is_twin(&k.telling)).collect();
    kept.sort_by(|a, b| {
        (a.telling.created, &a.telling.id, a.key).cmp(&(b.telling.created, &b.telling.id, b.key))
    });
    kept.dedup_by_key(|k| k.key);
    kept
}

/// Transition times, and who told what, of one invoice.
struct Gathered<'a, 'k> {
    own: &'k [&'a Known],
    links: &'k Links<'a>,
    /// When attempts failed, ascending: what rounds are counted by.
    failures: Vec<i64>,
}

impl<'a, 'k> Gathered<'a, 'k> {
    fn new(own: &'k [&'a Known], links: &'k Links<'a>, attempts: &[Attempt]) -> Self {
        let mut failures: Vec<i64> = attempts.iter().map(Attempt::time).collect();
        failures.sort_unstable();
        Gathered {
            own,
            links,
            failures,
        }
    }

    fn invoices(&self) -> impl Iterator<Item = (&'a Known, &'a Invoice)> {
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
    fn stated(&self, facts: &Facts<'a, '_>) -> Vec<Draft<'a>> {
        use InvoiceFact::*;
        let once = [
            (
                Finalized,
                Stage::Open,
                Rank::Finalized,
                State::PaymentPending,
            ),
            (
                AttemptRequired,
                Stage::Open,
                Rank::AttemptRequired,
                State::PaymentPending,
            ),
            (Overdue, Stage::Open, Rank::Overdue, State::PaymentPending),
            (
                WrittenOff,
                Stage::Open,
                Rank::WrittenOff,
                State::PaymentFailed,
            ),
            (Voided, Stage::Voided, Rank::Settled, State::PaymentFailed),
            (Paid, Stage::Paid, Rank::Settled, State::Paid),
        ];
        let told = once.map(|(fact, ..)| self.tellers(fact));
        let is_told = |fact| {
            once.iter()
                .zip(&told)
                .any(|(row, told_by)| row.0 == fact && !told_by.is_empty())
        };
        let written_off = is_told(WrittenOff);
        let mut drafts = Vec::new();
        for ((fact, stage, rank, state), told_by) in once.into_iter().zip(&told) {
            if told_by.is_empty() {
                continue;
            }
            let message = match fact {
                Finalized => message::finalized(facts, told_by),
                AttemptRequired => message::attempt_required(facts, told_by),
                Overdue => message::overdue(facts, told_by),
                WrittenOff => message::written_off(facts, told_by),
                Voided => message::voided(facts, told_by),
                _ => message::paid(facts, told_by, written_off),
            };
            let time = time_of(fact, told_by);
            let told_by = told_by.iter().map(|(k, _)| *k).collect();
            drafts.push(Draft {
                stage,
                time,
                rank,
                number: 0,
                object_id: facts.invoice_id,
                state,
                message,
                told_by,
            });
        }
        drafts
    }

    fn tellers(&self, fact: InvoiceFact) -> Vec<(&'a Known, &'a Invoice)> {
        let shown = SHOWN_BY_SNAPSHOTS.contains(&fact);
        let tells = |k: &Known, i: &Invoice| {
            by_type(&k.telling, i) == Some(fact) || (shown && by_snapshot(&k.telling, i, fact))
        };
        self.invoices().filter(|(k, i)| tells(k, i)).collect()
    }

    fn action_required(&self, facts: &Facts<'a, '_>) -> Vec<Draft<'a>> {
        let of_type = |kind: &str| -> Vec<&'a Known> {
            self.own
                .iter()
                .copied()
                .filter(|k| k.telling.kind == kind)
                .collect()
        };
        let by_invoice = of_type("invoice.payment_action_required");
        let by_intent = of_type("payment_intent.requires_action");
        let mut rounds: BTreeMap<usize, Vec<&'a Known>> = BTreeMap::new();
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
        let drafts = rounds.into_values().map(|told_by| {
            let told_by = in_order(told_by);
            open(
                Rank::ActionRequired,
                State::PaymentPending,
                "",
                message::action_required(facts, &told_by),
                told_by,
            )
        });
        drafts.collect()
    }

    fn in_flight(&self, facts: &Facts<'a, '_>) -> Vec<Draft<'a>> {
        let mut flights: BTreeMap<(&'a str, usize), Vec<&'a Known>> = BTreeMap::new();
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
        let drafts = flights.into_iter().map(|((payment, _), told_by)| {
            open(
                Rank::InFlight,
                State::PaymentInProgress,
                payment,
                message::in_flight(facts, &told_by),
                told_by,
            )
        });
        drafts.collect()
    }

    fn partly_funded(&self, facts: &Facts<'a, '_>) -> Vec<Draft<'a>> {
        let mut funded: BTreeMap<(&'a str, i64), Vec<&'a Known>> = BTreeMap::new();
        for &known in self.own {
            if let (Object::PaymentIntent(intent), "payment_intent.partially_funded") =
                (&known.telling.object, known.telling.kind.as_str())
                && let Some(amount) = intent.funded()
            {
                funded.entry((&intent.id, amount)).or_default().push(known);
            }
        }
        let drafts = funded.into_iter().map(|((intent, amount), told_by)| {
            open(
                Rank::PartlyFunded,
                State::PaymentInProgress,
                intent,
                message::partly_funded(facts, amount, &told_by),
                told_by,
            )
        });
        drafts.collect()
    }

    /// Left out when it is no part, but the payment: it covers at least what a paid invoice was due.
    fn part_paid(&self, facts: &Facts<'a, '_>) -> Vec<Draft<'a>> {
        let paid = self.tellers(InvoiceFact::Paid);
        let shown_paid = paid
            .iter()
            .filter(|(k, i)| by_snapshot(&k.telling, i, InvoiceFact::Paid));
        let lowest_due = shown_paid.filter_map(|(_, i)| i.amount_due).min();
        let mut parts: BTreeMap<&'a str, Vec<&'a Known>> = BTreeMap::new();
        for &known in self.own {
            if let (Object::InvoicePayment(part), "invoice_payment.paid") =
                (&known.telling.object, known.telling.kind.as_str())
            {
                parts.entry(&part.id).or_default().push(known);
            }
        }
        let drafts = parts.into_iter().filter_map(|(id, told_by)| {
            let amount = facts.amount_of_payment(id);
            let is_all = amount.is_none_or(|amount| lowest_due.is_some_and(|due| amount >= due));
            let message = message::part_paid(facts, amount, &told_by);
            (paid.is_empty() || !is_all).then(|| {
                open(
                    Rank::PartPaid,
                    State::PaymentInProgress,
                    id,
                    message,
                    told_by,
                )
            })
        });
        drafts.collect()
    }

    fn finalization_failed(&self, facts: &Facts<'a, '_>) -> Vec<Draft<'a>> {
        let mut seconds: BTreeMap<i64, Vec<(&'a Known, &'a Invoice)>> = BTreeMap::new();
        for (known, invoice) in self.tellers(InvoiceFact::FinalizationFailed) {
            seconds
                .entry(known.telling.created)
                .or_default()
                .push((known, invoice));
        }
        let drafts = seconds.into_values().map(|tellers| {
            let message = message::finalization_failed(facts, &tellers);
            let told_by = tellers.into_iter().map(|(k, _)| k).collect();
            open(
                Rank::FinalizationFailed,
                State::PaymentFailed,
                facts.invoice_id,
                message,
                told_by,
            )
        });
        drafts.collect()
    }
}

fn failed<'a>(attempt: &Attempt<'a>, own: &[&'a Known], facts: &Facts<'a, '_>) -> Draft<'a> {
    let told_by = attempt
        .told_by
        .iter()
        .chain(attempt.tries.iter().flat_map(|t| &t.told_by))
        .copied()
        .collect();
    Draft {
        stage: Stage::Open,
        time: attempt.time(),
        rank: Rank::Failed,
        number: attempt.number.unwrap_or(0),
        object_id: attempt.object_id(),
        state: State::PaymentFailed,
        message: message::attempt_failed(facts, attempt, own),
        told_by: in_order(told_by),
    }
}

/// A draft whose time is the earliest `created` of those who tell it.
fn open<'a>(
    rank: Rank,
    state: State,
    object_id: &'a str,
    message: String,
    told_by: Vec<&'a Known>,
) -> Draft<'a> {
    let time = told_by
        .iter()
        .map(|k| k.telling.created)
        .min()
        .unwrap_or_default();
    Draft {
        stage: Stage::Open,
        time,
        rank,
        number: 0,
        object_id,
        state,
        message,
        told_by,
    }
}

pub(in crate::domain) fn in_order(mut known: Vec<&Known>) -> Vec<&Known> {
    known.sort_by(|a, b| {
        (a.telling.created, &a.telling.id, a.key).cmp(&(b.telling.created, &b.telling.id, b.key))
    });
    known
}

/// When a fact became true: Stripe's own transition time where a snapshot has it, else the earliest event of its row, else
/// the earliest event that shows it; where only the API tells it, what its snapshot says, simulated or not.
fn time_of(fact: InvoiceFact, told_by: &[(&Known, &Invoice)]) -> i64 {
    let transition = |i: &Invoice| match fact {
        InvoiceFact::Finalized => i.finalized_at,
        InvoiceFact::WrittenOff => i.marked_uncollectible_at,
        InvoiceFact::Voided => i.voided_at,
        InvoiceFact::Paid => i.paid_at,
        _ => None,
    };
    let believed = || told_by.iter().filter(|(k, i)| !contradicts(&k.telling, i));
    let real = believed()
        .filter(|(_, i)| i.test_clock.is_none())
        .filter_map(|(_, i)| transition(i))
        .min();
    let events = || told_by.iter().filter(|(k, _)| !k.telling.fetched);
    let in_row = || {
        events()
            .filter(|(k, i)| by_type(&k.telling, i) == Some(fact))
            .map(|(k, _)| k.telling.created)
            .min()
    };
    let shown = || events().map(|(k, _)| k.telling.created).min();
    let simulated = || believed().filter_map(|(_, i)| transition(i)).min();
    let made = || told_by.iter().filter_map(|(_, i)| i.created).min();
    real.or_else(in_row)
        .or_else(shown)
        .or_else(simulated)
        .or_else(made)
        .unwrap_or_default()
}

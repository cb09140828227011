//! Builds the unsorted entries of one invoice, with one function for each kind of fact.
//!
//! Numbers of rules refer to `docs/payment-states.md`.

use std::collections::BTreeMap;

use super::context::InvoiceContext;
use super::entry::{PendingEntry, Phase, TieBreak, in_order};
use super::fact::{InvoiceFact, SHOWN_BY_SNAPSHOTS, by_snapshot, by_type, contradicts};
use super::failed_attempts::{FailedAttempt, LimitedAttempts};
use super::message;
use super::payment_links::PaymentLinks;
use crate::domain::payment_state::PaymentState;
use crate::domain::stripe::event::StoredObservation;
use crate::domain::stripe::object::{Invoice, Object};

/// Longest time in seconds between the two events of one required action.
const SAME_ACTION_S: i64 = 2;

/// Facts that occur once in a history, with the phase and state of their entries.
const STATED_ONCE: [(InvoiceFact, Phase, TieBreak, PaymentState); 6] = [
    (
        InvoiceFact::Finalized,
        Phase::Open,
        TieBreak::Finalized,
        PaymentState::PaymentPending,
    ),
    (
        InvoiceFact::AttemptRequired,
        Phase::Open,
        TieBreak::AttemptRequired,
        PaymentState::PaymentPending,
    ),
    (
        InvoiceFact::Overdue,
        Phase::Open,
        TieBreak::Overdue,
        PaymentState::PaymentPending,
    ),
    (
        InvoiceFact::WrittenOff,
        Phase::Open,
        TieBreak::WrittenOff,
        PaymentState::PaymentFailed,
    ),
    (
        InvoiceFact::Voided,
        Phase::Voided,
        TieBreak::Settled,
        PaymentState::PaymentFailed,
    ),
    (
        InvoiceFact::Paid,
        Phase::Paid,
        TieBreak::Settled,
        PaymentState::Paid,
    ),
];

/// Observations of one fact, with the invoice that each contains.
type InvoiceSources<'a> = Vec<(&'a StoredObservation, &'a Invoice)>;

/// Builds the entries of one invoice from the observations that count for it.
pub(super) struct HistoryBuilder<'a, 'k> {
    counted: &'k [&'a StoredObservation],
    links: &'k PaymentLinks<'a>,
    context: &'k InvoiceContext<'a, 'k>,
    /// Unix seconds of all failed attempts, ascending. They separate rounds.
    failures: Vec<i64>,
}

impl<'a, 'k> HistoryBuilder<'a, 'k> {
    pub fn new(
        counted: &'k [&'a StoredObservation],
        links: &'k PaymentLinks<'a>,
        context: &'k InvoiceContext<'a, 'k>,
        attempts: &[FailedAttempt],
    ) -> Self {
        let mut failures: Vec<i64> = attempts.iter().map(FailedAttempt::time).collect();
        failures.sort_unstable();

        HistoryBuilder {
            counted,
            links,
            context,
            failures,
        }
    }

    /// Returns the entries of all facts except those about money returned or contested.
    pub fn entries(&self, attempts: &LimitedAttempts<'a>) -> Vec<PendingEntry<'a>> {
        let mut entries = self.stated_once();
        entries.extend(self.action_required());
        entries.extend(self.in_flight());
        entries.extend(self.partly_funded());
        entries.extend(self.part_paid());
        entries.extend(self.finalization_failed());
        entries.extend(attempts.one_by_one.iter().map(|a| self.failed(a)));
        entries.extend(self.more_failed(&attempts.shared));
        entries
    }

    /// Returns the number of attempts that failed before this second.
    ///
    /// An invoice keeps its PaymentIntent across retries, so rounds distinguish its submissions.
    fn round(&self, second: i64) -> usize {
        self.failures.partition_point(|&failure| failure < second)
    }

    fn sources_of(&self, fact: InvoiceFact) -> InvoiceSources<'a> {
        let counts_snapshots = SHOWN_BY_SNAPSHOTS.contains(&fact);
        let invoices = self
            .counted
            .iter()
            .filter_map(|&stored| match &stored.observation.object {
                Object::Invoice(invoice) => Some((stored, &**invoice)),
                _ => None,
            });

        invoices
            .filter(|(stored, invoice)| {
                by_type(&stored.observation, invoice) == Some(fact)
                    || (counts_snapshots && by_snapshot(&stored.observation, invoice, fact))
            })
            .collect()
    }

    fn stated_once(&self) -> Vec<PendingEntry<'a>> {
        let context = self.context;
        let was_written_off = !self.sources_of(InvoiceFact::WrittenOff).is_empty();
        let mut entries = Vec::new();
        for (fact, phase, tie_break, state) in STATED_ONCE {
            let sources = self.sources_of(fact);
            if sources.is_empty() {
                continue;
            }
            let message = match fact {
                InvoiceFact::Finalized => message::finalized(context, &sources),
                InvoiceFact::AttemptRequired => message::attempt_required(context, &sources),
                InvoiceFact::Overdue => message::overdue(context, &sources),
                InvoiceFact::WrittenOff => message::written_off(context, &sources),
                InvoiceFact::Voided => message::voided(context, &sources),
                InvoiceFact::Paid => message::paid(context, &sources, was_written_off),
                InvoiceFact::ActionRequired
                | InvoiceFact::AttemptFailed
                | InvoiceFact::FinalizationFailed => continue,
            };
            entries.push(PendingEntry {
                phase,
                time: time_of(fact, &sources),
                tie_break,
                number: 0,
                object_id: context.invoice_id,
                state,
                message,
                sources: sources.into_iter().map(|(stored, _)| stored).collect(),
            });
        }

        entries
    }

    fn action_required(&self) -> Vec<PendingEntry<'a>> {
        let by_invoice = self.of_type("invoice.payment_action_required");
        let by_intent = self.of_type("payment_intent.requires_action");
        let mut rounds: BTreeMap<usize, Vec<&'a StoredObservation>> = BTreeMap::new();
        for (observations, siblings) in [(&by_invoice, &by_intent), (&by_intent, &by_invoice)] {
            for &stored in observations {
                // The two events arrive a second or two apart. A failure in between must not
                // separate them, so both count at the second of the earlier event.
                let second = stored.observation.created;
                let earliest = second.saturating_sub(SAME_ACTION_S);
                let at = siblings.partition_point(|sibling| sibling.observation.created < earliest);
                let sibling = siblings.get(at).map(|sibling| sibling.observation.created);
                let counted_at = sibling.filter(|at| *at <= second).unwrap_or(second);
                rounds
                    .entry(self.round(counted_at))
                    .or_default()
                    .push(stored);
            }
        }

        let entries = rounds.into_values().map(|sources| {
            let sources = in_order(sources);
            PendingEntry::open(
                TieBreak::ActionRequired,
                PaymentState::PaymentPending,
                "",
                message::action_required(self.context, &sources),
                sources,
            )
        });
        entries.collect()
    }

    /// Returns the observations of one event type, earliest first.
    fn of_type(&self, kind: &str) -> Vec<&'a StoredObservation> {
        let of_type = self.counted.iter().copied();
        of_type
            .filter(|stored| stored.observation.kind == kind)
            .collect()
    }

    fn in_flight(&self) -> Vec<PendingEntry<'a>> {
        let mut flights: BTreeMap<(&'a str, usize), Vec<&'a StoredObservation>> = BTreeMap::new();
        for &stored in self.counted {
            let payment = match (&stored.observation.object, stored.observation.kind.as_str()) {
                (Object::PaymentIntent(intent), "payment_intent.processing") => intent.id.as_str(),
                (Object::Charge(charge), "charge.pending") => charge
                    .payment_intent
                    .as_deref()
                    .or(self.links.intent_of(&charge.id))
                    .unwrap_or(&charge.id),
                _ => continue,
            };
            let round = self.round(stored.observation.created);
            flights.entry((payment, round)).or_default().push(stored);
        }

        let entries = flights.into_iter().map(|((payment, _), sources)| {
            PendingEntry::open(
                TieBreak::InFlight,
                PaymentState::PaymentInProgress,
                payment,
                message::in_flight(self.context, &sources),
                sources,
            )
        });
        entries.collect()
    }

    fn partly_funded(&self) -> Vec<PendingEntry<'a>> {
        let mut funded: BTreeMap<(&'a str, i64), Vec<&'a StoredObservation>> = BTreeMap::new();
        for &stored in self.counted {
            if let (Object::PaymentIntent(intent), "payment_intent.partially_funded") =
                (&stored.observation.object, stored.observation.kind.as_str())
                && let Some(amount) = intent.funded()
            {
                funded.entry((&intent.id, amount)).or_default().push(stored);
            }
        }

        let entries = funded.into_iter().map(|((intent, amount), sources)| {
            PendingEntry::open(
                TieBreak::PartlyFunded,
                PaymentState::PaymentInProgress,
                intent,
                message::partly_funded(self.context, amount, &sources),
                sources,
            )
        });
        entries.collect()
    }

    /// Leaves out a payment that covers at least the amount due of a paid invoice, because it is
    /// not a part payment.
    fn part_paid(&self) -> Vec<PendingEntry<'a>> {
        let paid = self.sources_of(InvoiceFact::Paid);
        let lowest_due = paid
            .iter()
            .filter(|(stored, invoice)| {
                by_snapshot(&stored.observation, invoice, InvoiceFact::Paid)
            })
            .filter_map(|(_, invoice)| invoice.amount_due)
            .min();
        let mut parts: BTreeMap<&'a str, Vec<&'a StoredObservation>> = BTreeMap::new();
        for &stored in self.counted {
            if let (Object::InvoicePayment(part), "invoice_payment.paid") =
                (&stored.observation.object, stored.observation.kind.as_str())
            {
                parts.entry(&part.id).or_default().push(stored);
            }
        }

        let mut entries = Vec::new();
        for (id, sources) in parts {
            let amount = self.context.amount_of_payment(id);
            let is_whole = amount.is_none_or(|amount| lowest_due.is_some_and(|due| amount >= due));
            if !paid.is_empty() && is_whole {
                continue;
            }
            entries.push(PendingEntry::open(
                TieBreak::PartPaid,
                PaymentState::PaymentInProgress,
                id,
                message::part_paid(self.context, amount, &sources),
                sources,
            ));
        }
        entries
    }

    fn finalization_failed(&self) -> Vec<PendingEntry<'a>> {
        let mut seconds: BTreeMap<i64, InvoiceSources<'a>> = BTreeMap::new();
        for (stored, invoice) in self.sources_of(InvoiceFact::FinalizationFailed) {
            let second = seconds.entry(stored.observation.created).or_default();
            second.push((stored, invoice));
        }

        let entries = seconds.into_values().map(|sources| {
            PendingEntry::open(
                TieBreak::FinalizationFailed,
                PaymentState::PaymentFailed,
                self.context.invoice_id,
                message::finalization_failed(self.context, &sources),
                sources.into_iter().map(|(stored, _)| stored).collect(),
            )
        });
        entries.collect()
    }

    fn failed(&self, attempt: &FailedAttempt<'a>) -> PendingEntry<'a> {
        PendingEntry {
            phase: Phase::Open,
            time: attempt.time(),
            tie_break: TieBreak::Failed,
            number: attempt.number.unwrap_or(0),
            object_id: attempt.object_id(),
            state: PaymentState::PaymentFailed,
            message: message::attempt_failed(self.context, attempt),
            sources: in_order(attempt.all_sources().collect()),
        }
    }

    /// Returns the entry that attempts share if there are too many to list one by one.
    ///
    /// The entry has the position of the first shared attempt, so the entries stay oldest first,
    /// and the latest attempts after it still decide the current state. The entry keeps every
    /// source.
    fn more_failed(&self, shared: &[FailedAttempt<'a>]) -> Option<PendingEntry<'a>> {
        let first = shared.first()?;
        let sources = shared.iter().flat_map(FailedAttempt::all_sources);
        Some(PendingEntry {
            phase: Phase::Open,
            time: first.time(),
            tie_break: TieBreak::Failed,
            number: first.number.unwrap_or(0),
            object_id: first.object_id(),
            state: PaymentState::PaymentFailed,
            message: message::more_attempts(self.context, shared),
            sources: in_order(sources.collect()),
        })
    }
}

/// Returns the Unix second in which a fact became true (rule 4.1).
///
/// Prefers Stripe's transition time where a snapshot has it, then the earliest event of the fact's
/// row, then the earliest event that shows it. If only the API shows the fact, uses the time of its
/// snapshot, even a time simulated by a test clock.
fn time_of(fact: InvoiceFact, sources: &[(&StoredObservation, &Invoice)]) -> i64 {
    let trusted = || {
        sources
            .iter()
            .filter(|(stored, invoice)| !contradicts(&stored.observation, invoice))
    };
    let real = trusted()
        .filter(|(_, invoice)| invoice.test_clock.is_none())
        .filter_map(|(_, invoice)| transition_time(fact, invoice))
        .min();
    let events = || {
        sources
            .iter()
            .filter(|(stored, _)| !stored.observation.fetched)
    };
    let in_row = events()
        .filter(|(stored, invoice)| by_type(&stored.observation, invoice) == Some(fact))
        .map(|(stored, _)| stored.observation.created)
        .min();
    let shown = events().map(|(stored, _)| stored.observation.created).min();
    let simulated = trusted()
        .filter_map(|(_, invoice)| transition_time(fact, invoice))
        .min();
    let made = sources
        .iter()
        .filter_map(|(_, invoice)| invoice.created)
        .min();

    real.or(in_row)
        .or(shown)
        .or(simulated)
        .or(made)
        .unwrap_or_default()
}

fn transition_time(fact: InvoiceFact, invoice: &Invoice) -> Option<i64> {
    match fact {
        InvoiceFact::Finalized => invoice.finalized_at,
        InvoiceFact::WrittenOff => invoice.marked_uncollectible_at,
        InvoiceFact::Voided => invoice.voided_at,
        InvoiceFact::Paid => invoice.paid_at,
        InvoiceFact::AttemptRequired
        | InvoiceFact::ActionRequired
        | InvoiceFact::Overdue
        | InvoiceFact::AttemptFailed
        | InvoiceFact::FinalizationFailed => None,
    }
}

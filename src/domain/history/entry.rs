//! The entries of a history, finished and pending, and their order.

use crate::domain::payment_state::PaymentState;
use crate::domain::stripe::event::{EventKey, StoredObservation};

/// One entry of `status.states`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub state: PaymentState,
    /// Unix milliseconds.
    pub timestamp_ms: i64,
    pub message: Option<String>,
    /// Keys of the events that prove the entry, earliest first. Empty for an imported entry.
    pub proofs: Vec<EventKey>,
}

/// First sort key of an entry. Terminal phases come last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::domain) enum Phase {
    Open,
    Voided,
    Paid,
    Information,
}

/// Third sort key of an entry: the usual order of facts within one second.
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

/// A computed entry before the history is sorted and merged with imported states.
pub(in crate::domain) struct PendingEntry<'a> {
    pub phase: Phase,
    /// Unix seconds.
    pub time: i64,
    pub tie_break: TieBreak,
    /// Attempt number, 0 for other facts.
    pub number: i64,
    /// Id of the object that the fact is about.
    pub object_id: &'a str,
    pub state: PaymentState,
    pub message: String,
    /// Observations that prove the entry.
    pub sources: Vec<&'a StoredObservation>,
}

impl<'a> PendingEntry<'a> {
    /// Returns an entry of the open phase, at the earliest `created` of its sources.
    pub fn open(
        tie_break: TieBreak,
        state: PaymentState,
        object_id: &'a str,
        message: String,
        sources: Vec<&'a StoredObservation>,
    ) -> PendingEntry<'a> {
        PendingEntry {
            phase: Phase::Open,
            time: earliest_second(&sources),
            tie_break,
            number: 0,
            object_id,
            state,
            message,
            sources,
        }
    }

    /// Returns the sort key: phase, time, tie-break, attempt number, object id, message.
    pub fn sort_key(&self) -> (Phase, i64, TieBreak, i64, &str, &str) {
        (
            self.phase,
            self.time,
            self.tie_break,
            self.number,
            self.object_id,
            &self.message,
        )
    }
}

/// Returns the earliest `created` of these observations in Unix seconds, or 0 without observations.
pub(in crate::domain) fn earliest_second(sources: &[&StoredObservation]) -> i64 {
    let seconds = sources.iter().map(|stored| stored.observation.created);
    seconds.min().unwrap_or_default()
}

/// Sorts observations by time, event id and key. This order does not depend on arrival.
pub(in crate::domain) fn in_order(
    mut observations: Vec<&StoredObservation>,
) -> Vec<&StoredObservation> {
    observations.sort_by(|a, b| chronological(a).cmp(&chronological(b)));
    observations
}

/// Returns the sort key of [`in_order`].
pub(in crate::domain) fn chronological(stored: &StoredObservation) -> (i64, &str, EventKey) {
    (
        stored.observation.created,
        &stored.observation.id,
        stored.key,
    )
}

//! Is this invoice paid, and how do we know? In plain sentences, from the evidence, for somebody in finance.

use super::evidence::{Evidence, Proven};
use crate::domain::invoice::{State, readable};

/// The answer, and what it rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// None: nothing is known.
    pub state: Option<State>,
    /// Whether it is paid, and since when.
    pub answer: String,
    /// How we know.
    pub grounds: String,
    /// What is still open about it.
    pub waits: String,
    /// Somebody should look at it before relying on the answer.
    pub is_doubtful: bool,
}

pub fn verdict(evidence: &Evidence) -> Verdict {
    let state = evidence.entries.last().map(|entry| entry.state);
    Verdict {
        state,
        answer: answer(evidence),
        grounds: grounds(evidence),
        waits: waits(evidence),
        is_doubtful: evidence.differs_since_ms.is_some(),
    }
}

fn answer(evidence: &Evidence) -> String {
    let Some(last) = evidence.entries.last() else {
        return match (&evidence.stripe_invoice_id, evidence.as_of_ms) {
            (None, _) => "Nothing is known about its payment: the stored invoice names no invoice at Stripe.".to_owned(),
            (Some(_), None) => "Nothing is known about its payment: Stripe has told nothing about it yet.".to_owned(),
            (Some(_), Some(_)) => "Nothing was known about its payment at that time.".to_owned(),
        };
    };
    let first_paid = evidence.entries.iter().find(|entry| entry.state == State::Paid);
    let since = readable(last.timestamp_ms);
    match (last.state, first_paid) {
        (State::Paid, Some(first)) if first.timestamp_ms != last.timestamp_ms => {
            format!("Paid on {}. Money was returned, contested or added since, last on {since}.", readable(first.timestamp_ms))
        }
        (State::Paid, _) => format!("Paid on {since}."),
        (State::PaymentPending, _) => format!("Not paid: it waits for payment since {since}."),
        (State::PaymentInProgress, _) => format!("Not paid yet: a payment is under way since {since}."),
        (State::PaymentFailed, _) => format!("Not paid: collecting it failed or was given up on {since}."),
    }
}

fn grounds(evidence: &Evidence) -> String {
    let proofs: usize = evidence.entries.iter().map(|entry| entry.proofs.len()).sum();
    let (some, imported) = (plural(proofs, "event"), evidence.entries.last().is_some_and(|entry: &Proven| entry.is_imported));
    match (evidence.differs_since_ms, evidence.confirmed_ms) {
        (Some(since_ms), _) => {
            format!("Do not rely on it: Stripe's API says something else since {}.", readable(since_ms))
        }
        (None, Some(confirmed_ms)) => format!("Confirmed with Stripe at {}.", readable(confirmed_ms)),
        (None, None) if evidence.entries.is_empty() => String::new(),
        (None, None) if imported => "It came with the stored invoice, and was not compared with Stripe.".to_owned(),
        (None, None) => format!("Proved by {some} from Stripe; not compared with Stripe's API."),
    }
}

fn waits(evidence: &Evidence) -> String {
    match evidence.missing.len() {
        0 if evidence.entries.is_empty() => String::new(),
        0 => "Nothing waits to be fetched.".to_owned(),
        1 => "One thing is still to be fetched from Stripe; it stands below.".to_owned(),
        n => format!("{n} things are still to be fetched from Stripe; they stand below."),
    }
}

fn plural(count: usize, thing: &str) -> String {
    if count == 1 { format!("one {thing}") } else { format!("{count} {thing}s") }
}

//! Is this invoice paid, and how do we know? In plain sentences, from the evidence, for somebody in finance.

use super::evidence::Evidence;
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
    let last = evidence.entries.last();
    let (proofs, imported) = (last.map_or(0, |last| last.proofs.len()), last.is_some_and(|last| last.is_imported));
    match (evidence.differs_since_ms, evidence.confirmed_ms) {
        (Some(since_ms), _) => {
            format!("Do not rely on it: Stripe's API says something else since {}.", readable(since_ms))
        }
        (None, Some(confirmed_ms)) => format!("Confirmed with Stripe at {}.", readable(confirmed_ms)),
        (None, None) if evidence.entries.is_empty() => String::new(),
        (None, None) if imported => "It came with the stored invoice, and was not compared with Stripe.".to_owned(),
        (None, None) if proofs == 1 => "Proved by one event from Stripe; not compared with Stripe's API.".to_owned(),
        (None, None) => format!("Proved by {proofs} events from Stripe; not compared with Stripe's API."),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::evidence::{Missing, Proven};

    const NINE: i64 = 1_769_850_000_000;

    fn evidence(states: &[(State, i64)]) -> Evidence {
        let entry = |(state, after_s): &(State, i64)| Proven {
            state: *state,
            timestamp_ms: NINE + after_s * 1000,
            message: None,
            is_imported: false,
            proofs: Vec::new(),
        };
        Evidence {
            tenant_uid: "acme".to_owned(),
            invoice_uid: "inv-1".to_owned(),
            stripe_invoice_id: Some("in_1".to_owned()),
            as_of_ms: None,
            stored_ms: NINE,
            confirmed_ms: Some(NINE + 5_000),
            differs_since_ms: None,
            last_event_ms: None,
            missing: Vec::new(),
            at_stripe: Default::default(),
            entries: states.iter().map(entry).collect(),
        }
    }

    #[test]
    fn the_answer_says_whether_it_is_paid_and_since_when() {
        let cases: [(&[(State, i64)], &str); 6] = [
            (&[(State::PaymentPending, 0), (State::Paid, 1)], "Paid on 2026-01-31 09:00:01 UTC."),
            (
                &[(State::Paid, 1), (State::Paid, 9)],
                "Paid on 2026-01-31 09:00:01 UTC. Money was returned, contested or added since, last on 2026-01-31 09:00:09 UTC.",
            ),
            (&[(State::PaymentPending, 0)], "Not paid: it waits for payment since 2026-01-31 09:00:00 UTC."),
            (&[(State::PaymentInProgress, 0)], "Not paid yet: a payment is under way since 2026-01-31 09:00:00 UTC."),
            (&[(State::PaymentFailed, 0)], "Not paid: collecting it failed or was given up on 2026-01-31 09:00:00 UTC."),
            (&[], "Nothing is known about its payment: Stripe has told nothing about it yet."),
        ];
        for (states, answer) in cases {
            assert_eq!(verdict(&evidence(states)).answer, answer);
        }
    }

    #[test]
    fn it_says_what_the_answer_rests_on_and_what_waits() {
        let mut paid = evidence(&[(State::Paid, 0)]);
        let told = verdict(&paid);
        assert_eq!(
            (&*told.grounds, &*told.waits),
            ("Confirmed with Stripe at 2026-01-31 09:00:05 UTC.", "Nothing waits to be fetched.")
        );
        paid.confirmed_ms = None;
        paid.missing = vec![Missing { event: None, message: String::new() }];
        let told = verdict(&paid);
        assert_eq!(told.waits, "One thing is still to be fetched from Stripe; it stands below.");
        assert!(told.grounds.ends_with("not compared with Stripe's API.") && !told.is_doubtful);
        paid.differs_since_ms = Some(NINE);
        let told = verdict(&paid);
        assert!(
            told.is_doubtful
                && told.grounds == "Do not rely on it: Stripe's API says something else since 2026-01-31 09:00:00 UTC."
        );
    }
}

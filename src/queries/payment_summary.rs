//! Summary of an invoice's payment in plain sentences for finance: its state, and the grounds for
//! it.

use super::evidence::{Evidence, Proven};
use crate::domain::payment_state::PaymentState;
use crate::domain::time::readable;
use crate::store::Source;

/// The payment state of an invoice in words, and the grounds for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaymentSummary {
    /// The present state, or `None` if nothing is known.
    pub state: Option<PaymentState>,
    /// The state of the payment and its time, as a sentence.
    pub answer: String,
    /// The proofs, and the last comparison with Stripe.
    pub grounds: String,
    /// Objects that are still to be fetched from Stripe.
    pub waits: String,
    /// `true` if somebody must check the invoice before relying on the answer.
    pub is_doubtful: bool,
}

/// Summarises the evidence.
pub fn summarise(evidence: &Evidence) -> PaymentSummary {
    let state = evidence.entries.last().map(|entry| entry.state);

    PaymentSummary {
        state,
        answer: answer(evidence),
        grounds: grounds(evidence),
        waits: waits(evidence),
        is_doubtful: evidence.differs_since_ms.is_some(),
    }
}

fn answer(evidence: &Evidence) -> String {
    let answer = describe_state(evidence);

    // The headline itself must say that test money is not real.
    let is_test = evidence.at_stripe.livemode == Some(false) && !evidence.entries.is_empty();
    if is_test {
        format!("{answer} In test mode: no real money.")
    } else {
        answer
    }
}

fn describe_state(evidence: &Evidence) -> String {
    let Some(last) = evidence.entries.last() else {
        return match (&evidence.stripe_invoice_id, evidence.as_of_ms) {
            (None, _) => {
                "Nothing is known about its payment: the stored invoice names no Stripe invoice."
                    .to_owned()
            }
            (Some(_), None) => {
                "Nothing is known about its payment: nothing has been received from Stripe yet."
                    .to_owned()
            }
            (Some(_), Some(_)) => "Nothing was known about its payment at that time.".to_owned(),
        };
    };
    let (_, before) = evidence
        .entries
        .split_last()
        .expect("the list has a last entry");
    let since = readable(last.timestamp_ms);

    // Refunds and disputes after the payment are further entries, perhaps within the same second.
    match (
        last.state,
        before
            .iter()
            .find(|entry| entry.state == PaymentState::Paid),
    ) {
        (PaymentState::Paid, Some(first)) => {
            format!(
                "Paid on {}. Money was returned, contested or added since, last on {since}.",
                readable(first.timestamp_ms)
            )
        }
        (PaymentState::Paid, _) => format!("Paid on {since}."),
        (PaymentState::PaymentPending, _) => {
            format!("Not paid: waiting for payment since {since}.")
        }
        (PaymentState::PaymentInProgress, _) => {
            format!(
                "Not paid in full: a payment is in progress, or a part has arrived, since {since}."
            )
        }
        (PaymentState::PaymentFailed, _) => {
            format!("Not paid: collection failed or ended on {since}.")
        }
    }
}

fn grounds(evidence: &Evidence) -> String {
    let last = evidence.entries.last();
    let proofs = last.map_or(&[][..], |last| &last.proofs);
    let imported = last.is_some_and(|last| last.is_imported);
    let is_past = evidence.as_of_ms.is_some();

    // Objects that a comparison fetches are received just after the comparison has started.
    let is_newer = |confirmed_ms: i64| {
        !proofs.is_empty()
            && proofs
                .iter()
                .all(|event| event.source != Source::Api && event.received_ms > confirmed_ms)
    };
    let proved = match last.map_or(0, Proven::proof_count) {
        1 => "Proved by one event from Stripe".to_owned(),
        n => format!("Proved by {n} events from Stripe"),
    };

    match (evidence.differs_since_ms, evidence.confirmed_ms) {
        (Some(since_ms), _) => {
            format!(
                "Do not rely on it: Stripe's API has differed since {}.",
                readable(since_ms)
            )
        }
        (None, Some(confirmed_ms)) if is_newer(confirmed_ms) => {
            format!(
                "{proved}; last compared with Stripe's API before that, at {}.",
                readable(confirmed_ms)
            )
        }
        (None, Some(confirmed_ms)) => {
            format!("Confirmed with Stripe at {}.", readable(confirmed_ms))
        }
        (None, None) if evidence.entries.is_empty() => String::new(),
        // Only the last agreement is stored; there may have been earlier ones.
        (None, None) if imported && is_past => {
            "Imported with the stored invoice; whether Stripe's API agreed by then is not known."
                .to_owned()
        }
        (None, None) if is_past => {
            format!("{proved}; whether Stripe's API agreed by then is not known.")
        }
        (None, None) if imported => {
            "Imported with the stored invoice, and not compared with Stripe.".to_owned()
        }
        (None, None) => format!("{proved}; not compared with Stripe's API."),
    }
}

fn waits(evidence: &Evidence) -> String {
    match evidence.missing.len() {
        0 if evidence.entries.is_empty() => String::new(),
        0 => "Nothing is left to fetch.".to_owned(),
        1 => "One object is still to be fetched from Stripe; see below.".to_owned(),
        n => format!("{n} objects are still to be fetched from Stripe; see below."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::stripe::event::EventKey;
    use crate::queries::evidence::{AtStripe, Missing};
    use crate::store::{LoggedEvent, Outcome};

    const NINE: i64 = 1_769_850_000_000;

    fn evidence(states: &[(PaymentState, i64)]) -> Evidence {
        let entry = |(state, after_s): &(PaymentState, i64)| Proven {
            state: *state,
            timestamp_ms: NINE + after_s * 1000,
            message: None,
            is_imported: false,
            proofs: Vec::new(),
            more_proofs: 0,
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
            at_stripe: AtStripe::default(),
            entries: states.iter().map(entry).collect(),
        }
    }

    #[test]
    fn answer_says_whether_and_since_when_it_is_paid() {
        let cases: [(&[(PaymentState, i64)], &str); 7] = [
            (
                &[(PaymentState::PaymentPending, 0), (PaymentState::Paid, 1)],
                "Paid on 2026-01-31 09:00:01 UTC.",
            ),
            (
                &[(PaymentState::Paid, 1), (PaymentState::Paid, 9)],
                "Paid on 2026-01-31 09:00:01 UTC. \
                 Money was returned, contested or added since, last on 2026-01-31 09:00:09 UTC.",
            ),
            (
                &[(PaymentState::Paid, 1), (PaymentState::Paid, 1)],
                "Paid on 2026-01-31 09:00:01 UTC. \
                 Money was returned, contested or added since, last on 2026-01-31 09:00:01 UTC.",
            ),
            (
                &[(PaymentState::PaymentPending, 0)],
                "Not paid: waiting for payment since 2026-01-31 09:00:00 UTC.",
            ),
            (
                &[(PaymentState::PaymentInProgress, 0)],
                "Not paid in full: a payment is in progress, or a part has arrived, \
                 since 2026-01-31 09:00:00 UTC.",
            ),
            (
                &[(PaymentState::PaymentFailed, 0)],
                "Not paid: collection failed or ended on 2026-01-31 09:00:00 UTC.",
            ),
            (
                &[],
                "Nothing is known about its payment: nothing has been received from Stripe yet.",
            ),
        ];
        for (states, answer) in cases {
            assert_eq!(summarise(&evidence(states)).answer, answer);
        }
    }

    #[test]
    fn test_mode_is_part_of_the_answer() {
        let mut paid = evidence(&[(PaymentState::Paid, 1)]);
        paid.at_stripe.livemode = Some(true);
        assert_eq!(summarise(&paid).answer, "Paid on 2026-01-31 09:00:01 UTC.");
        paid.at_stripe.livemode = Some(false);
        assert_eq!(
            summarise(&paid).answer,
            "Paid on 2026-01-31 09:00:01 UTC. In test mode: no real money."
        );
    }

    #[test]
    fn newer_proofs_are_not_called_confirmed() {
        let proof = |source, received_ms| LoggedEvent {
            key: EventKey([0; EventKey::LENGTH]),
            id: None,
            event_type: None,
            api_version: None,
            object_id: None,
            created_s: None,
            received_ms,
            source,
            secret_label: None,
            outcome: Outcome::Recorded,
            unreadable_reason: None,
        };
        let (before, after) = (NINE, NINE + 5_001);
        let newer = "Proved by one event from Stripe; \
                     last compared with Stripe's API before that, at 2026-01-31 09:00:05 UTC.";
        let confirmed = "Confirmed with Stripe at 2026-01-31 09:00:05 UTC.";

        for (proofs, grounds) in [
            (vec![proof(Source::Webhook, after)], newer),
            (vec![proof(Source::Webhook, before)], confirmed),
            (
                vec![
                    proof(Source::Webhook, before),
                    proof(Source::Webhook, after),
                ],
                confirmed,
            ),
            (vec![proof(Source::Api, after)], confirmed),
        ] {
            let mut paid = evidence(&[(PaymentState::PaymentPending, 0), (PaymentState::Paid, 1)]);
            paid.entries[1].proofs = proofs;
            assert_eq!(summarise(&paid).grounds, grounds);
        }
    }

    #[test]
    fn grounds_and_open_fetches_are_given() {
        let mut paid = evidence(&[(PaymentState::Paid, 0)]);
        let summary = summarise(&paid);
        assert_eq!(
            (&*summary.grounds, &*summary.waits),
            (
                "Confirmed with Stripe at 2026-01-31 09:00:05 UTC.",
                "Nothing is left to fetch."
            )
        );
        paid.confirmed_ms = None;
        paid.missing = vec![Missing {
            event: None,
            message: String::new(),
        }];
        let summary = summarise(&paid);
        assert_eq!(
            summary.waits,
            "One object is still to be fetched from Stripe; see below."
        );
        assert!(
            summary.grounds.ends_with("not compared with Stripe's API.") && !summary.is_doubtful
        );
        paid.as_of_ms = Some(NINE);
        assert!(
            summarise(&paid)
                .grounds
                .ends_with("; whether Stripe's API agreed by then is not known.")
        );
        paid.differs_since_ms = Some(NINE);
        let summary = summarise(&paid);

        assert!(
            summary.is_doubtful
                && summary.grounds
                    == "Do not rely on it: Stripe's API has differed since 2026-01-31 09:00:00 UTC."
        );
    }
}

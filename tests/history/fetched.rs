//! Objects that Stripe's API returned: what they tell, and what they never tell.

use serde_json::{Value, json};
use stripe_reconciler::domain::history::lacks_reason;
use stripe_reconciler::domain::stripe::event::{self, Reading, envelope};

use crate::stripe::{
    INTENT, INVOICE, Shape, event as event_of, history, intent, invoice, known, with,
};

fn fetched(object: Value, fetched_s: i64) -> Value {
    envelope(&object, fetched_s, None)
}

fn key(body: &Value) -> event::EventKey {
    match event::read(body.to_string().as_bytes()) {
        Reading::Event(event) => event.key,
        Reading::Unreadable { reason, .. } => panic!("{reason}"),
    }
}

#[test]
fn an_object_that_has_not_changed_is_the_same_whenever_it_was_fetched() {
    let paid = invoice(Shape::New, "paid");
    assert_eq!(
        key(&fetched(paid.clone(), 1)),
        key(&fetched(paid.clone(), 2))
    );
    assert_ne!(
        key(&fetched(paid.clone(), 1)),
        key(&fetched(invoice(Shape::New, "open"), 1))
    );
    assert_ne!(
        key(&fetched(paid.clone(), 1)),
        key(&envelope(&paid, 1, Some("acct_1")))
    );
}

#[test]
fn a_fetched_invoice_tells_what_no_event_told_at_stripes_own_time() {
    let paid = with(
        invoice(Shape::New, "paid"),
        json!({"status_transitions": {"finalized_at": 100, "paid_at": 200}}),
    );
    let entries = history(&[fetched(paid, 5000)]);
    let seconds: Vec<(&str, i64)> = entries
        .iter()
        .map(|e| (e.state.as_str(), e.timestamp_ms / 1000))
        .collect();
    assert_eq!(seconds, [("PaymentPending", 100), ("Paid", 200)]);
}

#[test]
fn a_fetched_payment_intent_tells_no_failure_but_gives_a_known_one_its_reason() {
    let error = json!({"last_payment_error": {"decline_code": "insufficient_funds", "charge": "ch_1Q", "message": "No funds."}});
    let asked = |second| {
        fetched(
            with(intent(Shape::New, "requires_payment_method"), error.clone()),
            second,
        )
    };
    assert_eq!(history(&[asked(300)]), []);

    let failed = |id: &str, attempt: i64, second: i64| {
        let open = with(
            invoice(Shape::New, "open"),
            json!({"attempt_count": attempt}),
        );
        event_of(id, "invoice.payment_failed", second, open)
    };
    let (first, second) = (failed("evt_1", 1, 100), failed("evt_2", 2, 200));
    let messages = |events: &[Value]| -> Vec<String> {
        let entries = history(events)
            .into_iter()
            .filter(|e| e.state.as_str() == "PaymentFailed");
        entries.filter_map(|entry| entry.message).collect()
    };
    let told = messages(&[first.clone(), second.clone(), asked(300)]);
    assert!(
        !told[0].contains("insufficient_funds")
            && told[1].contains("insufficient_funds: No funds."),
        "{told:?}"
    );
    // Asked before the second attempt, it is the reason of the first.
    let told = messages(&[first.clone(), second.clone(), asked(150)]);
    assert!(
        told[0].contains("insufficient_funds") && !told[1].contains("insufficient_funds"),
        "{told:?}"
    );

    assert!(lacks_reason(
        INVOICE,
        &known(&[first.clone(), second.clone()])
    ));
    assert!(!lacks_reason(
        INVOICE,
        &known(&[first.clone(), second.clone(), asked(300)])
    ));
    assert!(
        lacks_reason(INVOICE, &known(&[first, second, asked(150)])),
        "{INTENT} was asked before the latest attempt"
    );
}

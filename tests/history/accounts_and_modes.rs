//! Rule 3.6.4: accounts and modes do not mix.
//!
//! The owner of a connected account, or anybody in test mode, can set `order_reference` of a
//! PaymentIntent to the id of somebody else's invoice. These stories are such attacks, and the
//! legitimate events that look like them.

use serde_json::{Value, json};
use stripe_reconciler::domain::history::lacks_reason;
use stripe_reconciler::domain::invoice::comparison::differences;
use stripe_reconciler::domain::stripe::event::envelope;

use crate::stripe::*;
use Shape::New;

const ATTACKER: &str = "acct_evil";

/// The attacker's PaymentIntent, which names somebody else's invoice by its order reference.
fn evil_intent(fields: Value) -> Value {
    let intent = json!({
        "id": "pi_evil", "object": "payment_intent", "amount": 5000, "currency": "eur",
        "latest_charge": "ch_evil", "payment_details": {"order_reference": INVOICE},
    });
    with(intent, fields)
}

/// A failure, a submission, a refund and a dispute of the attacker's payment.
fn attack() -> Vec<Value> {
    let error = json!({"code": "fraud", "message": "Terminated for fraud, call 0900 1234"});
    let failed = evil_intent(json!({"last_payment_error": error}));
    let charge = json!({
        "id": "ch_evil", "object": "charge", "payment_intent": "pi_evil", "amount": 5000,
        "amount_refunded": 5000, "currency": "eur", "failure_message": "Call 0900 1234",
    });
    let refund = json!({
        "id": "re_evil", "object": "refund", "charge": "ch_evil", "payment_intent": "pi_evil",
        "amount": 5000, "currency": "eur", "status": "succeeded",
    });
    let dispute = json!({
        "id": "dp_evil", "object": "dispute", "charge": "ch_evil", "amount": 5000,
        "currency": "eur", "reason": "fraudulent",
    });
    vec![
        event("evt_e1", "payment_intent.payment_failed", 150, failed),
        event("evt_e2", "charge.failed", 150, charge.clone()),
        event(
            "evt_e3",
            "payment_intent.processing",
            160,
            evil_intent(json!({})),
        ),
        event(
            "evt_e4",
            "payment_intent.requires_action",
            170,
            evil_intent(json!({})),
        ),
        event("evt_e5", "charge.refunded", 400, charge),
        event("evt_e6", "refund.created", 400, refund),
        event("evt_e7", "charge.dispute.created", 500, dispute),
    ]
}

fn of_account(events: Vec<Value>, account: &str) -> Vec<Value> {
    let account = json!({ "account": account });
    events
        .into_iter()
        .map(|event| with(event, account.clone()))
        .collect()
}

fn in_test_mode(events: Vec<Value>) -> Vec<Value> {
    let test_mode = json!({"livemode": false});
    events
        .into_iter()
        .map(|event| with(event, test_mode.clone()))
        .collect()
}

/// An invoice that was declined once and then paid.
fn victim() -> Vec<Value> {
    let failed = with(invoice(New, "open"), json!({"attempt_count": 1}));
    vec![
        event("evt_1", "invoice.finalized", 100, invoice(New, "open")),
        event("evt_2", "invoice.payment_failed", 150, failed),
        event("evt_3", "invoice.paid", 300, invoice(New, "paid")),
    ]
}

fn joined(own: &[Value], foreign: &[Value]) -> Vec<Value> {
    [own, foreign].concat()
}

#[test]
fn connected_account_cannot_write_into_a_foreign_history() {
    let own = victim();
    let attacked = joined(&own, &of_account(attack(), ATTACKER));
    assert_eq!(told(&attacked), told(&own));

    let open = &own[..2];
    let attacked = joined(open, &of_account(attack(), ATTACKER));
    assert_eq!(told(&attacked), told(open));
}

#[test]
fn test_mode_cannot_write_into_a_live_history() {
    let own = victim();
    assert_eq!(told(&joined(&own, &in_test_mode(attack()))), told(&own));
}

#[test]
fn live_mode_cannot_write_into_a_test_history() {
    let own = in_test_mode(victim());
    assert_eq!(told(&joined(&own, &attack())), told(&own));
}

#[test]
fn own_account_cannot_write_into_a_connected_history() {
    let own = of_account(victim(), "acct_9");
    assert_eq!(told(&joined(&own, &attack())), told(&own));
}

#[test]
fn same_account_and_mode_show_by_order_reference() {
    for disguise in [|events| events, in_test_mode] {
        let own = disguise(victim());
        let history = told(&joined(&own, &disguise(attack())));
        assert!(history.len() > told(&own).len(), "{history:?}");
    }
}

#[test]
fn foreign_objects_join_nothing_of_the_invoice() {
    // No authentic event names an object of another account. If one did, it must not link it.
    let own_intent = with(intent(New, "processing"), json!({"latest_charge": "ch_1"}));
    let own = [
        victim(),
        vec![event("evt_4", "payment_intent.processing", 110, own_intent)],
    ]
    .concat();
    let stolen = json!({
        "id": "ch_1", "object": "charge", "invoice": "in_2Q", "payment_intent": INTENT,
        "amount": 1, "currency": "eur",
    });
    let foreign = vec![event("evt_e1", "charge.failed", 120, stolen)];
    assert_eq!(
        told(&joined(&own, &of_account(foreign, ATTACKER))),
        told(&own)
    );
}

#[test]
fn linked_event_waits_for_an_own_observation() {
    let submitted = event(
        "evt_1",
        "payment_intent.processing",
        100,
        intent(New, "processing"),
    );
    let created = event("evt_2", "invoice.created", 90, invoice(New, "draft"));
    assert!(history(std::slice::from_ref(&submitted)).is_empty());

    let foreign = of_account(vec![created.clone()], "acct_9");
    assert!(history(&joined(std::slice::from_ref(&submitted), &foreign)).is_empty());

    assert_eq!(states(&[submitted, created]), ["PaymentInProgress 100"]);
}

#[test]
fn account_and_mode_count_as_a_pair() {
    let live_connected = of_account(victim(), "acct_9");
    let test_own = in_test_mode(vec![event(
        "evt_8",
        "invoice.created",
        90,
        invoice(New, "draft"),
    )]);
    let own = joined(&live_connected, &test_own);
    // Each half is known of the invoice, but not together.
    let test_connected = of_account(in_test_mode(attack()), "acct_9");
    assert_eq!(told(&joined(&own, &test_connected)), told(&own));
    assert_eq!(told(&joined(&own, &attack())), told(&own));
}

#[test]
fn object_naming_its_invoice_shows_before_any_invoice_event() {
    let part = json!({"id": "inpay_1", "object": "invoice_payment", "invoice": INVOICE,
        "payment": {"payment_intent": INTENT}, "amount_paid": 700, "currency": "eur"});
    let submitted = with(intent(New, "processing"), json!({"payment_details": null}));
    let events = [
        event("evt_1", "payment_intent.processing", 100, submitted),
        event("evt_2", "invoice_payment.paid", 200, part),
    ];
    assert_eq!(
        states(&events),
        ["PaymentInProgress 100", "PaymentInProgress 200"]
    );
}

#[test]
fn fetched_object_without_account_counts_in_every_account() {
    let own = of_account(victim()[..2].to_vec(), "acct_9");
    let error = json!({"decline_code": "insufficient_funds", "message": "No funds."});
    let asked = with(
        intent(New, "requires_payment_method"),
        json!({"last_payment_error": error}),
    );
    let history = told(&joined(&own, &[envelope(&asked, 200, None)]));
    assert!(history[1].contains("insufficient_funds"), "{history:?}");
}

#[test]
fn fetched_object_of_another_account_changes_nothing() {
    let own = victim();
    let error = json!({"code": "fraud", "message": "Call 0900 1234"});
    let object = evil_intent(json!({"last_payment_error": error}));
    let asked = envelope(&object, 200, Some(ATTACKER));
    assert_eq!(told(&joined(&own, &[asked])), told(&own));

    let of_test_mode = with(object, json!({"livemode": false}));
    let asked = envelope(&of_test_mode, 200, None);
    assert_eq!(told(&joined(&own, &[asked])), told(&own));
}

#[test]
fn mode_decides_where_only_fetched_objects_are_known() {
    let open = with(invoice(New, "open"), json!({"livemode": true}));
    let own = [envelope(&open, 100, None)];
    let submitted = vec![event(
        "evt_1",
        "payment_intent.processing",
        150,
        intent(New, "processing"),
    )];
    let with_submission = |events: Vec<Value>| states(&joined(&own, &events)).len();

    assert_eq!(with_submission(submitted.clone()), 2);
    assert_eq!(with_submission(of_account(submitted.clone(), "acct_9")), 2);
    assert_eq!(with_submission(in_test_mode(submitted)), 1);
}

#[test]
fn first_own_event_decides_the_account_again() {
    let open = with(invoice(New, "open"), json!({"livemode": true}));
    let finalized = event("evt_1", "invoice.finalized", 100, invoice(New, "open"));
    let own = [envelope(&open, 90, None), finalized];
    assert_eq!(
        told(&joined(&own, &of_account(attack(), ATTACKER))),
        told(&own)
    );
}

#[test]
fn connected_account_is_said_where_every_own_event_has_one() {
    let connected = |events: &[Value]| {
        let history = told(events);
        let last = history.last().expect("an entry").clone();
        last.contains("Connected account acct_9.")
    };
    let own = of_account(victim(), "acct_9");
    assert!(connected(&own));

    // The account's own endpoint delivers the same invoice without the account.
    let direct = event("evt_9", "invoice.updated", 310, invoice(New, "paid"));
    assert!(!connected(&joined(&own, std::slice::from_ref(&direct))));

    // An object of the API says nothing about the account.
    let asked = envelope(&invoice(New, "paid"), 320, None);
    assert!(connected(&joined(&own, &[asked])));
}

#[test]
fn foreign_events_neither_give_nor_take_a_reason() {
    let open = &victim()[..2];
    let attacked = joined(open, &of_account(attack(), ATTACKER));
    assert!(lacks_reason(INVOICE, &known(open)));
    assert!(lacks_reason(INVOICE, &known(&attacked)));
}

#[test]
fn foreign_mode_is_no_difference_from_stripes_invoice() {
    let own = victim();
    let attacked = known(&joined(&own, &in_test_mode(attack())));
    let stripes = json!({"id": INVOICE, "object": "invoice", "status": "paid", "livemode": true});
    assert_eq!(
        differences(&json!({}), &attacked, &history(&own), &stripes),
        []
    );

    let of_test_mode = known(&in_test_mode(own.clone()));
    let found = differences(&json!({}), &of_test_mode, &history(&own), &stripes);
    assert_eq!(found.len(), 1, "{found:?}");
}

//! Examples that read as things that happen at Stripe.

use serde_json::json;
use stripe_reconciler::domain::history::fold;
use stripe_reconciler::domain::payment_state::{ImportedState, PaymentState};

use crate::stripe::*;
use Shape::{New, Old};

#[test]
fn a_card_pays_at_once() {
    let paid = with(
        invoice(New, "paid"),
        json!({"status_transitions": {"finalized_at": 100, "paid_at": 103}}),
    );
    let events = [
        event(
            "evt_1",
            "invoice.finalized",
            101,
            with(
                invoice(New, "open"),
                json!({"status_transitions": {"finalized_at": 100}}),
            ),
        ),
        event(
            "evt_2",
            "charge.succeeded",
            103,
            charge(New, "ch_1", "succeeded"),
        ),
        event("evt_3", "invoice.updated", 104, paid.clone()),
        event("evt_4", "invoice.payment_succeeded", 104, paid.clone()),
        event("evt_5", "invoice.paid", 104, paid),
    ];
    assert_eq!(
        told(&events),
        [
            "PaymentPending 100 Invoice INV-0001 over 50.00 EUR was finalized and waits for payment.",
            "Paid 103 50.00 EUR paid for invoice INV-0001.",
        ]
    );
}

#[test]
fn a_decline_is_one_entry_with_its_number_and_its_reason() {
    let error = json!({"code": "card_declined", "decline_code": "insufficient_funds", "message": "Your card has insufficient funds.", "charge": "ch_1"});
    let failed = with(
        invoice(New, "open"),
        json!({"attempt_count": 1, "next_payment_attempt": 1_770_110_100}),
    );
    let events = [
        event(
            "evt_1",
            "charge.failed",
            200,
            with(
                charge(New, "ch_1", "failed"),
                json!({"failure_code": "card_declined"}),
            ),
        ),
        event(
            "evt_2",
            "payment_intent.payment_failed",
            201,
            with(
                intent(New, "requires_payment_method"),
                json!({"last_payment_error": error}),
            ),
        ),
        event("evt_3", "invoice.payment_failed", 202, failed),
    ];
    assert_eq!(
        told(&events)[0],
        "PaymentFailed 200 Payment of 50.00 EUR for invoice INV-0001 failed (attempt 1): insufficient_funds: Your card has insufficient funds. \
         Next attempt: 2026-02-03 09:15 UTC."
    );
    // The open snapshot is evidence that the invoice was finalized, at the latest when it was seen.
    assert_eq!(states(&events), ["PaymentFailed 200", "PaymentPending 202"]);
}

#[test]
fn a_decline_that_the_invoice_names_by_its_charge_is_joined_over_any_distance() {
    let failed = with(
        invoice(Old, "open"),
        json!({"attempt_count": 2, "charge": "ch_2", "next_payment_attempt": null}),
    );
    let events = [
        event(
            "evt_1",
            "charge.failed",
            200,
            with(
                charge(Old, "ch_2", "failed"),
                json!({"outcome": {"reason": "do_not_honor"}}),
            ),
        ),
        event("evt_2", "invoice.payment_failed", 900, failed),
    ];
    let told = told(&events);
    assert_eq!(told.len(), 2);
    assert!(
        told[0].ends_with("failed (attempt 2): do_not_honor. No further attempt will be made."),
        "{told:?}"
    );
}

#[test]
fn the_latest_charge_says_nothing_about_a_later_attempt_that_made_none() {
    let failed = |count, charge| {
        with(
            invoice(Old, "open"),
            json!({"attempt_count": count, "charge": charge}),
        )
    };
    let events = [
        event("evt_1", "charge.failed", 100, charge(Old, "ch_1", "failed")),
        event("evt_2", "invoice.payment_failed", 101, failed(1, "ch_1")),
        event("evt_3", "invoice.payment_failed", 5000, failed(2, "ch_1")),
    ];
    assert_eq!(
        states(&events),
        [
            "PaymentFailed 100",
            "PaymentPending 101",
            "PaymentFailed 5000"
        ]
    );
}

#[test]
fn a_manual_retry_without_an_invoice_event_is_an_entry_of_its_own() {
    let failed = with(invoice(New, "open"), json!({"attempt_count": 1}));
    let events = [
        event("evt_1", "charge.failed", 100, charge(New, "ch_1", "failed")),
        event("evt_2", "invoice.payment_failed", 100, failed),
        event("evt_3", "charge.failed", 161, charge(New, "ch_2", "failed")),
        event(
            "evt_4",
            "payment_intent.created",
            50,
            intent(New, "requires_payment_method"),
        ),
    ];
    assert_eq!(
        states(&events),
        [
            "PaymentPending 100",
            "PaymentFailed 100",
            "PaymentFailed 161"
        ]
    );
}

#[test]
fn a_returned_debit_that_is_submitted_again_is_three_entries() {
    let error = json!({"code": "debit_not_authorized", "charge": "ch_1"});
    let events = [
        event(
            "evt_1",
            "payment_intent.processing",
            100,
            intent(Old, "processing"),
        ),
        event(
            "evt_2",
            "charge.pending",
            101,
            charge(Old, "ch_1", "pending"),
        ),
        event(
            "evt_3",
            "payment_intent.payment_failed",
            300,
            with(
                intent(Old, "requires_payment_method"),
                json!({"last_payment_error": error}),
            ),
        ),
        event(
            "evt_4",
            "payment_intent.processing",
            400,
            intent(Old, "processing"),
        ),
    ];
    assert_eq!(
        states(&events),
        [
            "PaymentInProgress 100",
            "PaymentFailed 300",
            "PaymentInProgress 400"
        ]
    );
}

#[test]
fn authentication_asked_for_once_is_one_entry_whichever_side_tells() {
    let events = [
        event(
            "evt_1",
            "payment_intent.requires_action",
            100,
            intent(New, "requires_action"),
        ),
        event(
            "evt_2",
            "invoice.payment_failed",
            101,
            with(invoice(New, "open"), json!({"attempt_count": 1})),
        ),
        event(
            "evt_3",
            "invoice.payment_action_required",
            102,
            invoice(New, "open"),
        ),
    ];
    assert_eq!(
        states(&events),
        [
            "PaymentPending 100",
            "PaymentPending 101",
            "PaymentFailed 101"
        ]
    );
}

#[test]
fn two_partial_payments_show_and_the_one_that_is_all_of_it_does_not() {
    let part = |id: &str, amount: i64| json!({"id": id, "object": "invoice_payment", "invoice": INVOICE, "amount_paid": amount, "currency": "eur"});
    let paid = event(
        "evt_9",
        "invoice.paid",
        300,
        with(
            invoice(New, "paid"),
            json!({"status_transitions": {"paid_at": 300}}),
        ),
    );
    let parts = [
        event("evt_1", "invoice_payment.paid", 100, part("inpay_1", 2000)),
        event("evt_2", "invoice_payment.paid", 300, part("inpay_2", 3000)),
        paid.clone(),
    ];
    assert_eq!(
        told(&parts),
        [
            "PaymentInProgress 100 Part payment of 20.00 EUR received for invoice INV-0001.",
            "PaymentInProgress 300 Part payment of 30.00 EUR received for invoice INV-0001.",
            "Paid 300 50.00 EUR paid for invoice INV-0001.",
        ]
    );
    let whole = [
        event("evt_1", "invoice_payment.paid", 300, part("inpay_1", 5000)),
        paid,
    ];
    assert_eq!(states(&whole), ["Paid 300"]);
}

#[test]
fn paid_outside_stripe_is_said_by_flag_by_amount_and_apparently_by_what_is_missing() {
    let paid = |fields| with(invoice(New, "paid"), fields);
    let message = |object| {
        told(&[event("evt_1", "invoice.paid", 100, object)])
            .pop()
            .expect("one entry")
    };
    assert_eq!(
        message(paid(json!({"paid_out_of_band": true, "amount_paid": 0}))),
        "Paid 100 50.00 EUR paid for invoice INV-0001. It was paid outside Stripe."
    );
    assert!(
        message(paid(json!({"amount_paid_off_stripe": 5000})))
            .ends_with("It was paid outside Stripe.")
    );
    assert!(
        message(paid(json!({"attempted": false})))
            .ends_with("It was apparently paid outside Stripe.")
    );
    assert!(
        message(paid(
            json!({"attempted": false, "amount_paid_off_stripe": 0})
        ))
        .ends_with("for invoice INV-0001.")
    );
}

#[test]
fn a_canceled_payment_intent_is_no_failure() {
    assert!(
        history(&[event(
            "evt_1",
            "payment_intent.canceled",
            100,
            intent(Old, "canceled")
        )])
        .is_empty()
    );
}

#[test]
fn nothing_leads_out_of_paid_not_even_a_failure_that_comes_later() {
    let events = [
        event(
            "evt_1",
            "invoice.paid",
            100,
            with(
                invoice(New, "paid"),
                json!({"status_transitions": {"paid_at": 100}}),
            ),
        ),
        event(
            "evt_2",
            "invoice.payment_failed",
            200,
            with(invoice(New, "open"), json!({"attempt_count": 1})),
        ),
        event(
            "evt_3",
            "invoice.voided",
            300,
            with(
                invoice(New, "void"),
                json!({"status_transitions": {"voided_at": 300}}),
            ),
        ),
    ];
    assert_eq!(
        states(&events),
        [
            "PaymentPending 200",
            "PaymentFailed 200",
            "PaymentFailed 300",
            "Paid 100"
        ]
    );
}

#[test]
fn a_revised_invoice_is_voided_and_says_by_what_it_was_replaced() {
    let voided = with(
        invoice(New, "void"),
        json!({"latest_revision": "in_2Q", "amount_remaining": 0}),
    );
    assert_eq!(
        told(&[event("evt_1", "invoice.voided", 100, voided)]),
        [
            "PaymentFailed 100 Invoice INV-0001 over 50.00 EUR was voided, so nothing is owed. It was replaced by revision in_2Q."
        ]
    );
}

#[test]
fn written_off_then_paid_says_so() {
    let events = [
        event(
            "evt_1",
            "invoice.marked_uncollectible",
            100,
            invoice(New, "uncollectible"),
        ),
        event("evt_2", "invoice.paid", 200, invoice(New, "paid")),
    ];
    assert_eq!(
        told(&events),
        [
            "PaymentFailed 100 Invoice INV-0001 over 50.00 EUR was written off as uncollectible.",
            "Paid 200 50.00 EUR paid for invoice INV-0001. It was paid after being written off.",
        ]
    );
}

#[test]
fn a_refund_and_a_dispute_two_hops_away_stand_after_paid_and_keep_the_state() {
    let refund = json!({"id": "re_1", "object": "refund", "charge": "ch_1", "amount": 1000, "currency": "eur", "status": "succeeded"});
    let dispute = json!({"id": "dp_1", "object": "dispute", "charge": "ch_1", "amount": 5000, "currency": "eur", "reason": "fraudulent"});
    let events = [
        event("evt_1", "charge.dispute.created", 400, dispute),
        event("evt_2", "refund.created", 300, refund),
        event(
            "evt_3",
            "charge.refunded",
            300,
            with(
                charge(New, "ch_1", "succeeded"),
                json!({"amount_refunded": 1000}),
            ),
        ),
        event(
            "evt_4",
            "payment_intent.succeeded",
            100,
            with(intent(New, "succeeded"), json!({"latest_charge": "ch_1"})),
        ),
        event("evt_5", "invoice.paid", 100, invoice(New, "paid")),
    ];
    assert_eq!(
        told(&events),
        [
            "Paid 100 50.00 EUR paid for invoice INV-0001.",
            "Paid 300 Refunded 10.00 EUR of 50.00 EUR for invoice INV-0001.",
            "Paid 400 The payment of 50.00 EUR for invoice INV-0001 is disputed: fraudulent.",
        ]
    );
}

#[test]
fn payment_naming_its_invoice_beats_an_order_reference() {
    let created = event("evt_0", "invoice.created", 80, invoice(New, "draft"));
    let referring = event(
        "evt_1",
        "payment_intent.processing",
        100,
        with(intent(New, "processing"), json!({"latest_charge": "ch_1"})),
    );
    let other = json!({"id": "ch_1", "object": "charge", "invoice": "in_2Q", "amount": 5000});
    let other = event("evt_2", "charge.succeeded", 90, other);

    assert_eq!(
        states(&[created.clone(), referring.clone()]),
        ["PaymentInProgress 100"]
    );
    assert!(history(&[created, referring, other]).is_empty());
}

#[test]
fn a_placeholder_that_contradicts_itself_is_believed_by_its_type() {
    let odd = with(
        invoice(Old, "paid"),
        json!({"attempt_count": 1, "status_transitions": {"paid_at": 50, "finalized_at": 40}}),
    );
    assert_eq!(
        told(&[event(
            "evt_00000000000000",
            "invoice.payment_failed",
            1_326_853_478,
            odd
        )]),
        ["PaymentFailed 1326853478 Payment for invoice in_1Q failed (attempt 1)."]
    );
}

#[test]
fn the_shape_without_a_status_tells_by_paid_and_by_type() {
    let open = json!({"id": INVOICE, "object": "invoice", "paid": false, "closed": false, "amount_due": 1000, "currency": "usd", "finalized_at": 95});
    let paid = with(open.clone(), json!({"paid": true, "amount_paid": 1000}));
    let events = [
        event("evt_1", "invoice.finalized", 100, open.clone()),
        event("evt_2", "invoice.updated", 200, paid),
    ];
    assert_eq!(states(&events), ["PaymentPending 95", "Paid 200"]);
    assert!(history(&[event("evt_3", "invoice.updated", 100, open)]).is_empty());
}

#[test]
fn a_thin_event_tells_what_its_type_claims_until_its_twin_is_known() {
    let notice = thin(
        "evt_t",
        "v1.invoice.paid",
        "1970-01-01T00:01:40.999999999Z",
        INVOICE,
        Some("evt_s"),
    );
    assert_eq!(states(std::slice::from_ref(&notice)), ["Paid 100"]);
    let twin = event(
        "evt_s",
        "invoice.paid",
        100,
        with(
            invoice(New, "paid"),
            json!({"status_transitions": {"paid_at": 98}}),
        ),
    );
    assert_eq!(states(&[notice, twin]), ["Paid 98"]);
}

#[test]
fn under_a_test_clock_events_keep_the_time_of_the_wall() {
    let paid = with(
        invoice(New, "paid"),
        json!({"test_clock": "clock_1", "status_transitions": {"paid_at": 9_000_000_000_i64}}),
    );
    assert_eq!(
        states(&[event("evt_1", "invoice.paid", 100, paid)]),
        ["Paid 100"]
    );
}

#[test]
fn states_that_came_with_the_invoice_stand_first_and_paid_ones_close_it() {
    let imported = |state, second: i64| ImportedState {
        state,
        timestamp_ms: second * 1000,
        message: None,
    };
    let refund = json!({"id": "re_1", "object": "refund", "payment_intent": INTENT, "amount": 1000, "currency": "eur"});
    let events = [
        event(
            "evt_1",
            "payment_intent.processing",
            100,
            intent(New, "processing"),
        ),
        event("evt_2", "invoice.paid", 200, invoice(New, "paid")),
        event("evt_3", "refund.created", 300, refund),
    ];
    let folded = |imported: &[ImportedState]| -> Vec<(PaymentState, i64)> {
        fold(Some(INVOICE), imported, &known(&events))
            .iter()
            .map(|e| (e.state, e.timestamp_ms / 1000))
            .collect()
    };
    assert_eq!(
        folded(&[
            imported(PaymentState::PaymentPending, 500),
            imported(PaymentState::Paid, 200)
        ]),
        [
            (PaymentState::PaymentPending, 500),
            (PaymentState::Paid, 200),
            (PaymentState::Paid, 300)
        ]
    );
    assert_eq!(
        folded(&[imported(PaymentState::PaymentInProgress, 100)]),
        [
            (PaymentState::PaymentInProgress, 100),
            (PaymentState::Paid, 200),
            (PaymentState::Paid, 300)
        ]
    );
}

#[test]
fn test_mode_and_the_connected_account_stand_in_every_message() {
    let mut paid = event("evt_1", "invoice.paid", 100, invoice(New, "paid"));
    paid["livemode"] = json!(false);
    paid["account"] = json!("acct_9");
    assert_eq!(
        told(&[paid]),
        ["Paid 100 50.00 EUR paid for invoice INV-0001. Test mode. Connected account acct_9."]
    );
}

#[test]
fn no_address_link_secret_or_card_number_reaches_a_message() {
    let error = json!({"message": "Card 4242 4242 4242 4242 of jane@example.com: see https://pay.example.com/x pi_1_secret_2 4242424242424242 now"});
    let failed = with(
        intent(Old, "requires_payment_method"),
        json!({"last_payment_error": error}),
    );
    assert_eq!(
        told(&[event("evt_1", "payment_intent.payment_failed", 100, failed)]),
        [
            "PaymentFailed 100 Payment of 50.00 EUR for invoice in_1Q failed: Card [removed] of [removed] see [removed] now."
        ]
    );
}

#[test]
fn an_invoice_number_is_said_in_full_however_many_digits_it_has() {
    for number in ["20260131-0001", "1234567890123", "2026 0131 0001"] {
        let overdue = event(
            "evt_1",
            "invoice.overdue",
            100,
            with(invoice(New, "open"), json!({"number": number})),
        );
        let said = &told(&[overdue])[1];
        assert!(
            said.contains(&format!("Invoice {number} over 50.00 EUR is overdue")),
            "{said}"
        );
    }
}

#[test]
fn a_card_number_is_removed_however_it_is_written_and_so_are_links_and_tokens() {
    let private = [
        "Card (4242 4242 4242 4242) bad",
        "\"4242 4242 4242 4242\"",
        "4242, 4242, 4242, 4242",
        "Amex 3782 822463 10005.",
        "Amex (3782 822463 10005) declined",
        "PAN=4242424242424242",
        "card:4242424242424242 x",
        "4242424242424242abc",
        "Card 4242-4242-4242-4242.",
        "see invoice.stripe.com/i/acct_1/live_abc?s=ap",
        "https://pay.stripe.com/x",
        "pi_1_secret_abc",
        "ask finance@example.com",
        "key sk_live_abc",
    ];
    for message in private {
        let error = json!({"code": "card_declined", "message": message});
        let failed = with(
            intent(Old, "requires_payment_method"),
            json!({"last_payment_error": error}),
        );
        let said = told(&[event("evt_1", "payment_intent.payment_failed", 100, failed)]).remove(0);
        assert!(said.contains("[removed]"), "{said}");
        let shown = said.trim_start_matches(|c| c != ':');
        let is_gone = |part: &str| !shown.contains(part);
        assert!(
            [
                "4242",
                "3782",
                "10005",
                "stripe.com",
                "_secret_",
                "@",
                "sk_live"
            ]
            .into_iter()
            .all(is_gone),
            "{said}"
        );
    }
    let error = json!({"code": "x", "message": "Retry after 2026-02-03, ref 12345678901."});
    let failed = with(
        intent(Old, "requires_payment_method"),
        json!({"last_payment_error": error}),
    );
    let said = told(&[event("evt_1", "payment_intent.payment_failed", 100, failed)]).remove(0);
    assert!(
        said.ends_with("x: Retry after 2026-02-03, ref 12345678901."),
        "what is no card number stays: {said}"
    );
}

#[test]
fn an_amount_that_only_a_sibling_of_the_same_payment_tells_is_told() {
    let created = event(
        "evt_1",
        "payment_intent.created",
        100,
        with(
            intent(Old, "requires_payment_method"),
            json!({"amount": 700}),
        ),
    );
    let thin_events = [
        ("v1.payment_intent.payment_failed", "failed"),
        ("v1.payment_intent.requires_action", "needs the customer"),
    ];
    for (event_type, said) in thin_events {
        let thin = thin("evt_2", event_type, "1970-01-01T00:03:20Z", INTENT, None);
        let told = told(&[created.clone(), thin]);
        assert!(
            told[0].contains("Payment of 7.00 EUR") && told[0].contains(said),
            "{told:?}"
        );
    }
}

#[test]
fn an_attempt_speaks_from_its_earliest_event_in_whatever_order_they_join() {
    let failed = |id: &str, created: i64, fields| {
        event(
            id,
            "invoice.payment_failed",
            created,
            with(invoice(New, "open"), fields),
        )
    };
    let events = [
        failed(
            "evt_1",
            1,
            json!({"attempt_count": 1, "charge": "ch_1", "amount_remaining": 123}),
        ),
        failed(
            "evt_2",
            3,
            json!({"attempt_count": 1, "amount_remaining": 7}),
        ),
        failed(
            "evt_3",
            3,
            json!({"attempt_count": 1, "charge": "ch_1", "amount_remaining": 7}),
        ),
    ];
    assert!(
        told(&events)[1].contains("Payment of 1.23 EUR"),
        "{:?}",
        told(&events)
    );
}

#[test]
fn a_part_payment_and_a_payment_say_the_amount_that_was_paid() {
    let part = |kind: &str, created, amount: i64| {
        let part = json!({"id": "inpay_1", "object": "invoice_payment", "invoice": INVOICE, "amount_paid": amount, "currency": "eur"});
        event(&format!("evt_{created}"), kind, created, part)
    };
    let told_parts = told(&[
        part("invoice_payment.detached", 58, 0),
        part("invoice_payment.paid", 119, 500),
    ]);
    assert!(
        told_parts[0].contains("Part payment of 5.00 EUR"),
        "{told_parts:?}"
    );

    let bare = |fields| {
        with(
            json!({"id": INVOICE, "object": "invoice", "status": "paid", "currency": "eur"}),
            fields,
        )
    };
    let due_first = [
        event(
            "evt_1",
            "invoice.paid",
            63,
            bare(json!({"amount_due": 1000})),
        ),
        event(
            "evt_2",
            "invoice.paid",
            119,
            bare(json!({"amount_paid": 500})),
        ),
    ];
    assert!(
        told(&due_first)[0].contains("5.00 EUR paid"),
        "{:?}",
        told(&due_first)
    );
}

#[test]
fn a_thin_part_payment_is_linked_by_the_payments_that_the_invoice_lists() {
    let listed = json!({"payments": {"object": "list", "data": [{"id": "inpay_1", "payment": {"type": "payment_intent", "payment_intent": "pi_9"}}]}});
    let events = [
        event(
            "evt_1",
            "invoice.updated",
            100,
            with(invoice(New, "open"), listed),
        ),
        thin(
            "evt_2",
            "v1.invoice_payment.paid",
            "1970-01-01T00:03:20Z",
            "inpay_1",
            None,
        ),
    ];
    assert_eq!(
        states(&events),
        ["PaymentPending 100", "PaymentInProgress 200"]
    );
}

/// Declined tries of a card testing attack through the hosted page, one every two seconds.
fn declined_tries(count: i64) -> Vec<serde_json::Value> {
    let tries = (0..count).map(|number| {
        let failed = with(
            charge(Old, &format!("ch_{number:06}"), "failed"),
            json!({"failure_code": "card_declined"}),
        );
        let second = 1_770_000_000 + 2 * number;
        event(&format!("evt_{number:06}"), "charge.failed", second, failed)
    });
    tries.collect()
}

#[test]
fn hundred_attempts_are_told_one_by_one() {
    let history = history(&declined_tries(100));
    assert_eq!(history.len(), 100);
    assert!(history.iter().all(|entry| entry.proofs.len() == 1));
}

#[test]
fn further_attempts_share_one_entry() {
    let events = declined_tries(6_000);
    let entries = history(&events);
    let times: Vec<i64> = entries.iter().map(|entry| entry.timestamp_ms).collect();
    let proofs: usize = entries.iter().map(|entry| entry.proofs.len()).sum();

    assert_eq!(entries.len(), 101);
    assert_eq!(
        entries[50].message.as_deref(),
        Some(
            "Payment for invoice in_1Q failed too often to list: the first 50 and the last 50 \
             attempts have entries of their own, and 5,900 more attempts failed between \
             2026-02-02 02:41 UTC and 2026-02-02 05:58 UTC."
        )
    );
    assert!(times.is_sorted());
    assert_eq!(times[100], 1_000 * (1_770_000_000 + 2 * 5_999));
    assert_eq!(proofs, 6_000, "each event still proves an entry");

    let reversed: Vec<_> = events.into_iter().rev().collect();
    assert_eq!(history(&reversed), entries);
}

#[test]
fn too_many_attempts_hide_no_other_entry() {
    let mut events = declined_tries(1_000);
    let overdue = event(
        "evt_x1",
        "invoice.overdue",
        1_770_001_000,
        invoice(Old, "open"),
    );
    let submitted = event(
        "evt_x2",
        "payment_intent.processing",
        1_770_001_001,
        intent(Old, "processing"),
    );
    let paid = event(
        "evt_x3",
        "invoice.paid",
        1_770_009_000,
        invoice(Old, "paid"),
    );
    events.extend([overdue, submitted]);
    let entries = history(&events);
    let states_of = |state: PaymentState| entries.iter().filter(|e| e.state == state).count();
    assert_eq!(states_of(PaymentState::PaymentFailed), 101);
    assert_eq!(states_of(PaymentState::PaymentPending), 2);
    assert_eq!(states_of(PaymentState::PaymentInProgress), 1);
    assert_eq!(
        entries.last().map(|e| e.state),
        Some(PaymentState::PaymentFailed)
    );

    events.push(paid);
    assert_eq!(
        history(&events).last().map(|e| e.state),
        Some(PaymentState::Paid)
    );
}

#[test]
fn exported_history_of_many_attempts_can_be_imported() {
    let known = known(&declined_tries(300));
    let exported = fold(Some(INVOICE), &[], &known);
    let imported: Vec<ImportedState> = exported
        .iter()
        .map(|entry| ImportedState {
            state: entry.state,
            timestamp_ms: entry.timestamp_ms,
            message: entry.message.clone(),
        })
        .collect();
    let again = fold(Some(INVOICE), &imported, &known);
    assert_eq!(again.len(), exported.len());
}

#[test]
fn tries_pair_with_the_nearest_attempts() {
    // 5 s, 20 s and 60 s apart; the last try is 61 s from its attempt.
    let failed = |id: &str, count: i64, second: i64| {
        let open = with(invoice(Old, "open"), json!({"attempt_count": count}));
        event(id, "invoice.payment_failed", second, open)
    };
    let declined = |id: &str, charge_id: &str, second: i64| {
        event(
            id,
            "charge.failed",
            second,
            charge(Old, charge_id, "failed"),
        )
    };
    let events = [
        failed("evt_1", 1, 1_000),
        failed("evt_2", 2, 1_030),
        failed("evt_3", 3, 2_000),
        failed("evt_4", 4, 3_000),
        declined("evt_5", "ch_1", 1_025),
        declined("evt_6", "ch_2", 1_050),
        declined("evt_7", "ch_3", 2_060),
        declined("evt_8", "ch_4", 2_939),
    ];
    let failures = || {
        states(&events)
            .into_iter()
            .filter(|state| state.starts_with("PaymentFailed"))
    };
    assert_eq!(
        failures().collect::<Vec<_>>(),
        [
            "PaymentFailed 1000",
            "PaymentFailed 1025",
            "PaymentFailed 2000",
            "PaymentFailed 2939",
            "PaymentFailed 3000",
        ]
    );
}

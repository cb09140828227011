//! Strangers and one invoice: other accounts and modes write nothing into it (rule 3.6.4), and
//! thousands of declined tries stay readable.

use serde_json::{Value, json};
use testkit::{TestServer, each_database, invoice_path};

const START: i64 = 1_769_850_000;

fn event(id: &str, event_type: &str, second: i64, object: Value) -> Value {
    json!({
        "id": id, "object": "event", "type": event_type, "created": START + second,
        "livemode": true, "data": {"object": object},
    })
}

fn with(mut event: Value, fields: Value) -> Value {
    for (name, value) in fields.as_object().unwrap() {
        event[name] = value.clone();
    }
    event
}

fn invoice(status: &str) -> Value {
    let remaining = if status == "paid" { 0 } else { 5000 };
    json!({
        "id": "in_1Q", "object": "invoice", "number": "INV-0001", "status": status,
        "currency": "eur", "amount_due": 5000, "amount_paid": 5000 - remaining,
        "amount_remaining": remaining, "attempted": true,
    })
}

/// A PaymentIntent that refers to the invoice by its order reference.
fn intent(id: &str, fields: Value) -> Value {
    let intent = json!({
        "id": id, "object": "payment_intent", "amount": 5000, "currency": "eur",
        "payment_details": {"order_reference": "in_1Q"},
    });
    with(intent, fields)
}

/// A failure, a refund and a dispute of somebody else's payment, which refers to the invoice.
fn attack(name: &str, origin: &Value) -> Vec<Value> {
    let (intent_id, charge_id) = (format!("pi_{name}"), format!("ch_{name}"));
    let error = json!({
        "code": "fraud", "message": "Terminated for fraud, call 0900 1234", "charge": charge_id,
    });
    let failed = intent(&intent_id, json!({"last_payment_error": error}));
    let part = json!({"charge": charge_id, "payment_intent": intent_id, "amount": 5000});
    let refund = json!({"id": format!("re_{name}"), "object": "refund", "status": "succeeded"});
    let dispute = json!({"id": format!("dp_{name}"), "object": "dispute", "reason": "fraudulent"});
    let events = [
        ("payment_intent.payment_failed", 20, failed),
        ("refund.created", 300, with(refund, part.clone())),
        ("charge.dispute.created", 400, with(dispute, part)),
    ];

    events
        .into_iter()
        .map(|(event_type, second, object)| {
            let id = format!("evt_{name}_{second}");
            with(event(&id, event_type, second, object), origin.clone())
        })
        .collect()
}

/// All that a reader sees of the invoice: its states, and the evidence without times of receipt.
async fn shown(server: &TestServer) -> (Value, Value) {
    let path = format!("{}/evidence", invoice_path("inv-1"));
    let evidence = server
        .get(&path, &server.acme_key)
        .await
        .with_status(200)
        .json();
    (server.states("inv-1").await, evidence)
}

each_database! {
    async fn other_accounts_and_modes_write_nothing_into_an_invoice(server: TestServer) {
        server.store("inv-1", "in_1Q").await.with_status(201);
        server
            .deliver(&event("evt_1", "invoice.finalized", 0, invoice("open")))
            .await
            .with_status(200);
        let origins = [
            ("connected", json!({"account": "acct_evil"})),
            ("test", json!({"livemode": false})),
            ("both", json!({"account": "acct_evil", "livemode": false})),
        ];

        let open = shown(&server).await;
        for (name, origin) in &origins {
            for event in attack(&format!("{name}1"), origin) {
                server.deliver(&event).await.with_status(200);
            }
        }
        assert_eq!(shown(&server).await, open);

        server
            .deliver(&event("evt_2", "invoice.paid", 100, invoice("paid")))
            .await
            .with_status(200);
        let paid = shown(&server).await;
        for (name, origin) in &origins {
            for event in attack(&format!("{name}2"), origin) {
                server.deliver(&event).await.with_status(200);
            }
        }
        assert_eq!(shown(&server).await, paid);
        assert_eq!(paid.0.as_array().unwrap().len(), 2, "{}", paid.0);
    }

    async fn linked_event_shows_once_its_account_and_mode_are_known(server: TestServer) {
        server.store("inv-1", "in_1Q").await.with_status(201);
        let origin = json!({"account": "acct_9", "livemode": false});
        let submitted = event(
            "evt_1",
            "payment_intent.processing",
            10,
            intent("pi_1", json!({})),
        );
        server
            .deliver(&with(submitted, origin.clone()))
            .await
            .with_status(200);
        assert_eq!(server.history("inv-1").await, Vec::<String>::new());

        // The invoice's own event, but of another mode.
        let created = event("evt_2", "invoice.created", 0, invoice("draft"));
        let of_live_mode = with(created.clone(), json!({"account": "acct_9"}));
        server.deliver(&of_live_mode).await.with_status(200);
        assert_eq!(server.history("inv-1").await, Vec::<String>::new());

        let of_same_mode = with(
            created,
            json!({"id": "evt_3", "account": "acct_9", "livemode": false}),
        );
        server.deliver(&of_same_mode).await.with_status(200);
        let states = server.states("inv-1").await;
        assert_eq!(states[0]["state"], "PaymentInProgress");
        let message = states[0]["paymentMsg"].as_str().unwrap();
        assert!(
            message.ends_with("Test mode. Connected account acct_9."),
            "{message}"
        );
    }

    async fn thousands_of_declined_tries_share_one_entry(server: TestServer) {
        server.store("inv-1", "in_1Q").await.with_status(201);
        let mut lines = event("evt_1", "invoice.finalized", 0, invoice("open")).to_string();
        for number in 0..2_000 {
            let charge = json!({
                "id": format!("ch_{number:05}"), "object": "charge", "invoice": "in_1Q",
                "amount": 5000, "currency": "eur", "failure_code": "card_declined",
            });
            let failed = event(
                &format!("evt_f{number:05}"),
                "charge.failed",
                100 + 2 * number,
                charge,
            );
            lines.push_str(&format!("\n{failed}"));
        }
        server
            .run_with_input(&["replay", "-"], lines.as_bytes())
            .with_code(0);

        let (states, evidence) = shown(&server).await;
        let states = states.as_array().unwrap();
        assert_eq!(states.len(), 102);
        let message = states[51]["paymentMsg"].as_str().unwrap();
        assert!(
            message.contains("and 1,900 more attempts failed between"),
            "{message}"
        );
        let proofs = |entry: &Value| {
            let listed = entry["proofs"].as_array().unwrap().len() as u64;
            listed + entry["moreProofs"].as_u64().unwrap_or_default()
        };
        let entries = evidence["entries"].as_array().unwrap();
        assert_eq!(entries.iter().map(proofs).sum::<u64>(), 2_001);

        let paid = event("evt_2", "invoice.paid", 9_000, invoice("paid"));
        server.deliver(&paid).await.with_status(200);
        assert_eq!(
            server.history("inv-1").await.last().unwrap(),
            "Paid 2026-01-31T11:30:00.000Z"
        );
    }
}

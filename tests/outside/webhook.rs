//! `POST /webhooks/stripe`, as Stripe meets it.

use serde_json::{Value, json};

use crate::each_database;
use crate::support::World;

fn paid(id: &str, created: i64) -> Value {
    json!({"id": id, "object": "event", "type": "invoice.paid", "created": created, "livemode": true, "data": {"object": {
        "id": "in_1", "object": "invoice", "status": "paid", "currency": "eur", "amount_due": 5000, "amount_paid": 5000}}})
}

each_database! {
    async fn a_redelivered_event_is_acknowledged_and_changes_nothing(world: World) {
        world.store("a", "in_1").await.with_status(201);
        let first = world.deliver(&paid("evt_1", 1_769_850_000)).await.with_status(200).json();
        assert_eq!(first, json!({"received": true, "outcome": "recorded"}));
        let again = world.deliver(&paid("evt_1", 1_769_850_000)).await.with_status(200).json();
        assert_eq!(again, json!({"received": true, "outcome": "duplicate"}));
        assert_eq!(world.history("a").await, ["Paid 2026-01-31T09:00:00.000Z"]);
        assert_eq!(world.run(&["events", "list", "--json"]).with_code(0).json_lines().len(), 1);
    }
}

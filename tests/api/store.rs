//! Conformance suite of the store: calls every public method on both engines.

mod copy;
mod events;
mod invoices;
mod monitoring;
mod opening;
mod reconcile;

use std::collections::BTreeSet;
use std::path::Path;

use stripe_reconciler::domain::stripe::event::{EventKey, Link};
use stripe_reconciler::store::{NewEvent, NewInvoice, Outcome, PackedBody, Source, Store};

use testkit::{Database, Engine};

/// A migrated store on its own database.
struct TestStore {
    database: Database,
    store: Store,
}

impl TestStore {
    async fn new(engine: Engine) -> TestStore {
        let database = Database::create(engine);
        let store = Store::connect(&database.url).await.unwrap();
        store.migrate().await.unwrap();
        TestStore { database, store }
    }
}

/// Defines tests that run on both engines.
macro_rules! each_store {
    ($($(#[$attribute:meta])* async fn $name:ident($test:ident: TestStore) $body:block)*) => {
        $(
            $(#[$attribute])*
            mod $name {
                #[allow(unused_imports)]
                use super::*;

                async fn run($test: TestStore) $body

                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn sqlite() {
                    run(TestStore::new(testkit::Engine::Sqlite).await).await
                }

                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn postgres() {
                    run(TestStore::new(testkit::Engine::Postgres).await).await
                }
            }
        )*
    };
}
use each_store;

/// Texts that every engine must preserve.
const ODD: [&str; 7] = [
    "it's",
    "\"quoted\"",
    "back\\slash \\n \\x00",
    "日本語 🦀 é e\u{301}",
    " blanks ",
    "a;drop table events--",
    "{},\"$1\"\n\t",
];

/// Returns the key of a rendering of the event with this id.
fn key(id: &str, rendering: u8) -> EventKey {
    let (EventKey(mut key), EventKey(last)) = EventKey::range(id);
    for (byte, last) in key
        .iter_mut()
        .zip(last)
        .filter(|(byte, last)| **byte != *last)
    {
        *byte = rendering.min(last);
    }
    EventKey(key)
}

/// Returns an event that names an invoice.
fn event(id: &str, rendering: u8, invoice: &str, received_ms: i64) -> NewEvent {
    NewEvent {
        key: key(id, rendering),
        id: Some(id.to_owned()),
        event_type: Some("charge.failed".to_owned()),
        api_version: Some("2025-11-17.clover".to_owned()),
        object_id: Some(format!("ch_{id}")),
        created_s: Some(1_769_850_000),
        received_ms,
        source: Source::Webhook,
        secret_label: Some("live".to_owned()),
        outcome: Outcome::Recorded,
        unreadable_reason: None,
        observation: None,
        mentions: vec![mention(invoice, true), mention(&format!("ch_{id}"), false)],
        body: PackedBody::pack(id.as_bytes()),
    }
}

/// Returns the n-th of many events in order of receipt.
fn nth(n: usize) -> NewEvent {
    event(
        &format!("evt_{n}"),
        (n % 256) as u8,
        "in_1",
        1_000 + n as i64,
    )
}

fn mention(object_id: &str, is_invoice: bool) -> Link {
    Link {
        object_id: object_id.to_owned(),
        is_invoice,
    }
}

fn invoice(tenant: &str, uid: &str, stripe_invoice_id: Option<&str>) -> NewInvoice {
    let document = match stripe_invoice_id {
        Some(id) => format!(r#"{{"status":{{"stripeInvoiceId":"{id}"}}}}"#),
        None => "{}".to_owned(),
    };
    NewInvoice {
        tenant_uid: tenant.to_owned(),
        invoice_uid: uid.to_owned(),
        stripe_invoice_id: stripe_invoice_id.map(str::to_owned),
        document,
        imported_states: "[]".to_owned(),
    }
}

/// Returns the public functions of the public types in `src/store/`.
fn public_functions() -> BTreeSet<String> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store")];
    let mut text = String::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                text.push_str(&std::fs::read_to_string(&path).unwrap());
                text.push('\n');
            }
        }
    }

    let is_public = |name: &str| {
        ["struct", "enum"]
            .iter()
            .any(|kind| text.contains(&format!("\npub {kind} {name}")))
    };
    let (mut functions, mut is_inside) = (BTreeSet::new(), false);
    for line in text.lines() {
        if let Some(named) = line.strip_prefix("impl ") {
            is_inside = is_public(named.trim_end_matches(['{', ' ']));
        }
        let declared = line
            .strip_prefix("    pub fn ")
            .or_else(|| line.strip_prefix("    pub async fn "));
        if let Some(declared) = declared.filter(|_| is_inside) {
            functions.insert(declared.split(['(', '<']).next().unwrap().to_owned());
        }
    }
    functions
}

#[test]
fn every_public_store_method_is_tested() {
    let suite = [
        include_str!("store/copy.rs"),
        include_str!("store/events.rs"),
        include_str!("store/invoices.rs"),
        include_str!("store/opening.rs"),
        include_str!("store/reconcile.rs"),
        include_str!("store/monitoring.rs"),
        include_str!("store.rs"),
        include_str!("beside_batch.rs"),
    ];
    let functions = public_functions();
    for known in ["connect", "append", "put_invoice", "unpack"] {
        assert!(functions.contains(known), "{functions:?}");
    }

    let is_called = |name: &&String| {
        suite
            .iter()
            .any(|file| file.contains(&format!(".{name}(")) || file.contains(&format!("::{name}")))
    };
    let forgotten: Vec<&String> = functions.iter().filter(|name| !is_called(name)).collect();
    assert!(
        forgotten.is_empty(),
        "both engines have to be held to {forgotten:?}"
    );
}

#![allow(unused_variables, unused_imports)]
//! The only SQL. One `Store`, opened by URL; every method is one round trip or one transaction.

/// Where a delivery came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Webhook,
    Replay,
    Api,
} // as_str(): "webhook" | "replay" | "api"

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Away, locked, full, or not migrated: try again later (503; exit code 4).
    #[error("the database cannot be reached: {0}")]
    Unavailable(String),
    /// Anything else.
    #[error("the database refused: {0}")]
    Refused(String),
}

#[derive(Clone)]
pub struct Store {/* enum over engines inside; today Sqlite {write: SqlitePool, read: SqlitePool} */}

impl Store {
    /// `sqlite://PATH` (created when missing). Does not migrate.
    pub async fn connect(url: &str) -> Result<Store, StoreError> {
        todo!()
    }
    /// Applies the embedded migrations. Returns the names of those applied now.
    pub async fn migrate(&self) -> Result<Vec<String>, StoreError> {
        todo!()
    }
    /// Reachable and migrated?
    pub async fn ping(&self) -> Result<(), StoreError> {
        todo!()
    }
    pub async fn close(&self) {
        todo!()
    }
}

// ---- events.rs
use crate::domain::event::{EventKey, Mention};
use crate::domain::history::Known;

/// One authentic delivery, ready to append. Everything costly (parse, hash, lz4) is done before the queue.
#[derive(Clone, Debug)]
pub struct NewEvent {
    pub key: EventKey,
    pub id: Option<String>, // None: unreadable
    pub event_type: Option<String>,
    pub api_version: Option<String>,
    pub object_id: Option<String>,
    pub created_s: Option<i64>,
    pub received_ms: i64,
    pub source: Source,
    pub secret_label: Option<String>,
    pub outcome: Outcome, // Recorded | NoPaymentFact | Unreadable
    pub unreadable_reason: Option<String>,
    pub telling: Option<String>, // JSON of Telling
    pub mentions: Vec<Mention>,
    pub body: PackedBody, // lz4 block, size prepended; PackedBody::pack(&[u8]) / unpack()
}
#[derive(Clone, Debug)]
pub struct PackedBody(pub Vec<u8>);
impl PackedBody {
    pub fn pack(_body: &[u8]) -> PackedBody {
        todo!()
    }
    pub fn unpack(&self) -> Option<Vec<u8>> {
        todo!()
    }
}
/// `as_str()`: "recorded" | "no_payment_fact" | "unreadable"
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Recorded,
    NoPaymentFact,
    Unreadable,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    New,
    Duplicate,
}

/// A row of the log, for events list/show/export, why, GET /v1/events. Body only where asked.
#[derive(Clone, Debug)]
pub struct LoggedEvent {
    pub key: EventKey,
    pub id: Option<String>,
    pub event_type: Option<String>,
    pub api_version: Option<String>,
    pub object_id: Option<String>,
    pub created_s: Option<i64>,
    pub received_ms: i64,
    pub source: Source,
    pub secret_label: Option<String>,
    pub outcome: Outcome,
    pub unreadable_reason: Option<String>,
}
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    pub event_type: Option<String>,
    pub stripe_invoice_id: Option<String>, /* mentions it */
    pub outcome: Option<Outcome>,          /* later: unmatched */
}

impl Store {
    /// One transaction for the whole batch, durable when it returns; answers in the order of the batch. Repeating is harmless. A key twice in a batch: New, then Duplicate.
    pub async fn append(&self, batch: &[NewEvent]) -> Result<Vec<Appended>, StoreError> {
        todo!()
    }
    /// Newest receipt first, keyset (received_ms, key).
    pub async fn events_page(
        &self,
        filter: &EventFilter,
        after: Option<(i64, EventKey)>,
        limit: u32,
    ) -> Result<Vec<LoggedEvent>, StoreError> {
        todo!()
    }
    /// All renderings of an id, oldest receipt first, with bodies (None when pruned).
    pub async fn events_by_id(&self, id: &str) -> Result<Vec<(LoggedEvent, Option<Vec<u8>>)>, StoreError> {
        todo!()
    }
    pub async fn events_by_keys(&self, keys: &[EventKey]) -> Result<Vec<LoggedEvent>, StoreError> {
        todo!()
    }
    /// Oldest receipt first, for export and rebuild: constant memory by pages.
    pub async fn stored_bodies(&self, after: Option<(i64, EventKey)>, limit: u32) -> Result<Vec<StoredBody>, StoreError> {
        todo!()
    }
    /// rebuild: replaces what was read in an event (telling, mentions, outcome, envelope columns) by what is read now; one transaction a batch. The row keeps its received_ms, source, label, body.
    /// (an unreadable row that became readable changes its key; when a row with the new key exists already, the old row is removed)
    pub async fn replace_readings(&self, batch: &[(EventKey /*old key*/, NewEvent)]) -> Result<(), StoreError> {
        todo!()
    }
    /// All tellings reachable from a Stripe invoice: those that mention it, and those that mention an object (not an invoice) that any of these mentions, over any number of hops.
    pub async fn tellings(&self, stripe_invoice_id: &str) -> Result<Vec<Known>, StoreError> {
        todo!()
    }
}
#[derive(Clone, Debug)]
pub struct StoredBody {
    pub logged: LoggedEvent,
    pub telling: Option<String>,
    pub body: Option<Vec<u8>>, /* unpacked */
}

// ---- invoices.rs
#[derive(Clone, Debug)]
pub struct StoredInvoice {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: Option<String>,
    pub document: String,        // the normalised v1Invoice JSON text without status.states
    pub imported_states: String, // JSON array of the states that came with the first storing
    pub stored_ms: i64,          // first storing
    pub revision: i64,           // grows with each replacement
    pub tellings: Vec<Known>,
}
#[derive(Clone, Debug)]
pub struct NewInvoice {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: Option<String>,
    pub document: String,
    pub imported_states: String,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    Created,
    Replaced,
    StripeInvoiceTaken,
    StripeInvoiceFixed,
    PreconditionFailed,
}
impl Store {
    /// The invoice and its tellings, one snapshot of the database.
    pub async fn invoice(&self, tenant_uid: &str, invoice_uid: &str) -> Result<Option<StoredInvoice>, StoreError> {
        todo!()
    }
    /// `precondition` is called inside the write transaction with what is stored now (None: nothing); false -> PreconditionFailed.
    /// stripe_invoice_id None on replacing keeps the stored one (and writes it back into document at /status/stripeInvoiceId); another value -> StripeInvoiceFixed. imported_states count on first storing only.
    pub async fn put_invoice(
        &self,
        new: &NewInvoice,
        now_ms: i64,
        precondition: impl Fn(Option<&StoredInvoice>) -> bool,
    ) -> Result<Put, StoreError> {
        todo!()
    }
    /// many at once in one transaction, for import
    pub async fn put_invoices(&self, batch: &[NewInvoice], now_ms: i64) -> Result<Vec<Put>, StoreError> {
        todo!()
    }
    /// newest first by (stored_ms desc, tenant_uid, invoice_uid), each with tellings; tenant None: all tenants
    pub async fn invoices_page(
        &self,
        tenant_uid: Option<&str>,
        stripe_invoice_id: Option<&str>,
        after: Option<&InvoiceCursor>,
        limit: u32,
    ) -> Result<Vec<StoredInvoice>, StoreError> {
        todo!()
    }
    /// (tenant_uid, invoice_uid) that hold one of these Stripe invoices: for rebuild's report
    pub async fn holders(&self, stripe_invoice_ids: &[String]) -> Result<Vec<(String, String, String)>, StoreError> {
        todo!()
    }
}
#[derive(Clone, Debug)]
pub struct InvoiceCursor {
    pub stored_ms: i64,
    pub tenant_uid: String,
    pub invoice_uid: String,
}

// ---- keys.rs
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    Tenant(String),
    Operator,
}
#[derive(Clone, Debug)]
pub struct ApiKey {
    pub id: String,
    pub scope: Scope,
    pub created_ms: i64,
    pub expires_ms: Option<i64>,
    pub revoked_ms: Option<i64>,
}
impl Store {
    pub async fn insert_key(&self, key: &ApiKey, secret_sha256: &[u8; 32]) -> Result<(), StoreError> {
        todo!()
    }
    /// whatever its state; the caller looks at expiry and revocation
    pub async fn key_by_hash(&self, secret_sha256: &[u8; 32]) -> Result<Option<ApiKey>, StoreError> {
        todo!()
    }
    pub async fn keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        todo!()
    }
    /// false: no such key (or already revoked)
    pub async fn revoke_key(&self, id: &str, now_ms: i64) -> Result<bool, StoreError> {
        todo!()
    }
}

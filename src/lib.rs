//! `stripe-reconciler`: the stored invoice tells the truth about its payment.
//!
//! # The idea
//!
//! The history of an invoice is a function of the *set* of authentic events known about it. So a delivery only ever appends
//! (bytes, and what we read in them), nothing is locked or updated, and the history is folded when it is read. Order,
//! duplicates, and events that come before their invoice need no special path.
//!
//! # The rooms, in reading order
//!
//! | module | what it is for | who may import it |
//! | --- | --- | --- |
//! | [`domain`] | pure: signature, reading an event, facts, history, messages, the invoice document | everybody |
//! | [`clock`] | the only caller of the system time | everybody but `domain` |
//! | [`transport`] | HTTP as a client: pooled, limited | `stripe_api`, `flows`, `telemetry`, `cli` |
//! | [`stripe_api`] | the only async-stripe: what Stripe's API answers, within a budget of calls | `flows`, `config` (is this a key?), `cli` |
//! | [`store`] | the only SQL | `inbox`, `flows`, `http`, `config` (is this a database URL?), `cli` |
//! | [`metrics`] | what is counted and measured, by which names | `inbox`, `flows`, `http`, `cli` |
//! | [`inbox`] | group commit: many deliveries, one durable transaction | `flows`, `http`, `cli` |
//! | [`flows`] | one path per file: ingest, replay, rebuild, import, reconcile, copy, evidence, signs, doctor | `http`, `cli` |
//! | [`http`] | the only axum: webhook endpoint, read endpoint, operator's calls | `cli` |
//! | [`telemetry`] | logs, and traces for a collector | `http`, `config`, `cli` |
//! | [`config`] | settings and secrets | `cli` |
//! | [`cli`] | one file per command | `main` |
//!
//! `tests/import_law.rs` holds this table.
//!
//! # The paths
//!
//! * **A delivery**: `http/webhook` (limit, raw bytes) → `domain/signature` → `flows/ingest` → `domain/event` → `inbox` →
//!   `store/sqlite` or `store/postgres` (one batch, one transaction, durable) → 200.
//! * **A read**: `http/invoices` → `store/histories` (key, invoice and what was told, in one round trip) → `domain/history` → JSON.
//! * **A replay**: recorded payloads → `flows/ingest`, without a signature, marked as replayed.
//! * **A pass against Stripe's API**: `stripe_api` → `flows/reconcile` (events, thin events' objects, links, invoices) → the same
//!   reading and the same append; `domain/comparison` says what differs.
//! * **A scrape, and `doctor`**: `flows/monitor` reads on in the log, and what it has come to from `store/monitor`; nothing in the path of a
//!   delivery but counters.
//! * **A rebuild**: stored bytes → `domain/event` again → compare → report, and save.
//! * **A copy**: `store/copying` on two databases, page beside page → `flows/copy` → what differs is written over → all histories compared.

pub mod domain;

pub mod clock;
pub mod http_client;

pub mod metrics;
pub mod store;
pub mod stripe_api;
pub mod telemetry;

pub mod config;
pub mod ingest;
pub mod monitoring;
pub mod queries;

pub mod reconcile;

pub mod doctor;
pub mod jobs;

pub mod http;

pub mod cli;

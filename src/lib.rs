//! `stripe-reconciler`: the stored invoice tells the truth about its payment.
//!
//! # The idea
//!
//! The history of an invoice is a function of the *set* of authentic events known about it. A
//! delivery therefore only appends (its bytes, and what we read in them); it locks and updates
//! nothing. A read folds the history. Order, duplicates, and events that arrive before their invoice
//! need no special path.
//!
//! # The rooms
//!
//! A room imports only the rooms that its row names, and a row names only rooms above it.
//! `tests/import_law` enforces this table, and rejects circular imports between files.
//!
//! | room | purpose | may import |
//! | --- | --- | --- |
//! | [`domain`] | pure values and functions: signatures, events, histories, the invoice document | nothing |
//! | [`clock`] | the only reader of the system time | nothing |
//! | [`http_client`] | HTTP as a client: pooled, with limits | nothing |
//! | [`store`] | the only SQL, for SQLite and PostgreSQL | `clock`, `domain` |
//! | [`stripe_api`] | reads of Stripe's API within a rate limit; the only async-stripe | `domain`, `http_client` |
//! | [`telemetry`] | logs, and traces for a collector | `http_client` |
//! | [`metrics`] | counters and gauges with their names | `domain` |
//! | [`config`] | settings and secrets | `domain`, `store`, `stripe_api`, `telemetry` |
//! | [`ingest`] | the path from a delivery to a durable row, with group commit | `domain`, `store`, `metrics` |
//! | [`queries`] | reads: histories, lists, evidence and summaries | `domain`, `store` |
//! | [`monitoring`] | the data behind `/metrics` and `doctor` | `domain`, `clock`, `store`, `metrics` |
//! | [`reconcile`] | runs against Stripe's API, one step per file | `domain`, `clock`, `store`, `stripe_api`, `metrics`, `ingest`, `queries`, `monitoring` |
//! | [`doctor`] | checks a health snapshot and suggests remedies | `domain`, `clock`, `store`, `stripe_api`, `monitoring`, `reconcile` |
//! | [`jobs`] | one-shot work on request: import, replay, rebuild and copy | `domain`, `clock`, `http_client`, `store`, `ingest`, `queries` |
//! | [`http`] | the only axum: webhook endpoint, API and pages | `domain`, `clock`, `store`, `metrics`, `telemetry`, `ingest`, `queries`, `monitoring`, `reconcile`, `doctor` |
//! | [`cli`] | one file per command | every room |
//! | `main` | the binary: parses arguments and exits with the command's code | `cli` |
//!
//! # The paths
//!
//! * **Delivery**: `http/webhook` (limits, raw bytes) → `domain/stripe/signature` → `ingest` →
//!   `ingest/batch_writer` (group commit) → `store/events` (one batch, one durable transaction) →
//!   200.
//! * **Read**: `http/invoices` → `store/invoice_reads` (key, invoice and observations in one round
//!   trip) → `queries/invoices` → `domain/history` (fold) → JSON.
//! * **Reconcile run**: `reconcile` lists the steps in order: `sync_events`, `fetch_objects`,
//!   `link_payments`, `compare_invoices` (with `judge_invoice`), `check_endpoints`. All findings go
//!   through `recorder` to `ingest`.
//! * **Replay**: recorded payloads → `jobs/json_reader` → `jobs/replay` → `ingest`, without a
//!   signature and marked as replayed; or signed and posted to a URL.
//! * **Rebuild**: stored bytes → `domain/stripe/event` again → `jobs/rebuild` compares → report, and
//!   save unless it is a dry run.
//! * **Copy**: `store/copy` reads two databases page by page → `jobs/copy` writes the differences →
//!   `jobs/copy` compares all histories.
//! * **Scrape and `doctor`**: `monitoring/log_scanner` continues its scan of the log, and
//!   `monitoring/snapshot` loads the totals. The path of a delivery only increments counters.

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

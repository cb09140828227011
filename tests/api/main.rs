//! End-to-end tests: the real binary over real sockets on a real database, one file per subject.
//!
//! A test written with `each_database!` runs on both engines, each with its own server.

#![expect(clippy::unwrap_used, reason = "what goes wrong in a test fails it")]

mod access;
mod accounts_and_modes;
mod alternating_crashes;
mod backup;
mod beside_batch;
mod commands;
mod connections;
mod copy;
mod docs;
mod doctor;
mod durability;
mod events;
mod eviction;
mod evidence;
mod failover;
mod hostile;
mod invoices;
mod leaks;
mod limits;
mod log_files;
mod manual;
mod metrics;
mod openapi;
mod outage;
mod pooler;
mod reading;
mod reconcile;
mod recordings;
mod replicas;
mod schemathesis;
mod seed;
mod serving;
mod sigkill;
mod store;
mod stories;
mod stripe_cli;
mod stripe_fake;
mod stripe_lists;
mod tls;
mod tracing;
mod ui;
mod webhook;

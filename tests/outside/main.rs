//! The program from outside: the real binary, over real sockets, on a real database. One file per thing a user meets.
//!
//! A test that is written with `each_database!` runs once on each engine, with a world of its own.

#![expect(clippy::unwrap_used, reason = "what goes wrong in a test fails it")]

mod support;

mod commands;
mod invoices;
mod kill_nine;
mod reading;
mod reconcile;
mod recordings;
mod serving;
mod stories;
mod stripe_cli;
mod stripe_fake;
mod webhook;

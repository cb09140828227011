//! Simulation of the program against faults, by seed.
//!
//! Invoices live randomly. Deliveries are dropped, duplicated, late, reordered, thin, in another
//! version, forged or signed with an old secret. Clocks jump, the API lags and fails, and the
//! program crashes at any point. In the end the histories equal what happened at Stripe, on both
//! engines.
//!
//! `SIMULATOR_SEED` sets the first round, `SIMULATOR_ROUNDS` their number. A failure names its seed
//! and prints all steps, after removing those that it does not need. A long run, and a failure once
//! more:
//!
//! ```sh
//! SIMULATOR_ROUNDS=1000 cargo test --test simulator -- --nocapture
//! SIMULATOR_SEED=1234 SIMULATOR_ROUNDS=1 cargo test --test simulator random_lives
//! ```
//!
//! `script` draws the steps from the seed and `simulation` plays them. `process` is the program,
//! which can crash. `invoice_lifecycle` is the truth at Stripe, `delivery` its webhooks and `work`
//! the concurrent work. `durable` has the invariants of the database, which `watch` checks at every
//! point, `ledger` those of the log and `reading` those of reads. `ending` checks the end of a
//! round.

#![expect(clippy::unwrap_used, reason = "what goes wrong in a test fails it")]

mod crash_points;
mod delivery;
mod durable;
mod ending;
mod invoice_lifecycle;
mod ledger;
mod process;
mod reading;
mod rounds;
mod script;
mod simulation;
mod watch;
mod work;

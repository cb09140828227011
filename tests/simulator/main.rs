//! The program against a wicked Stripe, by a seed: random lives of invoices, deliveries that are dropped, doubled, late, in any order, thin
//! or in another version of the API, forged or of an old secret, a clock that jumps, an API that lags and fails, and crashes at
//! any moment. Whatever happens, the histories end as what really happened at Stripe, on both engines.
//!
//! `SIMULATOR_SEED` says which round is first, `SIMULATOR_ROUNDS` how many there are. A failure names its seed and prints all that happened,
//! after it has left out what is not needed for it. A long run, and a failure once more:
//!
//! ```sh
//! SIMULATOR_ROUNDS=1000 cargo test --test simulator -- --nocapture
//! SIMULATOR_SEED=1234 SIMULATOR_ROUNDS=1 cargo test --test simulator random_lives
//! ```
//!
//! `script` is what shall happen, drawn from the seed; `world` makes it happen; `process` is the program, which can crash; `invoice_lifecycle` is
//! what is true at Stripe, `delivery` what becomes of its deliveries, `busy` what happens at the same time; `durable` is what must be true of the
//! database at every moment, at which `watch` looks, `ledger` of the log, `reading` of what is shown, `ending` of how it ends.

#![expect(clippy::unwrap_used, reason = "what goes wrong in a test fails it")]

mod busy;
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
mod watch;
mod world;

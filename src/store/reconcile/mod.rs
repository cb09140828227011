//! State of reconciliation with Stripe's API.
//!
//! `lookups` holds the events that still need a call, `checks` when each invoice was compared,
//! `progress` how far each step has come, `lease` which process reconciles, and `runs` the reports
//! of the last runs.

mod checks;
mod lease;
mod lookups;
mod progress;
mod runs;

pub use checks::{CheckCandidate, CheckResult, Comparison};
pub use lookups::{Backlog, LookupKind, LookupState, PendingLookup};
pub use progress::ProgressKey;
pub use runs::Run;

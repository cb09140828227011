//! Pure functions and values, without clock, database, `async` or environment.

pub mod api_key;
pub mod duration;
pub mod history;
pub mod invoice;
pub mod money;
pub mod payment_state;
pub mod redact;
pub mod run_summary;
pub mod stripe;
pub mod time;

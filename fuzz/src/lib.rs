//! Checks that must hold for any input from outside, one file per kind of input.
//!
//! The targets in `fuzz_targets/` run them on inputs of libFuzzer. `tests/fuzzing.rs` runs them on
//! the fixtures, on `seeds/` and on changes to both.

pub mod event;
pub mod invoice;
pub mod message;
pub mod mutate;
pub mod paths;
pub mod program;
pub mod signature;

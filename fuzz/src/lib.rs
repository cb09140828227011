//! What must hold for any bytes from outside, one file for each kind of them. The fuzz targets in `fuzz_targets/` ask it of what
//! libFuzzer makes up; `tests/fuzzing.rs` asks it of the fixtures, of `seeds/`, and of changes to them.

pub mod event;
pub mod invoice;
pub mod message;
pub mod mutate;
pub mod paths;
pub mod signature;
pub mod world;

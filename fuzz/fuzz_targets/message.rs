#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| stripe_reconciler_fuzz::message::check(input));

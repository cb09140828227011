#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use stripe_reconciler_fuzz::mutate::{self, Dice};

fuzz_target!(|input: &[u8]| stripe_reconciler_fuzz::paths::check(input));

fuzz_mutator!(
    |input: &mut [u8], size: usize, max_size: usize, seed: u32| {
        let mut dice = Dice::new(seed.into());
        let mutated = if dice.below(2) == 0 {
            None
        } else {
            mutate::body(&input[..size], &mut dice)
        };
        match mutated.filter(|mutated| mutated.len() <= max_size) {
            Some(mutated) => {
                input[..mutated.len()].copy_from_slice(&mutated);
                mutated.len()
            }
            None => fuzzer_mutate(input, size, max_size),
        }
    }
);

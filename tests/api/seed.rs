//! The seed of a test that draws at random.

/// Returns the seed in `TEST_SEED`, or a random one, and prints it, so that a failed run can be
/// repeated. Every assertion must hold for every seed.
pub fn seed() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "the settings of a test")]
    let given = std::env::var("TEST_SEED").ok();
    let seed = match given {
        Some(text) => text.parse().expect("TEST_SEED is a number"),
        None => rand::random(),
    };
    println!("TEST_SEED={seed}");
    seed
}

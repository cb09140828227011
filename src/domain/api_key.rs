//! API keys: random, shown once, kept as a hash. 256 random bits need no slow hash.

use sha2::{Digest, Sha256};

/// `srk_` and 64 hex digits.
pub fn from_random(random: [u8; 32]) -> String {
    format!("srk_{}", hex::encode(random))
}

/// What is stored of a key, and looked up: how long the look-up takes says nothing about any key.
pub fn hash(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

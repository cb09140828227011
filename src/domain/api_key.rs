//! API keys: random, shown once, stored as a hash. 256 random bits need no slow hash.

use sha2::{Digest, Sha256};

/// Returns a new key: `srk_` and 64 hexadecimal digits.
pub fn from_random(random: [u8; 32]) -> String {
    format!("srk_{}", hex::encode(random))
}

/// Returns the hash under which a key is stored and looked up. The duration of a look-up by hash
/// reveals nothing about any key.
pub fn hash(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

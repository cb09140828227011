//! What shall happen in a round, drawn from its seed before anything happens: it depends on nothing that the program does, so both
//! engines meet the same, and steps can be left out without a change to the others.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

const STEPS: std::ops::Range<usize> = 20..90;
const INVOICES: std::ops::RangeInclusive<usize> = 1..=5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Something happens to an invoice at Stripe.
    Live,
    /// Some of the deliveries on their way arrive at once.
    Deliver,
    /// A pass against Stripe's API, with deliveries meanwhile or without.
    Reconcile,
    /// Somebody stores an invoice.
    Store,
    /// Somebody reads one.
    Read,
    /// Stripe makes a new signing secret; the old one ends a day later.
    Roll,
    /// The operator hears of it.
    Configure,
    /// The program's clock is no longer right, or right again.
    JumpClock,
    /// Somebody who is not Stripe delivers something.
    Forge,
    /// Stripe delivers what is no event.
    Garble,
    /// The program is stopped, and started again.
    Restart,
}

#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub what: What,
    /// All that is random in it comes from this.
    pub seed: u64,
}

#[derive(Clone, Debug)]
pub struct Script {
    pub seed: u64,
    pub invoices: usize,
    pub steps: Vec<Step>,
    /// Every delivery and every pass is watched at every moment; else some.
    pub is_watched: bool,
}

/// How often each thing happens, of a hundred.
const SHARES: [(What, u32); 11] = [
    (What::Live, 34),
    (What::Deliver, 32),
    (What::Reconcile, 9),
    (What::Store, 6),
    (What::Read, 6),
    (What::Roll, 1),
    (What::Configure, 3),
    (What::JumpClock, 3),
    (What::Forge, 3),
    (What::Garble, 1),
    (What::Restart, 2),
];

impl Script {
    pub fn of(seed: u64) -> Script {
        let mut random = StdRng::seed_from_u64(seed);
        let invoices = random.random_range(INVOICES);
        let count = random.random_range(STEPS);
        let step = |_| {
            let (what, _) = *SHARES
                .choose_weighted(&mut random, |(_, share)| *share)
                .unwrap();
            Step {
                what,
                seed: random.random(),
            }
        };
        let steps = (0..count).map(step).collect();
        Script {
            seed,
            invoices,
            steps,
            is_watched: false,
        }
    }

    /// The same, watched or not.
    pub fn watched(&self, is_watched: bool) -> Script {
        Script {
            is_watched,
            ..self.clone()
        }
    }

    /// As few of its steps as still fail, found by leaving out a half, a quarter, and so on, as long as there are tries left.
    pub fn shortened(&self, mut tries: usize, fails: impl Fn(&Script) -> bool) -> Script {
        let mut found = self.clone();
        let mut size = found.steps.len().div_ceil(2);
        while size > 0 {
            let mut at = 0;
            while at < found.steps.len() {
                let mut shorter = found.clone();
                shorter.steps.drain(at..(at + size).min(found.steps.len()));
                if tries == 0 {
                    return found;
                }
                tries -= 1;
                if fails(&shorter) {
                    found = shorter;
                } else {
                    at += size;
                }
            }
            size /= 2;
        }
        found
    }
}

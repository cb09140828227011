//! Script of a round, drawn from its seed in advance. It depends on nothing that the program does,
//! so both engines get the same steps, and steps can be removed without changing the others.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

const STEPS: std::ops::Range<usize> = 20..90;
const INVOICES: std::ops::RangeInclusive<usize> = 1..=5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Changes an invoice at Stripe.
    Live,
    /// Delivers some of the queued webhooks concurrently.
    Deliver,
    /// Makes a reconcile run, with or without concurrent deliveries.
    Reconcile,
    /// Stores an invoice.
    Store,
    /// Reads an invoice.
    Read,
    /// Creates a new signing secret at Stripe. The old one ends a day later.
    Roll,
    /// Configures the program with Stripe's secrets.
    Configure,
    /// Changes the program's clock to a wrong time or back to the right one.
    JumpClock,
    /// Delivers a forged webhook.
    Forge,
    /// Delivers an authentic body that is not an event.
    Garble,
    /// Stops the program and starts it again.
    Restart,
}

#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub action: Action,
    /// Source of all randomness.
    pub seed: u64,
}

#[derive(Clone, Debug)]
pub struct Script {
    pub seed: u64,
    pub invoices: usize,
    pub steps: Vec<Step>,
    /// Whether every delivery and run is watched rather than some.
    pub is_watched: bool,
}

/// Frequency of each step in percent.
const SHARES: [(Action, u32); 11] = [
    (Action::Live, 34),
    (Action::Deliver, 32),
    (Action::Reconcile, 9),
    (Action::Store, 6),
    (Action::Read, 6),
    (Action::Roll, 1),
    (Action::Configure, 3),
    (Action::JumpClock, 3),
    (Action::Forge, 3),
    (Action::Garble, 1),
    (Action::Restart, 2),
];

impl Script {
    pub fn of(seed: u64) -> Script {
        let mut random = StdRng::seed_from_u64(seed);
        let invoices = random.random_range(INVOICES);
        let count = random.random_range(STEPS);
        let step = |_| {
            let (action, _) = *SHARES
                .choose_weighted(&mut random, |(_, share)| *share)
                .unwrap();
            Step {
                action,
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

    /// Returns the same script, watched or not.
    pub fn watched(&self, is_watched: bool) -> Script {
        Script {
            is_watched,
            ..self.clone()
        }
    }

    /// Removes steps while the script still fails: a half, a quarter and so on, up to the given
    /// number of attempts.
    pub fn shortened(&self, mut attempts: usize, fails: impl Fn(&Script) -> bool) -> Script {
        let mut found = self.clone();
        let mut size = found.steps.len().div_ceil(2);
        while size > 0 {
            let mut at = 0;
            while at < found.steps.len() {
                let mut shorter = found.clone();
                shorter.steps.drain(at..(at + size).min(found.steps.len()));
                if attempts == 0 {
                    return found;
                }
                attempts -= 1;
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

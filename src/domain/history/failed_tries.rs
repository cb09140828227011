//! Failed tries: single declined payments, as charges and PaymentIntents report them.
//!
//! A try has the reason of a failure but not the attempt's number. `failed_attempts` joins tries
//! with the invoice's events, which have the number but not the reason.

use std::collections::{BTreeMap, HashMap};

use crate::domain::stripe::event::StoredObservation;
use crate::domain::stripe::object::{Object, PaymentIntent};

/// Largest distance in seconds between a thin event and its try. A thin event names no charge.
const SAME_TRY_S: i64 = 2;

/// One declined payment, as a charge or a PaymentIntent reports it.
pub struct FailedTry<'a> {
    pub charge: Option<&'a str>,
    /// The PaymentIntent of a try that names no charge.
    pub intent: Option<&'a str>,
    pub sources: Vec<&'a StoredObservation>,
    /// The earliest `created`, in Unix seconds.
    pub time: i64,
}

/// Identity of a try: its charge, or without a charge its PaymentIntent and second.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum TryKey<'a> {
    Charge(&'a str),
    IntentAt(&'a str, i64),
}

/// Tries found so far, in the order in which they were found.
#[derive(Default)]
struct FoundTries<'a> {
    failed_tries: Vec<FailedTry<'a>>,
    index: HashMap<TryKey<'a>, usize>,
}

impl<'a> FoundTries<'a> {
    fn add(&mut self, stored: &'a StoredObservation, key: TryKey<'a>) {
        let second = stored.observation.created;
        if let Some(&at) = self.index.get(&key) {
            let found = &mut self.failed_tries[at];
            found.sources.push(stored);
            found.time = found.time.min(second);
            return;
        }

        let (charge, intent) = match key {
            TryKey::Charge(charge) => (Some(charge), None),
            TryKey::IntentAt(intent, _) => (None, Some(intent)),
        };
        self.index.insert(key, self.failed_tries.len());
        self.failed_tries.push(FailedTry {
            charge,
            intent,
            sources: vec![stored],
            time: second,
        });
    }

    /// Returns the lowest charge id of each second in which a try with a charge began.
    fn lowest_charges(&self) -> BTreeMap<i64, &'a str> {
        let mut lowest = BTreeMap::new();
        for found in &self.failed_tries {
            if let Some(charge) = found.charge {
                let known = lowest.entry(found.time).or_insert(charge);
                *known = charge.min(*known);
            }
        }
        lowest
    }
}

/// Returns all failed tries. `observations` belong to one invoice and have a fixed order.
pub fn failed_tries<'a>(observations: &[&'a StoredObservation]) -> Vec<FailedTry<'a>> {
    let mut found = FoundTries::default();
    let mut without_charge = Vec::new();
    for &stored in observations {
        match (&stored.observation.object, stored.observation.kind.as_str()) {
            (Object::Charge(charge), "charge.failed") => {
                found.add(stored, TryKey::Charge(&charge.id));
            }
            (Object::PaymentIntent(intent), "payment_intent.payment_failed") => {
                match failed_charge(intent) {
                    Some(charge) => found.add(stored, TryKey::Charge(charge)),
                    None => without_charge.push((stored, intent.id.as_str())),
                }
            }
            _ => {}
        }
    }

    // Thin events are matched against the tries as the other events report them. So collect the
    // times first, because a thin event must not move a try while others are still being matched.
    let charges = found.lowest_charges();
    for (stored, intent) in without_charge {
        let second = stored.observation.created;
        let key = match nearest(&charges, second).filter(|_| stored.observation.thin) {
            Some(charge) => TryKey::Charge(charge),
            None => TryKey::IntentAt(intent, second),
        };
        found.add(stored, key);
    }
    found.failed_tries
}

/// Returns the charge that failed. `latest_charge` may be an earlier one if there is an error.
fn failed_charge(intent: &PaymentIntent) -> Option<&str> {
    if intent.error.is_some() {
        intent.error_charge.as_deref()
    } else {
        intent.latest_charge.as_deref()
    }
}

/// Returns the charge of the nearest try; ties go to the earlier try, then to the lower id.
fn nearest<'a>(lowest_charges: &BTreeMap<i64, &'a str>, second: i64) -> Option<&'a str> {
    let near = lowest_charges
        .range(second.saturating_sub(SAME_TRY_S)..=second.saturating_add(SAME_TRY_S))
        .map(|(&time, &charge)| ((time - second).abs(), time, charge));
    near.min().map(|(_, _, charge)| charge)
}

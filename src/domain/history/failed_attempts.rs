//! Failed attempts: what `invoice.payment_failed` counts, joined with the tries that charges and PaymentIntents tell of.
//!
//! An invoice's event knows the attempt's number but not the reason; a charge or PaymentIntent knows the reason but not the
//! number. Here they are brought together, so that one failure is one entry.

use super::{StoredObservation, in_order};
use crate::domain::stripe::event::Observation;
use crate::domain::stripe::object::{Invoice, Object, PaymentIntent};

/// A thin event names no charge; it is one more telling of a try this near.
const SAME_TRY_S: i64 = 2;
/// A try and an attempt that name no common charge are one failure when they are this near.
const SAME_FAILURE_S: i64 = 60;

/// One failed payment, as the charge or the PaymentIntent tells it.
pub struct FailedTry<'a> {
    pub charge: Option<&'a str>,
    /// The PaymentIntent of a try that names no charge.
    pub intent: Option<&'a str>,
    pub sources: Vec<&'a StoredObservation>,
    /// The earliest `created`, in Unix seconds.
    pub time: i64,
}

/// One failed attempt to collect an invoice: one entry of its history.
#[derive(Default)]
pub struct FailedAttempt<'a> {
    /// Stripe's `attempt_count`; it counts scheduled attempts only.
    pub number: Option<i64>,
    /// The `invoice.payment_failed` events.
    pub sources: Vec<&'a StoredObservation>,
    pub charges: Vec<&'a str>,
    pub tries: Vec<FailedTry<'a>>,
}

impl<'a> FailedAttempt<'a> {
    /// The earliest `created` of all that tells of it.
    pub fn time(&self) -> i64 {
        self.sources
            .iter()
            .map(|k| k.telling.created)
            .chain(self.tries.iter().map(|t| t.time))
            .min()
            .unwrap_or_default()
    }

    /// The lowest charge, else the lowest PaymentIntent, else empty: decides the order within a second.
    pub fn object_id(&self) -> &'a str {
        let charges = self
            .charges
            .iter()
            .copied()
            .chain(self.tries.iter().filter_map(|t| t.charge));
        charges
            .min()
            .or_else(|| self.tries.iter().filter_map(|t| t.intent).min())
            .unwrap_or_default()
    }

    fn told_at(&self) -> i64 {
        self.sources
            .iter()
            .map(|k| k.telling.created)
            .min()
            .unwrap_or_default()
    }

    fn order(&self) -> (i64, i64) {
        (self.told_at(), self.number.unwrap_or(0))
    }
}

/// All failed attempts of an invoice. `known` are the tellings that belong to it, in a fixed order.
pub fn failed_attempts<'a>(known: &[&'a StoredObservation]) -> Vec<FailedAttempt<'a>> {
    let mut attempts = attempts(known);
    let mut others = Vec::new();
    for failed in tries(known) {
        let names_it = |a: &&mut FailedAttempt| {
            failed
                .charge
                .is_some_and(|charge| a.charges.contains(&charge))
        };
        match attempts.iter_mut().find(names_it) {
            Some(attempt) => attempt.tries.push(failed),
            None => others.push(failed),
        }
    }
    pair(&mut attempts, &mut others);
    give_reason(&mut attempts, known);
    attempts.extend(others.into_iter().map(|failed| FailedAttempt {
        tries: vec![failed],
        ..FailedAttempt::default()
    }));
    attempts
}

/// Whether Stripe's API may know why the latest attempt failed: no event told it, and it was not asked since.
pub fn lacks_reason(known: &[&StoredObservation]) -> bool {
    let mut attempts = failed_attempts(known);
    attempts.sort_by_key(FailedAttempt::order);
    let Some(latest) = attempts.last().filter(|attempt| attempt.tries.is_empty()) else {
        return false;
    };
    !known
        .iter()
        .any(|k| asked_intent(k).is_some() && k.telling.created >= latest.told_at())
}

/// The last error of a PaymentIntent, as Stripe's API tells it, is the reason of the latest attempt before it was asked; where
/// events tell of a try or name a charge, they know better.
fn give_reason<'a>(attempts: &mut [FailedAttempt<'a>], known: &[&'a StoredObservation]) {
    for &known in known {
        let Some(intent) = asked_intent(known).filter(|intent| intent.error.is_some()) else {
            continue;
        };
        let charge = intent.error_charge.as_deref();
        let is_known = |a: &FailedAttempt| {
            charge.is_some_and(|charge| {
                a.charges.contains(&charge) || a.tries.iter().any(|t| t.charge == Some(charge))
            })
        };
        if attempts.iter().any(is_known) {
            continue;
        }
        let before = attempts
            .iter_mut()
            .filter(|a| !a.sources.is_empty() && a.told_at() <= known.telling.created);
        if let Some(attempt) = before
            .max_by_key(|a| a.order())
            .filter(|a| a.tries.is_empty() && a.charges.is_empty())
        {
            let time = attempt.told_at();
            let intent = if charge.is_none() {
                Some(intent.id.as_str())
            } else {
                None
            };
            attempt.tries.push(FailedTry {
                charge,
                intent,
                sources: vec![known],
                time,
            });
        }
    }
}

fn asked_intent(known: &StoredObservation) -> Option<&PaymentIntent> {
    match &known.telling.object {
        Object::PaymentIntent(intent) if known.telling.fetched => Some(intent),
        _ => None,
    }
}

/// One `invoice.payment_failed`, with what decides which attempt it belongs to.
struct Failure<'a> {
    known: &'a StoredObservation,
    second: i64,
    number: Option<i64>,
    charge: Option<&'a str>,
}

fn attempts<'a>(known: &[&'a StoredObservation]) -> Vec<FailedAttempt<'a>> {
    let mut failures: Vec<Failure<'a>> = known.iter().filter_map(|k| failure(k)).collect();
    forget_latest_charges(&mut failures);
    let (numbered, unnumbered): (Vec<_>, Vec<_>) =
        failures.into_iter().partition(|f| f.number.is_some());
    let mut attempts = group(numbered);
    attempts.sort_by_key(|a| a.number);
    let mut rest = Vec::new();
    for failure in unnumbered {
        match attempts.iter_mut().find(|a| {
            a.sources
                .iter()
                .any(|k| k.telling.created == failure.second)
        }) {
            Some(attempt) => include(attempt, failure),
            None => rest.push(failure),
        }
    }
    attempts.extend(group(rest));
    for attempt in &mut attempts {
        // An attempt speaks from its earliest event, in whatever order they were found to belong together.
        attempt.sources = in_order(std::mem::take(&mut attempt.sources));
    }
    attempts.sort_by_key(FailedAttempt::order);
    attempts
}

fn failure(known: &StoredObservation) -> Option<Failure<'_>> {
    let (telling, invoice) = invoice_event(&known.telling)?;
    (telling.kind == "invoice.payment_failed").then_some(Failure {
        known,
        second: telling.created,
        number: invoice.attempt_count,
        charge: invoice.charge.as_deref(),
    })
}

fn invoice_event(telling: &Observation) -> Option<(&Observation, &Invoice)> {
    match &telling.object {
        Object::Invoice(invoice) => Some((telling, invoice)),
        _ => None,
    }
}

/// `invoice.charge` is the *latest* charge: one that another attempt named earlier says nothing about this one.
fn forget_latest_charges(failures: &mut [Failure]) {
    let named: Vec<_> = failures
        .iter()
        .map(|f| (f.charge, f.number, f.second))
        .collect();
    for failure in failures {
        let earlier = |&(charge, number, second): &(Option<&str>, Option<i64>, i64)| {
            charge == failure.charge
                && number.is_some()
                && number != failure.number
                && (second, number) < (failure.second, failure.number)
        };
        if failure.charge.is_some() && named.iter().any(earlier) {
            failure.charge = None;
        }
    }
}

/// Same number, and the same second or the same charge: one attempt.
fn group(failures: Vec<Failure>) -> Vec<FailedAttempt> {
    let mut attempts: Vec<FailedAttempt> = Vec::new();
    for failure in failures {
        let same = |a: &FailedAttempt| {
            a.number == failure.number
                && (a
                    .sources
                    .iter()
                    .any(|k| k.telling.created == failure.second)
                    || failure
                        .charge
                        .is_some_and(|charge| a.charges.contains(&charge)))
        };
        let (mut joined, others): (Vec<FailedAttempt>, Vec<FailedAttempt>) =
            attempts.into_iter().partition(same);
        attempts = others;
        let mut attempt = joined.pop().unwrap_or(FailedAttempt {
            number: failure.number,
            ..FailedAttempt::default()
        });
        for other in joined {
            attempt.sources.extend(other.sources);
            attempt.charges.extend(other.charges);
        }
        include(&mut attempt, failure);
        attempts.push(attempt);
    }
    attempts
}

fn include<'a>(attempt: &mut FailedAttempt<'a>, failure: Failure<'a>) {
    attempt.sources.push(failure.known);
    if let Some(charge) = failure
        .charge
        .filter(|charge| !attempt.charges.contains(charge))
    {
        attempt.charges.push(charge);
    }
}

fn tries<'a>(known: &[&'a StoredObservation]) -> Vec<FailedTry<'a>> {
    let mut tries: Vec<FailedTry<'a>> = Vec::new();
    let mut unnamed = Vec::new();
    for &known in known {
        let telling = &known.telling;
        match (&telling.object, telling.kind.as_str()) {
            (Object::Charge(charge), "charge.failed") => {
                tell(&mut tries, known, Some(&charge.id), None)
            }
            (Object::PaymentIntent(intent), "payment_intent.payment_failed") => {
                let charge = if intent.error.is_some() {
                    &intent.error_charge
                } else {
                    &intent.latest_charge
                };
                match charge.as_deref() {
                    Some(charge) => tell(&mut tries, known, Some(charge), None),
                    None => unnamed.push((known, intent.id.as_str())),
                }
            }
            _ => {}
        }
    }
    // A thin event is matched against the tries as the other events tell them, so none of these may move meanwhile.
    let named: Vec<(i64, &str)> = tries
        .iter()
        .filter_map(|t| Some((t.time, t.charge?)))
        .collect();
    for (known, intent) in unnamed {
        match nearest(&named, known).filter(|_| known.telling.thin) {
            Some(charge) => tell(&mut tries, known, Some(charge), None),
            None => tell(&mut tries, known, None, Some(intent)),
        }
    }
    tries
}

/// Nearest first, then the earlier, then the lower id.
fn nearest<'a>(named: &[(i64, &'a str)], known: &StoredObservation) -> Option<&'a str> {
    let near = named
        .iter()
        .map(|&(time, charge)| ((time - known.telling.created).abs(), time, charge));
    near.filter(|&(distance, ..)| distance <= SAME_TRY_S)
        .min()
        .map(|(_, _, charge)| charge)
}

/// The same charge, or without one the same PaymentIntent in the same second, is the same try.
fn tell<'a>(
    tries: &mut Vec<FailedTry<'a>>,
    known: &'a StoredObservation,
    charge: Option<&'a str>,
    intent: Option<&'a str>,
) {
    let second = known.telling.created;
    let same = |t: &&mut FailedTry| {
        t.charge == charge && t.intent == intent && (charge.is_some() || t.time == second)
    };
    match tries.iter_mut().find(same) {
        Some(found) => {
            found.sources.push(known);
            found.time = found.time.min(second);
        }
        None => tries.push(FailedTry {
            charge,
            intent,
            sources: vec![known],
            time: second,
        }),
    }
}

/// Attempts that name no charge, and tries that no attempt names, one to one, nearest first.
fn pair<'a>(attempts: &mut [FailedAttempt<'a>], others: &mut Vec<FailedTry<'a>>) {
    let mut pairs = Vec::new();
    for (a, attempt) in attempts
        .iter()
        .enumerate()
        .filter(|(_, attempt)| attempt.charges.is_empty())
    {
        for (t, failed) in others.iter().enumerate() {
            let distance = (attempt.told_at() - failed.time).abs();
            if distance <= SAME_FAILURE_S {
                pairs.push((
                    distance,
                    attempt.order(),
                    failed.time,
                    failed.charge.or(failed.intent),
                    a,
                    t,
                ));
            }
        }
    }
    pairs.sort();
    let mut taken: Vec<(usize, usize)> = Vec::new();
    for (.., a, t) in pairs {
        if !taken.iter().any(|&(a2, t2)| a == a2 || t == t2) {
            taken.push((a, t));
        }
    }
    taken.sort_by_key(|&(_, t)| std::cmp::Reverse(t));
    for (a, t) in taken {
        attempts[a].tries.push(others.remove(t));
    }
}

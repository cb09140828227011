//! Failed attempts as counted by `invoice.payment_failed`, joined with the underlying tries.
//!
//! An invoice's event has the attempt's number but not the reason; a charge or PaymentIntent has
//! the reason but not the number. This file joins them, so that one failure is one entry.
//!
//! Every step is a lookup or one walk over sorted times, because card testing through a hosted
//! page makes thousands of tries on one invoice.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use super::disjoint_sets::DisjointSets;
use super::entry::{chronological, in_order};
use super::failed_tries::{FailedTry, failed_tries};
use crate::domain::stripe::event::{EventKey, StoredObservation};
use crate::domain::stripe::object::{Object, PaymentIntent};

/// Largest distance in seconds between an attempt and its try if they name no common charge.
const SAME_FAILURE_S: i64 = 60;

/// Number of the earliest, and of the latest, failed attempts that have an entry of their own.
///
/// The attempts between them share one entry. Stripe retries an invoice eight times at most; only
/// card testing or a broken client makes more than a hundred attempts on one invoice, and nobody
/// reads these one by one. Without a limit each of them costs every reader a message. The earliest
/// attempts show how the failures began; the latest hold the current state and reason.
pub const LISTED_AT_EACH_END: usize = 50;

/// One failed attempt to collect an invoice.
#[derive(Default)]
pub struct FailedAttempt<'a> {
    /// Stripe's `attempt_count`; it counts scheduled attempts only.
    pub number: Option<i64>,
    /// The `invoice.payment_failed` events, earliest first.
    pub sources: Vec<&'a StoredObservation>,
    /// Charges that these events name.
    pub charges: BTreeSet<&'a str>,
    pub failed_tries: Vec<FailedTry<'a>>,
}

impl<'a> FailedAttempt<'a> {
    /// Returns the earliest `created` of its events and tries.
    pub fn time(&self) -> i64 {
        let events = self
            .sources
            .first()
            .map(|stored| stored.observation.created);
        let failed_tries = self.failed_tries.iter().map(|failed| failed.time);
        events
            .into_iter()
            .chain(failed_tries)
            .min()
            .unwrap_or_default()
    }

    /// Returns the lowest charge, else the lowest PaymentIntent, else an empty id.
    pub fn object_id(&self) -> &'a str {
        let intents = self.failed_tries.iter().filter_map(|failed| failed.intent);
        self.all_charges()
            .min()
            .or_else(|| intents.min())
            .unwrap_or_default()
    }

    /// Returns the charges that its events or its tries name.
    pub fn all_charges(&self) -> impl Iterator<Item = &'a str> {
        let tried = self.failed_tries.iter().filter_map(|failed| failed.charge);
        self.charges.iter().copied().chain(tried)
    }

    /// Returns its events and the sources of its tries.
    pub fn all_sources(&self) -> impl Iterator<Item = &'a StoredObservation> {
        let failed_tries = self.failed_tries.iter().flat_map(|failed| &failed.sources);
        self.sources.iter().chain(failed_tries).copied()
    }

    /// Returns the second of its earliest event, 0 if no event reports it.
    fn event_second(&self) -> i64 {
        self.sources
            .first()
            .map(|stored| stored.observation.created)
            .unwrap_or_default()
    }

    fn order(&self) -> (i64, i64) {
        (self.event_second(), self.number.unwrap_or(0))
    }

    /// Returns the order of the entries, which decides the attempts that have one of their own.
    fn sort_key(&self) -> (i64, i64, &'a str, Option<EventKey>) {
        let earliest = self
            .all_sources()
            .min_by(|a, b| chronological(a).cmp(&chronological(b)));
        (
            self.time(),
            self.number.unwrap_or(0),
            self.object_id(),
            earliest.map(|stored| stored.key),
        )
    }
}

/// Failed attempts, split into those with an entry of their own and those that share one.
pub struct LimitedAttempts<'a> {
    pub one_by_one: Vec<FailedAttempt<'a>>,
    /// The attempts between the earliest and the latest ones, in order. Usually empty.
    pub shared: Vec<FailedAttempt<'a>>,
}

/// Splits attempts by [`LISTED_AT_EACH_END`]. The split depends only on the set of attempts.
pub fn limit(mut attempts: Vec<FailedAttempt<'_>>) -> LimitedAttempts<'_> {
    if attempts.len() <= 2 * LISTED_AT_EACH_END {
        return LimitedAttempts {
            one_by_one: attempts,
            shared: Vec::new(),
        };
    }
    attempts.sort_by_cached_key(FailedAttempt::sort_key);

    let latest = attempts.split_off(attempts.len() - LISTED_AT_EACH_END);
    let shared = attempts.split_off(LISTED_AT_EACH_END);
    attempts.extend(latest);
    LimitedAttempts {
        one_by_one: attempts,
        shared,
    }
}

/// Returns all failed attempts of an invoice. `observations` belong to it, in a fixed order.
pub fn failed_attempts<'a>(observations: &[&'a StoredObservation]) -> Vec<FailedAttempt<'a>> {
    let mut attempts = attempts_of_events(observations);
    let mut by_charge: HashMap<&str, usize> = HashMap::new();
    for (at, attempt) in attempts.iter().enumerate() {
        for charge in &attempt.charges {
            by_charge.entry(charge).or_insert(at);
        }
    }

    let mut unnamed = Vec::new();
    for failed in failed_tries(observations) {
        match failed.charge.and_then(|charge| by_charge.get(charge)) {
            Some(&at) => attempts[at].failed_tries.push(failed),
            None => unnamed.push(failed),
        }
    }
    let alone = pair(&mut attempts, unnamed);
    add_fetched_reasons(&mut attempts, observations);

    attempts.extend(alone.into_iter().map(|failed| FailedAttempt {
        failed_tries: vec![failed],
        ..FailedAttempt::default()
    }));
    attempts
}

/// Returns whether Stripe's API may know the reason of the latest failed attempt.
///
/// It may if no event gave a reason and no PaymentIntent was fetched since.
pub fn lacks_reason(observations: &[&StoredObservation]) -> bool {
    let attempts = failed_attempts(observations);
    let latest = attempts.iter().max_by_key(|attempt| attempt.order());
    let Some(latest) = latest.filter(|attempt| attempt.failed_tries.is_empty()) else {
        return false;
    };
    !observations.iter().any(|stored| {
        fetched_intent(stored).is_some() && stored.observation.created >= latest.event_second()
    })
}

/// Gives the last error of a fetched PaymentIntent to the latest attempt before the fetch.
///
/// Skips attempts that have a try or name a charge, because their own events are more exact.
fn add_fetched_reasons<'a>(
    attempts: &mut [FailedAttempt<'a>],
    observations: &[&'a StoredObservation],
) {
    let mut known: HashSet<&str> = attempts
        .iter()
        .flat_map(FailedAttempt::all_charges)
        .collect();
    for &stored in observations {
        let Some(intent) = fetched_intent(stored).filter(|intent| intent.error.is_some()) else {
            continue;
        };
        let charge = intent.error_charge.as_deref();
        if charge.is_some_and(|charge| known.contains(charge)) {
            continue;
        }

        // The attempts are sorted by the second of their earliest event.
        let before = attempts.partition_point(|a| a.event_second() <= stored.observation.created);
        let Some(attempt) = attempts[..before].last_mut() else {
            continue;
        };
        if attempt.failed_tries.is_empty() && attempt.charges.is_empty() {
            known.extend(charge);
            attempt.failed_tries.push(FailedTry {
                charge,
                intent: charge.is_none().then_some(intent.id.as_str()),
                sources: vec![stored],
                time: attempt.event_second(),
            });
        }
    }
}

fn fetched_intent(stored: &StoredObservation) -> Option<&PaymentIntent> {
    match &stored.observation.object {
        Object::PaymentIntent(intent) if stored.observation.fetched => Some(intent),
        _ => None,
    }
}

/// One `invoice.payment_failed`, with the fields that decide its attempt.
struct Failure<'a> {
    stored: &'a StoredObservation,
    second: i64,
    number: Option<i64>,
    charge: Option<&'a str>,
}

/// Returns the attempts that `invoice.payment_failed` reports, sorted by time and number.
fn attempts_of_events<'a>(observations: &[&'a StoredObservation]) -> Vec<FailedAttempt<'a>> {
    let mut failures: Vec<Failure<'a>> = observations.iter().filter_map(|k| failure(k)).collect();
    drop_repeated_charges(&mut failures);
    let (numbered, unnumbered): (Vec<_>, Vec<_>) = failures
        .into_iter()
        .partition(|failure| failure.number.is_some());

    let mut attempts = group(numbered);
    attempts.sort_by_key(|attempt| attempt.number);
    let mut by_second: HashMap<i64, usize> = HashMap::new();
    for (at, attempt) in attempts.iter().enumerate() {
        for stored in &attempt.sources {
            by_second.entry(stored.observation.created).or_insert(at);
        }
    }

    let mut rest = Vec::new();
    for failure in unnumbered {
        match by_second.get(&failure.second) {
            Some(&at) => include(&mut attempts[at], &failure),
            None => rest.push(failure),
        }
    }
    attempts.extend(group(rest));

    for attempt in &mut attempts {
        // Keep sources sorted by time, whatever the merge order: the earliest event dates the
        // attempt.
        attempt.sources = in_order(std::mem::take(&mut attempt.sources));
    }
    attempts.sort_by_key(FailedAttempt::order);
    attempts
}

fn failure(stored: &StoredObservation) -> Option<Failure<'_>> {
    match &stored.observation.object {
        Object::Invoice(invoice) if stored.observation.kind == "invoice.payment_failed" => {
            Some(Failure {
                stored,
                second: stored.observation.created,
                number: invoice.attempt_count,
                charge: invoice.charge.as_deref(),
            })
        }
        _ => None,
    }
}

/// Removes the charges that an attempt with another number named earlier.
///
/// `invoice.charge` is the *latest* charge: a later attempt that made none still shows it.
fn drop_repeated_charges(failures: &mut [Failure]) {
    let mut named: HashMap<&str, Vec<(i64, i64)>> = HashMap::new();
    for failure in failures.iter() {
        if let (Some(charge), Some(number)) = (failure.charge, failure.number) {
            let times = named.entry(charge).or_default();
            times.push((failure.second, number));
        }
    }
    // The earliest claim and the earliest with another number decide for all claims.
    let earliest: HashMap<&str, [Option<(i64, i64)>; 2]> = named
        .into_iter()
        .map(|(charge, times)| {
            let first = times.iter().min().copied();
            let others = times.iter().filter(|(_, number)| {
                first.is_some_and(|(_, first_number)| *number != first_number)
            });
            (charge, [first, others.min().copied()])
        })
        .collect();

    for failure in failures {
        let Some(charge) = failure.charge else {
            continue;
        };
        let is_repeated =
            earliest
                .get(charge)
                .into_iter()
                .flatten()
                .flatten()
                .any(|&(second, number)| {
                    Some(number) != failure.number
                        && (second, Some(number)) < (failure.second, failure.number)
                });
        if is_repeated {
            failure.charge = None;
        }
    }
}

/// Groups failures with one number that share a second or a charge, over any number of steps.
fn group(failures: Vec<Failure>) -> Vec<FailedAttempt> {
    let mut sets = DisjointSets::new(failures.len());
    let mut by_second: HashMap<(Option<i64>, i64), usize> = HashMap::new();
    let mut by_charge: HashMap<(Option<i64>, &str), usize> = HashMap::new();
    for (at, failure) in failures.iter().enumerate() {
        let same_second = by_second.entry((failure.number, failure.second));
        sets.join(at, *same_second.or_insert(at));
        if let Some(charge) = failure.charge {
            let same_charge = by_charge.entry((failure.number, charge));
            sets.join(at, *same_charge.or_insert(at));
        }
    }
    sets.flatten();

    let mut attempts: Vec<FailedAttempt> = Vec::new();
    let mut by_set: HashMap<usize, usize> = HashMap::new();
    for (at, failure) in failures.iter().enumerate() {
        let attempt = *by_set.entry(sets.root(at)).or_insert_with(|| {
            attempts.push(FailedAttempt {
                number: failure.number,
                ..FailedAttempt::default()
            });
            attempts.len() - 1
        });
        include(&mut attempts[attempt], failure);
    }
    attempts
}

fn include<'a>(attempt: &mut FailedAttempt<'a>, failure: &Failure<'a>) {
    attempt.sources.push(failure.stored);
    attempt.charges.extend(failure.charge);
}

/// Pairs attempts that name no charge with tries that no attempt names, nearest first.
///
/// Returns the tries that remain unpaired. Ties go to the earlier attempt, then the lower number,
/// then the earlier try, then the lower id. Walks the seconds once for each distance, so the time
/// does not depend on the number of possible pairs.
fn pair<'a>(
    attempts: &mut [FailedAttempt<'a>],
    failed_tries: Vec<FailedTry<'a>>,
) -> Vec<FailedTry<'a>> {
    let mut failed_tries: Vec<Option<FailedTry<'a>>> = failed_tries.into_iter().map(Some).collect();
    let mut waiting = tries_by_second(&failed_tries);
    let mut unpaired: Vec<usize> = (0..attempts.len())
        .filter(|&at| attempts[at].charges.is_empty())
        .collect();

    for distance in 0..=SAME_FAILURE_S {
        if unpaired.is_empty() || waiting.is_empty() {
            break;
        }
        let (mut before, mut after) = (0, 0);
        unpaired.retain(|&at| {
            let second = attempts[at].event_second();
            let near = take_at(&mut waiting, &mut before, second - distance)
                .or_else(|| take_at(&mut waiting, &mut after, second + distance));
            let Some(failed) = near.and_then(|index| failed_tries[index].take()) else {
                return true;
            };
            attempts[at].failed_tries.push(failed);
            false
        });
        waiting.retain(|(_, queue)| !queue.is_empty());
    }
    failed_tries.into_iter().flatten().collect()
}

/// Seconds in ascending order, each with the tries of that second by id.
type TriesBySecond = Vec<(i64, VecDeque<usize>)>;

fn tries_by_second(failed_tries: &[Option<FailedTry>]) -> TriesBySecond {
    let mut sorted: Vec<(i64, Option<&str>, usize)> = failed_tries
        .iter()
        .enumerate()
        .filter_map(|(at, failed)| {
            let failed = failed.as_ref()?;
            Some((failed.time, failed.charge.or(failed.intent), at))
        })
        .collect();
    sorted.sort_unstable();

    let mut seconds: TriesBySecond = Vec::new();
    for (second, _, at) in sorted {
        match seconds.last_mut() {
            Some((last, queue)) if *last == second => queue.push_back(at),
            _ => seconds.push((second, VecDeque::from([at]))),
        }
    }
    seconds
}

/// Takes the first try of a second. `cursor` only moves forward, so seconds must ascend.
fn take_at(waiting: &mut TriesBySecond, cursor: &mut usize, second: i64) -> Option<usize> {
    while waiting.get(*cursor).is_some_and(|(at, _)| *at < second) {
        *cursor += 1;
    }
    let (_, queue) = waiting.get_mut(*cursor).filter(|(at, _)| *at == second)?;
    queue.pop_front()
}

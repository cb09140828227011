//! Concurrent work of a step: deliveries and a reconcile run, until they complete, the program
//! crashes or the clients hang up.

use std::cell::{Cell, RefCell};

use futures_util::future::{join, join_all};
use rand::RngExt;
use rand::rngs::StdRng;
use stripe_reconciler::reconcile::{self, Lease, Plan, ReconcileError, Report, WriteMode};

use super::delivery::{Delivery, Signed};
use super::process::Replica;
use super::simulation::{Simulation, assert_is_error, quiet};
use super::watch::Watch;
use testkit::Answer;

/// Lifetime of a lease that its holder does not renew.
const LEASE_MS: i64 = 12_000;
/// A lease with a longer remaining time than this was taken under a skewed clock and counts as
/// expired.
const MAX_SKEW_MS: i64 = 60_000;

/// Way in which concurrent work ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Whole,
    /// Crashes the program after this many waits.
    Crash(usize),
    /// Drops all clients and the run after this many waits.
    HangUp(usize),
}

pub struct Work {
    pub deliveries: Vec<Delivery>,
    pub plan: Option<Plan>,
    pub end: End,
    /// Whether the database is checked at every point where a crash could happen.
    pub is_watched: bool,
}

pub struct Done {
    /// Whether the work completed before the crash or hang-up.
    pub is_whole: bool,
    pub report: Option<Report>,
}

/// State of a run's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leased {
    No,
    Held,
    /// The lease is being released.
    Ending,
}

/// Result of a run. `None` if another process held the lease.
type RunResult = Result<Option<Report>, ReconcileError>;

impl End {
    /// Draws an end. Most work completes; the rest is interrupted after a wait, usually an early
    /// one.
    pub fn draw(random: &mut StdRng, most: usize) -> End {
        let most = [most, most / 2, most / 5][random.random_range(0..3)].max(2);
        let waits = random.random_range(0..most);
        match random.random_range(0..10) {
            0 | 1 => End::Crash(waits),
            2 => End::HangUp(waits),
            _ => End::Whole,
        }
    }

    pub fn waits(self) -> Option<usize> {
        match self {
            End::Whole => None,
            End::Crash(waits) | End::HangUp(waits) => Some(waits),
        }
    }
}

impl Simulation {
    /// Runs the work concurrently until its end. Unacknowledged deliveries are queued again.
    pub fn run_concurrently(&mut self, work: Work, random: &mut StdRng) -> Done {
        let signed: Vec<Signed> = work
            .deliveries
            .iter()
            .map(|delivery| self.sign(delivery, random))
            .collect();
        for (delivery, signed) in work
            .deliveries
            .iter()
            .zip(&signed)
            .filter(|(_, signed)| !signed.labels.is_empty())
        {
            self.ledger
                .record_sent(&delivery.identity, &delivery.body, &signed.labels);
        }
        let answers: RefCell<Vec<Option<Answer>>> =
            RefCell::new(work.deliveries.iter().map(|_| None).collect());
        let mut deliveries = Vec::with_capacity(signed.len());
        for (n, (delivery, signed)) in work.deliveries.iter().zip(&signed).enumerate() {
            let (replica, answers) = (self.process().replica(random.random_range(0..2)), &answers);
            deliveries.push(async move {
                let answer = replica.deliver(&signed.header, delivery.body.clone()).await;
                answers.borrow_mut()[n] = Some(answer);
            });
        }
        let (result, leased) = (RefCell::new(None), Cell::new(Leased::No));
        let replica = self.process().replica(random.random_range(0..2));
        let running = async {
            if let Some(plan) = work.plan {
                let ended = under_lease(replica, plan, &leased).await;
                *result.borrow_mut() = Some(ended);
            }
        };

        if work.plan.is_some() {
            self.invariants().begin_run(&self.stripe);
        }
        if work.is_watched {
            self.watch();
        }

        let ended = self
            .process()
            .run_until(work.end.waits(), join(join_all(deliveries), running));

        let (is_whole, answers, result) =
            (ended.is_some(), answers.into_inner(), result.into_inner());
        let seen = self.process().end_watch().map_or(Ok(()), Watch::end);
        self.invariants()
            .end_run(work.plan.is_some() && !is_whole && matches!(work.end, End::HangUp(_)));
        self.trace_work(&work, is_whole, &answers, &result);
        seen.unwrap_or_else(|wrong| panic!("at some moment of that: {wrong}"));
        self.check_lease(work.plan, leased.get(), is_whole, result.is_some());
        self.take_answers(&work, &signed, answers);
        if !is_whole && matches!(work.end, End::Crash(_)) {
            self.crash(random);
        }
        let was_logged = self.ledger.logged().len();
        self.check_log();
        let changes_nothing = work.deliveries.is_empty()
            && work.plan.is_some_and(|plan| plan.mode == WriteMode::DryRun);
        let is_changed = self.ledger.logged().len() != was_logged;
        assert!(
            !changes_nothing || self.may_still_write || !is_changed,
            "a dry run changes the log"
        );
        self.may_still_write |= !is_whole && matches!(work.end, End::HangUp(_));
        assert_eq!(self.stripe.violations(), [""; 0]);
        let report = result
            .and_then(|result| result.unwrap_or_else(|error| panic!("a pass fails: {error}")));
        Done { is_whole, report }
    }

    /// Makes a run without disturbance and returns its report.
    pub fn quiet_run(&mut self, plan: Plan) -> Report {
        if !self.is_lease_free() {
            self.later(LEASE_MS + MAX_SKEW_MS);
        }

        let done = self.run_concurrently(
            Work {
                deliveries: Vec::new(),
                plan: Some(plan),
                end: End::Whole,
                is_watched: false,
            },
            &mut quiet(),
        );
        done.report.expect("nobody holds the lease")
    }

    fn is_lease_free(&self) -> bool {
        self.is_over(self.lease_until_ms) && self.is_over(self.lease_perhaps_until_ms)
    }

    fn is_over(&self, until_ms: i64) -> bool {
        let left_ms = until_ms - self.clock.now_ms();
        left_ms <= 0 || left_ms > LEASE_MS + MAX_SKEW_MS
    }

    /// Checks the lease and records its state.
    ///
    /// A dead holder keeps the lease until it expires. A run that was interrupted while taking or
    /// releasing the lease may hold it.
    fn check_lease(
        &mut self,
        plan: Option<Plan>,
        leased: Leased,
        is_whole: bool,
        has_passed: bool,
    ) {
        assert!(
            leased == Leased::No || self.is_over(self.lease_until_ms),
            "a lease is taken that somebody else still holds"
        );

        let needs_lease = plan.is_some_and(|plan| plan.mode == WriteMode::Save);
        let must_take = needs_lease && is_whole && self.is_lease_free();
        assert!(
            !must_take || leased != Leased::No,
            "nobody holds the lease, and it cannot be taken"
        );

        let until_ms = self.clock.now_ms() + LEASE_MS;
        match leased {
            Leased::No if needs_lease && !has_passed => self.lease_perhaps_until_ms = until_ms,
            Leased::No => {}
            _ if has_passed => (self.lease_until_ms, self.lease_perhaps_until_ms) = (0, 0),
            Leased::Held => (self.lease_until_ms, self.lease_perhaps_until_ms) = (until_ms, 0),
            Leased::Ending => (self.lease_until_ms, self.lease_perhaps_until_ms) = (0, until_ms),
        }
    }

    fn sign(&self, delivery: &Delivery, random: &mut StdRng) -> Signed {
        let on_its_way_s = match random.random_range(0..20) {
            0 => [299, 300, 301, 4000][random.random_range(0..4)],
            1..4 => random.random_range(0..200),
            _ => 0,
        };
        self.secrets.sign(
            &delivery.body,
            self.now_s() - on_its_way_s,
            self.clock.now_s(),
            random,
        )
    }

    fn trace_work(
        &self,
        work: &Work,
        is_whole: bool,
        answers: &[Option<Answer>],
        result: &Option<RunResult>,
    ) {
        if let Some(plan) = work.plan {
            let came_to = match result {
                Some(Ok(Some(report))) => format!(
                    "heals {}, {} differ",
                    report.healed.len(),
                    report.differing.len()
                ),
                Some(Ok(None)) => "finds the lease taken".to_owned(),
                Some(Err(error)) => format!("fails: {error}"),
                None => "does not come to its end".to_owned(),
            };
            self.trace_line(format!(
                "a pass ({:?}, {:?}, since {:?}) {came_to}",
                plan.extent, plan.mode, plan.since_s
            ));
        }

        for (delivery, answer) in work.deliveries.iter().zip(answers) {
            let answer = answer.as_ref().map_or("no answer".to_owned(), |answer| {
                format!(
                    "{} {}",
                    answer.status.as_u16(),
                    String::from_utf8_lossy(&answer.body)
                )
            });
            self.trace_line(format!("delivered: {}: {answer}", delivery.description));
        }

        match work.end {
            End::Crash(waits) if !is_whole => {
                self.trace_line(format!("the program crashes after {waits} waits"));
            }
            End::HangUp(waits) if !is_whole => {
                self.trace_line(format!("all of that is given up after {waits} waits"));
            }
            _ => {}
        }
    }

    fn take_answers(&mut self, work: &Work, signed: &[Signed], answers: Vec<Option<Answer>>) {
        let mut authentic = Vec::new();
        for ((delivery, signed), answer) in work.deliveries.iter().zip(signed).zip(answers) {
            let (is_authentic, status) = (
                !signed.labels.is_empty(),
                answer.as_ref().map(|answer| answer.status.as_u16()),
            );
            match (is_authentic, &answer, status) {
                (_, None, _) | (true, _, Some(200)) => {}
                (false, Some(answer), Some(400)) => assert_is_error(answer, "InvalidSignature"),
                (true, Some(answer), Some(503)) => {
                    assert!(!answer.header("retry-after").is_empty(), "{answer:?}");
                }
                _ => panic!(
                    "{} (authentic: {is_authentic}) is answered {answer:?}",
                    delivery.description
                ),
            }
            let is_acknowledged = status == Some(200);
            if is_authentic {
                authentic.push((
                    delivery.identity.clone(),
                    answer.filter(|_| is_acknowledged),
                ));
            }
            if !is_acknowledged {
                self.delivery.queued.push(delivery.clone());
            }
        }

        self.ledger.check_answers(&authentic, work.plan.is_none());
    }
}

/// Makes a run under the lease, as the program does.
async fn under_lease(replica: Replica, plan: Plan, leased: &Cell<Leased>) -> RunResult {
    let tools = replica.tools();
    if plan.mode == WriteMode::DryRun {
        return reconcile::run(&tools, plan).await.map(Some);
    }

    let Some(lease) = Lease::try_take(&tools.store, &tools.clock).await? else {
        return Ok(None);
    };
    leased.set(Leased::Held);
    let ended = reconcile::run(&tools, plan).await;
    leased.set(Leased::Ending);
    lease.release().await;
    ended.map(Some)
}

//! What happens at the same time: deliveries, and a pass beside them; to its end, or until the program crashes or the others give up.

use std::cell::{Cell, RefCell};

use futures_util::future::{join, join_all};
use rand::RngExt;
use rand::rngs::StdRng;
use stripe_reconciler::reconcile::{self, Lease, Plan, ReconcileError, Report, WriteMode};

use super::delivery::{Parcel, Signed};
use super::process::Replica;
use super::watch::Watch;
use super::world::{World, assert_is_error, quiet};
use testkit::Answer;

/// Without news from its holder, a lease lasts so long.
const LEASE_MS: i64 = 12_000;
/// One that lasts so much longer was taken by a clock that was wrong, and is none.
const CLOCKS_DIFFER_MS: i64 = 60_000;

/// How something that was begun ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Whole,
    /// After so many waits, the program crashes.
    Crash(usize),
    /// After so many waits, the others hang up, and a pass is given up.
    HangUp(usize),
}

pub struct Busy {
    pub parcels: Vec<Parcel>,
    pub plan: Option<Plan>,
    pub end: End,
    /// What is durable is looked at whenever a moment has come.
    pub is_watched: bool,
}

pub struct Done {
    /// It came to its end before anything could disturb it.
    pub is_whole: bool,
    pub report: Option<Report>,
}

/// How far a pass has come with its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leased {
    No,
    Held,
    /// It is being given back.
    Ending,
}

/// A pass that ended. None: another held the lease.
type Passed = Result<Option<Report>, ReconcileError>;

impl End {
    /// Most things come to their end; the others are left after a wait, few of them after many.
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

impl World {
    /// All at the same time, to its end or not. What is not acknowledged is under way again.
    pub fn make_busy(&mut self, busy: Busy, random: &mut StdRng) -> Done {
        let signed: Vec<Signed> = busy
            .parcels
            .iter()
            .map(|parcel| self.sign(parcel, random))
            .collect();
        for (parcel, signed) in busy
            .parcels
            .iter()
            .zip(&signed)
            .filter(|(_, signed)| !signed.labels.is_empty())
        {
            self.ledger
                .note_sent(&parcel.identity, &parcel.body, &signed.labels);
        }
        let answers: RefCell<Vec<Option<Answer>>> =
            RefCell::new(busy.parcels.iter().map(|_| None).collect());
        let mut deliveries = Vec::with_capacity(signed.len());
        for (n, (parcel, signed)) in busy.parcels.iter().zip(&signed).enumerate() {
            let (replica, answers) = (self.process().replica(random.random_range(0..2)), &answers);
            deliveries.push(async move {
                let answer = replica.deliver(&signed.header, parcel.body.clone()).await;
                answers.borrow_mut()[n] = Some(answer);
            });
        }
        let (passed, leased) = (RefCell::new(None), Cell::new(Leased::No));
        let replica = self.process().replica(random.random_range(0..2));
        let passing = async {
            if let Some(plan) = busy.plan {
                let ended = under_lease(replica, plan, &leased).await;
                *passed.borrow_mut() = Some(ended);
            }
        };

        if busy.plan.is_some() {
            self.invariants().begin_pass(&self.stripe);
        }
        if busy.is_watched {
            self.watch();
        }

        let ended = self
            .process()
            .run_until(busy.end.waits(), join(join_all(deliveries), passing));

        let (is_whole, answers, passed) =
            (ended.is_some(), answers.into_inner(), passed.into_inner());
        let seen = self.process().end_watch().map_or(Ok(()), Watch::end);
        self.invariants()
            .end_pass(busy.plan.is_some() && !is_whole && matches!(busy.end, End::HangUp(_)));
        self.tell(&busy, is_whole, &answers, &passed);
        seen.unwrap_or_else(|wrong| panic!("at some moment of that: {wrong}"));
        self.judge_lease(busy.plan, leased.get(), is_whole, passed.is_some());
        self.take_answers(&busy, &signed, answers);
        if !is_whole && matches!(busy.end, End::Crash(_)) {
            self.crash(random);
        }
        let was_logged = self.ledger.logged().len();
        self.check_log();
        let changes_nothing =
            busy.parcels.is_empty() && busy.plan.is_some_and(|plan| plan.mode == WriteMode::DryRun);
        let is_changed = self.ledger.logged().len() != was_logged;
        assert!(
            !changes_nothing || self.goes_on || !is_changed,
            "a dry run changes the log"
        );
        self.goes_on |= !is_whole && matches!(busy.end, End::HangUp(_));
        assert_eq!(self.stripe.faults(), [""; 0]);
        let report = passed
            .and_then(|passed| passed.unwrap_or_else(|error| panic!("a pass fails: {error}")));
        Done { is_whole, report }
    }

    /// A pass that nothing disturbs, and its report.
    pub fn quiet_pass(&mut self, plan: Plan) -> Report {
        if !self.is_lease_free() {
            self.later(LEASE_MS + CLOCKS_DIFFER_MS);
        }
        let done = self.make_busy(
            Busy {
                parcels: Vec::new(),
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
        left_ms <= 0 || left_ms > LEASE_MS + CLOCKS_DIFFER_MS
    }

    /// One that is dead holds its lease until that ends, and nobody after that. One that was left while it took it, or gave it back, holds
    /// it perhaps.
    fn judge_lease(
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

    fn sign(&self, parcel: &Parcel, random: &mut StdRng) -> Signed {
        let on_its_way_s = match random.random_range(0..20) {
            0 => [299, 300, 301, 4000][random.random_range(0..4)],
            1..4 => random.random_range(0..200),
            _ => 0,
        };
        self.secrets.sign(
            &parcel.body,
            self.now_s() - on_its_way_s,
            self.clock.now_s(),
            random,
        )
    }

    fn tell(
        &self,
        busy: &Busy,
        is_whole: bool,
        answers: &[Option<Answer>],
        passed: &Option<Passed>,
    ) {
        if let Some(plan) = busy.plan {
            let came_to = match passed {
                Some(Ok(Some(report))) => format!(
                    "heals {}, {} differ",
                    report.healed.len(),
                    report.differing.len()
                ),
                Some(Ok(None)) => "finds the lease taken".to_owned(),
                Some(Err(error)) => format!("fails: {error}"),
                None => "does not come to its end".to_owned(),
            };
            self.say(format!(
                "a pass ({:?}, {:?}, since {:?}) {came_to}",
                plan.extent, plan.mode, plan.since_s
            ));
        }
        for (parcel, answer) in busy.parcels.iter().zip(answers) {
            let answer = answer.as_ref().map_or("no answer".to_owned(), |answer| {
                format!(
                    "{} {}",
                    answer.status.as_u16(),
                    String::from_utf8_lossy(&answer.body)
                )
            });
            self.say(format!("delivered: {}: {answer}", parcel.told));
        }
        match busy.end {
            End::Crash(waits) if !is_whole => {
                self.say(format!("the program crashes after {waits} waits"))
            }
            End::HangUp(waits) if !is_whole => {
                self.say(format!("all of that is given up after {waits} waits"))
            }
            _ => {}
        }
    }

    fn take_answers(&mut self, busy: &Busy, signed: &[Signed], answers: Vec<Option<Answer>>) {
        let mut authentic = Vec::new();
        for ((parcel, signed), answer) in busy.parcels.iter().zip(signed).zip(answers) {
            let (is_authentic, status) = (
                !signed.labels.is_empty(),
                answer.as_ref().map(|answer| answer.status.as_u16()),
            );
            match (is_authentic, &answer, status) {
                (_, None, _) | (true, _, Some(200)) => {}
                (false, Some(answer), Some(400)) => assert_is_error(answer, "InvalidSignature"),
                (true, Some(answer), Some(503)) => {
                    assert!(!answer.header("retry-after").is_empty(), "{answer:?}")
                }
                _ => panic!(
                    "{} (authentic: {is_authentic}) is answered {answer:?}",
                    parcel.told
                ),
            }
            let is_acknowledged = status == Some(200);
            if is_authentic {
                authentic.push((parcel.identity.clone(), answer.filter(|_| is_acknowledged)));
            }
            if !is_acknowledged {
                self.delivery.under_way.push(parcel.clone());
            }
        }
        self.ledger.judge(&authentic, busy.plan.is_none());
    }
}

/// As the program makes its passes.
async fn under_lease(replica: Replica, plan: Plan, leased: &Cell<Leased>) -> Passed {
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

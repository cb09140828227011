//! One round on one engine: what the script says happens, to Stripe, to its deliveries and to the program, and after each step all is
//! checked that must always be true.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use futures_util::future::{join, join_all};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::api_key;
use stripe_reconciler::flows::reconcile::{self, Extent, Lease, Mode, Plan, ReconcileError, Report};
use stripe_reconciler::store::{ApiKey, Scope, Store};

use super::ledger::Ledger;
use super::lives::{Fact, Invoice, NEAR_S};
use super::process::{Process, Replica, Setup};
use super::script::{Script, Step, What};
use super::wire::{Parcel, Secrets, Signed, Wire};
use crate::stripe_fake::{DAY, HOUR, Stripe, Troubles};
use crate::support::{Answer, Database, Engine, assert_is_invoice, invoice_path};

pub const KEY: &str = "srk_simulated";
/// Deliveries at a time.
const AT_ONCE: usize = 8;
/// Without news from its holder, a lease lasts so long.
const LEASE_MS: i64 = 12_000;
/// One that lasts so much longer was taken by a clock that was wrong, and is none.
const CLOCKS_DIFFER_MS: i64 = 60_000;
/// Stripe's events are listed for thirty days; a round shall be over by then.
const LASTS_S: i64 = 24 * DAY;
/// A body may be so large.
const LARGEST: usize = 1 << 20;

/// What happened so far, in words; it outlives the round.
pub type Trace = Arc<Mutex<Vec<String>>>;

pub struct World {
    pub stripe: Stripe,
    pub invoices: Vec<Invoice>,
    pub stored: BTreeMap<String, Stored>,
    pub wire: Wire,
    pub ledger: Ledger,
    pub database: Database,
    /// The API has said less than it knew.
    pub has_lagged: bool,
    wanted: usize,
    start_s: i64,
    /// The right time.
    time: Clock,
    /// What the program believes.
    clock: Clock,
    skew_ms: i64,
    secrets: Secrets,
    process: Option<Process>,
    /// Until when somebody who is dead holds the lease, by the program's clock.
    lease_until_ms: i64,
    /// What was shown of each invoice when it was read last.
    shown: BTreeMap<String, Vec<(String, i64)>>,
    trace: Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Nobody heard an answer.
    Perhaps,
    Yes,
}

/// How something that was begun ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Whole,
    /// After so many waits, the program crashes.
    Crash(usize),
    /// After so many waits, the others hang up, and a pass is given up.
    HangUp(usize),
}

/// What happens at the same time.
struct Busy {
    parcels: Vec<Parcel>,
    plan: Option<Plan>,
    end: End,
}

impl World {
    pub fn new(engine: Engine, script: &Script, trace: Trace) -> World {
        let mut random = StdRng::seed_from_u64(script.seed);
        let start_s = 1_772_000_000 + random.random_range(0..DAY);
        let (time, clock) = (Clock::fixed(start_s * 1000), Clock::fixed(start_s * 1000));
        let stripe = Stripe::start_at(time.clone());
        let mut world = World {
            stripe,
            invoices: Vec::new(),
            stored: BTreeMap::new(),
            wire: Wire::default(),
            ledger: Ledger::default(),
            database: Database::create(engine),
            has_lagged: false,
            wanted: script.invoices,
            start_s,
            time,
            clock,
            skew_ms: 0,
            secrets: Secrets::new(),
            process: None,
            lease_until_ms: 0,
            shown: BTreeMap::new(),
            trace,
        };
        world.start(&mut random);
        let store = world.process().replica(0).store;
        world.process().run(make_key(&store));
        world
    }

    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("it is started again whenever it has ended")
    }

    pub fn say(&self, what: impl AsRef<str>) {
        let at = self.now_s() - self.start_s;
        let (days, rest) = (at / DAY, at % DAY);
        let line = format!("day {days:2} {:02}:{:02}:{:02}  {}", rest / HOUR, rest / 60 % 60, rest % 60, what.as_ref());
        self.trace.lock().unwrap().push(line);
    }

    fn now_s(&self) -> i64 {
        self.time.now_s()
    }

    pub fn later(&mut self, ms: i64) {
        self.time.set(self.time.now_ms() + ms);
        self.clock.set(self.time.now_ms() + self.skew_ms);
    }

    pub fn step(&mut self, step: Step) {
        let mut random = StdRng::seed_from_u64(step.seed);
        self.later(random.random_range(500..20_000));
        match step.what {
            What::Live => self.live(&mut random),
            What::Deliver => self.deliver(&mut random),
            What::Reconcile => self.reconcile(&mut random),
            What::Store => self.store(&mut random),
            What::Read => self.read_one(&mut random),
            What::Roll => {
                self.secrets.roll(self.now_s());
                self.say("Stripe makes a new secret; the old one ends in a day");
            }
            What::Configure => {
                self.secrets.configure(self.now_s(), &mut random);
                self.say(format!("the program is configured with {}", self.secrets.setting()));
                self.restart(&mut random);
            }
            What::JumpClock => self.jump_clock(&mut random),
            What::Forge => self.forge(&mut random),
            What::Garble => self.wire.garble(&mut random),
            What::Restart => self.restart(&mut random),
        }
    }

    fn live(&mut self, random: &mut StdRng) {
        let waits_s = match random.random_range(0..3) {
            0 => random.random_range(3..NEAR_S),
            1 => random.random_range(NEAR_S..HOUR),
            _ => random.random_range(HOUR..DAY),
        };
        if self.now_s() + waits_s > self.start_s + LASTS_S {
            return;
        }
        self.later(waits_s * 1000);
        let before = self.stripe.events().len();
        let begins = self.invoices.is_empty() || (self.invoices.len() < self.wanted && random.random_bool(0.4));
        if begins {
            let invoice = Invoice::begin(&self.stripe, self.invoices.len(), self.now_s(), random);
            self.say(format!("{} is drafted as {}", invoice.uid, invoice.life.id()));
            self.invoices.push(invoice);
        } else {
            let now = self.now_s();
            let invoice = random.random_range(0..self.invoices.len());
            let invoice = &mut self.invoices[invoice];
            let Some(told) = invoice.live(now, random) else { return };
            let told = format!("{} {told}", invoice.uid);
            self.say(told);
        }
        for (n, event) in self.stripe.events()[before..].iter().enumerate() {
            // Of a connected account nobody knows but by its events.
            let is_kept = begins && n == 0 && event.account.is_some();
            self.wire.post(event, is_kept, random);
        }
    }

    fn deliver(&mut self, random: &mut StdRng) {
        if self.wire.under_way.is_empty() {
            return;
        }
        let parcels = self.wire.take(random, AT_ONCE);
        let end = draw_end(random, 6);
        self.make_busy(Busy { parcels, plan: None, end }, random);
    }

    fn reconcile(&mut self, random: &mut StdRng) {
        let since_s = random.random_bool(0.1).then_some(30 * DAY);
        let extent = if since_s.is_some() || random.random_bool(0.6) { Extent::All } else { Extent::Due };
        let mode = if random.random_bool(0.1) { Mode::DryRun } else { Mode::Save };
        let troubles = match random.random_range(0..10) {
            0 => Troubles { rate_limited: 0.02, failing: 0.02, resets: 0.03, truncated: 0.03, ..Troubles::default() },
            1 | 2 => Troubles { lagging: 0.3, ..Troubles::default() },
            _ => Troubles::default(),
        };
        self.has_lagged |= troubles.lagging > 0.0;
        self.stripe.trouble(Troubles { seed: random.random(), ..troubles });
        let meanwhile = random.random_bool(0.4) && !self.wire.under_way.is_empty();
        let parcels = if meanwhile { self.wire.take(random, AT_ONCE) } else { Vec::new() };
        let end = draw_end(random, 200);
        self.make_busy(Busy { parcels, plan: Some(Plan { extent, mode, since_s }), end }, random);
        self.stripe.trouble(Troubles::default());
    }

    /// A pass that nothing disturbs, and its report.
    pub fn quiet_pass(&mut self, plan: Plan) -> Report {
        if !self.is_lease_free() {
            self.later(LEASE_MS + CLOCKS_DIFFER_MS);
        }
        let report =
            self.make_busy(Busy { parcels: Vec::new(), plan: Some(plan), end: End::Whole }, &mut StdRng::seed_from_u64(0));
        report.expect("nobody holds the lease")
    }

    /// All at the same time, to its end or not. What is not acknowledged is under way again.
    fn make_busy(&mut self, busy: Busy, random: &mut StdRng) -> Option<Report> {
        let signed: Vec<Signed> = busy.parcels.iter().map(|parcel| self.sign(parcel, random)).collect();
        for (parcel, signed) in busy.parcels.iter().zip(&signed).filter(|(_, signed)| !signed.labels.is_empty()) {
            self.ledger.note_sent(&parcel.identity, &parcel.body, &signed.labels);
        }
        let answers: RefCell<Vec<Option<Answer>>> = RefCell::new(busy.parcels.iter().map(|_| None).collect());
        let deliveries = busy.parcels.iter().zip(&signed).enumerate().map(|(n, (parcel, signed))| {
            let (replica, answers) = (self.process().replica(random.random_range(0..2)), &answers);
            async move {
                let answer = replica.deliver(&signed.header, parcel.body.clone()).await;
                answers.borrow_mut()[n] = Some(answer);
            }
        });
        let deliveries: Vec<_> = deliveries.collect();
        let (pass, took_lease) = (RefCell::new(None), Cell::new(false));
        let passing = async {
            if let Some(plan) = busy.plan {
                let ended = under_lease(self.process().replica(random.random_range(0..2)), plan, &took_lease).await;
                *pass.borrow_mut() = Some(ended);
            }
        };
        let waits = match busy.end {
            End::Whole => None,
            End::Crash(waits) | End::HangUp(waits) => Some(waits),
        };
        let ended = self.process().run_until(waits, join(join_all(deliveries), passing));
        let (answers, pass) = (answers.into_inner(), pass.into_inner());
        self.tell(&busy, ended.is_some(), &answers, &pass);
        let is_free = self.is_lease_free();
        let needs_lease = busy.plan.is_some_and(|plan| plan.mode == Mode::Save);
        assert!(!took_lease.get() || is_free, "a lease was taken that the dead holder still has");
        assert!(!needs_lease || took_lease.get() == is_free || ended.is_none(), "nobody holds the lease, and it cannot be taken");
        if took_lease.get() && pass.is_none() {
            self.lease_until_ms = self.clock.now_ms() + LEASE_MS;
        }
        let alone = busy.plan.is_none();
        self.take_answers(busy.parcels, &signed, answers, alone);
        if ended.is_none() && matches!(busy.end, End::Crash(_)) {
            self.crash(random);
        }
        let log = self.process().log();
        self.ledger.check(&log, &self.stripe);
        assert_eq!(self.stripe.faults(), [""; 0]);
        pass.and_then(|ended| ended.unwrap_or_else(|error| panic!("a pass fails: {error}")))
    }

    fn is_lease_free(&self) -> bool {
        let left_ms = self.lease_until_ms - self.clock.now_ms();
        left_ms <= 0 || left_ms > LEASE_MS + CLOCKS_DIFFER_MS
    }

    fn sign(&self, parcel: &Parcel, random: &mut StdRng) -> Signed {
        let on_its_way_s = match random.random_range(0..20) {
            0 => *[299, 300, 301, 4000].get(random.random_range(0..4)).expect("one of four"),
            1..4 => random.random_range(0..200),
            _ => 0,
        };
        self.secrets.sign(&parcel.body, self.now_s() - on_its_way_s, self.clock.now_s(), random)
    }

    fn tell(
        &self,
        busy: &Busy,
        is_whole: bool,
        answers: &[Option<Answer>],
        pass: &Option<Result<Option<Report>, ReconcileError>>,
    ) {
        if let Some(plan) = busy.plan {
            let came_to = match pass {
                Some(Ok(Some(report))) => format!("heals {}, {} differ", report.healed.len(), report.differing.len()),
                Some(Ok(None)) => "finds the lease taken".to_owned(),
                Some(Err(error)) => format!("fails: {error}"),
                None => "does not come to its end".to_owned(),
            };
            self.say(format!("a pass ({:?}, {:?}, since {:?}) {came_to}", plan.extent, plan.mode, plan.since_s));
        }
        for (parcel, answer) in busy.parcels.iter().zip(answers) {
            let answer = answer.as_ref().map_or("no answer".to_owned(), |answer| {
                format!("{} {}", answer.status.as_u16(), String::from_utf8_lossy(&answer.body))
            });
            self.say(format!("delivered: {}: {answer}", parcel.told));
        }
        match busy.end {
            End::Crash(waits) if !is_whole => self.say(format!("the program crashes after {waits} waits")),
            End::HangUp(waits) if !is_whole => self.say(format!("all of that is given up after {waits} waits")),
            _ => {}
        }
    }

    fn take_answers(&mut self, parcels: Vec<Parcel>, signed: &[Signed], answers: Vec<Option<Answer>>, alone: bool) {
        let mut authentic = Vec::new();
        for ((parcel, signed), answer) in parcels.into_iter().zip(signed).zip(answers) {
            let status = answer.as_ref().map(|answer| answer.status.as_u16());
            match (signed.labels.is_empty(), status) {
                (_, None) | (false, Some(200)) => {}
                (true, Some(400)) => assert_is_error(answer.as_ref().expect("it has a status"), "InvalidSignature"),
                (false, Some(503)) => assert!(!answer.as_ref().expect("it has a status").header("retry-after").is_empty()),
                (is_forged, _) => panic!("{} is not authentic: {is_forged}; it is answered {answer:?}", parcel.told),
            }
            let is_acknowledged = status == Some(200);
            if !signed.labels.is_empty() {
                authentic.push((parcel.identity.clone(), answer.filter(|_| is_acknowledged)));
            }
            if !is_acknowledged {
                self.wire.under_way.push(parcel);
            }
        }
        self.ledger.judge(&authentic, alone);
    }

    /// Somebody stores an invoice: for the first time, or as it is.
    fn store(&mut self, random: &mut StdRng) {
        if self.invoices.is_empty() {
            return;
        }
        let n = random.random_range(0..self.invoices.len());
        let end = draw_end(random, 6);
        self.store_invoice(n, end, random);
    }

    pub fn store_whole(&mut self, n: usize) {
        self.store_invoice(n, End::Whole, &mut StdRng::seed_from_u64(0));
    }

    fn store_invoice(&mut self, n: usize, end: End, random: &mut StdRng) {
        let (uid, document) = (self.invoices[n].uid.clone(), self.invoices[n].document());
        let waits = match end {
            End::Whole => None,
            End::Crash(waits) | End::HangUp(waits) => Some(waits),
        };
        let replica = self.process().replica(random.random_range(0..2));
        let answer = self.process().run_until(waits, async move { replica.put(&invoice_path(&uid), KEY, &document).await });
        let uid = self.invoices[n].uid.clone();
        let status = answer.as_ref().map(|answer| answer.status.as_u16());
        self.say(format!("{uid} is stored: {}", status.map_or("no answer".to_owned(), |status| status.to_string())));
        match (self.stored.get(&uid), status) {
            (None, Some(201)) | (Some(_), Some(200)) | (Some(Stored::Perhaps), Some(201)) => {
                self.stored.insert(uid, Stored::Yes);
            }
            (_, None) => {
                self.stored.entry(uid).or_insert(Stored::Perhaps);
                if matches!(end, End::Crash(_)) {
                    self.say("the program crashes");
                    self.crash(random);
                }
            }
            (stored, _) => panic!("{uid} ({stored:?}) is answered {answer:?}"),
        }
    }

    fn read_one(&mut self, random: &mut StdRng) {
        if !self.invoices.is_empty() {
            let n = random.random_range(0..self.invoices.len());
            self.read(n);
        }
    }

    /// What is shown of an invoice: never what is not true, and nothing goes away again.
    pub fn read(&mut self, n: usize) -> Option<Value> {
        let invoice = &self.invoices[n];
        let (uid, replica) = (invoice.uid.clone(), self.process().replica(n));
        let answer = self.process().run(async { replica.get(&invoice_path(&uid), KEY).await });
        match (self.stored.get(&uid), answer.status.as_u16()) {
            (Some(_), 200) => {}
            (None | Some(Stored::Perhaps), 404) => {
                assert_is_error(&answer, "ResourceNotFound");
                self.say(format!("{uid} is not there"));
                return None;
            }
            (stored, _) => panic!("{uid} ({stored:?}) is answered {answer:?}"),
        }
        let read = assert_is_invoice(std::str::from_utf8(&answer.body).unwrap());
        let states = read["status"]["states"].clone();
        let shown = entries(&states);
        self.say(format!("{uid} is shown as {}", in_words(&shown)));
        self.check_shown(n, &shown);
        self.shown.insert(uid, shown);
        Some(states)
    }

    fn check_shown(&self, n: usize, shown: &[(String, i64)]) {
        let invoice = &self.invoices[n];
        let truth = invoice.truth();
        let paid = truth.iter().find(|entry| entry.fact == Fact::Paid).map(|entry| entry.at);
        for (state, at) in shown {
            let is_true = truth.iter().any(|entry| entry.fact.state() == state && entry.at == *at);
            // Until it is known that it is all, a payment is a part; thin, what has nothing to collect is finalized.
            let is_not_all = state == "PaymentInProgress" && paid == Some(*at);
            let is_thin = state == "PaymentPending" && paid == Some(*at);
            assert!(is_true || is_not_all || is_thin, "{} was never {state} at {at}; the truth is {truth:?}", invoice.uid);
        }
        let stays = |state: &str, at: i64| {
            truth.iter().filter(|entry| entry.fact.state() == state && entry.at == at).any(|entry| match entry.fact {
                // They are told apart by what failed between them.
                Fact::ActionRequired(_) | Fact::InFlight(_) => false,
                // What is near may be taken for one, until all is known.
                Fact::Failed => truth.iter().all(|e| e.fact != Fact::Failed || e.at == at || (e.at - at).abs() > NEAR_S),
                _ => true,
            })
        };
        let before = self.shown.get(&invoice.uid).into_iter().flatten();
        let gone: Vec<_> = before.filter(|entry| !shown.contains(entry) && stays(&entry.0, entry.1)).collect();
        assert!(gone.is_empty(), "{}: no longer shown: {gone:?}; now {shown:?}", invoice.uid);
    }

    fn jump_clock(&mut self, random: &mut StdRng) {
        self.skew_ms = match random.random_range(0..10) {
            0..4 => 0,
            4..7 => random.random_range(-290_000..290_000),
            7 => random.random_range(-2 * HOUR..2 * HOUR) * 1000,
            8 => random.random_range(0..DAY) * 1000,
            _ => -random.random_range(0..DAY) * 1000,
        };
        self.say(format!("the program's clock is {} s from the right time", self.skew_ms / 1000));
        self.soon_pass();
    }

    pub fn set_clock_right(&mut self) {
        self.skew_ms = 0;
        self.soon_pass();
    }

    /// The worker makes a pass every few minutes: what an earlier clock was wrong about is soon seen.
    fn soon_pass(&mut self) {
        self.later(300_000);
        self.quiet_pass(Plan { extent: Extent::Due, mode: Mode::Save, since_s: None });
    }

    fn forge(&mut self, random: &mut StdRng) {
        let replica = self.process().replica(random.random_range(0..2));
        if random.random_bool(0.1) {
            let answer = self.process().run(replica.deliver("t=1,v1=00", vec![b' '; LARGEST + 1]));
            assert_is_error(&answer.with_status(413), "PayloadTooLarge");
            let answer = self.process().run(replica.send("GET", "/webhooks/stripe", &[], Vec::new())).with_status(405);
            assert_eq!(answer.header("allow"), "POST");
            return self.say("something is too large, and something not posted");
        }
        let events = self.stripe.events();
        if events.is_empty() {
            return;
        }
        let body = serde_json::to_vec(&events[random.random_range(0..events.len())].as_delivered()).unwrap();
        let (wrong, headers, body) = self.secrets.forge(body, self.clock.now_s(), random);
        let headers: Vec<(&str, &str)> = headers.iter().map(|value| ("stripe-signature", value.as_str())).collect();
        let answer = self.process().run(replica.send("POST", "/webhooks/stripe", &headers, body));
        self.say(format!("forged, with {wrong}: {}", answer.status));
        assert_is_error(&answer.with_status(400), "InvalidSignature");
        let log = self.process().log();
        self.ledger.check(&log, &self.stripe);
    }

    fn start(&mut self, random: &mut StdRng) {
        let setup = Setup {
            database_url: &self.database.url,
            clock: &self.clock,
            secrets: &self.secrets.setting(),
            stripe_base: &self.stripe.base,
            replicas: if random.random_bool(0.3) { 2 } else { 1 },
        };
        self.process = Some(Process::start(&setup));
    }

    pub fn restart(&mut self, random: &mut StdRng) {
        self.process.take().expect("it runs").stop();
        self.ledger.note_end();
        self.say("the program is stopped, and started again");
        self.start(random);
    }

    /// All secrets of Stripe's are known to it from now on.
    pub fn configure(&mut self) {
        let mut random = StdRng::seed_from_u64(0);
        self.secrets.configure(self.now_s(), &mut random);
        self.restart(&mut random);
    }

    fn crash(&mut self, random: &mut StdRng) {
        self.process.take().expect("it runs").crash(&self.database);
        self.ledger.note_end();
        self.start(random);
    }

    /// Whatever is still under way arrives.
    pub fn deliver_the_rest(&mut self) {
        let mut random = StdRng::seed_from_u64(1);
        while !self.wire.under_way.is_empty() {
            let parcels = self.wire.take(&mut random, AT_ONCE);
            self.make_busy(Busy { parcels, plan: None, end: End::Whole }, &mut random);
        }
    }

    /// The accounts of which something is in the log.
    pub fn accounts_logged(&self) -> BTreeSet<String> {
        let log = self.process().log();
        let bodies = log.iter().filter_map(|row| serde_json::from_slice::<Value>(row.body.as_ref()?).ok());
        bodies.filter_map(|event| event["account"].as_str().map(str::to_owned)).collect()
    }
}

pub async fn make_key(store: &Store) {
    let key =
        ApiKey { id: "key_simulated".to_owned(), scope: Scope::Operator, created_ms: 0, expires_ms: None, revoked_ms: None };
    store.insert_key(&key, &api_key::hash(KEY.as_bytes())).await.unwrap();
}

/// Most things come to their end; the others are left after a wait, few of them after many.
fn draw_end(random: &mut StdRng, most: usize) -> End {
    let waits = |random: &mut StdRng| {
        let most = [most, most / 2, most / 5][random.random_range(0..3)].max(2);
        random.random_range(0..most)
    };
    match random.random_range(0..10) {
        0 | 1 => End::Crash(waits(random)),
        2 => End::HangUp(waits(random)),
        _ => End::Whole,
    }
}

/// As the program makes its passes. None: another holds the lease.
async fn under_lease(replica: Replica, plan: Plan, took_lease: &Cell<bool>) -> Result<Option<Report>, ReconcileError> {
    let tools = replica.tools();
    if plan.mode == Mode::DryRun {
        return reconcile::run(&tools, plan).await.map(Some);
    }
    let Some(lease) = Lease::try_take(&tools.store, &tools.clock).await? else { return Ok(None) };
    took_lease.set(true);
    let ended = reconcile::run(&tools, plan).await;
    lease.release().await;
    ended.map(Some)
}

fn assert_is_error(answer: &Answer, code: &str) {
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    assert!(body["code"] == code && body["ref"] == answer.header("x-request-id"), "{answer:?}");
}

/// State and second of each entry.
pub fn entries(states: &Value) -> Vec<(String, i64)> {
    let entry = |state: &Value| {
        let time: jiff::Timestamp = state["timestamp"].as_str().unwrap().parse().unwrap();
        assert_eq!(time.as_millisecond() % 1000, 0, "{state}");
        (state["state"].as_str().unwrap().to_owned(), time.as_second())
    };
    states.as_array().expect("states are always there").iter().map(entry).collect()
}

fn in_words(shown: &[(String, i64)]) -> String {
    let told: Vec<String> = shown.iter().map(|(state, at)| format!("{state} {at}")).collect();
    format!("[{}]", told.join(", "))
}

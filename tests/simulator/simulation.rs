//! One round on one engine: executes the script's steps on Stripe, its deliveries and the program,
//! and checks all invariants after each step.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::api_key;
use stripe_reconciler::reconcile::{Extent, Plan, WriteMode};
use stripe_reconciler::store::{ApiKey, Scope, Store};

use super::delivery::{Deliveries, Secrets};
use super::durable::Invariants;
use super::invoice_lifecycle::{Invoice, NEAR_S};
use super::ledger::Ledger;
use super::process::{Process, Setup};
use super::reading::Reads;
use super::script::{Action, Script, Step};
use super::work::{End, Work};
use testkit::stripe::{DAY, Faults, HOUR, Stripe};
use testkit::{Answer, Database, Engine, invoice_path};

pub const KEY: &str = "srk_simulated";
/// Concurrent deliveries.
pub const CONCURRENT: usize = 8;
/// Maximum duration of a round in seconds. Stripe lists events for thirty days.
const MAX_DURATION_S: i64 = 24 * DAY;
/// Maximum size of a body in bytes.
const MAX_BODY_BYTES: usize = 1 << 20;

/// Descriptions of the steps so far. Outlives the round.
pub type Trace = Arc<Mutex<Vec<String>>>;

pub struct Simulation {
    pub stripe: Stripe,
    pub invoices: Vec<Invoice>,
    pub stored: BTreeMap<String, Stored>,
    pub delivery: Deliveries,
    pub secrets: Secrets,
    pub ledger: Ledger,
    pub invariants: Arc<Mutex<Invariants>>,
    pub reads: Reads,
    /// The program's clock.
    pub clock: Clock,
    /// End of a dead process's lease, in Unix milliseconds by that clock.
    pub lease_until_ms: i64,
    /// End of a lease that a dead process may hold.
    pub lease_perhaps_until_ms: i64,
    /// Whether the API has omitted something.
    pub has_lagged: bool,
    wanted: usize,
    pub all_is_watched: bool,
    start_s: i64,
    /// The correct time.
    time: Clock,
    skew_ms: i64,
    pub database: Database,
    process: Option<Process>,
    trace: Trace,
    /// Whether an abandoned statement may still be executed by the running program.
    pub may_still_write: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// The answer was lost.
    Perhaps,
    Yes,
}

/// Returns a generator for steps without randomness.
pub fn quiet() -> StdRng {
    StdRng::seed_from_u64(0)
}

/// Creates a database in memory where possible: no test cuts the power, and a disk only takes time.
pub fn database(engine: Engine) -> Database {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        // Only the first call has an effect, and all pass the same folder.
        let _ = tempfile::env::override_temp_dir(memory);
    }
    Database::create(engine)
}

impl Simulation {
    pub fn new(engine: Engine, script: &Script, trace: Trace) -> Simulation {
        let mut random = StdRng::seed_from_u64(script.seed);
        let start_s = 1_772_000_000 + random.random_range(0..DAY);
        let (time, clock) = (Clock::fixed(start_s * 1000), Clock::fixed(start_s * 1000));
        let mut simulation = Simulation {
            stripe: Stripe::start_at(time.clone()),
            invoices: Vec::new(),
            stored: BTreeMap::new(),
            delivery: Deliveries::default(),
            secrets: Secrets::new(),
            ledger: Ledger::default(),
            invariants: Arc::default(),
            reads: Reads::default(),
            clock,
            lease_until_ms: 0,
            lease_perhaps_until_ms: 0,
            has_lagged: false,
            wanted: script.invoices,
            all_is_watched: script.is_watched,
            start_s,
            time,
            skew_ms: 0,
            database: database(engine),
            process: None,
            trace,
            may_still_write: false,
        };

        simulation.start(&mut random);
        let store = simulation.process().replica(0).store;
        simulation.process().run(make_key(&store));
        simulation
    }

    pub fn process(&self) -> &Process {
        self.process
            .as_ref()
            .expect("it is started again whenever it has ended")
    }

    pub fn trace_line(&self, action: impl AsRef<str>) {
        let at = self.now_s() - self.start_s;
        let (days, rest) = (at / DAY, at % DAY);
        let line = format!(
            "day {days:2} {:02}:{:02}:{:02}  {}",
            rest / HOUR,
            rest / 60 % 60,
            rest % 60,
            action.as_ref()
        );
        self.trace.lock().unwrap().push(line);
    }

    pub fn now_s(&self) -> i64 {
        self.time.now_s()
    }

    pub fn later(&mut self, ms: i64) {
        self.time.set(self.time.now_ms() + ms);
        self.clock.set(self.time.now_ms() + self.skew_ms);
    }

    pub fn step(&mut self, step: Step) {
        let mut random = StdRng::seed_from_u64(step.seed);
        self.later(random.random_range(500..20_000));

        match step.action {
            Action::Live => self.live(&mut random),
            Action::Deliver => self.deliver(&mut random),
            Action::Reconcile => self.reconcile(&mut random),
            Action::Store => self.store(&mut random),
            Action::Read => self.read_one(&mut random),
            Action::Roll => {
                self.secrets.roll(self.now_s());
                self.trace_line("Stripe makes a new secret; the old one ends in a day");
            }
            Action::Configure => self.configure(&mut random),
            Action::JumpClock => self.jump_clock(&mut random),
            Action::Forge => self.forge(&mut random),
            Action::Garble => self.delivery.garble(&mut random),
            Action::Restart => self.restart(&mut random),
        }
    }

    pub fn live(&mut self, random: &mut StdRng) {
        let waits_s = match random.random_range(0..3) {
            0 => random.random_range(3..NEAR_S),
            1 => random.random_range(NEAR_S..HOUR),
            _ => random.random_range(HOUR..DAY),
        };
        if self.now_s() + waits_s > self.start_s + MAX_DURATION_S {
            return;
        }

        self.later(waits_s * 1000);
        let before = self.stripe.events().len();
        let begins = self.invoices.is_empty()
            || (self.invoices.len() < self.wanted && random.random_bool(0.4));

        if begins {
            let invoice = Invoice::begin(&self.stripe, self.invoices.len(), self.now_s(), random);
            self.trace_line(format!(
                "{} is drafted as {}",
                invoice.uid,
                invoice.life.id()
            ));
            self.invoices.push(invoice);
        } else {
            let (now, n) = (self.now_s(), random.random_range(0..self.invoices.len()));
            let Some(description) = self.invoices[n].live(now, random) else {
                return;
            };
            self.trace_line(format!("{} {description}", self.invoices[n].uid));
        }

        for (n, event) in self.stripe.events()[before..]
            .iter()
            .enumerate()
            .filter(|(_, event)| event.generated)
        {
            // Only its events reveal a connected account.
            let is_required = begins && n == 0 && event.account.is_some();
            self.delivery.post(event, is_required, random);
        }
    }

    fn deliver(&mut self, random: &mut StdRng) {
        if !self.delivery.queued.is_empty() {
            let (deliveries, end, is_watched) = (
                self.delivery.take(random, CONCURRENT),
                End::draw(random, 6),
                self.is_watched(random),
            );
            self.run_concurrently(
                Work {
                    deliveries,
                    plan: None,
                    end,
                    is_watched,
                },
                random,
            );
        }
    }

    fn reconcile(&mut self, random: &mut StdRng) {
        let since_s = random.random_bool(0.1).then_some(30 * DAY);
        let extent = if since_s.is_some() || random.random_bool(0.6) {
            Extent::All
        } else {
            Extent::Due
        };
        let mode = if random.random_bool(0.1) {
            WriteMode::DryRun
        } else {
            WriteMode::Save
        };
        let faults = match random.random_range(0..10) {
            0 => Faults {
                rate_limited: 0.02,
                failing: 0.02,
                resets: 0.03,
                truncated: 0.03,
                ..Faults::default()
            },
            1 | 2 => Faults {
                lagging: 0.3,
                ..Faults::default()
            },
            _ => Faults::default(),
        };

        self.has_lagged |= faults.lagging > 0.0;
        self.stripe.set_faults(Faults {
            seed: random.random(),
            ..faults
        });
        let meanwhile = random.random_bool(0.4) && !self.delivery.queued.is_empty();
        let deliveries = if meanwhile {
            self.delivery.take(random, CONCURRENT)
        } else {
            Vec::new()
        };
        let (end, is_watched) = (End::draw(random, 200), self.is_watched(random));

        self.run_concurrently(
            Work {
                deliveries,
                plan: Some(Plan {
                    extent,
                    mode,
                    since_s,
                }),
                end,
                is_watched,
            },
            random,
        );
        self.stripe.set_faults(Faults::default());
    }

    /// Stores an invoice for the first time or replaces it unchanged.
    fn store(&mut self, random: &mut StdRng) {
        if !self.invoices.is_empty() {
            let (n, end) = (
                random.random_range(0..self.invoices.len()),
                End::draw(random, 6),
            );
            self.store_invoice(n, end, random);
        }
    }

    pub fn store_invoice(&mut self, n: usize, end: End, random: &mut StdRng) {
        let (uid, document) = (self.invoices[n].uid.clone(), self.invoices[n].document());
        let (replica, path) = (
            self.process().replica(random.random_range(0..2)),
            invoice_path(&uid),
        );
        let answer = self.process().run_until(end.waits(), async move {
            replica.put(&path, KEY, &document).await
        });
        let status = answer.as_ref().map(|answer| answer.status.as_u16());

        self.trace_line(format!(
            "{uid} is stored: {}",
            status.map_or("no answer".to_owned(), |status| status.to_string())
        ));
        match (self.stored.get(&uid), status) {
            (None | Some(Stored::Perhaps), Some(201)) | (Some(_), Some(200)) => {
                let _ = self.stored.insert(uid, Stored::Yes);
            }
            (_, None) => drop(self.stored.entry(uid).or_insert(Stored::Perhaps)),
            (stored, _) => panic!("{uid} ({stored:?}) is answered {answer:?}"),
        }

        if status.is_none() && matches!(end, End::Crash(_)) {
            self.trace_line("the program crashes");
            self.crash(random);
        }
    }

    fn read_one(&mut self, random: &mut StdRng) {
        if !self.invoices.is_empty() {
            let n = random.random_range(0..self.invoices.len());
            self.read(n);
        }
    }

    fn jump_clock(&mut self, random: &mut StdRng) {
        self.skew_ms = match random.random_range(0..10) {
            0..4 => 0,
            4..7 => random.random_range(-290_000..290_000),
            7 => random.random_range(-2 * HOUR..2 * HOUR) * 1000,
            8 => random.random_range(0..DAY) * 1000,
            _ => -random.random_range(0..DAY) * 1000,
        };
        self.trace_line(format!(
            "the program's clock is {} s from the right time",
            self.skew_ms / 1000
        ));
        self.run_soon();
    }

    pub fn set_clock_right(&mut self) {
        self.skew_ms = 0;
        self.trace_line("the program's clock is right");
        self.run_soon();
    }

    /// Makes a run soon: with runs every few minutes, errors from an earlier clock are found early.
    fn run_soon(&mut self) {
        self.later(300_000);
        self.quiet_run(Plan {
            extent: Extent::Due,
            mode: WriteMode::Save,
            since_s: None,
        });
    }

    fn forge(&mut self, random: &mut StdRng) {
        let replica = self.process().replica(random.random_range(0..2));
        if random.random_bool(0.1) {
            let answer = self
                .process()
                .run(replica.deliver("t=1,v1=00", vec![b' '; MAX_BODY_BYTES + 1]));
            assert_is_error(&answer.with_status(413), "PayloadTooLarge");
            let answer = self
                .process()
                .run(replica.send("GET", "/webhooks/stripe", &[], Vec::new()))
                .with_status(405);
            assert_eq!(answer.header("allow"), "POST");
            return self.trace_line("something is too large, and something not posted");
        }

        let events = self.stripe.events();
        if events.is_empty() {
            return;
        }

        let body = serde_json::to_vec(&events[random.random_range(0..events.len())].as_delivered())
            .unwrap();
        let (wrong, headers, body) = self.secrets.forge(body, self.clock.now_s(), random);
        let headers: Vec<(&str, &str)> = headers
            .iter()
            .map(|value| ("stripe-signature", value.as_str()))
            .collect();
        let answer = self
            .process()
            .run(replica.send("POST", "/webhooks/stripe", &headers, body));
        self.trace_line(format!("forged, with {wrong}: {}", answer.status));

        assert_is_error(&answer.with_status(400), "InvalidSignature");

        self.check_log();
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
        self.may_still_write = false;
    }

    fn restart(&mut self, random: &mut StdRng) {
        self.process.take().expect("it runs").stop();
        self.trace_line("the program is stopped, and started again");
        self.start_recovered(random);
    }

    pub fn crash(&mut self, random: &mut StdRng) {
        self.process.take().expect("it runs").crash(&self.database);
        self.start_recovered(random);
    }

    fn start_recovered(&mut self, random: &mut StdRng) {
        self.start(random);
        self.check_log();
        self.ledger.record_end();
    }

    /// Configures the program with all secrets of Stripe.
    pub fn configure(&mut self, random: &mut StdRng) {
        self.secrets.configure(self.now_s(), random);
        self.trace_line(format!(
            "the program is configured with {}",
            self.secrets.setting()
        ));
        self.restart(random);
    }

    /// Delivers everything that is still queued.
    pub fn deliver_the_rest(&mut self) {
        let mut random = quiet();
        while !self.delivery.queued.is_empty() {
            let deliveries = self.delivery.take(&mut random, CONCURRENT);
            self.run_concurrently(
                Work {
                    deliveries,
                    plan: None,
                    end: End::Whole,
                    is_watched: false,
                },
                &mut random,
            );
            self.later(1000);
        }
    }

    /// Returns the accounts with events in the log.
    pub fn accounts_logged(&self) -> BTreeSet<String> {
        let log = self.process().durable().log;
        let bodies = log
            .iter()
            .filter_map(|row| serde_json::from_slice::<Value>(row.body.as_ref()?).ok());
        bodies
            .filter_map(|event| event["account"].as_str().map(str::to_owned))
            .collect()
    }
}

pub async fn make_key(store: &Store) {
    let key = ApiKey {
        id: "key_simulated".to_owned(),
        scope: Scope::Operator,
        created_ms: 0,
        expires_ms: None,
        revoked_ms: None,
    };

    store
        .insert_key(&key, &api_key::hash(KEY.as_bytes()))
        .await
        .unwrap();
}

pub fn assert_is_error(answer: &Answer, code: &str) {
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    assert!(
        body["code"] == code && body["ref"] == answer.header("x-request-id"),
        "{answer:?}"
    );
}

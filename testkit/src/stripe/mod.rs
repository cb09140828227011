//! Stripe, stood in for by a server of our own with a state of its own: accounts, invoices and what they are paid with, the events that
//! tell of it, an API that answers as Stripe's does, and troubles that can be switched on.
//!
//! It shares no line with the program: what it shows is written from Stripe's documentation. Whatever asks it in a way that Stripe would
//! refuse, or that a reader has no business with, is refused, and remembered as a fault.
//!
//! `objects` is what there is, `life` what happens, `api` what is answered, `wire` how that goes wrong, `delivery` the webhooks.

mod api;
mod delivery;
mod life;
mod objects;
pub mod story;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use tokio::sync::oneshot;

pub use delivery::{Deliveries, deliver_one};
pub use life::{DAY, HOUR, Life, Terms};
pub use objects::{BASIL, CLOVER, ENDIVE, OLD, Object};
pub use wire::Troubles;

pub const LIVE_KEY: &str = "sk_live_fake_1234567890";
/// As good as the first, as all that begin so: to tell apart who asks.
pub const OTHER_KEY: &str = "rk_live_fake_1234567890";
pub const TEST_KEY: &str = "sk_test_fake_1234567890";

/// Cheap to clone; clones are the same Stripe. It is gone with the last one.
#[derive(Clone)]
pub struct Stripe {
    /// `http://127.0.0.1:PORT`
    pub base: String,
    state: Arc<Mutex<State>>,
    _running: Arc<Running>,
}

/// Ends the server's thread when it is dropped.
struct Running(Option<oneshot::Sender<()>>);

struct State {
    clock: Clock,
    objects: BTreeMap<String, Kept>,
    events: Vec<Event>,
    endpoints: Vec<Endpoint>,
    serial: usize,
    troubles: Troubles,
    calls: Vec<Call>,
    connections: usize,
    faults: BTreeSet<String>,
    /// Nothing is answered.
    held: bool,
    /// How often in a row each URL was answered badly.
    in_a_row: BTreeMap<String, usize>,
}

struct Kept {
    object: Object,
    /// As it was until it last changed.
    before: Option<Object>,
    account: Option<&'static str>,
    livemode: bool,
    order: u32,
}

#[derive(Clone)]
pub struct Event {
    pub id: String,
    /// Among those of the same second.
    order: u32,
    pub kind: &'static str,
    pub created: i64,
    pub account: Option<&'static str>,
    livemode: bool,
    listed: &'static str,
    delivered: &'static str,
    object: Object,
    previous: Option<Value>,
    /// Stripe sometimes fails to: then nobody ever hears of it.
    pub generated: bool,
}

/// A registered webhook endpoint.
#[derive(Clone)]
pub struct Endpoint {
    pub url: String,
    pub status: &'static str,
    pub enabled_events: Vec<&'static str>,
}

/// One call of the API.
#[derive(Clone, Debug)]
pub struct Call {
    pub at_ms: i64,
    pub key: String,
    /// The path, `*` for each id.
    pub endpoint: String,
    /// Path, query and account.
    pub url: String,
    /// None: no whole answer was given.
    pub status: Option<u16>,
}

impl Stripe {
    pub fn start() -> Stripe {
        Stripe::start_at(Clock::system())
    }

    /// A Stripe whose time is this.
    pub fn start_at(clock: Clock) -> Stripe {
        let state = Arc::new(Mutex::new(State::new(clock)));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (ended, end) = oneshot::channel();
        let served = state.clone();
        // A thread of its own: it answers also while a test waits for a command to end.
        std::thread::spawn(move || wire::serve(listener, served, end));
        Stripe {
            base,
            state,
            _running: Arc::new(Running(Some(ended))),
        }
    }

    /// The program's settings for it.
    pub fn settings(&self) -> [(&str, &str); 2] {
        [
            ("STRIPE_API_KEY", LIVE_KEY),
            ("STRIPE_API_BASE", &self.base),
        ]
    }

    /// An invoice's life, from its draft on.
    pub fn draft(&self, terms: Terms) -> Life {
        Life::begin(self, terms, &[])
    }

    pub fn register(&self, endpoint: Endpoint) {
        self.state().endpoints.push(endpoint);
    }

    pub fn trouble(&self, troubles: Troubles) {
        self.state().troubles = troubles;
    }

    /// From now on, Stripe takes every call, and answers none until it is released.
    pub fn hold(&self) {
        self.state().held = true;
    }

    pub fn release(&self) {
        self.state().held = false;
    }

    pub fn events(&self) -> Vec<Event> {
        self.state().events.clone()
    }

    /// Those that its API lists now.
    #[allow(dead_code, reason = "only the simulator asks")]
    pub fn listed(&self) -> Vec<Event> {
        let state = self.state();
        state
            .events
            .iter()
            .filter(|event| state.is_shown(event))
            .cloned()
            .collect()
    }

    pub fn calls(&self) -> Vec<Call> {
        self.state().calls.clone()
    }

    pub fn forget_calls(&self) {
        let mut state = self.state();
        state.calls.clear();
        state.connections = 0;
    }

    pub fn connections(&self) -> usize {
        self.state().connections
    }

    /// Whether it has an object of this id.
    pub fn has(&self, id: &str) -> bool {
        self.state().objects.contains_key(id)
    }

    /// What was asked that nobody may ask.
    pub fn faults(&self) -> Vec<String> {
        self.state().faults.iter().cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn next_serial(&self) -> usize {
        let mut state = self.state();
        state.serial += 1;
        state.serial
    }

    fn put(&self, object: Object, terms: &Terms) {
        let mut state = self.state();
        let order = scrambled(state.objects.len());
        let (account, livemode, id) = (terms.account, terms.livemode, object.id().to_owned());
        let kept = match state.objects.remove(&id) {
            Some(kept) => Kept {
                before: Some(kept.object),
                object,
                ..kept
            },
            None => Kept {
                object,
                before: None,
                account,
                livemode,
                order,
            },
        };
        state.objects.insert(id, kept);
    }

    fn emit(&self, event: Event) {
        let mut state = self.state();
        let order = scrambled(state.events.len());
        let origin =
            if event.kind.starts_with("payment_intent.") || event.kind.starts_with("charge.") {
                3
            } else {
                1
            };
        let id = format!("evt_{origin}F{order:08x}{:x}", state.events.len());
        state.events.push(Event { id, order, ..event });
    }
}

impl State {
    fn new(clock: Clock) -> State {
        State {
            clock,
            objects: BTreeMap::new(),
            events: Vec::new(),
            endpoints: Vec::new(),
            serial: 0,
            troubles: Troubles::default(),
            calls: Vec::new(),
            connections: 0,
            faults: BTreeSet::new(),
            held: false,
            in_a_row: BTreeMap::new(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The thread may have ended already.
        let _ = self.0.take().map(|ended| ended.send(()));
    }
}

impl Event {
    /// As the API lists it.
    pub fn as_listed(&self) -> Value {
        self.render(self.listed)
    }

    /// As the webhook endpoint gets it.
    pub fn as_delivered(&self) -> Value {
        self.render(self.delivered)
    }

    pub fn render(&self, version: &str) -> Value {
        let mut event = json!({"id": self.id, "object": "event", "api_version": version, "created": self.created,
            "data": {"object": self.object.render(version)}, "livemode": self.livemode, "pending_webhooks": 1,
            "request": {"id": null, "idempotency_key": null}, "type": self.kind});
        if let Some(previous) = &self.previous {
            event["data"]["previous_attributes"] = previous.clone();
        }
        if let Some(account) = self.account {
            event["account"] = json!(account);
        }
        event
    }

    /// Its thin twin.
    pub fn as_thin(&self) -> Value {
        let (kind, id) = (self.object.name(), self.object.id());
        json!({"id": self.thin_id(), "object": "v2.core.event", "type": format!("v1.{}", self.kind), "livemode": self.livemode,
            "created": format!("{}.413268975Z", written(self.created)), "context": self.account, "reason": null,
            "related_object": {"id": id, "type": kind, "url": format!("/v1/{kind}s/{id}")}, "snapshot_event": self.id})
    }

    pub fn thin_id(&self) -> String {
        self.id.replace("evt_", "evt_test_65")
    }

    /// The id of the object inside.
    pub fn object_id(&self) -> &str {
        self.object.id()
    }
}

impl Endpoint {
    /// One that gets all there is.
    pub fn enabled(url: &str) -> Endpoint {
        Endpoint {
            url: url.to_owned(),
            status: "enabled",
            enabled_events: vec!["*"],
        }
    }
}

pub fn now_s() -> i64 {
    Clock::system().now_s()
}

/// `2026-01-31T09:00:00`
fn written(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds)
        .unwrap()
        .to_string()
        .trim_end_matches('Z')
        .to_owned()
}

/// Numbers in an order that says nothing.
fn scrambled(serial: usize) -> u32 {
    (serial as u32).wrapping_add(1).wrapping_mul(2_654_435_761)
}

/// From 0 to 1, the same for the same things.
fn chance(seed: u64, of: &impl Hash) -> f64 {
    let mut hasher = DefaultHasher::new();
    (seed, of).hash(&mut hasher);
    (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
}

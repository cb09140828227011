//! A fake Stripe: a real HTTP server with its own state, which consists of accounts, invoices,
//! their payments and events, with an API that answers like Stripe's and faults that tests switch
//! on.
//!
//! It shares no code with the program: it was written from Stripe's documentation. It rejects calls
//! that Stripe would reject or that a reader has no reason to make, and records them as violations.
//!
//! `objects` renders the objects, `life` changes them, `api` answers calls, `wire` makes answers
//! fail and `delivery` sends webhooks.

mod api;
mod delivery;
mod life;
mod objects;
mod server;
pub mod story;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use tokio::sync::oneshot;

pub use delivery::{Deliveries, deliver_one};
pub use life::{DAY, HOUR, Life, Terms};
pub use objects::{BASIL, CLOVER, ENDIVE, OLD, Object};
pub use server::Faults;

pub const LIVE_KEY: &str = "sk_live_fake_1234567890";
/// A second valid key, which tells callers apart.
pub const OTHER_KEY: &str = "rk_live_fake_1234567890";
pub const TEST_KEY: &str = "sk_test_fake_1234567890";

/// A running fake. Clones share its state, and it ends with the last one.
#[derive(Clone)]
pub struct Stripe {
    /// `http://127.0.0.1:PORT`
    pub base: String,
    state: Arc<Mutex<State>>,
    _running: Arc<Running>,
}

/// Handle of the server's thread. Dropping it ends the thread.
struct Running(Option<oneshot::Sender<()>>);

struct State {
    clock: Clock,
    objects: BTreeMap<String, StoredObject>,
    events: Vec<Event>,
    endpoints: Vec<Endpoint>,
    serial: usize,
    faults: Faults,
    calls: Vec<Call>,
    connections: usize,
    violations: BTreeSet<String>,
    /// Whether all answers are held back.
    is_held: bool,
    /// Number of consecutive failed answers per URL.
    consecutive_failures: BTreeMap<String, usize>,
}

struct StoredObject {
    object: Object,
    /// State before the last change.
    before: Option<Object>,
    account: Option<&'static str>,
    livemode: bool,
    order: u32,
}

#[derive(Clone)]
pub struct Event {
    pub id: String,
    /// Order among events of the same second.
    order: u32,
    pub kind: &'static str,
    pub created: i64,
    pub account: Option<&'static str>,
    livemode: bool,
    listed: &'static str,
    delivered: &'static str,
    object: Object,
    previous: Option<Value>,
    /// Whether Stripe generated the event.
    ///
    /// It sometimes fails to, and then no API call or webhook shows it.
    pub generated: bool,
}

/// A registered webhook endpoint.
#[derive(Clone)]
pub struct Endpoint {
    pub url: String,
    pub status: &'static str,
    pub enabled_events: Vec<&'static str>,
}

/// A recorded call of the API.
#[derive(Clone, Debug)]
pub struct Call {
    pub at_ms: i64,
    pub key: String,
    /// Path with `*` for each id.
    pub endpoint: String,
    /// Path, query and account.
    pub url: String,
    /// Status of the answer. `None` if no complete answer was sent.
    pub status: Option<u16>,
}

impl Stripe {
    pub fn start() -> Stripe {
        Stripe::start_at(Clock::system())
    }

    /// Starts a fake with this clock.
    pub fn start_at(clock: Clock) -> Stripe {
        let state = Arc::new(Mutex::new(State::new(clock)));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (ended, end) = oneshot::channel();
        let served = state.clone();

        // On its own thread: it answers while a test blocks on a command.
        std::thread::spawn(move || server::serve(listener, served, end));
        Stripe {
            base,
            state,
            _running: Arc::new(Running(Some(ended))),
        }
    }

    /// Returns the program's settings for this fake.
    pub fn settings(&self) -> [(&str, &str); 2] {
        [
            ("STRIPE_API_KEY", LIVE_KEY),
            ("STRIPE_API_BASE", &self.base),
        ]
    }

    /// Starts the life of an invoice with its draft.
    pub fn draft(&self, terms: Terms) -> Life {
        Life::begin(self, terms, &[])
    }

    pub fn register(&self, endpoint: Endpoint) {
        self.state().endpoints.push(endpoint);
    }

    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// Accepts every call from now on and answers none until it is released.
    pub fn hold(&self) {
        self.state().is_held = true;
    }

    pub fn release(&self) {
        self.state().is_held = false;
    }

    pub fn events(&self) -> Vec<Event> {
        self.state().events.clone()
    }

    /// Returns the events that the API lists now.
    #[allow(dead_code, reason = "only the simulator asks")]
    pub fn listed(&self) -> Vec<Event> {
        let state = self.state();
        state
            .events
            .iter()
            .filter(|event| state.is_visible(event))
            .cloned()
            .collect()
    }

    pub fn calls(&self) -> Vec<Call> {
        self.state().calls.clone()
    }

    pub fn clear_calls(&self) {
        let mut state = self.state();
        state.calls.clear();
        state.connections = 0;
    }

    pub fn connections(&self) -> usize {
        self.state().connections
    }

    /// Returns whether an object of this id exists.
    pub fn has(&self, id: &str) -> bool {
        self.state().objects.contains_key(id)
    }

    /// Returns the recorded calls that no reader may make.
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.iter().cloned().collect()
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
        let order = scramble(state.objects.len());
        let (account, livemode, id) = (terms.account, terms.livemode, object.id().to_owned());
        let stored = match state.objects.remove(&id) {
            Some(stored) => StoredObject {
                before: Some(stored.object),
                object,
                ..stored
            },
            None => StoredObject {
                object,
                before: None,
                account,
                livemode,
                order,
            },
        };

        state.objects.insert(id, stored);
    }

    fn emit(&self, event: Event) {
        let mut state = self.state();
        let order = scramble(state.events.len());
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
            faults: Faults::default(),
            calls: Vec::new(),
            connections: 0,
            violations: BTreeSet::new(),
            is_held: false,
            consecutive_failures: BTreeMap::new(),
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
    /// Renders the event as the API lists it.
    pub fn as_listed(&self) -> Value {
        self.render(self.listed)
    }

    /// Renders the event as the webhook endpoint receives it.
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

    /// Renders the event as its thin twin.
    pub fn as_thin(&self) -> Value {
        let (kind, id) = (self.object.name(), self.object.id());
        json!({"id": self.thin_id(), "object": "v2.core.event", "type": format!("v1.{}", self.kind), "livemode": self.livemode,
            "created": format!("{}.413268975Z", written(self.created)), "context": self.account, "reason": null,
            "related_object": {"id": id, "type": kind, "url": format!("/v1/{kind}s/{id}")}, "snapshot_event": self.id})
    }

    pub fn thin_id(&self) -> String {
        self.id.replace("evt_", "evt_test_65")
    }

    /// Returns the id of the object in the event.
    pub fn object_id(&self) -> &str {
        self.object.id()
    }
}

impl Endpoint {
    /// Returns an enabled endpoint that subscribes to all events.
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

/// Formats a time as `2026-01-31T09:00:00`.
fn written(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds)
        .unwrap()
        .to_string()
        .trim_end_matches('Z')
        .to_owned()
}

/// Maps serial numbers to numbers in no meaningful order.
fn scramble(serial: usize) -> u32 {
    (serial as u32).wrapping_add(1).wrapping_mul(2_654_435_761)
}

/// Returns a number between 0 and 1 that depends only on its arguments.
fn chance(seed: u64, of: &impl Hash) -> f64 {
    let mut hasher = DefaultHasher::new();
    (seed, of).hash(&mut hasher);
    (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
}

//! Deliveries of the fake Stripe and their signatures. Deliveries are lost, duplicated, thin, late,
//! in another version and in any order.

use hmac::{Hmac, KeyInit, Mac};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use serde_json::{Value, json};
use sha2::Sha256;

use super::ledger::identity;
use testkit::stripe::{BASIL, CLOVER, DAY, ENDIVE, Event, OLD};

/// Maximum difference between the time of a signature and ours, in seconds.
const TOLERANCE_S: i64 = 300;

/// A queued delivery.
#[derive(Clone)]
pub struct Delivery {
    pub body: Vec<u8>,
    pub identity: String,
    /// Description for the trace.
    pub description: String,
}

#[derive(Default)]
pub struct Deliveries {
    pub queued: Vec<Delivery>,
    serial: usize,
}

impl Deliveries {
    /// Queues the deliveries of a new event. If `is_kept` is set, at least one of them is queued.
    pub fn post(&mut self, event: &Event, is_required: bool, random: &mut StdRng) {
        if !is_required && random.random_bool(0.25) {
            return;
        }

        let delivered = event.as_delivered();
        let (thin, snapshot) = match random.random_range(0..10) {
            0 if !is_required => (true, false),
            0..3 => (true, true),
            _ => (false, true),
        };
        if thin {
            self.post_thin(event, random);
        }

        if !snapshot {
            return;
        }

        self.send(&delivered, random);
        if random.random_bool(0.15) {
            // Deliver it once more, as Stripe renders it by now.
            let mut again = delivered;
            again["pending_webhooks"] = json!(random.random_range(0..9));
            self.send(&again, random);
        }

        if random.random_bool(0.1) {
            // A second endpoint of the same merchant, or one that was moved to another version.
            self.send(
                &event.render([OLD, BASIL, CLOVER, ENDIVE].choose(random).unwrap()),
                random,
            );
        }
    }

    pub fn post_thin(&mut self, event: &Event, random: &mut StdRng) {
        self.send(&event.as_thin(), random);
    }

    /// Queues an authentic body that is not an event.
    pub fn garble(&mut self, random: &mut StdRng) {
        self.serial += 1;
        let n = self.serial;
        let bodies = [
            format!("not JSON {n}"),
            format!(
                "{{\"id\":\"evt_{n}\",\"type\":\"invoice.paid\",\"created\":1760000000,\"data\":{{\"object\":"
            ),
            format!("[{n}]"),
            format!(
                "{{\"id\":{n},\"type\":\"invoice.paid\",\"created\":1760000000,\"data\":{{\"object\":{{}}}}}}"
            ),
            format!(
                "{{\"id\":\"evt_garbled{n}\",\"type\":\"invoice.paid\",\"created\":-1,\"data\":{{\"object\":{{}}}}}}"
            ),
        ];

        let body = bodies.choose(random).unwrap().clone().into_bytes();
        self.queued.push(Delivery {
            identity: identity(&body),
            body,
            description: format!("something garbled, {n}"),
        });
    }

    fn send(&mut self, event: &Value, random: &mut StdRng) {
        let body = if random.random_bool(0.5) {
            serde_json::to_vec(event)
        } else {
            serde_json::to_vec_pretty(event)
        };
        let body = body.unwrap();
        let version = event["api_version"].as_str().unwrap_or("thin");
        let description = format!(
            "{} {} ({version})",
            event["id"].as_str().unwrap(),
            event["type"].as_str().unwrap()
        );

        self.queued.push(Delivery {
            identity: identity(&body),
            body,
            description,
        });
    }

    /// Takes some of the queued deliveries at random.
    pub fn take(&mut self, random: &mut StdRng, most: usize) -> Vec<Delivery> {
        let count = random.random_range(1..=most).min(self.queued.len());
        (0..count)
            .map(|_| {
                self.queued
                    .swap_remove(random.random_range(0..self.queued.len()))
            })
            .collect()
    }
}

/// Signing secrets of the endpoint: Stripe's, and those in the program's configuration.
pub struct Secrets {
    all: Vec<Secret>,
    configured: Vec<usize>,
}

struct Secret {
    key: String,
    /// Unix seconds at which the secret ends. `None` until the next one is created.
    ends: Option<i64>,
}

/// A signed delivery.
pub struct Signed {
    pub header: String,
    /// Labels of the secrets that make the delivery authentic to the program. Empty if it is not.
    pub labels: Vec<String>,
}

impl Secrets {
    pub fn new() -> Secrets {
        Secrets {
            all: vec![Secret {
                key: key(0),
                ends: None,
            }],
            configured: vec![0],
        }
    }

    pub fn roll(&mut self, now: i64) {
        for secret in self.all.iter_mut().filter(|secret| secret.ends.is_none()) {
            secret.ends = Some(now + DAY);
        }
        self.all.push(Secret {
            key: key(self.all.len()),
            ends: None,
        });
    }

    fn active(&self, now: i64) -> Vec<usize> {
        (0..self.all.len())
            .filter(|n| self.all[*n].ends.is_none_or(|ends| now < ends))
            .collect()
    }

    /// Configures the secrets that Stripe signs with. Ended secrets may stay for a while.
    pub fn configure(&mut self, now: i64, random: &mut StdRng) {
        let active = self.active(now);
        let is_required = |n: &usize| active.contains(n) || random.random_bool(0.3);
        self.configured = (0..self.all.len()).filter(is_required).collect();
        self.configured.shuffle(random);
    }

    /// Returns the value of the program's setting.
    pub fn setting(&self) -> String {
        let named: Vec<String> = self
            .configured
            .iter()
            .map(|n| format!("{}={}", label(*n), self.all[*n].key))
            .collect();
        named.join(",")
    }

    /// Signs a delivery. Signing time, delivery time and the program's time may all differ.
    pub fn sign(
        &self,
        body: &[u8],
        signed_at: i64,
        programs_now: i64,
        random: &mut StdRng,
    ) -> Signed {
        let mut active = self.active(signed_at);
        active.shuffle(random);
        let mut parts: Vec<String> = active
            .iter()
            .map(|n| format!("v1={}", mac(&self.all[*n].key, signed_at, body)))
            .collect();
        if random.random_bool(0.2) {
            parts.push(format!("v0={}", mac("nobody", signed_at, body)));
        }

        let is_timely = (programs_now - signed_at).abs() <= TOLERANCE_S;
        let accepted = active
            .iter()
            .filter(|n| is_timely && self.configured.contains(n));
        Signed {
            labels: accepted.map(|n| label(*n)).collect(),
            header: format!("t={signed_at},{}", parts.join(",")),
        }
    }

    /// Returns an invalid header for the body, the body, and a description of the error.
    pub fn forge(
        &self,
        body: Vec<u8>,
        now: i64,
        random: &mut StdRng,
    ) -> (&'static str, Vec<String>, Vec<u8>) {
        let n = *self.active(now).choose(random).unwrap();
        let right = mac(&self.all[n].key, now, &body);
        let header = |text: String| vec![text];

        match random.random_range(0..8) {
            0 => ("no signature", Vec::new(), body),
            1 => (
                "another secret",
                header(format!("t={now},v1={}", mac("whsec_guessed", now, &body))),
                body,
            ),
            2 => {
                let mut changed = body;
                let at = random.random_range(0..changed.len());
                changed[at] ^= 1;
                (
                    "a changed body",
                    header(format!("t={now},v1={right}")),
                    changed,
                )
            }
            3 => ("only v0", header(format!("t={now},v0={right}")), body),
            4 => ("two headers", vec![format!("t={now},v1={right}"); 2], body),
            5 => (
                "two times",
                header(format!("t={now},t={now},v1={right}")),
                body,
            ),
            6 => (
                "another time",
                header(format!("t={},v1={right}", now + 1)),
                body,
            ),
            _ => (
                "half a signature",
                header(format!("t={now},v1={}", &right[..32])),
                body,
            ),
        }
    }
}

fn key(n: usize) -> String {
    format!("whsec_simulated{n}")
}

fn label(n: usize) -> String {
    format!("secret{n}")
}

fn mac(key: &str, time: i64, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(key.as_bytes()).unwrap();
    mac.update(format!("{time}.").as_bytes());
    mac.update(body);
    hex::encode(mac.finalize().into_bytes())
}

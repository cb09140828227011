//! Webhooks of the fake Stripe, signed like Stripe's.

use futures_util::StreamExt;
use futures_util::stream;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::Value;
use stripe_reconciler::http_client::HttpClient;

use super::{Event, Stripe, chance, now_s};
use crate::{SECRET, client, send, signature};

/// Concurrent deliveries.
const CONCURRENT: usize = 8;

/// Treatment of the webhooks.
#[derive(Clone, Copy, Debug)]
pub enum Deliveries {
    All,
    /// Loses this share of the webhooks, chosen by the seed.
    Dropping(f64, u64),
}

impl Stripe {
    /// Delivers a webhook for every generated event in random order. Returns how many arrived.
    pub async fn deliver(&self, server: &str, deliveries: Deliveries) -> usize {
        let arrives = |event: &Event| match deliveries {
            Deliveries::All => event.generated,
            Deliveries::Dropping(share, seed) => {
                event.generated && chance(seed, &event.id) >= share
            }
        };
        let mut bodies: Vec<Value> = self
            .events()
            .iter()
            .filter(|event| arrives(event))
            .map(Event::as_delivered)
            .collect();
        bodies.shuffle(&mut StdRng::seed_from_u64(7));
        let client = client();

        let answers = stream::iter(&bodies)
            .map(|body| deliver_over(&client, server, body))
            .buffer_unordered(CONCURRENT);
        answers.collect::<Vec<()>>().await.len()
    }
}

/// Delivers one event, thin or not. The server must acknowledge it.
pub async fn deliver_one(server: &str, event: &Value) {
    deliver_over(&client(), server, event).await;
}

async fn deliver_over(client: &HttpClient, server: &str, event: &Value) {
    let body = serde_json::to_vec_pretty(event).unwrap();
    let signature = signature(SECRET, now_s(), &body);
    let url = format!("{server}/webhooks/stripe");
    send(
        client,
        "POST",
        &url,
        &[("Stripe-Signature", &signature)],
        body,
    )
    .await
    .with_status(200);
}

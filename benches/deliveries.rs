//! Webhook requests for the benchmarks: payloads of `fixtures/`, each made unique and signed.

use std::sync::Arc;

use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::stripe::signature::sign;
use stripe_reconciler::domain::stripe::signing_secrets::SigningSecrets;

use crate::load::Requests;

pub const SECRET: &str = "whsec_benchmark";

/// Four events of one invoice, of 6.9 KB each.
const TEMPLATES: [&str; 4] = [
    include_str!("../fixtures/events/2022-11-15/invoice.finalized.json"),
    include_str!("../fixtures/events/2022-11-15/invoice.updated.json"),
    include_str!("../fixtures/events/2022-11-15/invoice.payment_succeeded.json"),
    include_str!("../fixtures/events/2022-11-15/invoice.paid.json"),
];
/// Part that all ids of the templates share.
const MARK: &str = "Q038Fx";

/// Returns the id of the Stripe invoice that the events of this number belong to.
pub fn stripe_invoice_id(number: usize) -> String {
    format!("in_1{}", unique(number))
}

/// Replaces [`MARK`] by an id that grows with the number, because Stripe's ids grow with time.
fn unique(number: usize) -> String {
    format!("Q{number:09}Fx")
}

pub fn bodies(first: usize, count: usize) -> impl Iterator<Item = String> {
    (first..first + count)
        .map(|n| TEMPLATES[n % TEMPLATES.len()].replace(MARK, &unique(n / TEMPLATES.len())))
}

/// Returns signed requests. Signatures carry the current time and are valid for five minutes.
pub fn signed(first: usize, count: usize) -> Requests {
    let secrets = SigningSecrets::parse(SECRET).expect("a secret");
    let now_s = Clock::system().now_s();
    let request = |body: String| {
        let signature = sign(secrets.first(), now_s, body.as_bytes());
        let head = format!(
            "POST /webhooks/stripe HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
             stripe-signature: {signature}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        [head.into_bytes(), body.into_bytes()].concat()
    };
    Arc::new(bodies(first, count).map(request).collect())
}

pub fn reads(path: &str, headers: &str, count: usize) -> Requests {
    let request = format!("GET {path} HTTP/1.1\r\nhost: bench\r\n{headers}\r\n").into_bytes();
    Arc::new(vec![request; count])
}

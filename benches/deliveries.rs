//! What is sent: payloads of `fixtures/`, each made unique and signed, as whole HTTP requests.

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
/// What all ids of the templates have in common.
const MARK: &str = "Q038Fx";

/// The Stripe invoice that the events of this number are about.
pub fn stripe_invoice_id(number: usize) -> String {
    format!("in_1{}", unique(number))
}

/// Ids grow with time, as Stripe's do.
fn unique(number: usize) -> String {
    format!("Q{number:09}Fx")
}

pub fn bodies(first: usize, count: usize) -> impl Iterator<Item = String> {
    (first..first + count)
        .map(|n| TEMPLATES[n % TEMPLATES.len()].replace(MARK, &unique(n / TEMPLATES.len())))
}

/// Signed now: good for five minutes.
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

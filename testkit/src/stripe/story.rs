//! A story of many invoices: every kind of life there is, in several versions of the API, and some of it with events that Stripe fails
//! to make. What it fails to tell can always be found out: from an event of the same move, or from the object as it is.

use serde_json::{Value, json};

use super::{CLOVER, DAY, ENDIVE, HOUR, Life, OLD, Stripe, Terms, now_s};

/// All types begin so.
const EVERYTHING: &[&str] = &[""];
const NOTHING: &[&str] = &[];
const KINDS: usize = 15;
/// How each kind of life is told: whole, or with one gap or another.
const GAPS: usize = 3;
/// Many invoices live in the same seconds.
const STARTS: usize = 5;
pub const CONNECTED: &str = "acct_1Connected";

/// An invoice of the story, as the merchant knows it.
pub struct Stored {
    pub uid: String,
    pub stripe_id: String,
    pub due: i64,
}

impl Stored {
    /// A `v1Invoice` that agrees with Stripe's.
    pub fn document(&self) -> Value {
        json!({"metadata": {"uid": self.uid}, "spec": {"paymentUnit": "usd"},
            "status": {"billableAmount": self.due as f64 / 100.0, "stripeInvoiceId": self.stripe_id}})
    }
}

pub fn tell(stripe: &Stripe, invoices: usize) -> Vec<Stored> {
    (0..invoices)
        .map(|n| {
            let life = live(stripe, n);
            Stored {
                uid: format!("inv-{n:04}"),
                stripe_id: life.id().to_owned(),
                due: life.invoice.due,
            }
        })
        .collect()
}

fn terms(n: usize) -> Terms {
    let kind = n % KINDS;
    let (listed, delivered) = match (kind, n / KINDS % 4) {
        // Money from outside Stripe is told apart by what only these two versions say.
        (7, round) => [(OLD, OLD), (ENDIVE, ENDIVE)][round % 2],
        // Several payments of one invoice are there since basil.
        (6, round) => [(CLOVER, CLOVER), (CLOVER, ENDIVE)][round % 2],
        (_, 0) => (OLD, OLD),
        (_, 1) => (CLOVER, CLOVER),
        (_, 2) => (CLOVER, ENDIVE),
        _ => (OLD, CLOVER),
    };
    Terms {
        account: (n % 7 == 3 && kind != 12).then_some(CONNECTED),
        livemode: true,
        due: if kind == 11 {
            0
        } else {
            10_000 + 100 * n as i64
        },
        currency: "usd",
        sent: matches!(kind, 7 | 8),
        start: now_s() / HOUR * HOUR - 28 * DAY + (n % STARTS) as i64 * DAY,
        listed,
        delivered,
        order_reference: None,
    }
}

fn live(stripe: &Stripe, n: usize) -> Life {
    let (kind, gap) = (n % KINDS, n / KINDS % GAPS);
    let when = |wanted: usize, gap_in: &'static [&'static str]| {
        if gap == wanted { gap_in } else { NOTHING }
    };
    let from_the_draft_on = kind == 12 && gap == 2;
    let mut life = Life::begin(
        stripe,
        terms(n),
        if from_the_draft_on {
            EVERYTHING
        } else {
            NOTHING
        },
    );
    match kind {
        11 => drop(life.later(HOUR).silence(when(1, EVERYTHING)).paid_at_zero()),
        14 => {}
        _ => {
            let untold = match kind {
                12 if from_the_draft_on => EVERYTHING,
                0 | 5 | 12 => when(1, EVERYTHING),
                2 | 6 => when(2, EVERYTHING),
                _ => NOTHING,
            };
            life.later(HOUR).silence(untold).finalized();
            after_finalization(&mut life, kind, gap, when);
        }
    }
    life
}

fn after_finalization(
    life: &mut Life,
    kind: usize,
    gap: usize,
    when: impl Fn(usize, &'static [&'static str]) -> &'static [&'static str],
) {
    life.silence(NOTHING).later(HOUR);
    match kind {
        0 => drop(life.silence(when(2, EVERYTHING)).paid_by_card()),
        1 => {
            life.silence([NOTHING, &["charge."], &["payment_intent."]][gap])
                .declined("insufficient_funds", Some(3 * DAY));
            life.later(3 * DAY)
                .silence(when(1, &["invoice."]))
                .paid_by_card();
        }
        2 => {
            life.declined("insufficient_funds", Some(3 * DAY))
                .later(3 * DAY)
                .declined("expired_card", None);
            life.later(DAY).silence(when(1, EVERYTHING)).voided();
        }
        3 => {
            life.silence([NOTHING, &["payment_intent."], &["invoice."]][gap])
                .action_required();
            life.silence(NOTHING).later(600).paid_by_card();
        }
        4 => {
            life.silence([NOTHING, &["payment_intent."], &["charge."]][gap])
                .processing();
            life.silence(NOTHING).later(4 * DAY).paid_by_card();
        }
        5 => drop(
            life.processing()
                .later(3 * DAY)
                .returned()
                .later(DAY)
                .processing()
                .later(4 * DAY)
                .paid_by_card(),
        ),
        6 => {
            let (half, quarter) = (life.invoice.due / 2, life.invoice.due / 4);
            let rest = life.invoice.due - half - quarter;
            life.part(half)
                .later(DAY)
                .part(quarter)
                .later(DAY)
                .silence(when(1, &["invoice."]))
                .part(rest);
        }
        7 => drop(
            life.later(9 * DAY)
                .silence(when(1, EVERYTHING))
                .paid_outside(),
        ),
        8 => {
            life.later(10 * DAY)
                .overdue()
                .later(5 * DAY)
                .silence(when(1, EVERYTHING))
                .written_off();
            if gap != 0 {
                life.later(2 * DAY)
                    .silence(when(2, EVERYTHING))
                    .paid_by_card();
            }
        }
        9 => {
            let quarter = life.invoice.due / 4;
            life.paid_by_card()
                .later(3 * DAY)
                .silence([NOTHING, &["refund."], &["charge."]][gap])
                .refunded(quarter);
            life.silence(NOTHING).later(DAY).credited(1200);
        }
        10 => {
            life.silence(when(1, EVERYTHING)).paid_by_card();
            life.silence(NOTHING)
                .later(10 * DAY)
                .disputed()
                .later(5 * DAY)
                .dispute_won();
        }
        13 => drop(
            life.silence(when(2, &["charge."]))
                .declined("insufficient_funds", None),
        ),
        _ => {}
    }
}

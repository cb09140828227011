//! A story of many invoices: every kind of life in several versions of the API, some of them with
//! missing events.
//!
//! Everything that a missing event would assert can be found in another event of the same change or
//! in the object.

use serde_json::{Value, json};

use super::{CLOVER, DAY, ENDIVE, HOUR, Life, OLD, Stripe, Terms, now_s};

/// Prefix of all event types.
const EVERYTHING: &[&str] = &[""];
const NOTHING: &[&str] = &[];
const KINDS: usize = 15;
/// Number of variants of each life: complete, or with one of two gaps.
const GAPS: usize = 3;
/// Number of different start days, so that many invoices live in the same seconds.
const STARTS: usize = 5;
pub const CONNECTED: &str = "acct_1Connected";

/// An invoice of the story as the merchant stores it.
pub struct StoryInvoice {
    pub uid: String,
    pub stripe_id: String,
    pub due: i64,
}

impl StoryInvoice {
    /// Returns a `v1Invoice` that agrees with Stripe's invoice.
    pub fn document(&self) -> Value {
        json!({"metadata": {"uid": self.uid}, "spec": {"paymentUnit": "usd"},
            "status": {"billableAmount": self.due as f64 / 100.0, "stripeInvoiceId": self.stripe_id}})
    }
}

pub fn play(stripe: &Stripe, invoices: usize) -> Vec<StoryInvoice> {
    (0..invoices)
        .map(|n| {
            let life = play_one(stripe, n);
            StoryInvoice {
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
        // Only fields of these two versions identify money from outside Stripe.
        (7, round) => [(OLD, OLD), (ENDIVE, ENDIVE)][round % 2],
        // An invoice can have several payments since basil.
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

fn play_one(stripe: &Stripe, n: usize) -> Life {
    let (kind, gap) = (n % KINDS, n / KINDS % GAPS);
    let in_gap = |wanted: usize, gap_in: &'static [&'static str]| {
        if gap == wanted { gap_in } else { NOTHING }
    };
    let omits_draft = kind == 12 && gap == 2;
    let mut life = Life::begin(
        stripe,
        terms(n),
        if omits_draft { EVERYTHING } else { NOTHING },
    );

    match kind {
        11 => drop(
            life.later(HOUR)
                .omit_events(in_gap(1, EVERYTHING))
                .paid_at_zero(),
        ),
        14 => {}
        _ => {
            let omitted = match kind {
                12 if omits_draft => EVERYTHING,
                0 | 5 | 12 => in_gap(1, EVERYTHING),
                2 | 6 => in_gap(2, EVERYTHING),
                _ => NOTHING,
            };
            life.later(HOUR).omit_events(omitted).finalized();
            after_finalization(&mut life, kind, gap, in_gap);
        }
    }

    life
}

fn after_finalization(
    life: &mut Life,
    kind: usize,
    gap: usize,
    in_gap: impl Fn(usize, &'static [&'static str]) -> &'static [&'static str],
) {
    life.omit_events(NOTHING).later(HOUR);
    match kind {
        0 => drop(life.omit_events(in_gap(2, EVERYTHING)).paid_by_card()),
        1 => {
            life.omit_events([NOTHING, &["charge."], &["payment_intent."]][gap])
                .declined("insufficient_funds", Some(3 * DAY));
            life.later(3 * DAY)
                .omit_events(in_gap(1, &["invoice."]))
                .paid_by_card();
        }
        2 => {
            life.declined("insufficient_funds", Some(3 * DAY))
                .later(3 * DAY)
                .declined("expired_card", None);
            life.later(DAY).omit_events(in_gap(1, EVERYTHING)).voided();
        }
        3 => {
            life.omit_events([NOTHING, &["payment_intent."], &["invoice."]][gap])
                .action_required();
            life.omit_events(NOTHING).later(600).paid_by_card();
        }
        4 => {
            life.omit_events([NOTHING, &["payment_intent."], &["charge."]][gap])
                .processing();
            life.omit_events(NOTHING).later(4 * DAY).paid_by_card();
        }
        5 => drop(
            life.processing()
                .later(3 * DAY)
                .debit_returned()
                .later(DAY)
                .processing()
                .later(4 * DAY)
                .paid_by_card(),
        ),
        6 => {
            let (half, quarter) = (life.invoice.due / 2, life.invoice.due / 4);
            let rest = life.invoice.due - half - quarter;
            life.pay_part(half)
                .later(DAY)
                .pay_part(quarter)
                .later(DAY)
                .omit_events(in_gap(1, &["invoice."]))
                .pay_part(rest);
        }
        7 => drop(
            life.later(9 * DAY)
                .omit_events(in_gap(1, EVERYTHING))
                .paid_outside(),
        ),
        8 => {
            life.later(10 * DAY)
                .overdue()
                .later(5 * DAY)
                .omit_events(in_gap(1, EVERYTHING))
                .written_off();
            if gap != 0 {
                life.later(2 * DAY)
                    .omit_events(in_gap(2, EVERYTHING))
                    .paid_by_card();
            }
        }
        9 => {
            let quarter = life.invoice.due / 4;
            life.paid_by_card()
                .later(3 * DAY)
                .omit_events([NOTHING, &["refund."], &["charge."]][gap])
                .refunded(quarter);
            life.omit_events(NOTHING).later(DAY).credited(1200);
        }
        10 => {
            life.omit_events(in_gap(1, EVERYTHING)).paid_by_card();
            life.omit_events(NOTHING)
                .later(10 * DAY)
                .disputed()
                .later(5 * DAY)
                .dispute_won();
        }
        13 => drop(
            life.omit_events(in_gap(2, &["charge."]))
                .declined("insufficient_funds", None),
        ),
        _ => {}
    }
}

//! For every generated life of an invoice: any order, any duplication, twin ids and any mix of API shapes give the same
//! history; Paid is never lost again; entries are unique; nothing panics.

use std::collections::HashSet;

use proptest::prelude::*;
use serde_json::{Value, json};
use stripe_reconciler::domain::history::{StoredObservation, fold};
use stripe_reconciler::domain::payment_state::PaymentState;
use stripe_reconciler::domain::stripe::event;

use crate::stripe::*;

/// What can happen to an invoice, one after the other, an hour apart.
#[derive(Clone, Copy, Debug)]
enum Step {
    Declined,
    ActionRequired,
    DebitSubmitted,
    DebitReturned,
    Overdue,
    PartPaid,
    WrittenOff,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Open,
    Paid,
    Voided,
    Refunded,
    Disputed,
}

fn lives() -> impl Strategy<Value = (Vec<Step>, End)> {
    use Step::*;
    let step = prop::sample::select(vec![
        Declined,
        ActionRequired,
        DebitSubmitted,
        DebitReturned,
        Overdue,
        PartPaid,
        WrittenOff,
    ]);
    let end = prop::sample::select(vec![
        End::Open,
        End::Paid,
        End::Voided,
        End::Refunded,
        End::Disputed,
    ]);
    (prop::collection::vec(step, 0..6), end)
}

/// All events of a life, in the order in which they happen, in one shape.
fn events(steps: &[Step], end: End, shape: Shape) -> Vec<Value> {
    let mut stripe = Stripe {
        shape,
        now: 1_760_000_000,
        attempts: 0,
        finalized: 1_760_000_000,
        events: Vec::new(),
    };
    stripe.tell("invoice.finalized", stripe.open());
    stripe.tell(
        "payment_intent.created",
        intent(shape, "requires_payment_method"),
    );
    for step in steps {
        stripe.now += 3600;
        stripe.step(*step);
    }
    stripe.now += 3600;
    stripe.end(end);
    stripe.events
}

struct Stripe {
    shape: Shape,
    now: i64,
    attempts: i64,
    finalized: i64,
    events: Vec<Value>,
}

impl Stripe {
    fn tell(&mut self, event_type: &str, object: Value) {
        let id = format!("evt_{:03}", self.events.len());
        self.events.push(event(&id, event_type, self.now, object));
    }

    fn open(&self) -> Value {
        let fields = json!({"attempt_count": self.attempts, "next_payment_attempt": self.now + 7200, "status_transitions": {"finalized_at": self.finalized}});
        with(invoice(self.shape, "open"), fields)
    }

    fn closed(&self, status: &str, at: &str) -> Value {
        with(
            invoice(self.shape, status),
            json!({"status_transitions": {"finalized_at": self.finalized, at: self.now}}),
        )
    }

    fn fail(&mut self) {
        self.attempts += 1;
        let id = format!("ch_{}", self.attempts);
        let reason = json!({"failure_code": "card_declined", "failure_message": "No.", "outcome": {"reason": "do_not_honor"}});
        let error = json!({"code": "card_declined", "message": "No.", "charge": id});
        self.tell(
            "charge.failed",
            with(charge(self.shape, &id, "failed"), reason),
        );
        self.now += 1;
        self.tell(
            "payment_intent.payment_failed",
            with(
                intent(self.shape, "requires_payment_method"),
                json!({"last_payment_error": error}),
            ),
        );
        let mut failed = self.open();
        if self.shape == Shape::Old {
            failed["charge"] = json!(id);
        }
        self.tell("invoice.payment_failed", failed);
    }

    fn step(&mut self, step: Step) {
        let shape = self.shape;
        match step {
            Step::Declined | Step::DebitReturned => self.fail(),
            Step::ActionRequired => {
                self.tell(
                    "payment_intent.requires_action",
                    intent(shape, "requires_action"),
                );
                self.now += 1;
                self.tell("invoice.payment_action_required", self.open());
            }
            Step::DebitSubmitted => {
                self.tell("payment_intent.processing", intent(shape, "processing"));
                self.tell(
                    "charge.pending",
                    charge(shape, &format!("ch_{}", self.attempts + 1), "pending"),
                );
            }
            Step::Overdue => self.tell("invoice.overdue", self.open()),
            Step::PartPaid => {
                let part = json!({"id": format!("inpay_{}", self.now), "object": "invoice_payment", "invoice": INVOICE, "amount_paid": 700, "currency": "eur"});
                self.tell("invoice_payment.paid", part);
            }
            Step::WrittenOff => {
                let at = json!({"status_transitions": {"finalized_at": self.finalized, "marked_uncollectible_at": self.now}});
                self.tell(
                    "invoice.marked_uncollectible",
                    with(invoice(shape, "uncollectible"), at),
                );
            }
        }
    }

    fn end(&mut self, end: End) {
        let shape = self.shape;
        match end {
            End::Open => return,
            End::Voided => return self.tell("invoice.voided", self.closed("void", "voided_at")),
            End::Paid | End::Refunded | End::Disputed => {}
        }
        self.tell("charge.succeeded", charge(shape, "ch_paid", "succeeded"));
        self.tell(
            "payment_intent.succeeded",
            with(
                intent(shape, "succeeded"),
                json!({"latest_charge": "ch_paid"}),
            ),
        );
        let paid = self.closed("paid", "paid_at");
        self.tell("invoice.updated", paid.clone());
        self.tell("invoice.payment_succeeded", paid.clone());
        self.tell("invoice.paid", paid);
        self.now += 60;
        match end {
            End::Refunded => {
                let refund = json!({"id": "re_1", "object": "refund", "charge": "ch_paid", "amount": 1000, "currency": "eur", "status": "pending"});
                self.tell("refund.created", refund.clone());
                self.tell(
                    "charge.refunded",
                    with(
                        charge(shape, "ch_paid", "succeeded"),
                        json!({"amount_refunded": 1000}),
                    ),
                );
                self.tell(
                    "refund.failed",
                    with(
                        refund,
                        json!({"status": "failed", "failure_reason": "lost_or_stolen_card"}),
                    ),
                );
            }
            End::Disputed => {
                let dispute = json!({"id": "dp_1", "object": "dispute", "charge": "ch_paid", "amount": 5000, "currency": "eur", "reason": "general"});
                self.tell("charge.dispute.created", dispute.clone());
                self.tell(
                    "charge.dispute.closed",
                    with(dispute, json!({"status": "won"})),
                );
            }
            _ => {}
        }
    }
}

/// How one event of a life is delivered.
#[derive(Clone, Debug)]
struct Delivery {
    old_shape: bool,
    copies: usize,
    twin: bool,
    both_shapes: bool,
    place: u32,
}

fn deliveries() -> impl Strategy<Value = Vec<Delivery>> {
    let one = (
        any::<bool>(),
        1..3_usize,
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        any::<u32>(),
    );
    let delivery = one.prop_map(|(old_shape, copies, twin, both_shapes, place)| Delivery {
        old_shape,
        copies,
        twin,
        both_shapes,
        place,
    });
    prop::collection::vec(delivery, 40)
}

/// The life's events as they arrive: in any order, some twice, some under a second id, some in another shape.
fn arrive(steps: &[Step], end: End, deliveries: &[Delivery]) -> Vec<Value> {
    let (old, new) = (
        events(steps, end, Shape::Old),
        events(steps, end, Shape::New),
    );
    let mut arriving = Vec::new();
    for (index, delivery) in deliveries.iter().cycle().take(old.len()).enumerate() {
        let version =
            |shape: &[Value], name: &str| with(shape[index].clone(), json!({"api_version": name}));
        let (old, new) = (
            version(&old, "2022-11-15"),
            version(&new, "2025-11-17.clover"),
        );
        let mut copies = vec![
            if delivery.old_shape {
                old.clone()
            } else {
                new.clone()
            };
            delivery.copies
        ];
        if delivery.both_shapes {
            copies.extend([old, new]);
        }
        if delivery.twin {
            let id = format!("evt_twin_{index}");
            copies.push(with(copies[0].clone(), json!({"id": id})));
        }
        let place = |copy: usize| {
            delivery
                .place
                .wrapping_mul(2_654_435_761)
                .wrapping_add(copy as u32 * 97_654_321)
        };
        arriving.extend(
            copies
                .into_iter()
                .enumerate()
                .map(|(copy, event)| (place(copy), event)),
        );
    }
    arriving.sort_by_key(|(place, _)| *place);
    arriving.into_iter().map(|(_, event)| event).collect()
}

/// The payments of another life, in another account or mode, that refer to the same invoice.
///
/// Stripe itself never names the invoice in them. With `shares_ids` they even claim the ids of
/// the invoice's own payments, which no authentic event does.
fn foreign(
    steps: &[Step],
    end: End,
    (livemode, account): (bool, Option<&str>),
    shares_ids: bool,
) -> Vec<Value> {
    let payments = events(steps, end, Shape::New).into_iter().filter(|event| {
        let object = &event["data"]["object"];
        object["object"] != "invoice" && object["invoice"].is_null()
    });
    payments
        .enumerate()
        .map(|(index, event)| {
            let mut text = event.to_string();
            if !shares_ids {
                for prefix in ["pi_", "ch_", "re_", "dp_"] {
                    text = text.replace(&format!("\"{prefix}"), &format!("\"{prefix}evil"));
                }
            }
            let event: Value = serde_json::from_str(&text).expect("it was JSON before");
            let id = format!("evt_evil_{index}");
            with(
                event,
                json!({"id": id, "livemode": livemode, "account": account}),
            )
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_order_duplication_twin_and_shape_gives_the_same_history((steps, end) in lives(), deliveries in deliveries()) {
        let plain = told(&events(&steps, end, Shape::New));
        prop_assert_eq!(&told(&events(&steps, end, Shape::Old)), &plain);
        prop_assert_eq!(&told(&arrive(&steps, end, &deliveries)), &plain);
    }

    /// Rule 3.6.4.
    #[test]
    fn events_of_another_account_or_mode_change_nothing(
        (steps, end) in lives(),
        (foreign_steps, foreign_end) in lives(),
        origin in prop::sample::select(vec![(true, Some("acct_evil")), (false, None), (false, Some("acct_evil"))]),
        shares_ids in any::<bool>(),
        deliveries in deliveries(),
    ) {
        let own = events(&steps, end, Shape::New);
        let foreign = foreign(&foreign_steps, foreign_end, origin, shares_ids);
        let mut all = arrive(&steps, end, &deliveries);
        for (index, event) in foreign.into_iter().enumerate() {
            all.insert(deliveries[index % deliveries.len()].place as usize % (all.len() + 1), event);
        }
        prop_assert_eq!(told(&all), told(&own));
    }

    #[test]
    fn once_paid_is_known_no_later_event_takes_it_away((steps, end) in lives(), deliveries in deliveries()) {
        let known = known(&arrive(&steps, end, &deliveries));
        let mut was_paid = false;
        for upto in 0..=known.len() {
            let history = fold(Some(INVOICE), &[], &known[..upto]);
            let is_paid = history.last().is_some_and(|e| e.state == PaymentState::Paid);
            prop_assert!(is_paid || !was_paid, "{history:?}");
            was_paid = is_paid;
        }
        prop_assert_eq!(was_paid, matches!(end, End::Paid | End::Refunded | End::Disputed));
    }

    #[test]
    fn entries_are_unique_and_every_one_is_proved_by_a_known_event((steps, end) in lives(), deliveries in deliveries()) {
        let known = known(&arrive(&steps, end, &deliveries));
        let keys: HashSet<_> = known.iter().map(|k| k.key).collect();
        let history = fold(Some(INVOICE), &[], &known);
        let unique: HashSet<_> = history.iter().map(|e| (format!("{:?}", e.state), e.timestamp_ms, e.message.clone())).collect();
        prop_assert_eq!(unique.len(), history.len());
        for entry in &history {
            prop_assert!(!entry.proofs.is_empty() && entry.proofs.iter().all(|key| keys.contains(key)), "{:?}", entry);
        }
    }

    #[test]
    fn no_value_in_any_field_panics(index in 0..20_usize, pointer in 0..60_usize, junk in junk()) {
        let mut all = events(&[Step::Declined, Step::ActionRequired, Step::DebitSubmitted, Step::PartPaid, Step::WrittenOff], End::Refunded, Shape::Old);
        let index = index % all.len();
        let mut pointers = Vec::new();
        collect_pointers(&all[index], String::new(), &mut pointers);
        let place = &pointers[pointer % pointers.len()];
        *all[index].pointer_mut(place).expect("collected from this value") = junk;
        let known: Vec<StoredObservation> = all.iter().filter_map(|json| match event::read(json.to_string().as_bytes()) {
            event::Reading::Event(event) => event.observation.map(|observation| StoredObservation { key: event.key, observation }),
            event::Reading::Unreadable { .. } => None,
        }).collect();
        fold(Some(INVOICE), &[], &known);
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        event::read(&bytes);
    }
}

fn junk() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({"id": "in_9", "object": "invoice"})),
    ]
}

fn collect_pointers(value: &Value, at: String, pointers: &mut Vec<String>) {
    if let Value::Object(fields) = value {
        for (name, field) in fields {
            let here = format!("{at}/{name}");
            pointers.push(here.clone());
            collect_pointers(field, here, pointers);
        }
    }
}

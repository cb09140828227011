//! Lives of invoices: what happens next is drawn, and what a merchant should be shown of it is written down at once, by the rules of
//! what a payment is and not by what any event says.

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

use testkit::stripe::{BASIL, CLOVER, DAY, ENDIVE, Life, OLD, Stripe, Terms};

pub const CONNECTED: &str = "acct_1Connected";
/// Moves of one invoice this close, in seconds, are hard to tell apart, and may be shown as one until all is known.
pub const NEAR_S: i64 = 61;

/// Stripe fails to make events whose type begins so: all of them, or none.
const EVERYTHING: &[&str] = &[""];
const NOTHING: &[&str] = &[];

/// One of the three tells enough of it.
const OF_AN_ATTEMPT: &[&[&str]] = &[&["charge."], &["payment_intent."], &["invoice."]];

/// An invoice at Stripe, and what is true of it.
pub struct Invoice {
    pub uid: String,
    pub life: Life,
    account: Option<&'static str>,
    currency: &'static str,
    due: i64,
    /// Several payments of one invoice are there since basil.
    is_payable_in_parts: bool,
    stage: Stage,
    /// Attempts that failed.
    failed: usize,
    is_overdue: bool,
    is_credited: bool,
    refunded: i64,
    dispute: Dispute,
    truth: Vec<Entry>,
    /// What is no entry of its own: shown at its time as long as nobody has heard of the first.
    repeated: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Draft,
    Open,
    Debit,
    PaidInParts,
    WrittenOff,
    PaidByCard,
    PaidOtherwise,
    Voided,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dispute {
    None,
    Open,
    Won,
}

/// One entry of a true history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub fact: Fact,
    /// Unix seconds.
    pub at: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    Finalized,
    /// In which round: how many attempts had failed before.
    ActionRequired(usize),
    InFlight(usize),
    Part,
    Failed,
    Overdue,
    WrittenOff,
    Voided,
    Paid,
    /// Money returned or contested, a credit note.
    Information,
}

impl Fact {
    pub fn state(self) -> &'static str {
        match self {
            Fact::Finalized | Fact::ActionRequired(_) | Fact::Overdue => "PaymentPending",
            Fact::InFlight(_) | Fact::Part => "PaymentInProgress",
            Fact::Failed | Fact::WrittenOff | Fact::Voided => "PaymentFailed",
            Fact::Paid | Fact::Information => "Paid",
        }
    }

    /// What leads to the end, the end, and what comes after it.
    fn chapter(self) -> usize {
        match self {
            Fact::Paid | Fact::Voided => 1,
            Fact::Information => 2,
            _ => 0,
        }
    }
}

impl Invoice {
    pub fn begin(stripe: &Stripe, number: usize, at: i64, random: &mut StdRng) -> Invoice {
        let versions = [OLD, BASIL, CLOVER, ENDIVE];
        let (listed, delivered) = (
            *versions.choose(random).unwrap(),
            *versions.choose(random).unwrap(),
        );
        let due = if random.random_bool(0.05) {
            0
        } else {
            random.random_range(100..1_000_000)
        };
        let currency = *["usd", "eur", "jpy"].choose(random).unwrap();
        let account = random.random_bool(0.2).then_some(CONNECTED);
        let terms = Terms {
            account,
            livemode: true,
            due,
            currency,
            sent: random.random_bool(0.3),
            start: at,
            listed,
            delivered,
            order_reference: random.random_bool(0.15).then_some("PO 17"),
        };
        Invoice {
            uid: format!("inv-{number}"),
            account,
            currency,
            due,
            is_payable_in_parts: listed != OLD && delivered != OLD,
            life: stripe.draft(terms),
            stage: Stage::Draft,
            failed: 0,
            is_overdue: false,
            is_credited: false,
            refunded: 0,
            dispute: Dispute::None,
            truth: Vec::new(),
            repeated: Vec::new(),
        }
    }

    /// A `v1Invoice` that agrees with Stripe's.
    pub fn document(&self) -> Value {
        let units = if self.currency == "jpy" { 1.0 } else { 100.0 };
        // There is no other unit than this to store.
        let spec = if self.currency == "usd" {
            json!({"paymentUnit": "usd"})
        } else {
            json!({})
        };
        json!({"metadata": {"uid": self.uid}, "spec": spec,
            "status": {"billableAmount": self.due as f64 / units, "stripeInvoiceId": self.life.id()}})
    }

    /// What really happened, in the order in which it is to be shown.
    pub fn truth(&self) -> Vec<Entry> {
        let mut truth = self.truth.clone();
        truth.sort_by_key(|entry| (entry.fact.chapter(), entry.at));
        truth
    }

    pub fn repeated(&self) -> &[Entry] {
        &self.repeated
    }

    /// Whether it is a connected account's.
    pub fn is_connected(&self) -> bool {
        self.account.is_some()
    }

    /// Whether it was paid outside Stripe: how surely that is told depends on the version of the API.
    pub fn is_paid_outside(&self) -> bool {
        self.life.invoice.paid_outside > 0
    }

    /// Something happens to it now. In words; none: nothing can.
    pub fn live(&mut self, now: i64, random: &mut StdRng) -> Option<&'static str> {
        self.life.t = now;
        let told = self.next(random);
        self.life.silence(NOTHING);
        told
    }

    /// Now and then Stripe fails to make one kind of events or another. What it fails to tell can always be found out: by the other
    /// events of the same move, or from the object as it is.
    fn silence(&mut self, gaps: &[&'static [&'static str]], random: &mut StdRng) {
        if random.random_bool(0.1) {
            self.life.silence(gaps.choose(random).unwrap());
        }
    }

    fn next(&mut self, random: &mut StdRng) -> Option<&'static str> {
        match self.stage {
            Stage::Draft if self.due == 0 => {
                self.silence(&[EVERYTHING], random);
                self.life.paid_at_zero();
                Some(self.to(
                    Stage::PaidOtherwise,
                    Fact::Paid,
                    "has nothing to collect, and is paid",
                ))
            }
            Stage::Draft => {
                self.silence(&[EVERYTHING], random);
                self.life.finalized();
                Some(self.to(Stage::Open, Fact::Finalized, "is finalized"))
            }
            Stage::Open => Some(self.collect(random)),
            Stage::Debit if random.random_bool(0.4) => {
                self.silence(OF_AN_ATTEMPT, random);
                self.life.returned();
                self.failed += 1;
                Some(self.to(Stage::Open, Fact::Failed, "has its debit returned"))
            }
            Stage::Debit => Some(self.pay_by_card(random)),
            Stage::PaidInParts => Some(self.part(random)),
            Stage::WrittenOff => match random.random_range(0..10) {
                0..6 => Some(self.pay_by_card(random)),
                6..8 => Some(self.void(random)),
                _ => Some(self.pay_outside(random)),
            },
            Stage::PaidByCard | Stage::PaidOtherwise => self.after_payment(random),
            Stage::Voided => None,
        }
    }

    fn collect(&mut self, random: &mut StdRng) -> &'static str {
        match random.random_range(0..100) {
            0..28 => {
                self.silence(OF_AN_ATTEMPT, random);
                let reason = *["insufficient_funds", "expired_card", "generic"]
                    .choose(random)
                    .unwrap();
                self.life
                    .declined(reason, random.random_bool(0.7).then_some(3 * DAY));
                self.failed += 1;
                self.to(Stage::Open, Fact::Failed, "is declined")
            }
            28..42 => {
                self.silence(&[&["payment_intent."], &["invoice."]], random);
                self.life.action_required();
                self.once(
                    Fact::ActionRequired(self.failed),
                    "needs the customer to act",
                )
            }
            42..58 => {
                self.silence(&[&["payment_intent."], &["charge."]], random);
                self.life.processing();
                self.stage = Stage::Debit;
                self.once(Fact::InFlight(self.failed), "has a debit submitted")
            }
            58..66 if self.is_payable_in_parts && self.due > 400 => self.part(random),
            66..72 if !self.is_overdue => {
                self.life.overdue();
                self.is_overdue = true;
                self.to(Stage::Open, Fact::Overdue, "is overdue")
            }
            72..78 => {
                self.silence(&[EVERYTHING], random);
                self.life.written_off();
                self.to(Stage::WrittenOff, Fact::WrittenOff, "is written off")
            }
            78..83 => self.void(random),
            83..88 => self.pay_outside(random),
            _ => self.pay_by_card(random),
        }
    }

    fn pay_by_card(&mut self, random: &mut StdRng) -> &'static str {
        self.silence(
            &[
                EVERYTHING,
                &["invoice."],
                &["charge."],
                &["payment_intent."],
            ],
            random,
        );
        self.life.paid_by_card();
        self.to(Stage::PaidByCard, Fact::Paid, "is paid by card or debit")
    }

    fn pay_outside(&mut self, random: &mut StdRng) -> &'static str {
        self.silence(&[EVERYTHING], random);
        self.life.paid_outside();
        self.to(Stage::PaidOtherwise, Fact::Paid, "is paid outside Stripe")
    }

    fn void(&mut self, random: &mut StdRng) -> &'static str {
        self.silence(&[EVERYTHING], random);
        self.life.voided();
        self.to(Stage::Voided, Fact::Voided, "is voided")
    }

    fn part(&mut self, random: &mut StdRng) -> &'static str {
        let rest = self.due - self.life.invoice.paid;
        let is_last = self.stage == Stage::PaidInParts && random.random_bool(0.4);
        let amount = if is_last || rest < 3 {
            rest
        } else {
            random.random_range(1..rest)
        };
        self.silence(&[&["invoice."]], random);
        self.life.part(amount);
        self.to(Stage::PaidInParts, Fact::Part, "");
        match amount == rest {
            true => self.to(
                Stage::PaidOtherwise,
                Fact::Paid,
                "gets its last part, and is paid",
            ),
            false => "gets a part",
        }
    }

    fn after_payment(&mut self, random: &mut StdRng) -> Option<&'static str> {
        let by_card = self.stage == Stage::PaidByCard;
        match random.random_range(0..4) {
            0 if by_card && self.refunded < self.due => {
                let amount = random.random_range(1..=self.due - self.refunded);
                self.refunded += amount;
                self.silence(&[&["refund."], &["charge."]], random);
                self.life.refunded(amount);
                Some(self.to(
                    self.stage,
                    Fact::Information,
                    "is refunded in part or whole",
                ))
            }
            1 if !self.is_credited && self.due > 0 => {
                self.is_credited = true;
                self.life.credited(random.random_range(1..=self.due));
                Some(self.to(self.stage, Fact::Information, "gets a credit note"))
            }
            2 if by_card && self.dispute == Dispute::None => {
                self.dispute = Dispute::Open;
                self.life.disputed();
                self.to(self.stage, Fact::Information, "");
                Some(self.to(
                    self.stage,
                    Fact::Information,
                    "is disputed, and the money withdrawn",
                ))
            }
            3 if self.dispute == Dispute::Open => {
                self.dispute = Dispute::Won;
                self.life.dispute_won();
                self.to(self.stage, Fact::Information, "");
                Some(self.to(
                    self.stage,
                    Fact::Information,
                    "has its dispute won, and the money back",
                ))
            }
            _ => None,
        }
    }

    fn to(&mut self, stage: Stage, fact: Fact, told: &'static str) -> &'static str {
        self.stage = stage;
        self.truth.push(Entry {
            fact,
            at: self.life.t,
        });
        told
    }

    /// What is one entry however often it happens.
    fn once(&mut self, fact: Fact, told: &'static str) -> &'static str {
        let is_first = self.truth.iter().all(|entry| entry.fact != fact);
        let entries = if is_first {
            &mut self.truth
        } else {
            &mut self.repeated
        };
        entries.push(Entry {
            fact,
            at: self.life.t,
        });
        told
    }
}

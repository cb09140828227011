//! Lives of invoices: the next change is drawn at random, and the entries that a merchant should
//! see are recorded at once, by the rules of payments and independently of any event.

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

use testkit::stripe::{BASIL, CLOVER, DAY, ENDIVE, Life, OLD, Stripe, Terms};

pub const CONNECTED: &str = "acct_1Connected";
/// Changes of one invoice within this many seconds are hard to tell apart and may be shown as one
/// until all is known.
pub const NEAR_S: i64 = 61;

/// Event types that Stripe fails to generate: all of them.
const EVERYTHING: &[&str] = &[""];
const NOTHING: &[&str] = &[];

/// Event types of an attempt. One of the three suffices to reconstruct it.
const OF_ATTEMPT: &[&[&str]] = &[&["charge."], &["payment_intent."], &["invoice."]];

/// An invoice at Stripe and its true history.
pub struct Invoice {
    pub uid: String,
    pub life: Life,
    account: Option<&'static str>,
    currency: &'static str,
    due: i64,
    /// Whether the invoice can have several payments, as since basil.
    is_payable_in_parts: bool,
    stage: Stage,
    /// Number of failed attempts.
    failed: usize,
    is_overdue: bool,
    is_credited: bool,
    refunded: i64,
    dispute: Dispute,
    truth: Vec<Entry>,
    /// Repetitions of an entry, shown at their own time while the first one is unknown.
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

/// An entry of a true history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub fact: Fact,
    /// Time in Unix seconds.
    pub at: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    Finalized,
    /// Authentication required after this many failed attempts.
    ActionRequired(usize),
    InFlight(usize),
    Part,
    Failed,
    Overdue,
    WrittenOff,
    Voided,
    Paid,
    /// Money returned or disputed, or a credit note.
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

    /// Returns the sort rank: before the end, the end, after it.
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

    /// Returns a `v1Invoice` that agrees with Stripe's invoice.
    pub fn document(&self) -> Value {
        let units = if self.currency == "jpy" { 1.0 } else { 100.0 };
        // The document supports no other unit.
        let spec = if self.currency == "usd" {
            json!({"paymentUnit": "usd"})
        } else {
            json!({})
        };
        json!({"metadata": {"uid": self.uid}, "spec": spec,
            "status": {"billableAmount": self.due as f64 / units, "stripeInvoiceId": self.life.id()}})
    }

    /// Returns the true history in display order.
    pub fn truth(&self) -> Vec<Entry> {
        let mut truth = self.truth.clone();
        truth.sort_by_key(|entry| (entry.fact.chapter(), entry.at));
        truth
    }

    pub fn repeated(&self) -> &[Entry] {
        &self.repeated
    }

    /// Returns whether the invoice belongs to a connected account.
    pub fn is_connected(&self) -> bool {
        self.account.is_some()
    }

    /// Returns whether the invoice was paid outside Stripe.
    ///
    /// The certainty of that depends on the API version.
    pub fn is_paid_outside(&self) -> bool {
        self.life.invoice.paid_outside > 0
    }

    /// Makes a random change at this time.
    ///
    /// Returns its description, or `None` if no change is possible.
    pub fn live(&mut self, now: i64, random: &mut StdRng) -> Option<&'static str> {
        self.life.now_s = now;
        let description = self.next(random);
        self.life.omit_events(NOTHING);
        description
    }

    /// Occasionally makes Stripe fail to generate some kinds of events.
    ///
    /// Other events of the same change or the object still show what they would assert.
    fn omit_events(&mut self, gaps: &[&'static [&'static str]], random: &mut StdRng) {
        if random.random_bool(0.1) {
            self.life.omit_events(gaps.choose(random).unwrap());
        }
    }

    fn next(&mut self, random: &mut StdRng) -> Option<&'static str> {
        match self.stage {
            Stage::Draft if self.due == 0 => {
                self.omit_events(&[EVERYTHING], random);
                self.life.paid_at_zero();
                Some(self.to(
                    Stage::PaidOtherwise,
                    Fact::Paid,
                    "has nothing to collect, and is paid",
                ))
            }
            Stage::Draft => {
                self.omit_events(&[EVERYTHING], random);
                self.life.finalized();
                Some(self.to(Stage::Open, Fact::Finalized, "is finalized"))
            }
            Stage::Open => Some(self.collect(random)),
            Stage::Debit if random.random_bool(0.4) => {
                self.omit_events(OF_ATTEMPT, random);
                self.life.debit_returned();
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
                self.omit_events(OF_ATTEMPT, random);
                let reason = *["insufficient_funds", "expired_card", "generic"]
                    .choose(random)
                    .unwrap();
                self.life
                    .declined(reason, random.random_bool(0.7).then_some(3 * DAY));
                self.failed += 1;
                self.to(Stage::Open, Fact::Failed, "is declined")
            }
            28..42 => {
                self.omit_events(&[&["payment_intent."], &["invoice."]], random);
                self.life.action_required();
                self.once(
                    Fact::ActionRequired(self.failed),
                    "needs the customer to act",
                )
            }
            42..58 => {
                self.omit_events(&[&["payment_intent."], &["charge."]], random);
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
                self.omit_events(&[EVERYTHING], random);
                self.life.written_off();
                self.to(Stage::WrittenOff, Fact::WrittenOff, "is written off")
            }
            78..83 => self.void(random),
            83..88 => self.pay_outside(random),
            _ => self.pay_by_card(random),
        }
    }

    fn pay_by_card(&mut self, random: &mut StdRng) -> &'static str {
        self.omit_events(
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
        self.omit_events(&[EVERYTHING], random);
        self.life.paid_outside();
        self.to(Stage::PaidOtherwise, Fact::Paid, "is paid outside Stripe")
    }

    fn void(&mut self, random: &mut StdRng) -> &'static str {
        self.omit_events(&[EVERYTHING], random);
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
        self.omit_events(&[&["invoice."]], random);
        self.life.pay_part(amount);
        self.to(Stage::PaidInParts, Fact::Part, "");

        if amount == rest {
            self.to(
                Stage::PaidOtherwise,
                Fact::Paid,
                "gets its last part, and is paid",
            )
        } else {
            "gets a part"
        }
    }

    fn after_payment(&mut self, random: &mut StdRng) -> Option<&'static str> {
        let by_card = self.stage == Stage::PaidByCard;
        match random.random_range(0..4) {
            0 if by_card && self.refunded < self.due => {
                let amount = random.random_range(1..=self.due - self.refunded);
                self.refunded += amount;
                self.omit_events(&[&["refund."], &["charge."]], random);
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

    fn to(&mut self, stage: Stage, fact: Fact, description: &'static str) -> &'static str {
        self.stage = stage;
        self.truth.push(Entry {
            fact,
            at: self.life.now_s,
        });
        description
    }

    /// Records an entry that appears once however often it happens.
    fn once(&mut self, fact: Fact, description: &'static str) -> &'static str {
        let is_first = self.truth.iter().all(|entry| entry.fact != fact);
        let entries = if is_first {
            &mut self.truth
        } else {
            &mut self.repeated
        };
        entries.push(Entry {
            fact,
            at: self.life.now_s,
        });
        description
    }
}

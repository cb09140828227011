//! The four payment states, and the states that were imported with a stored document.

use serde::{Deserialize, Serialize};

/// The payment state of an invoice. `docs/payment-states.md` lists the facts that lead to each
/// state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PaymentState {
    Paid,
    PaymentPending,
    PaymentInProgress,
    PaymentFailed,
}

impl PaymentState {
    /// All payment states.
    pub const ALL: [PaymentState; 4] = [
        PaymentState::Paid,
        PaymentState::PaymentPending,
        PaymentState::PaymentInProgress,
        PaymentState::PaymentFailed,
    ];

    /// Returns the name in JSON, on the command line and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            PaymentState::Paid => "Paid",
            PaymentState::PaymentPending => "PaymentPending",
            PaymentState::PaymentInProgress => "PaymentInProgress",
            PaymentState::PaymentFailed => "PaymentFailed",
        }
    }

    /// Parses a name that [`PaymentState::as_str`] returns. Returns `None` for any other text.
    pub fn parse(text: &str) -> Option<PaymentState> {
        PaymentState::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
    }
}

/// A state that the document contained when it was first stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportedState {
    pub state: PaymentState,
    /// Unix milliseconds.
    pub timestamp_ms: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

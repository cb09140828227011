#![allow(unused_variables)]
use super::history::Entry;
use serde::{Deserialize, Serialize};
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    Paid,
    PaymentPending,
    PaymentInProgress,
    PaymentFailed,
}
impl State {
    pub fn as_str(self) -> &'static str {
        todo!()
    }
}
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportedState {
    pub state: State,
    pub timestamp_ms: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub pointer: String,
    pub reason: String,
}
#[derive(Clone, Debug)]
pub struct ValidInvoice {
    pub document: serde_json::Value,
    pub stripe_invoice_id: Option<String>,
    pub imported_states: Vec<ImportedState>,
    pub uid: Option<String>,
}
pub fn validate(document: serde_json::Value) -> Result<ValidInvoice, Vec<Fault>> {
    todo!()
}
pub fn validate_uid(uid: &str) -> Result<(), String> {
    todo!()
}
pub fn render(document: &serde_json::Value, entries: &[Entry]) -> serde_json::Value {
    todo!()
}
pub fn timestamp(ms: i64) -> String {
    todo!()
}

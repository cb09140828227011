#![allow(unused_variables)]
use super::event::{EventKey, Telling};
use super::invoice::{ImportedState, State};
#[derive(Clone, Debug, PartialEq)]
pub struct Known { pub key: EventKey, pub telling: Telling }
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry { pub state: State, pub timestamp_ms: i64, pub message: Option<String>, pub proofs: Vec<EventKey> }
pub fn fold(stripe_invoice_id: Option<&str>, imported: &[ImportedState], known: &[Known]) -> Vec<Entry> { todo!() }

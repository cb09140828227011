#![allow(unused_variables)]
use crate::{inbox::{Inbox, InboxError}, store::{NewEvent, Source}};
#[derive(Clone, Debug)]
pub struct Delivery { pub body: bytes::Bytes, pub source: Source, pub secret_label: Option<String>, pub received_ms: i64 }
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome { Recorded, Duplicate, NoPaymentFact, Unreadable }
impl Outcome { pub fn as_str(self) -> &'static str { todo!() } }
pub fn prepare(delivery: Delivery) -> NewEvent { todo!() }
pub async fn ingest(inbox: &Inbox, delivery: Delivery) -> Result<Outcome, InboxError> { todo!() }

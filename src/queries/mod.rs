//! Reads for people: invoices with their history, events, evidence, and the payment summary.

pub mod events;
pub mod evidence;
pub mod folding;
pub mod invoices;
pub mod payment_summary;

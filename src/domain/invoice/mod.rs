//! The stored invoice document: its types, its schema, and the comparison with the invoice at
//! Stripe.

pub mod comparison;
pub mod document;
pub mod schema;

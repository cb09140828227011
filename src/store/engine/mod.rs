//! Connections of the two engines: opening, pooling, and what their SQL cannot share.

pub(super) mod connection;
pub(super) mod pool;
pub(super) mod postgres;
pub(super) mod sqlite;

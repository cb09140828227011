//! Connections of the two engines: opening, pooling, and the SQL that the engines cannot share.

mod checkpointer;
pub(super) mod circuit_breaker;
pub(super) mod connection;
mod file_identity;
mod interruptible;
pub(super) mod pool;
pub(super) mod postgres;
pub(super) mod postgres_connection;
pub(super) mod postgres_server;
pub(super) mod sqlite;

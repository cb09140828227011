//! Servers, databases, a fake Stripe and fixtures for the tests and benchmarks.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

pub mod collector;
mod command;
mod database;
pub mod fixtures;
mod http;
mod invoice_schema;
mod load;
pub mod openapi;
mod pooler;
mod postgres;
mod server;
pub mod stripe;

pub use command::{CommandOutput, binary, binary_path, run};
pub use database::{Database, Engine};
pub use fixtures::Files;
pub use http::{Answer, Wire, client, send, send_raw, try_send};
pub use invoice_schema::{V1_INVOICE_SCHEMA, assert_is_invoice};
pub use load::Load;
pub use pooler::Pooler;
pub use postgres::PostgresServer;
pub use server::{OLD_SECRET, SECRET, Server, TestServer, invoice_path, signature, uid_and_states};

/// Defines tests that run on every engine: `name::sqlite` and `name::postgres`.
#[macro_export]
macro_rules! each_database {
    ($($(#[$attribute:meta])* async fn $name:ident($server:ident: TestServer) $body:block)*) => {
        $(
            $(#[$attribute])*
            mod $name {
                #[allow(unused_imports)]
                use super::*;

                async fn run($server: $crate::TestServer) $body

                #[tokio::test]
                async fn sqlite() {
                    run($crate::TestServer::start($crate::Engine::Sqlite).await).await
                }

                #[tokio::test]
                async fn postgres() {
                    run($crate::TestServer::start($crate::Engine::Postgres).await).await
                }
            }
        )*
    };
}

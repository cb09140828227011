//! What the tests stand on: a world with a server in it, a database, and the means to talk to both.

pub mod collector;
mod command;
mod database;
pub mod documented;
mod http;
mod load;
mod pooler;
mod postgres;
pub mod recorded;
mod schema;
mod server;

pub use command::{CommandOutput, binary, run};
pub use database::{Database, Engine};
pub use http::{Answer, Wire, client, send, send_raw, try_send};
pub use load::Load;
pub use pooler::Pooler;
pub use postgres::PostgresServer;
pub use recorded::Files;
pub use schema::assert_is_invoice;
pub use server::{OLD_SECRET, SECRET, Server, TestServer, invoice_path, signature, uid_and_states};

/// Writes each test once and runs it on every engine: `name::sqlite` and so on.
#[macro_export]
macro_rules! each_database {
    ($($(#[$attribute:meta])* async fn $name:ident($server:ident: TestServer) $body:block)*) => {
        $(
            $(#[$attribute])*
            mod $name {
                #[allow(unused_imports)]
                use super::*;

                async fn run($server: $crate::support::TestServer) $body

                #[tokio::test]
                async fn sqlite() {
                    run($crate::support::TestServer::start($crate::support::Engine::Sqlite).await).await
                }

                #[tokio::test]
                async fn postgres() {
                    run($crate::support::TestServer::start($crate::support::Engine::Postgres).await).await
                }
            }
        )*
    };
}

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
mod world;

pub use command::{Ran, binary, run};
pub use database::{Database, Engine};
pub use http::{Answer, Wire, client, send, send_raw, try_send};
pub use load::Load;
pub use pooler::Pooler;
pub use postgres::PostgresServer;
pub use recorded::Files;
pub use schema::assert_is_invoice;
pub use world::{OLD_SECRET, SECRET, Server, World, invoice_path, signature, uid_and_states};

/// Writes each test once and runs it on every engine: `name::sqlite` and so on.
#[macro_export]
macro_rules! each_database {
    ($($(#[$attribute:meta])* async fn $name:ident($world:ident: World) $body:block)*) => {
        $(
            $(#[$attribute])*
            mod $name {
                #[allow(unused_imports)]
                use super::*;

                async fn run($world: $crate::support::World) $body

                #[tokio::test]
                async fn sqlite() {
                    run($crate::support::World::start($crate::support::Engine::Sqlite).await).await
                }

                #[tokio::test]
                async fn postgres() {
                    run($crate::support::World::start($crate::support::Engine::Postgres).await).await
                }
            }
        )*
    };
}

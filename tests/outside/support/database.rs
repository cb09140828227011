//! An empty database of its own for each world.

use sqlx::{Connection, SqliteConnection};
use tempfile::TempDir;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Sqlite,
}

/// Gone when it is dropped.
pub struct Database {
    pub engine: Engine,
    pub url: String,
    _folder: TempDir,
}

impl Database {
    pub fn create(engine: Engine) -> Database {
        match engine {
            Engine::Sqlite => {
                let folder = tempfile::tempdir().unwrap();
                Database { engine, url: format!("sqlite://{}/test.db", folder.path().display()), _folder: folder }
            }
        }
    }

    /// Locks everybody else out of writing events until it is released. Reading goes on.
    pub async fn hold(&self) -> Held {
        match self.engine {
            Engine::Sqlite => {
                let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
                sqlx::query("begin immediate").execute(&mut connection).await.unwrap();
                Held::Sqlite(connection)
            }
        }
    }
}

pub enum Held {
    Sqlite(SqliteConnection),
}

impl Held {
    pub async fn release(self) {
        match self {
            Held::Sqlite(mut connection) => {
                sqlx::query("rollback").execute(&mut connection).await.unwrap();
            }
        }
    }
}

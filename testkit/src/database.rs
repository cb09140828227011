//! An empty database of its own for each world.

use std::path::Path;
use std::sync::Arc;

use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use tempfile::TempDir;

use super::postgres::PostgresServer;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Sqlite,
    Postgres,
}

/// Gone when it is dropped.
pub struct Database {
    pub engine: Engine,
    pub url: String,
    place: TestStore,
}

enum TestStore {
    Folder(#[expect(dead_code, reason = "it is removed when it is dropped")] TempDir),
    Server {
        server: Arc<PostgresServer>,
        name: String,
    },
}

impl Database {
    pub fn create(engine: Engine) -> Database {
        match engine {
            Engine::Sqlite => {
                let folder = tempfile::tempdir().unwrap();
                let url = format!("sqlite://{}/test.db", folder.path().display());
                Database {
                    engine,
                    url,
                    place: TestStore::Folder(folder),
                }
            }
            Engine::Postgres => Database::create_on(PostgresServer::shared()),
        }
    }

    pub fn create_on(server: &Arc<PostgresServer>) -> Database {
        let name = server.create_database();
        Database {
            engine: Engine::Postgres,
            url: server.url(&name),
            place: TestStore::Server {
                server: server.clone(),
                name,
            },
        }
    }

    /// The same database, by another way than straight to its server.
    pub fn by_way_of(mut self, url: impl FnOnce(&str) -> String) -> Database {
        let TestStore::Server { name, .. } = &self.place else {
            unreachable!("SQLite has no other way")
        };
        self.url = url(name);
        self
    }

    /// Does what nobody does through the program.
    pub async fn execute(&self, statement: &str) {
        let statement = sqlx::raw_sql(AssertSqlSafe(statement.to_owned()));
        match self.engine {
            Engine::Sqlite => {
                let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
                statement.execute(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
            Engine::Postgres => {
                let mut connection = PgConnection::connect(&self.url).await.unwrap();
                statement.execute(&mut connection).await.unwrap();
            }
        }
    }

    /// Of a PostgreSQL: into a file.
    pub fn dump(&self, file: &Path) {
        let TestStore::Server { server, name } = &self.place else {
            unreachable!("SQLite is copied")
        };
        server.dump(name, file);
    }

    /// Of a PostgreSQL: out of a file.
    pub fn restore(&self, file: &Path) {
        let TestStore::Server { server, name } = &self.place else {
            unreachable!("SQLite is copied")
        };
        server.restore(name, file);
    }

    /// Locks everybody else out of writing events until it is released. Reading goes on.
    pub async fn hold(&self) -> LockGuard {
        match self.engine {
            Engine::Sqlite => {
                let mut connection = SqliteConnection::connect(&self.url).await.unwrap();
                sqlx::query("begin immediate")
                    .execute(&mut connection)
                    .await
                    .unwrap();
                LockGuard::Sqlite(connection)
            }
            Engine::Postgres => {
                let mut connection = PgConnection::connect(&self.url).await.unwrap();
                sqlx::raw_sql("begin; lock table events in exclusive mode")
                    .execute(&mut connection)
                    .await
                    .unwrap();
                LockGuard::Postgres(connection)
            }
        }
    }
}

pub enum LockGuard {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl LockGuard {
    pub async fn release(self) {
        match self {
            LockGuard::Sqlite(mut connection) => drop(
                sqlx::query("rollback")
                    .execute(&mut connection)
                    .await
                    .unwrap(),
            ),
            LockGuard::Postgres(mut connection) => drop(
                sqlx::query("rollback")
                    .execute(&mut connection)
                    .await
                    .unwrap(),
            ),
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if let TestStore::Server { server, name } = &self.place {
            // Any other may be stopped, and is gone with its test.
            if Arc::ptr_eq(server, PostgresServer::shared()) {
                server.drop_database(name);
            }
        }
    }
}

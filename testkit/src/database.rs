//! An empty database for each test.

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

/// A database that is removed when it is dropped.
pub struct Database {
    pub engine: Engine,
    pub url: String,
    storage: Storage,
}

enum Storage {
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
                    storage: Storage::Folder(folder),
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
            storage: Storage::Server {
                server: server.clone(),
                name,
            },
        }
    }

    /// Returns the database with another URL, for example that of a pooler.
    pub fn with_url(mut self, url: impl FnOnce(&str) -> String) -> Database {
        let Storage::Server { name, .. } = &self.storage else {
            unreachable!("SQLite has no other way")
        };
        self.url = url(name);
        self
    }

    /// Executes a statement behind the program's back.
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

    /// Dumps a PostgreSQL database into a file.
    pub fn dump(&self, file: &Path) {
        let Storage::Server { server, name } = &self.storage else {
            unreachable!("SQLite is copied")
        };
        server.dump(name, file);
    }

    /// Restores a PostgreSQL database from a file.
    pub fn restore(&self, file: &Path) {
        let Storage::Server { server, name } = &self.storage else {
            unreachable!("SQLite is copied")
        };
        server.restore(name, file);
    }

    /// Blocks all writers of events until the guard is released. Reads continue.
    pub async fn lock(&self) -> LockGuard {
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
        if let Storage::Server { server, name } = &self.storage {
            // Any other server may be stopped already, and is removed with its test.
            if Arc::ptr_eq(server, PostgresServer::shared()) {
                server.drop_database(name);
            }
        }
    }
}

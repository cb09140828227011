//! An empty database of its own for each world.

use tempfile::TempDir;

use super::postgres::PostgresServer;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Sqlite,
    Postgres,
}

/// Gone when it is dropped.
pub struct Database {
    pub url: String,
    place: Place,
}

enum Place {
    Folder(TempDir),
    Server { name: String },
}

impl Database {
    pub fn create(engine: Engine) -> Database {
        match engine {
            Engine::Sqlite => {
                let folder = tempfile::tempdir().unwrap();
                let url = format!("sqlite://{}/test.db", folder.path().display());
                Database { url, place: Place::Folder(folder) }
            }
            Engine::Postgres => {
                let server = PostgresServer::shared();
                let name = server.create_database();
                Database { url: server.url(&name), place: Place::Server { name } }
            }
        }
    }

    pub fn engine(&self) -> Engine {
        match &self.place {
            Place::Folder(_) => Engine::Sqlite,
            Place::Server { .. } => Engine::Postgres,
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if let Place::Server { name } = &self.place {
            PostgresServer::shared().drop_database(name);
        }
    }
}

//! An empty database of its own for each world.

use tempfile::TempDir;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Sqlite,
}

/// Gone when it is dropped.
pub struct Database {
    pub url: String,
    _folder: TempDir,
}

impl Database {
    pub fn create(engine: Engine) -> Database {
        match engine {
            Engine::Sqlite => {
                let folder = tempfile::tempdir().unwrap();
                Database { url: format!("sqlite://{}/test.db", folder.path().display()), _folder: folder }
            }
        }
    }
}

//! What a store can fail with: one kind to try again, one kind not to.

use sqlx::migrate::MigrateError;

#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Away, locked, full or not migrated: the same call may succeed later.
    #[error("the database cannot be reached: {0}")]
    Unavailable(String),
    /// The database answered, and trying again changes nothing.
    #[error("the database refused: {0}")]
    Refused(String),
}

impl StoreError {
    /// Names the file that the error is about.
    pub(super) fn about(self, path: &str) -> StoreError {
        match self {
            StoreError::Unavailable(reason) => StoreError::Unavailable(format!("{path}: {reason}")),
            StoreError::Refused(reason) => StoreError::Refused(format!("{path}: {reason}")),
        }
    }
}

/// SQLite's primary result codes that pass: busy, locked, read-only, I/O error, full, cannot open.
const PASSING: [u32; 6] = [5, 6, 8, 10, 13, 14];

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> StoreError {
        use sqlx::Error::*;
        let passes = match &error {
            Io(_) | Tls(_) | Protocol(_) | PoolTimedOut | PoolClosed | WorkerCrashed => true,
            Database(database) => {
                let code = database.code().and_then(|code| code.parse::<u32>().ok());
                code.is_some_and(|code| PASSING.contains(&(code & 0xff))) || database.message().contains("no such table")
            }
            _ => false,
        };
        match &error {
            Database(database) if database.message().contains("no such table") => {
                StoreError::Unavailable("it is not migrated: run `stripe-reconciler migrate`".to_owned())
            }
            Database(database) if passes => StoreError::Unavailable(database.message().to_owned()),
            Database(database) => StoreError::Refused(database.message().to_owned()),
            _ if passes => StoreError::Unavailable(error.to_string()),
            _ => StoreError::Refused(error.to_string()),
        }
    }
}

impl From<MigrateError> for StoreError {
    fn from(error: MigrateError) -> StoreError {
        match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error.into(),
            MigrateError::VersionMissing(version) => StoreError::Refused(format!(
                "it was migrated by a newer version of this program (migration {version} is not known here)"
            )),
            other => StoreError::Refused(other.to_string()),
        }
    }
}

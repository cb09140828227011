//! What a store can fail with, by what the caller can do about it.

use sqlx::error::DatabaseError;
use sqlx::migrate::MigrateError;
use sqlx::postgres::PgDatabaseError;

#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The server is away, or about to be: no other call will fare better now.
    #[error("the database cannot be reached: {0}")]
    Away(String),
    /// Locked, full or not migrated: the same call may succeed later.
    #[error("the database cannot take it now: {0}")]
    Unavailable(String),
    /// Another writer was faster: the same call may succeed at once.
    #[error("the database is contended: {0}")]
    Contended(String),
    /// The database answered, and trying again changes nothing.
    #[error("the database refused: {0}")]
    Refused(String),
}

impl StoreError {
    /// Without what kind of failure it is.
    pub(crate) fn reason(&self) -> &str {
        match self {
            StoreError::Away(reason)
            | StoreError::Unavailable(reason)
            | StoreError::Contended(reason)
            | StoreError::Refused(reason) => reason,
        }
    }

    /// Puts what the error is about in front.
    pub(super) fn about(self, what: &str) -> StoreError {
        let about = |reason: String| format!("{what}: {reason}");
        match self {
            StoreError::Away(reason) => StoreError::Away(about(reason)),
            StoreError::Unavailable(reason) => StoreError::Unavailable(about(reason)),
            StoreError::Contended(reason) => StoreError::Contended(about(reason)),
            StoreError::Refused(reason) => StoreError::Refused(about(reason)),
        }
    }
}

/// SQLite's primary result codes that pass: busy, locked, read-only, I/O error, full, cannot open.
const PASSING: [u32; 6] = [5, 6, 8, 10, 13, 14];
/// PostgreSQL: somebody made the database read-only, or the server is a standby, which takes no serializable transaction either.
pub(super) const READ_ONLY: [&str; 2] = ["25006", "0A000"];
/// PostgreSQL's classes of errors that mean the server: connection, out of resources, going down, system error.
const SERVER: [&str; 4] = ["08", "53", "57", "58"];

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> StoreError {
        use sqlx::Error::*;
        match &error {
            Io(_) | Tls(_) | Protocol(_) | PoolClosed | WorkerCrashed => {
                StoreError::Away(error.to_string())
            }
            PoolTimedOut => StoreError::Unavailable(
                "no connection is free: another statement takes too long".to_owned(),
            ),
            Database(database) => of_database(&**database),
            _ => StoreError::Refused(error.to_string()),
        }
    }
}

fn of_database(error: &dyn DatabaseError) -> StoreError {
    let message = error.message().to_owned();
    let code = error.code().unwrap_or_default();
    if error.is_unique_violation() {
        return StoreError::Contended(message);
    }
    if code == "42P01" || message.contains("no such table") {
        return StoreError::Unavailable("it is empty: it was never migrated".to_owned());
    }
    if error.try_downcast_ref::<PgDatabaseError>().is_some() {
        return match &*code {
            "40001" | "40P01" => StoreError::Contended(message),
            // Its disk is full, it has no connection more, or it is read-only: what is there can still be read.
            code if code == "53100" || code == "53300" || READ_ONLY.contains(&code) => {
                StoreError::Unavailable(message)
            }
            code if SERVER.contains(&&code[..2]) => StoreError::Away(message),
            _ => StoreError::Refused(message),
        };
    }
    match code.parse::<u32>() {
        Ok(code) if PASSING.contains(&(code & 0xff)) => StoreError::Unavailable(message),
        _ => StoreError::Refused(message),
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

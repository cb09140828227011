//! Errors of store calls: the kind of failure, and the options that the caller has.
//!
//! This module alone derives the kind, from the SQLSTATE or SQLite result code. No other code reads
//! an engine's message.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use sqlx::error::DatabaseError;
use sqlx::migrate::MigrateError;
use sqlx::postgres::PgDatabaseError;

/// A failed store call.
///
/// Cheap to clone, because one failed commit answers a whole batch of deliveries.
#[derive(Clone, Debug)]
pub struct StoreError {
    kind: StoreErrorKind,
    context: Cow<'static, str>,
    source: Option<Arc<sqlx::Error>>,
}

/// The cause of a failure. Causes differ if an operator acts differently on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// The database is empty: no migration was ever applied.
    NotMigrated,
    /// The database lacks migrations that this version needs.
    SchemaOlder,
    /// A newer version of this program migrated the database.
    SchemaNewer,
    /// The SQLite file does not exist, or no longer exists.
    FileMissing,
    /// Another file took the place of the SQLite file that was opened.
    FileReplaced,
    /// SQLite's write-ahead log or its index was replaced, deleted or truncated.
    LogLost,
    /// The database, its file or the transaction is read-only.
    ReadOnly,
    /// The PostgreSQL server is a standby.
    Standby,
    /// The disk of the database is full.
    DiskFull,
    /// PostgreSQL has no free connection slot.
    TooManyConnections,
    /// Another process or statement holds a lock that this call needs.
    Locked,
    /// The database file is damaged, or is not a database.
    Corrupt,
    /// A stored row cannot be read.
    DamagedRow,
    /// SQLite cannot read, write or open its file.
    Io,
    /// The server cannot be reached, or is shutting down.
    Unreachable,
    /// The server did not answer in time.
    Unresponsive,
    /// A concurrent writer caused a conflict.
    Contended,
    /// The database acknowledges commits that a crash can lose or damage.
    UnsafeCommit,
    /// The database refuses the request itself: credentials, names, values.
    Rejected,
}

/// The options that a caller has after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorClass {
    /// No other call can succeed now: the circuit breaker opens.
    Away,
    /// The same call may succeed later: the answer is 503.
    Unavailable,
    /// The same call may succeed at once.
    Contended,
    /// Repeating the call changes nothing: the answer is 500, and a batch is retried one by one.
    Rejected,
}

impl StoreErrorKind {
    /// Returns the options that a caller has after a failure of this kind.
    pub fn class(self) -> StoreErrorClass {
        use StoreErrorKind::{
            Contended, Corrupt, DamagedRow, DiskFull, FileMissing, FileReplaced, Io, Locked,
            LogLost, NotMigrated, ReadOnly, Rejected, SchemaNewer, SchemaOlder, Standby,
            TooManyConnections, Unreachable, Unresponsive, UnsafeCommit,
        };
        match self {
            Unreachable => StoreErrorClass::Away,
            NotMigrated | SchemaOlder | SchemaNewer | FileMissing | FileReplaced | LogLost
            | ReadOnly | Standby | DiskFull | TooManyConnections | Locked | Io | Unresponsive
            | UnsafeCommit => StoreErrorClass::Unavailable,
            Contended => StoreErrorClass::Contended,
            Corrupt | DamagedRow | Rejected => StoreErrorClass::Rejected,
        }
    }

    fn as_str(self) -> &'static str {
        use StoreErrorKind::{
            Contended, Corrupt, DamagedRow, DiskFull, FileMissing, FileReplaced, Io, Locked,
            LogLost, NotMigrated, ReadOnly, Rejected, SchemaNewer, SchemaOlder, Standby,
            TooManyConnections, Unreachable, Unresponsive, UnsafeCommit,
        };
        match self {
            NotMigrated => "database was never migrated",
            SchemaOlder => "database lacks migrations",
            SchemaNewer => "database was migrated by a newer version of this program",
            FileMissing => "database file is missing",
            FileReplaced => "database file was replaced",
            LogLost => "database log was lost",
            ReadOnly => "database is read-only",
            Standby => "database server is a standby",
            DiskFull => "database disk is full",
            TooManyConnections => "database has no free connection slot",
            Locked => "database is locked or busy",
            Corrupt => "database is damaged",
            DamagedRow => "stored data is damaged",
            Io => "database file cannot be read or written",
            Unreachable => "database cannot be reached",
            Unresponsive => "database does not answer",
            Contended => "database transaction conflicts with another",
            UnsafeCommit => "database may lose acknowledged commits",
            Rejected => "database rejected the request",
        }
    }
}

impl fmt::Display for StoreErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl StoreError {
    /// Creates an error of this kind. `context` adds what the kind leaves open; it may be empty.
    pub(crate) fn new(kind: StoreErrorKind, context: impl Into<Cow<'static, str>>) -> StoreError {
        StoreError {
            kind,
            context: context.into(),
            source: None,
        }
    }

    /// Creates an error about a stored row that cannot be read.
    pub(crate) fn damaged(context: impl Into<Cow<'static, str>>) -> StoreError {
        StoreError::new(StoreErrorKind::DamagedRow, context)
    }

    /// Creates an error about a call that did not end within its time limit.
    pub(crate) fn unresponsive() -> StoreError {
        StoreError::new(StoreErrorKind::Unresponsive, "")
    }

    /// Puts a subject, such as a file, in front of the context. Kind and source stay.
    pub(super) fn with_subject(self, subject: &str) -> StoreError {
        StoreError {
            context: format!("{subject}: {}", self.context).into(),
            ..self
        }
    }

    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Returns the options that a caller has after this error.
    pub fn class(&self) -> StoreErrorClass {
        self.kind.class()
    }

    /// Returns the cause without its kind: the message of the engine or of the store.
    pub fn reason(&self) -> &str {
        if self.context.is_empty() {
            self.kind.as_str()
        } else {
            &self.context
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if !self.context.is_empty() {
            write!(f, ": {}", self.context)?;
        }
        Ok(())
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = self.source.as_deref()?;
        Some(source)
    }
}

/// SQLSTATE classes that mean the server is unavailable or about to be: connection exception,
/// insufficient resources, operator intervention, system error.
const SERVER_CLASSES: [&str; 4] = ["08", "53", "57", "58"];

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> StoreError {
        use sqlx::Error::{Database, Io, PoolClosed, PoolTimedOut, Protocol, Tls, WorkerCrashed};
        let (kind, context) = match &error {
            Io(_) | Tls(_) | Protocol(_) | PoolClosed | WorkerCrashed => {
                (StoreErrorKind::Unreachable, error.to_string())
            }
            PoolTimedOut => {
                let reason = "no connection became free: another statement takes too long";
                (StoreErrorKind::Locked, reason.to_owned())
            }
            Database(database) => (kind_of(&**database), database.message().to_owned()),
            _ => (StoreErrorKind::Rejected, error.to_string()),
        };

        StoreError {
            kind,
            context: context.into(),
            source: Some(Arc::new(error)),
        }
    }
}

fn kind_of(error: &dyn DatabaseError) -> StoreErrorKind {
    let code = error.code().unwrap_or_default();
    if error.is_unique_violation() {
        return StoreErrorKind::Contended;
    }

    if error.try_downcast_ref::<PgDatabaseError>().is_some() {
        return kind_of_sqlstate(&code);
    }

    // SQLite reports a missing table as a generic SQLITE_ERROR (1), so the text has to decide.
    if error.message().contains("no such table") {
        return StoreErrorKind::NotMigrated;
    }

    code.parse()
        .map_or(StoreErrorKind::Rejected, kind_of_sqlite_code)
}

fn kind_of_sqlstate(code: &str) -> StoreErrorKind {
    match code {
        "40001" | "40P01" => StoreErrorKind::Contended,
        "42P01" => StoreErrorKind::NotMigrated,
        "25006" => StoreErrorKind::ReadOnly,
        // A standby rejects a serializable transaction with "feature not supported".
        "0A000" => StoreErrorKind::Standby,
        "53100" => StoreErrorKind::DiskFull,
        // A cancelled statement, or one that took too long, proves nothing about the server.
        "57014" => StoreErrorKind::Locked,
        "53300" => StoreErrorKind::TooManyConnections,
        "XX001" | "XX002" => StoreErrorKind::Corrupt,
        code if code
            .get(..2)
            .is_some_and(|class| SERVER_CLASSES.contains(&class)) =>
        {
            StoreErrorKind::Unreachable
        }
        _ => StoreErrorKind::Rejected,
    }
}

/// Decides by the primary result code: the lowest byte of SQLite's extended code.
fn kind_of_sqlite_code(code: u32) -> StoreErrorKind {
    match code & 0xff {
        5 | 6 => StoreErrorKind::Locked,
        8 => StoreErrorKind::ReadOnly,
        10 | 14 => StoreErrorKind::Io,
        11 | 26 => StoreErrorKind::Corrupt,
        13 => StoreErrorKind::DiskFull,
        _ => StoreErrorKind::Rejected,
    }
}

impl From<MigrateError> for StoreError {
    fn from(error: MigrateError) -> StoreError {
        match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error.into(),
            MigrateError::VersionMissing(version) => StoreError::new(
                StoreErrorKind::SchemaNewer,
                format!("this version does not know migration {version}"),
            ),
            other => StoreError::new(StoreErrorKind::Rejected, other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlstate_decides_kind_and_class() {
        use StoreErrorKind::*;

        for (code, kind, class) in [
            ("40001", Contended, StoreErrorClass::Contended),
            ("40P01", Contended, StoreErrorClass::Contended),
            ("42P01", NotMigrated, StoreErrorClass::Unavailable),
            ("25006", ReadOnly, StoreErrorClass::Unavailable),
            ("0A000", Standby, StoreErrorClass::Unavailable),
            ("53100", DiskFull, StoreErrorClass::Unavailable),
            ("53300", TooManyConnections, StoreErrorClass::Unavailable),
            ("53200", Unreachable, StoreErrorClass::Away),
            ("08006", Unreachable, StoreErrorClass::Away),
            ("57P01", Unreachable, StoreErrorClass::Away),
            ("57014", Locked, StoreErrorClass::Unavailable),
            ("58030", Unreachable, StoreErrorClass::Away),
            ("XX001", Corrupt, StoreErrorClass::Rejected),
            ("28P01", Rejected, StoreErrorClass::Rejected),
            ("", Rejected, StoreErrorClass::Rejected),
        ] {
            assert_eq!(kind_of_sqlstate(code), kind, "{code}");
            assert_eq!(kind.class(), class, "{code}");
        }
    }

    #[test]
    fn extended_sqlite_code_counts_as_its_primary() {
        use StoreErrorKind::*;

        for (code, kind) in [
            (5, Locked),
            (261, Locked),
            (6, Locked),
            (8, ReadOnly),
            (1032, ReadOnly),
            (10, Io),
            (778, Io),
            (14, Io),
            (11, Corrupt),
            (26, Corrupt),
            (13, DiskFull),
            (1, Rejected),
        ] {
            assert_eq!(kind_of_sqlite_code(code), kind, "{code}");
        }
    }

    #[test]
    fn source_survives_cloning() {
        let error = StoreError::from(sqlx::Error::PoolTimedOut).clone();
        let source = std::error::Error::source(&error).unwrap();
        assert_eq!(source.to_string(), sqlx::Error::PoolTimedOut.to_string());
        assert_eq!(error.kind(), StoreErrorKind::Locked);
    }
}

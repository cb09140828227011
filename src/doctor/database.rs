//! Checks of the database and its disk, and the remedy for each kind of failure.

use super::format::{bytes, failing, ok, sentence, unknown, warning};
use super::{Check, CheckId};
use crate::monitoring::snapshot::HealthSnapshot;
use crate::store::{Durability, Space, StoreError, StoreErrorKind};

/// Free space that is enough however large the disk is.
const AMPLE_BYTES: u64 = 10 << 30;
/// Size from which the WAL of SQLite is suspicious. Its usual size is some megabytes.
const LARGE_WAL_BYTES: u64 = 1 << 30;

/// Reports a database that cannot be read.
pub fn unreadable(error: &StoreError) -> Check {
    failing(
        CheckId::Database,
        sentence(&error.to_string()),
        remedy(error.kind()),
    )
}

/// Checks a database that can be read. `write_error` is the reason why it rejects writes.
/// `has_keys` means that the database is in use, because an API key was created. `exposed_mode`
/// holds the permission bits of a file that every user of the machine may read.
pub fn readable(
    snapshot: &HealthSnapshot,
    write_error: Option<&StoreError>,
    has_keys: bool,
    durability: Durability,
    exposed_mode: Option<u32>,
) -> Check {
    if let Some(error) = write_error {
        return failing(
            CheckId::Database,
            format!("Readable, but rejects writes: {}.", error.reason()),
            remedy(error.kind()),
        );
    }
    if !has_keys {
        return warning(
            CheckId::Database,
            "Reached and migrated, but it holds no API key: nobody can read from it.",
            format!("If it is new, run `keys create`. {NOT_THE_ONE}"),
        );
    }
    if !durability.synchronous_commit {
        return warning(
            CheckId::Database,
            "Reached and migrated. The server's synchronous_commit is off: `serve` overrides it for \
             its own sessions until it is restarted.",
            "Set it on (alter system, alter database or alter role ... set synchronous_commit = on): \
             `serve` does not start while it is off.",
        );
    }
    if let Some(mode) = exposed_mode {
        return warning(
            CheckId::Database,
            format!(
                "Reached and migrated, but every user of this machine can read its file \
                 (mode {mode:o}), and so payloads and hashes of keys."
            ),
            "Run `chmod 600` on the file, and on those next to it that end in -wal and -shm.",
        );
    }

    let size = bytes(snapshot.space.database + snapshot.space.wal.unwrap_or_default());
    ok(
        CheckId::Database,
        format!("Reached and migrated. It uses {size}."),
    )
}

/// Part of a remedy: `serve` may have created and migrated an empty database in place of a lost
/// one.
const NOT_THE_ONE: &str = "If a database existed before, this is a different one: DATABASE_URL names the wrong one, its \
     disk is not mounted, or its file was lost or replaced. Stop `serve` and put it back, or \
     restore the backup (docs/backup.md).";

const MEANWHILE: &str =
    "Until then deliveries are answered 503. Nothing is lost: Stripe redelivers for three days.";

/// Returns the remedy for a failure of this kind.
///
/// The match is exhaustive, so a new kind does not compile without its remedy.
pub(super) fn remedy(kind: StoreErrorKind) -> String {
    use StoreErrorKind::{
        Contended, Corrupt, DamagedRow, DiskFull, FileMissing, FileReplaced, Io, Locked, LogLost,
        NotMigrated, ReadOnly, Rejected, SchemaNewer, SchemaOlder, Standby, TooManyConnections,
        Unreachable, Unresponsive, UnsafeCommit,
    };
    let remedy = match kind {
        NotMigrated => {
            return format!(
                "If it is new, run `stripe-reconciler migrate`; `serve` does so when it starts. \
                 {NOT_THE_ONE}"
            );
        }
        SchemaOlder => {
            return "Run `stripe-reconciler migrate`; `serve` does so when it starts.".to_owned();
        }
        SchemaNewer => {
            return "Run that version: a database cannot go back to an older one.".to_owned();
        }
        FileMissing => {
            "Correct DATABASE_URL, or mount its disk. If the file was moved, put it back; if it is \
             lost, restore the backup. Only for a new database: start `serve`, which creates it."
        }
        LogLost => {
            "Somebody deleted, replaced or truncated SQLite's -wal or -shm file while `serve` was \
             running. Restart `serve`. Its log reports whether it saved the data (\"saved the lost \
             write-ahead log\"). If it does not, or if the file was truncated, the writes that had \
             not reached the database file are lost: run `reconcile --since 30d`."
        }
        FileReplaced => {
            "Put the original file back. If the current file is the right one, restart `serve`, which \
             opened the original."
        }
        ReadOnly | Standby => "Point DATABASE_URL at the primary, or make it writable again.",
        DiskFull => "Free space on its disk.",
        TooManyConnections => {
            "End other programs that use its connections, or raise max_connections: each replica \
             needs 11."
        }
        Locked => {
            "End the process that holds it: `fuser` with the SQLite file names it, and in \
             PostgreSQL the view pg_stat_activity."
        }
        Corrupt => {
            "If DATABASE_URL names the right file, it is damaged: restore the backup, then run \
             `reconcile --since 30d`."
        }
        DamagedRow => {
            "Run `rebuild`, which reads the stored events again. If that does not help, restore \
             the backup."
        }
        Io => {
            "Check its disk: is it mounted, and may this program read and write the file and its \
             folder?"
        }
        Unreachable | Unresponsive | Contended => {
            "Start the database server (its own log says why it does not run), or correct \
             DATABASE_URL."
        }
        UnsafeCommit => {
            "Set it to on, and reload the server's settings (select pg_reload_conf()): no \
             acknowledged delivery may be lost."
        }
        Rejected => "Correct DATABASE_URL: server, database, user and password.",
    };

    format!("{remedy} {MEANWHILE}")
}

/// Checks the free space of the database's disk, and the size of the WAL.
pub fn disk(space: &Space) -> Check {
    const REMEDY: &str = "Free space: enlarge the disk, or move other files away. To keep the database from growing, \
         prune old payloads (`events prune --older-than 90d`) while some space is left: pruning \
         needs some, too. On a full disk deliveries are answered 503, and Stripe retries for three \
         days.";
    let Some(disk) = space.disk else {
        return unknown(
            CheckId::Disk,
            "The disk of the database server is not visible from here.",
            "Monitor the disk on the machine of the server.",
        );
    };

    let share = disk.free as f64 / disk.size.max(1) as f64;
    let left = format!(
        "{} of {} are free ({:.0} %)",
        bytes(disk.free),
        bytes(disk.size),
        share * 100.0
    );
    if share < 0.03 && disk.free < AMPLE_BYTES {
        return failing(CheckId::Disk, format!("Nearly full: {left}."), REMEDY);
    }
    if share < 0.1 && disk.free < AMPLE_BYTES {
        return warning(CheckId::Disk, format!("Filling up: {left}."), REMEDY);
    }
    if let Some(wal) = space.wal.filter(|wal| *wal > LARGE_WAL_BYTES) {
        return warning(
            CheckId::Disk,
            format!(
                "SQLite's WAL has grown to {}, because a process keeps an old snapshot open.",
                bytes(wal)
            ),
            "Look for a process that keeps the database open, such as a backup that hangs (`fuser` \
             names it), and end it.",
        );
    }
    ok(CheckId::Disk, format!("{left}."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::CheckStatus;
    use crate::store::Disk;

    #[test]
    fn disk_is_full_by_share_unless_much_space_is_left() {
        let status = |free: u64, size: u64| {
            disk(&Space {
                disk: Some(Disk { free, size }),
                ..Space::default()
            })
            .state
        };

        assert_eq!(status(50 << 30, 100 << 30), CheckStatus::Ok);
        assert_eq!(status(9 << 30, 100 << 30), CheckStatus::Warning);
        assert_eq!(
            status(20 << 30, 1000 << 30),
            CheckStatus::Ok,
            "2 % are free, but that is 20 GB"
        );
        assert_eq!(status(1 << 20, 3 << 30), CheckStatus::Failing);
        assert_eq!(status(0, 0), CheckStatus::Failing);
        let large_wal = Space {
            wal: Some(2 << 30),
            disk: Some(Disk {
                free: 50 << 30,
                size: 100 << 30,
            }),
            ..Space::default()
        };

        assert_eq!(disk(&large_wal).state, CheckStatus::Warning);
    }

    #[test]
    fn remedy_matches_kind() {
        for (kind, first_action) in [
            (StoreErrorKind::Locked, "fuser"),
            (StoreErrorKind::DiskFull, "Free space"),
            (StoreErrorKind::ReadOnly, "writable"),
            (StoreErrorKind::TooManyConnections, "max_connections"),
            (StoreErrorKind::Rejected, "password"),
            (StoreErrorKind::Corrupt, "restore the backup"),
            (StoreErrorKind::DamagedRow, "rebuild"),
            (StoreErrorKind::FileMissing, "put it back"),
            (StoreErrorKind::Unreachable, "Start the database server"),
        ] {
            let remedy = remedy(kind);
            assert!(
                remedy.contains(first_action) && remedy.contains("503"),
                "{kind:?}: {remedy}"
            );
        }

        let newer = remedy(StoreErrorKind::SchemaNewer);
        assert!(
            newer.contains("Run that version") && !newer.contains("503"),
            "{newer}"
        );
    }
}

//! How the database and its disk are judged: what a failure means, and what cures just that one.

use super::Check;
use super::format::{bytes, failing, ok, sentence, unknown, warning};
use crate::monitoring::monitor::HealthSnapshot;
use crate::store::{Durability, Space, StoreError, StoreErrorKind};

/// While the room that is left is more than this, no share of a disk is too little.
const ROOMY: u64 = 10 << 30;
/// SQLite's log is some megabytes long.
const LONG_LOG: u64 = 1 << 30;

/// Nothing can be read from it.
pub fn away(error: &StoreError) -> Check {
    failing(
        "database",
        sentence(&error.to_string()),
        &remedy(error.kind()),
    )
}

/// Reports on a database that can be read. `refused` says why it rejects writes. `has_keys` means
/// that somebody has begun to use it.
pub fn reached(
    snapshot: &HealthSnapshot,
    refused: Option<&StoreError>,
    has_keys: bool,
    durability: Durability,
) -> Check {
    let size = bytes(snapshot.space.database + snapshot.space.log.unwrap_or_default());
    match refused {
        Some(error) => failing(
            "database",
            format!("Readable, but rejects writes: {}.", error.reason()),
            &remedy(error.kind()),
        ),
        None if !has_keys => warning(
            "database",
            "Reached, and migrated; but it holds no API key: nobody can read from it.".to_owned(),
            &format!("A new one: `keys create`. {NOT_THE_ONE}"),
        ),
        None if !durability.synchronous_commit => warning(
            "database",
            "Reached, and migrated. The server's synchronous_commit is off: `serve` overrides it \
             for its own sessions until it is restarted."
                .to_owned(),
            "Set it on (alter system, alter database or alter role ... set synchronous_commit = on): \
             `serve` does not start while it is off.",
        ),
        None => ok(
            "database",
            format!("Reached, and migrated. It takes {size}."),
        ),
    }
}

/// `serve` makes an empty database where there is none, and migrates it.
const NOT_THE_ONE: &str = "Where there was one before, this is not it: DATABASE_URL names another, its disk is not mounted, or its file was \
                           lost or replaced. Stop `serve`, and put it back, or restore the backup (docs/backup.md).";

const MEANWHILE: &str =
    "Until then deliveries are answered 503. Nothing is lost: Stripe redelivers for three days.";

/// Returns what to do about a failure of this kind.
///
/// The match is exhaustive: a new kind does not compile without its remedy.
pub(super) fn remedy(kind: StoreErrorKind) -> String {
    use StoreErrorKind::*;
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
        FileReplaced => {
            "Put the file back that was there. If the present file is the right one, restart \
             `serve`, which opened the other."
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

pub fn disk(space: &Space) -> Check {
    let Some(disk) = space.disk else {
        return unknown(
            "disk",
            "The database server's disk cannot be seen from here.".to_owned(),
            "Watch it where the server runs.",
        );
    };
    let share = disk.free as f64 / disk.size.max(1) as f64;
    let left = format!(
        "{} of {} are free ({:.0} %)",
        bytes(disk.free),
        bytes(disk.size),
        share * 100.0
    );
    let remedy = "Make room: enlarge the disk, or move away what else is on it. To keep the file from growing, forget old payloads \
                (`events prune --older-than 90d`), while there is some room: that takes some, too. When it is full, deliveries are \
                answered 503, and Stripe repeats them for three days.";
    match share {
        share if share < 0.03 && disk.free < ROOMY => {
            failing("disk", format!("It is nearly full: {left}."), remedy)
        }
        share if share < 0.1 && disk.free < ROOMY => {
            warning("disk", format!("It fills up: {left}."), remedy)
        }
        _ if space.log.is_some_and(|log| log > LONG_LOG) => warning(
            "disk",
            format!(
                "SQLite's log has grown to {}: something reads an old state of it.",
                bytes(space.log.unwrap_or_default())
            ),
            "Look for a process that holds the database open, such as a backup that hangs (`fuser` names it), and end it.",
        ),
        _ => ok("disk", format!("{left}.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::CheckStatus;
    use crate::store::Disk;

    #[test]
    fn a_disk_is_full_by_its_share_unless_much_room_is_left() {
        let judged = |free: u64, size: u64| {
            disk(&Space {
                disk: Some(Disk { free, size }),
                ..Space::default()
            })
            .state
        };
        assert_eq!(judged(50 << 30, 100 << 30), CheckStatus::Ok);
        assert_eq!(judged(9 << 30, 100 << 30), CheckStatus::Warning);
        assert_eq!(
            judged(20 << 30, 1000 << 30),
            CheckStatus::Ok,
            "two in a hundred, and much room"
        );
        assert_eq!(judged(1 << 20, 3 << 30), CheckStatus::Failing);
        assert_eq!(judged(0, 0), CheckStatus::Failing);
        let long = Space {
            log: Some(2 << 30),
            disk: Some(Disk {
                free: 50 << 30,
                size: 100 << 30,
            }),
            ..Space::default()
        };
        assert_eq!(disk(&long).state, CheckStatus::Warning);
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

//! How the database and its disk are judged: what a failure means, and what cures just that one.

use super::Check;
use super::format::{bytes, failing, ok, sentence, unknown, warning};
use crate::monitoring::monitor::HealthSnapshot;
use crate::store::{Space, StoreError};

/// While the room that is left is more than this, no share of a disk is too little.
const ROOMY: u64 = 10 << 30;
/// SQLite's log is some megabytes long.
const LONG_LOG: u64 = 1 << 30;

/// Nothing can be read from it.
pub fn away(error: &StoreError) -> Check {
    failing("database", sentence(&error.to_string()), &remedy(error))
}

/// `refused`: why it takes nothing. `has_keys`: somebody has begun to use it.
pub fn reached(snapshot: &HealthSnapshot, refused: Option<&StoreError>, has_keys: bool) -> Check {
    let size = bytes(snapshot.space.database + snapshot.space.log.unwrap_or_default());
    match refused {
        Some(error) => failing(
            "database",
            format!("It can be read, but takes nothing: {}.", error.reason()),
            &remedy(error),
        ),
        None if !has_keys => warning(
            "database",
            "Reached, and migrated; but it holds no API key: nobody can read from it.".to_owned(),
            &format!("A new one: `keys create`. {NOT_THE_ONE}"),
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

/// Told by the words of the engines and of the store: there are more causes than kinds of [`StoreError`].
fn remedy(error: &StoreError) -> String {
    const MEANWHILE: &str = "Meanwhile deliveries are answered 503 and nothing is lost: Stripe delivers them again for three days.";
    let says = |words: &[&str]| words.iter().any(|words| error.reason().contains(words));
    let remedy = match error {
        _ if says(&["newer version"]) => {
            return "Run that version: a database does not go back to an older one.".to_owned();
        }
        _ if says(&["it is empty"]) => {
            return format!(
                "A new one: run `stripe-reconciler migrate`; `serve` does it when it starts. {NOT_THE_ONE}"
            );
        }
        _ if says(&["migrate`"]) => {
            return "Run `stripe-reconciler migrate`; `serve` does it when it starts.".to_owned();
        }
        _ if says(&["there is no file"]) => {
            "Put DATABASE_URL right, or mount its disk. If the file is lost, restore the backup. Only for a new database: start `serve`, \
             which makes it."
        }
        _ if says(&["no longer"]) => {
            "Put the file back that was there; or, if the one that is there now is right, restart `serve`: it opened the other."
        }
        _ if says(&["not a database", "malformed"]) => {
            "Where DATABASE_URL names the right file, it is damaged: restore the backup, and run `reconcile --since 30d`."
        }
        _ if says(&["read-only", "readonly", "standby"]) => {
            "Point DATABASE_URL at the primary, or make it writable again."
        }
        _ if says(&["is full", "No space left"]) => "Make room on its disk.",
        _ if says(&["too many", "connection slots"]) => {
            "End who else uses its connections, or let it have more (max_connections): each replica needs 11."
        }
        _ if says(&["locked", "connection is free", "not end in time"]) => {
            "End the process that holds it: `fuser` with SQLite's file names it, and PostgreSQL's pg_stat_activity."
        }
        StoreError::Refused(_) => "Put DATABASE_URL right: server, database, user and password.",
        _ => "Start it (its own log says why it does not run), or put DATABASE_URL right.",
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
    fn what_cures_a_failure_is_told_by_its_words() {
        let unavailable = |reason: &str| remedy(&StoreError::Unavailable(reason.to_owned()));
        assert!(unavailable("database is locked").contains("fuser"));
        assert!(unavailable("database or disk is full").contains("Make room"));
        assert!(
            unavailable("could not extend file \"base/1/2\": No space left on device")
                .contains("Make room")
        );
        assert!(unavailable("attempt to write a readonly database").contains("writable"));
        assert!(unavailable("sorry, too many clients already").contains("max_connections"));
        let newer = unavailable(
            "it was migrated by a newer version of this program (to 5; this version knows 4)",
        );
        assert!(
            newer.contains("Run that version") && !newer.contains("503"),
            "{newer}"
        );
        let refused = |reason: &str| remedy(&StoreError::Refused(reason.to_owned()));
        assert!(refused("password authentication failed for user \"x\"").contains("password"));
        assert!(refused("a.db: file is not a database").contains("restore the backup"));
        assert!(
            remedy(&StoreError::Away(
                "Connection refused (os error 111)".to_owned()
            ))
            .starts_with("Start it")
        );
    }
}

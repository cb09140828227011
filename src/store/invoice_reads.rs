//! An invoice and all that is told about it, read in one round trip, together with the API keys of who asks.

use std::collections::HashMap;

use super::engine::connection::{Connection, EngineConnection, rows};
use super::invoices::{InvoiceRow, ObservationRow, StoredInvoice, stored_invoice};
use super::keys::{ApiKey, KeyRow, api_key};
use super::{Store, StoreError};
use crate::domain::stripe::event::EventKey;

/// What is told of an invoice: what mentions it, or an object (other than an invoice) that is named together with one that was
/// reached, over any number of hops. More than belongs to the invoice may be among it.
///
/// The invoice, what is told of it and the keys that were asked for come as one row: one statement, one round trip, one snapshot
/// of the database, and nothing to hand over row by row. Without a key that may read it (and unless `$5`: nobody asks but we),
/// the invoice is not looked for: what is another's takes no longer than what is not there. `$hop` leads from `reached` to `link.value`, `$told` gives `key` and
/// `telling` of what was reached, `$lines` makes a line of each: the key in hex, then the telling, which is JSON and so has no
/// line break. `$keys` makes a JSON array of the keys.
macro_rules! invoice_and_tellings {
    ($hop:expr, $told:expr, $lines:expr, $keys:literal) => {
        concat!(
            "with recursive
             this as (select * from invoices where tenant_uid = $1 and invoice_uid = $2
                      and ($5 or exists (select 1 from api_keys where secret_sha256 in ($3, $4)
                                                                    and (tenant_uid is null or tenant_uid = $1)))),
             reached (root, object_id) as (
                 select 0, stripe_invoice_id from this where stripe_invoice_id is not null
                 union
                 select 0, link.value from reached ",
            $hop,
            ")
             select (select ",
            $keys,
            " from api_keys where secret_sha256 in ($3, $4)),
                    document, stripe_invoice_id, imported_states, stored_ms, revision,
                    (select ",
            $lines,
            " from ",
            $told,
            ") from (select 1 as always) as one left join this on true"
        )
    };
}
/// API keys; document, Stripe invoice, imported states, stored, revision, tellings.
type Row = (
    Option<String>,
    Option<String>,
    Option<String>,
    Option<String>,
    Option<i64>,
    Option<i64>,
    Option<String>,
);
/// Whether it is the second that was asked for, and the key.
type AskedKey = (bool, KeyRow);

/// The same for several objects: `$1` is a JSON array of their ids. `$root` says what each telling comes with: the id that led to
/// it, or the same for all, so that it comes once. One row for each root.
macro_rules! observations {
    ($root:literal, $ids:expr, $hop:expr, $told:expr, $lines:expr) => {
        concat!(
            "with recursive reached (root, object_id) as (
                 select ",
            $root,
            ", ids.value from ",
            $ids,
            " as ids
                 union
                 select reached.root, link.value from reached ",
            $hop,
            ") select root, ",
            $lines,
            " from ",
            $told,
            " group by root"
        )
    };
}

/// SQLite, too, knows nothing of a recursion, and would rather read whole tables: `cross join` keeps the order.
macro_rules! sqlite_hop {
    () => {
        "cross join mentions on mentions.object_id = reached.object_id cross join events on events.key = mentions.event_key
         cross join json_each(events.linked) as link"
    };
}
macro_rules! sqlite_told {
    () => {
        "(select distinct root, event_key from reached cross join mentions using (object_id))
         cross join events on key = event_key and telling is not null "
    };
}

/// PostgreSQL cannot know how few rows a recursion brings, and would rather read whole tables than seek in an index so often:
/// each `offset 0` makes it take one step after the other.
macro_rules! postgres_ids {
    () => {
        r#"(select value collate "C" from jsonb_array_elements_text($1::jsonb))"#
    };
}
macro_rules! postgres_hop {
    () => {
        r#"cross join lateral (select event_key from mentions where mentions.object_id = reached.object_id offset 0) as mention
           cross join lateral (select linked from events where events.key = mention.event_key offset 0) as event
           cross join lateral (select value collate "C" from jsonb_array_elements_text(event.linked::jsonb)) as link"#
    };
}
macro_rules! postgres_told {
    () => {
        "(select distinct root, event_key from reached
          cross join lateral (select event_key from mentions where mentions.object_id = reached.object_id offset 0) as mention) as told
         cross join lateral (select key, telling from events where events.key = told.event_key and telling is not null offset 0) as event "
    };
}

/// The statements that each engine needs in its own words.
struct EngineSql {
    invoice_and_tellings: &'static str,
    tellings_of_each: &'static str,
    tellings_of_all: &'static str,
}

/// A line of each.
macro_rules! sqlite_lines {
    () => {
        "group_concat(hex(key) || telling, char(10))"
    };
}
macro_rules! postgres_lines {
    () => {
        "string_agg(encode(key, 'hex') || telling, chr(10))"
    };
}

const SQLITE: EngineSql = EngineSql {
    invoice_and_tellings: invoice_and_tellings!(
        sqlite_hop!(),
        sqlite_told!(),
        sqlite_lines!(),
        "json_group_array(json_array(json(iif(secret_sha256 = $3, 'false', 'true')),
                                     json_array(id, tenant_uid, created_ms, expires_ms, revoked_ms)))"
    ),
    tellings_of_each: observations!("ids.value", "json_each($1)", sqlite_hop!(), sqlite_told!(), sqlite_lines!()),
    tellings_of_all: observations!("''", "json_each($1)", sqlite_hop!(), sqlite_told!(), sqlite_lines!()),
};
const POSTGRES: EngineSql = EngineSql {
    invoice_and_tellings: invoice_and_tellings!(
        postgres_hop!(),
        postgres_told!(),
        postgres_lines!(),
        "json_agg(json_build_array(secret_sha256 is distinct from $3,
                                   json_build_array(id, tenant_uid, created_ms, expires_ms, revoked_ms)))::text"
    ),
    tellings_of_each: observations!("ids.value", postgres_ids!(), postgres_hop!(), postgres_told!(), postgres_lines!()),
    tellings_of_all: observations!(r#"'' collate "C""#, postgres_ids!(), postgres_hop!(), postgres_told!(), postgres_lines!()),
};

impl EngineSql {
    fn of(session: &Connection) -> &'static EngineSql {
        match session.connection {
            EngineConnection::Sqlite(_) => &SQLITE,
            EngineConnection::Postgres(_) => &POSTGRES,
        }
    }
}

impl Store {
    /// The invoice and what is told about it.
    pub async fn invoice(
        &self,
        tenant_uid: &str,
        invoice_uid: &str,
    ) -> Result<Option<StoredInvoice>, StoreError> {
        let mut session = self.session().await?;
        let (invoice, _) = read(&mut session, tenant_uid, invoice_uid, Reader::Us).await?;
        session.done().await?;
        Ok(invoice)
    }

    /// The same for who shows API keys with these hashes, if one of them may read it; and these keys in their order, expired and
    /// revoked ones too. What may not be read is not looked for: how long it takes says nothing of it.
    pub async fn invoice_and_keys(
        &self,
        tenant_uid: &str,
        invoice_uid: &str,
        secrets_sha256: [Option<[u8; 32]>; 2],
    ) -> Result<(Option<StoredInvoice>, Vec<ApiKey>), StoreError> {
        let mut session = self.session().await?;
        let found = read(
            &mut session,
            tenant_uid,
            invoice_uid,
            Reader::With(secrets_sha256),
        )
        .await?;
        session.done().await?;
        Ok(found)
    }

    /// All that is told about these objects and those that belong with them; more may be among it.
    pub async fn observations_for(
        &self,
        object_ids: &[String],
    ) -> Result<Vec<ObservationRow>, StoreError> {
        let mut session = self.session().await?;
        let sql = EngineSql::of(&session).tellings_of_all;
        let found = observations(&mut session, sql, &object_ids.iter().collect::<Vec<_>>()).await?;
        session.done().await?;
        Ok(found.into_values().flatten().collect())
    }
}

/// Who wants to read.
pub(super) enum Reader {
    Us,
    /// Who shows keys with these hashes.
    With([Option<[u8; 32]>; 2]),
}

pub(super) async fn read(
    session: &mut Connection,
    tenant_uid: &str,
    invoice_uid: &str,
    reader: Reader,
) -> Result<(Option<StoredInvoice>, Vec<ApiKey>), StoreError> {
    let sql = EngineSql::of(session).invoice_and_tellings;
    let (is_us, hashes) = match reader {
        Reader::Us => (true, [None, None]),
        Reader::With(hashes) => (false, hashes),
    };
    let [first, second] = hashes.map(|hash| hash.map(|hash| hash.to_vec()));
    let (keys, document, stripe_invoice_id, imported_states, stored_ms, revision, lines) = rows!(
        session,
        fetch_one,
        Row,
        sql,
        tenant_uid,
        invoice_uid,
        first.as_deref(),
        second.as_deref(),
        is_us
    )?;
    let damaged = || StoreError::damaged("an invoice");
    let mut keys: Vec<AskedKey> =
        serde_json::from_str(keys.as_deref().unwrap_or("[]")).map_err(|_| damaged())?;
    keys.sort_by_key(|(is_second, _)| *is_second);
    let keys = keys.into_iter().map(|(_, key)| api_key(key)).collect();
    let (Some(document), Some(imported_states), Some(stored_ms), Some(revision)) =
        (document, imported_states, stored_ms, revision)
    else {
        return Ok((None, keys));
    };
    let (tenant_uid, invoice_uid) = (tenant_uid.to_owned(), invoice_uid.to_owned());
    let row: InvoiceRow = (
        tenant_uid,
        invoice_uid,
        stripe_invoice_id,
        document,
        imported_states,
        stored_ms,
        revision,
    );
    let observations = read_lines(lines.as_deref().unwrap_or_default())?;
    Ok((
        Some(StoredInvoice {
            observations,
            ..stored_invoice(row)
        }),
        keys,
    ))
}

fn read_lines(lines: &str) -> Result<Vec<ObservationRow>, StoreError> {
    let damaged = || StoreError::damaged("the observations of an invoice");
    lines
        .lines()
        .map(|line| telling(line).ok_or_else(damaged))
        .collect()
}

/// A key in hex, and what it tells.
fn telling(line: &str) -> Option<ObservationRow> {
    let mut key = EventKey([0; EventKey::LENGTH]);
    let (hex, json) = line.split_at_checked(2 * EventKey::LENGTH)?;
    hex::decode_to_slice(hex, &mut key.0).ok()?;
    Some(ObservationRow {
        key,
        json: json.to_owned(),
    })
}

/// Adds what is told about each of these invoices.
pub(super) async fn tell(
    session: &mut Connection,
    invoices: &mut [StoredInvoice],
) -> Result<(), StoreError> {
    let ids: Vec<&String> = invoices
        .iter()
        .filter_map(|invoice| invoice.stripe_invoice_id.as_ref())
        .collect();
    let mut told = observations(session, EngineSql::of(session).tellings_of_each, &ids).await?;
    for invoice in invoices {
        invoice.observations = invoice
            .stripe_invoice_id
            .as_ref()
            .and_then(|id| told.remove(id))
            .unwrap_or_default();
    }
    Ok(())
}

/// By what led to them.
async fn observations(
    session: &mut Connection,
    sql: &'static str,
    ids: &[&String],
) -> Result<HashMap<String, Vec<ObservationRow>>, StoreError> {
    let ids = serde_json::to_string(ids).expect("strings always serialise");
    let found = rows!(session, fetch_all, (String, String), sql, ids.as_str())?;
    found
        .into_iter()
        .map(|(root, lines)| Ok((root, read_lines(&lines)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use sqlx::AssertSqlSafe;

    use super::*;

    #[tokio::test]
    async fn sqlite_gathers_a_history_by_index_however_long_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::connect(&format!("sqlite://{}/test.db", folder.path().display()))
            .await
            .unwrap();
        store.migrate().await.unwrap();
        let mut session = store.session().await.unwrap();
        for sql in [
            SQLITE.invoice_and_tellings,
            SQLITE.tellings_of_each,
            SQLITE.tellings_of_all,
        ] {
            let explained = || AssertSqlSafe(format!("explain query plan {sql}"));
            let plan = rows!(session, fetch_all, (i64, i64, i64, String), explained()).unwrap();
            let read_whole: Vec<_> = plan
                .iter()
                .filter(|(.., step)| ["SCAN events", "SCAN mentions"].contains(&&**step))
                .collect();
            assert!(
                read_whole.is_empty() && plan.iter().any(|(.., step)| step.contains("events")),
                "{plan:#?}"
            );
        }
    }
}

//! Reads an invoice with its observations and the caller's API keys in one round trip.
//!
//! The observations of an invoice are those of every event that its links reach: from the invoice
//! to the events that mention it, to the objects that these events name, to the events that mention
//! those objects, and so on. More events may be reached than belong to the invoice;
//! `domain::history` decides.

use std::collections::HashMap;

use super::engine::connection::{Connection, EngineConnection, rows};
use super::invoice_rows::{InvoiceRow, ObservationRow, StoredInvoice, stored_invoice};
use super::keys::{ApiKey, KeyRow, api_key};
use super::{Store, StoreError};
use crate::domain::stripe::event::EventKey;

/// API keys as JSON; document, Stripe invoice, imported states, stored time, revision;
/// observations, one per line.
type Row = (
    Option<String>,
    Option<String>,
    Option<String>,
    Option<String>,
    Option<i64>,
    Option<i64>,
    Option<String>,
);
/// An API key, preceded by `true` if its hash is the second of the requested hashes.
type RequestedKey = (bool, KeyRow);

/// The statements that differ between the engines. Neither engine plans a recursion well by itself,
/// and each needs its own hints.
struct EngineSql {
    invoice_with_observations: &'static str,
    observations_of_each: &'static str,
    observations_of_all: &'static str,
}

const SQLITE: EngineSql = EngineSql {
    invoice_with_observations: include_str!("sql/sqlite/invoice_with_observations.sql"),
    observations_of_each: include_str!("sql/sqlite/observations_of_each.sql"),
    observations_of_all: include_str!("sql/sqlite/observations_of_all.sql"),
};
const POSTGRES: EngineSql = EngineSql {
    invoice_with_observations: include_str!("sql/postgres/invoice_with_observations.sql"),
    observations_of_each: include_str!("sql/postgres/observations_of_each.sql"),
    observations_of_all: include_str!("sql/postgres/observations_of_all.sql"),
};

impl EngineSql {
    fn for_connection(session: &Connection) -> &'static EngineSql {
        match session.connection {
            EngineConnection::Sqlite(_) => &SQLITE,
            EngineConnection::Postgres(_) => &POSTGRES,
        }
    }
}

impl Store {
    /// Returns an invoice with its observations.
    pub async fn invoice(
        &self,
        tenant_uid: &str,
        invoice_uid: &str,
    ) -> Result<Option<StoredInvoice>, StoreError> {
        let mut session = self.session().await?;
        let (invoice, _) = read(&mut session, tenant_uid, invoice_uid, Reader::Internal).await?;
        session.done().await?;
        Ok(invoice)
    }

    /// Returns the API keys with these hashes, in the order of the hashes, and the invoice if one
    /// of the keys may read it.
    ///
    /// Expired and revoked keys are returned too. Without a key that may read the invoice, the
    /// invoice is not looked up, so that the time to answer does not reveal whether it exists.
    pub async fn invoice_and_keys(
        &self,
        tenant_uid: &str,
        invoice_uid: &str,
        secrets_sha256: [Option<[u8; 32]>; 2],
    ) -> Result<(Option<StoredInvoice>, Vec<ApiKey>), StoreError> {
        let mut session = self.session().await?;
        let reader = Reader::WithKeys(secrets_sha256);
        let found = read(&mut session, tenant_uid, invoice_uid, reader).await?;
        session.done().await?;
        Ok(found)
    }

    /// Returns the observations of these objects and of all objects linked to them, in no
    /// particular order. Unrelated observations may be among them.
    pub async fn observations_for(
        &self,
        object_ids: &[String],
    ) -> Result<Vec<ObservationRow>, StoreError> {
        let mut session = self.session().await?;
        let sql = EngineSql::for_connection(&session).observations_of_all;
        let ids: Vec<&String> = object_ids.iter().collect();
        let found = observations_by_root(&mut session, sql, &ids).await?;
        session.done().await?;
        Ok(found.into_values().flatten().collect())
    }

    /// Reads the observations of these invoices into them. Unrelated observations may be among
    /// them.
    pub async fn add_observations(&self, invoices: &mut [StoredInvoice]) -> Result<(), StoreError> {
        let mut session = self.session().await?;
        add_observations(&mut session, invoices).await?;
        session.done().await
    }
}

/// The party that reads an invoice.
pub(super) enum Reader {
    /// This program, which may read every invoice.
    Internal,
    /// A client that presents API keys with these hashes.
    WithKeys([Option<[u8; 32]>; 2]),
}

/// Reads an invoice and the API keys of its reader. See [`Store::invoice_and_keys`].
pub(super) async fn read(
    session: &mut Connection,
    tenant_uid: &str,
    invoice_uid: &str,
    reader: Reader,
) -> Result<(Option<StoredInvoice>, Vec<ApiKey>), StoreError> {
    let sql = EngineSql::for_connection(session).invoice_with_observations;
    let (is_internal, hashes) = match reader {
        Reader::Internal => (true, [None, None]),
        Reader::WithKeys(hashes) => (false, hashes),
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
        is_internal
    )?;

    let keys = api_keys(keys.as_deref().unwrap_or("[]"))?;
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
    let invoice = StoredInvoice {
        observations,
        ..stored_invoice(row)
    };
    Ok((Some(invoice), keys))
}

/// Parses a JSON array of [`RequestedKey`]s and sorts it by the order of the hashes.
fn api_keys(json: &str) -> Result<Vec<ApiKey>, StoreError> {
    let mut keys: Vec<RequestedKey> =
        serde_json::from_str(json).map_err(|_| StoreError::damaged("an API key is damaged"))?;
    keys.sort_by_key(|(is_second, _)| *is_second);
    Ok(keys.into_iter().map(|(_, key)| api_key(key)).collect())
}

fn read_lines(lines: &str) -> Result<Vec<ObservationRow>, StoreError> {
    lines
        .lines()
        .map(|line| {
            read_line(line)
                .ok_or_else(|| StoreError::damaged("an observation of an invoice is damaged"))
        })
        .collect()
}

/// Reads an event key in hexadecimal digits and the JSON of its observation.
fn read_line(line: &str) -> Option<ObservationRow> {
    let mut key = EventKey([0; EventKey::LENGTH]);
    let (hex, json) = line.split_at_checked(2 * EventKey::LENGTH)?;
    hex::decode_to_slice(hex, &mut key.0).ok()?;
    Some(ObservationRow {
        key,
        json: json.to_owned(),
    })
}

/// Reads the observations of each of these invoices into it.
pub(super) async fn add_observations(
    session: &mut Connection,
    invoices: &mut [StoredInvoice],
) -> Result<(), StoreError> {
    let ids: Vec<&String> = invoices
        .iter()
        .filter_map(|invoice| invoice.stripe_invoice_id.as_ref())
        .collect();
    let sql = EngineSql::for_connection(session).observations_of_each;
    let mut found = observations_by_root(session, sql, &ids).await?;

    for invoice in invoices {
        invoice.observations = invoice
            .stripe_invoice_id
            .as_ref()
            .and_then(|id| found.remove(id))
            .unwrap_or_default();
    }
    Ok(())
}

/// Returns observations by the root of the walk that reached them.
async fn observations_by_root(
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
    async fn sqlite_reads_observations_by_index() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::connect(&format!("sqlite://{}/test.db", folder.path().display()))
            .await
            .unwrap();
        store.migrate().await.unwrap();
        let mut session = store.session().await.unwrap();

        for sql in [
            SQLITE.invoice_with_observations,
            SQLITE.observations_of_each,
            SQLITE.observations_of_all,
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

    /// Ensures that reading another tenant's invoice takes no longer than reading a missing one.
    #[tokio::test]
    async fn key_is_checked_before_invoice_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::connect(&format!("sqlite://{}/test.db", folder.path().display()))
            .await
            .unwrap();
        store.migrate().await.unwrap();
        let mut session = store.session().await.unwrap();
        let sql = SQLITE.invoice_with_observations;
        let explained = || AssertSqlSafe(format!("explain query plan {sql}"));
        let plan = rows!(session, fetch_all, (i64, i64, i64, String), explained()).unwrap();

        let steps: Vec<&str> = plan.iter().map(|(.., step)| step.as_str()).collect();
        let reads: Vec<usize> = (0..steps.len())
            .filter(|n| steps[*n].starts_with("SEARCH invoices"))
            .collect();
        assert!(!reads.is_empty(), "{steps:#?}");
        for read in reads {
            assert_eq!(
                steps[read - 1],
                "SCAN granted",
                "the invoice is the inner loop of the key's check: {steps:#?}"
            );
        }
    }
}

//! An invoice and all that is told about it, read in one round trip, together with the API keys of who asks.

use std::collections::{HashMap, HashSet};

use super::events::event_key;
use super::invoices::{InvoiceRow, StoredInvoice, StoredTelling, stored_invoice};
use super::keys::{ApiKey, KeyRow, api_key};
use super::session::{Connection, Session, rows};
use super::{Store, StoreError};

/// What is told of an invoice: what mentions it, or an object (other than an invoice) that is named together with one that was
/// reached, over any number of hops. More than belongs to the invoice may be among it.
///
/// The keys that were asked for, the invoice, and each telling come in rows of their own: one statement, one round trip, one
/// snapshot of the database.
macro_rules! invoice_and_tellings {
    ($linked:literal) => {
        concat!(
            "with recursive
             this as (select * from invoices where tenant_uid = $1 and invoice_uid = $2),
             reached (object_id) as (
                 select stripe_invoice_id from this where stripe_invoice_id is not null
                 union
                 select link.value from reached join mentions on mentions.object_id = reached.object_id
                 join events on events.key = mentions.event_key cross join ",
            $linked,
            " as link
             )
             select cast(1 as bigint) as kind, stripe_invoice_id as a, document as b, imported_states as c, stored_ms as x, revision as y,
                    cast(null as bigint) as z, null as key
             from this
             union all
             select 2, telling, null, null, null, null, null, key from events
             where telling is not null and key in (select event_key from mentions join reached using (object_id))
             union all
             select case when secret_sha256 = $3 then 3 else 4 end, id, tenant_uid, null, created_ms, expires_ms, revoked_ms, null from api_keys
             where secret_sha256 = $3 or secret_sha256 = $4"
        )
    };
}
/// The kind of the row, three texts, three numbers, an event's key.
type Row = (i64, Text, Text, Text, Number, Number, Number, Option<Vec<u8>>);
type Text = Option<String>;
type Number = Option<i64>;

/// The same for several Stripe invoices: `$1` is a JSON array of their ids.
macro_rules! tellings_of_each {
    ($ids:literal, $linked:literal) => {
        concat!(
            "with recursive reached (root, object_id) as (
                 select ids.value, ids.value from ",
            $ids,
            " as ids
                 union
                 select reached.root, link.value from reached join mentions on mentions.object_id = reached.object_id
                 join events on events.key = mentions.event_key cross join ",
            $linked,
            " as link
             ), told (root, event_key) as (select distinct root, event_key from mentions join reached using (object_id))
             select root, key, telling from told join events on key = event_key where telling is not null"
        )
    };
}

/// What mentions these objects; `$1` is a JSON array of their ids.
macro_rules! hop {
    ($ids:literal) => {
        concat!(
            "select key, telling, linked from events
             where key in (select event_key from mentions where object_id in (select value from ",
            $ids,
            " as ids))"
        )
    };
}
/// Key, telling, and what it links.
type HopRow = (Vec<u8>, Text, Text);

/// The statements that take JSON apart, which each engine does in its own words.
struct Words {
    invoice_and_tellings: &'static str,
    tellings_of_each: &'static str,
    hop: &'static str,
}

const SQLITE: Words = Words {
    invoice_and_tellings: invoice_and_tellings!("json_each(events.linked)"),
    tellings_of_each: tellings_of_each!("json_each($1)", "json_each(events.linked)"),
    hop: hop!("json_each($1)"),
};
const POSTGRES: Words = Words {
    invoice_and_tellings: invoice_and_tellings!(
        r#"lateral (select value collate "C" from jsonb_array_elements_text(events.linked::jsonb))"#
    ),
    tellings_of_each: tellings_of_each!(
        r#"(select value collate "C" from jsonb_array_elements_text($1::jsonb))"#,
        r#"lateral (select value collate "C" from jsonb_array_elements_text(events.linked::jsonb))"#
    ),
    hop: hop!(r#"(select value collate "C" from jsonb_array_elements_text($1::jsonb))"#),
};

impl Words {
    fn of(session: &Session) -> &'static Words {
        match session.connection {
            Connection::Sqlite(_) => &SQLITE,
            Connection::Postgres(_) => &POSTGRES,
        }
    }
}

impl Store {
    /// The invoice and what is told about it.
    pub async fn invoice(&self, tenant_uid: &str, invoice_uid: &str) -> Result<Option<StoredInvoice>, StoreError> {
        let (invoice, _) = self.invoice_and_keys(tenant_uid, invoice_uid, [None, None]).await?;
        Ok(invoice)
    }

    /// The same, and the API keys with these hashes in their order, expired and revoked ones too.
    pub async fn invoice_and_keys(
        &self,
        tenant_uid: &str,
        invoice_uid: &str,
        secrets_sha256: [Option<[u8; 32]>; 2],
    ) -> Result<(Option<StoredInvoice>, Vec<ApiKey>), StoreError> {
        let mut session = self.session().await?;
        let found = read(&mut session, tenant_uid, invoice_uid, secrets_sha256).await?;
        session.done().await?;
        Ok(found)
    }

    /// All that is told about these objects and those that belong with them; more may be among it.
    ///
    /// Hop by hop: PostgreSQL believes of any JSON that it holds a hundred ids, and of a recursion over them that it reaches
    /// millions. Then it reads whole tables, and compiles for a second what takes a millisecond.
    pub async fn told_of(&self, object_ids: &[String]) -> Result<Vec<StoredTelling>, StoreError> {
        let mut session = self.session().await?;
        let sql = Words::of(&session).hop;
        let mut reached: HashSet<String> = object_ids.iter().cloned().collect();
        let mut keys = HashSet::new();
        let mut told = Vec::new();
        let mut next: Vec<String> = reached.iter().cloned().collect();
        while !next.is_empty() {
            let ids = serde_json::to_string(&next).expect("strings always serialise");
            next.clear();
            for (key, telling, linked) in rows!(session, fetch_all, HopRow, sql, ids)? {
                let key = event_key(key)?;
                if !keys.insert(key) {
                    continue;
                }
                told.extend(telling.map(|json| StoredTelling { key, json }));
                let linked: Vec<String> = linked.and_then(|json| serde_json::from_str(&json).ok()).unwrap_or_default();
                next.extend(linked.into_iter().filter(|id| reached.insert(id.clone())));
            }
        }
        session.done().await?;
        Ok(told)
    }
}

pub(super) async fn read(
    session: &mut Session,
    tenant_uid: &str,
    invoice_uid: &str,
    secrets_sha256: [Option<[u8; 32]>; 2],
) -> Result<(Option<StoredInvoice>, Vec<ApiKey>), StoreError> {
    let sql = Words::of(session).invoice_and_tellings;
    let [first, second] = secrets_sha256.map(|hash| hash.map(|hash| hash.to_vec()));
    let found = rows!(session, fetch_all, Row, sql, tenant_uid, invoice_uid, first, second)?;
    let (mut invoice, mut tellings, mut keys) = (None, Vec::with_capacity(found.len()), Vec::new());
    for row in found {
        match row {
            (1, stripe_invoice_id, Some(document), Some(imported_states), Some(stored_ms), Some(revision), ..) => {
                let (tenant_uid, invoice_uid) = (tenant_uid.to_owned(), invoice_uid.to_owned());
                let row: InvoiceRow =
                    (tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision);
                invoice = Some(stored_invoice(row));
            }
            (2, Some(json), .., Some(key)) => tellings.push(StoredTelling { key: event_key(key)?, json }),
            (asked @ (3 | 4), Some(id), tenant_uid, _, Some(created_ms), expires_ms, revoked_ms, _) => {
                let row: KeyRow = (id, tenant_uid, created_ms, expires_ms, revoked_ms);
                keys.push((asked, api_key(row)));
            }
            _ => return Err(StoreError::Refused("an invoice is damaged".to_owned())),
        }
    }
    keys.sort_by_key(|(asked, _)| *asked);
    let keys = keys.into_iter().map(|(_, key)| key).collect();
    Ok((invoice.map(|invoice| StoredInvoice { tellings, ..invoice }), keys))
}

/// Adds what is told about each of these invoices.
pub(super) async fn tell(session: &mut Session, invoices: &mut [StoredInvoice]) -> Result<(), StoreError> {
    let ids: Vec<&String> = invoices.iter().filter_map(|invoice| invoice.stripe_invoice_id.as_ref()).collect();
    let mut told: HashMap<String, Vec<StoredTelling>> = HashMap::new();
    for (stripe_invoice_id, telling) in tellings_of_each(session, &ids).await? {
        told.entry(stripe_invoice_id).or_default().push(telling);
    }
    for invoice in invoices {
        invoice.tellings = invoice.stripe_invoice_id.as_ref().and_then(|id| told.remove(id)).unwrap_or_default();
    }
    Ok(())
}

/// Each telling with the id that led to it: with several, where several did.
async fn tellings_of_each(session: &mut Session, ids: &[&String]) -> Result<Vec<(String, StoredTelling)>, StoreError> {
    let ids = serde_json::to_string(ids).expect("strings always serialise");
    let sql = Words::of(session).tellings_of_each;
    let found = rows!(session, fetch_all, (String, Vec<u8>, String), sql, ids)?;
    found.into_iter().map(|(id, key, json)| Ok((id, StoredTelling { key: event_key(key)?, json }))).collect()
}

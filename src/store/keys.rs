//! API keys. Only the hash of a key is stored.

use super::engine::connection::{execute, rows};
use super::{Store, StoreError};

/// The access that a key grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Read access to one tenant's invoices.
    Tenant(String),
    /// Read and write access to everything.
    Operator,
}

impl Scope {
    /// Returns whether this key may read the invoices of that tenant.
    pub fn reads(&self, tenant_uid: &str) -> bool {
        match self {
            Scope::Operator => true,
            Scope::Tenant(own) => own == tenant_uid,
        }
    }
}

/// An API key without its secret. Times in Unix milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiKey {
    pub id: String,
    pub scope: Scope,
    pub created_ms: i64,
    pub expires_ms: Option<i64>,
    pub revoked_ms: Option<i64>,
}

/// Columns of an API key: id, tenant, created, expires, revoked.
pub(super) type KeyRow = (String, Option<String>, i64, Option<i64>, Option<i64>);

const INSERT: &str = "
    insert into api_keys (id, secret_sha256, tenant_uid, created_ms, expires_ms, revoked_ms)
    values ($1, $2, $3, $4, $5, $6)";
const BY_HASH: &str = "
    select id, tenant_uid, created_ms, expires_ms, revoked_ms from api_keys
    where secret_sha256 = $1";
const BY_ID: &str = "
    select id, tenant_uid, created_ms, expires_ms, revoked_ms, secret_sha256 from api_keys
    where id = $1";
const ALL: &str = "
    select id, tenant_uid, created_ms, expires_ms, revoked_ms from api_keys
    order by created_ms desc, id";
const REVOKE: &str = "update api_keys set revoked_ms = $2 where id = $1 and revoked_ms is null";

impl Store {
    /// Stores a new key under the hash of its secret.
    pub async fn insert_key(
        &self,
        key: &ApiKey,
        secret_sha256: &[u8; 32],
    ) -> Result<(), StoreError> {
        let ApiKey {
            id,
            scope,
            created_ms,
            expires_ms,
            revoked_ms,
        } = key;
        let tenant_uid = match scope {
            Scope::Tenant(tenant_uid) => Some(tenant_uid),
            Scope::Operator => None,
        };

        let mut session = self.writing().await?;
        execute!(
            session,
            INSERT,
            id,
            &secret_sha256[..],
            tenant_uid,
            created_ms,
            expires_ms,
            revoked_ms
        )?;
        session.commit().await
    }

    /// Returns the key with this hash, even if it is expired or revoked.
    pub async fn key_by_hash(
        &self,
        secret_sha256: &[u8; 32],
    ) -> Result<Option<ApiKey>, StoreError> {
        let mut session = self.session().await?;
        let row = rows!(session, fetch_optional, KeyRow, BY_HASH, &secret_sha256[..])?;
        session.done().await?;

        Ok(row.map(api_key))
    }

    /// Returns the key with this id and its stored hash, even if it is expired or revoked.
    pub async fn key_by_id(&self, id: &str) -> Result<Option<(ApiKey, Vec<u8>)>, StoreError> {
        type Row = (
            String,
            Option<String>,
            i64,
            Option<i64>,
            Option<i64>,
            Vec<u8>,
        );
        let mut session = self.session().await?;
        let row = rows!(session, fetch_optional, Row, BY_ID, id)?;
        session.done().await?;

        Ok(row.map(|(a, b, c, d, e, secret_sha256)| (api_key((a, b, c, d, e)), secret_sha256)))
    }

    /// Returns all keys, the newest first.
    pub async fn keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        let mut session = self.session().await?;
        let rows = rows!(session, fetch_all, KeyRow, ALL)?;
        session.done().await?;

        Ok(rows.into_iter().map(api_key).collect())
    }

    /// Revokes a key immediately. Returns `false` for an unknown or already revoked key.
    pub async fn revoke_key(&self, id: &str, now_ms: i64) -> Result<bool, StoreError> {
        let mut session = self.writing().await?;
        let revoked = execute!(session, REVOKE, id, now_ms)?;
        session.commit().await?;

        Ok(revoked == 1)
    }
}

pub(super) fn api_key((id, tenant_uid, created_ms, expires_ms, revoked_ms): KeyRow) -> ApiKey {
    ApiKey {
        id,
        scope: tenant_uid.map_or(Scope::Operator, Scope::Tenant),
        created_ms,
        expires_ms,
        revoked_ms,
    }
}

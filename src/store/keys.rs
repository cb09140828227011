//! API keys: only the hash of each is kept.

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::{Store, StoreError};

/// What a key opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Reads one tenant's invoices.
    Tenant(String),
    /// Reads and writes everything.
    Operator,
}

impl Scope {
    /// Whether this key may read that tenant's invoices.
    pub fn reads(&self, tenant_uid: &str) -> bool {
        match self {
            Scope::Operator => true,
            Scope::Tenant(own) => own == tenant_uid,
        }
    }
}

/// A key, without the key. Times in Unix milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiKey {
    pub id: String,
    pub scope: Scope,
    pub created_ms: i64,
    pub expires_ms: Option<i64>,
    pub revoked_ms: Option<i64>,
}

impl Store {
    pub async fn insert_key(&self, key: &ApiKey, secret_sha256: &[u8; 32]) -> Result<(), StoreError> {
        let tenant_uid = match &key.scope {
            Scope::Tenant(tenant_uid) => Some(tenant_uid),
            Scope::Operator => None,
        };
        sqlx::query(
            "insert into api_keys (id, secret_sha256, tenant_uid, created_ms, expires_ms, revoked_ms) values ($1, $2, $3, $4, $5, $6)",
        )
        .bind(&key.id)
        .bind(&secret_sha256[..])
        .bind(tenant_uid)
        .bind(key.created_ms)
        .bind(key.expires_ms)
        .bind(key.revoked_ms)
        .execute(&self.write)
        .await?;
        Ok(())
    }

    /// The key with this hash, expired and revoked ones too.
    pub async fn key_by_hash(&self, secret_sha256: &[u8; 32]) -> Result<Option<ApiKey>, StoreError> {
        let sql = "select id, tenant_uid, created_ms, expires_ms, revoked_ms from api_keys where secret_sha256 = $1";
        let row = sqlx::query(sql).bind(&secret_sha256[..]).fetch_optional(&self.read).await?;
        row.as_ref().map(api_key).transpose()
    }

    /// All keys, the newest first.
    pub async fn keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        let sql = "select id, tenant_uid, created_ms, expires_ms, revoked_ms from api_keys order by created_ms desc, id";
        let rows = sqlx::query(sql).fetch_all(&self.read).await?;
        rows.iter().map(api_key).collect()
    }

    /// Revokes a key at once. False: there is no such key, or it is revoked already.
    pub async fn revoke_key(&self, id: &str, now_ms: i64) -> Result<bool, StoreError> {
        let sql = "update api_keys set revoked_ms = $2 where id = $1 and revoked_ms is null";
        let done = sqlx::query(sql).bind(id).bind(now_ms).execute(&self.write).await?;
        Ok(done.rows_affected() == 1)
    }
}

fn api_key(row: &SqliteRow) -> Result<ApiKey, StoreError> {
    let tenant_uid: Option<String> = row.try_get("tenant_uid")?;
    Ok(ApiKey {
        id: row.try_get("id")?,
        scope: tenant_uid.map_or(Scope::Operator, Scope::Tenant),
        created_ms: row.try_get("created_ms")?,
        expires_ms: row.try_get("expires_ms")?,
        revoked_ms: row.try_get("revoked_ms")?,
    })
}

//! `keys`: creates, lists and revokes API keys. A key is shown once; the database stores only its
//! hash.

use clap::{Args, Subcommand};
use serde_json::json;
use uuid::Uuid;

use super::output;
use super::{Access, Exit, GlobalArgs, duration_ms};
use crate::clock::Clock;
use crate::config::ConfigErrors;
use crate::domain::api_key;
use crate::domain::invoice::schema::validate_uid;
use crate::store::{ApiKey, Scope, Store, StoreError};

/// Create, list and revoke API keys
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler keys create --operator
  stripe-reconciler keys list")]
pub struct Keys {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create a key and print it once, alone on standard output
    #[command(after_help = "Examples:
  TENANT_KEY=$(stripe-reconciler keys create --tenant acme)
  stripe-reconciler keys create --operator --expires-in 90d")]
    Create(Create),
    /// List all keys, without their secret part
    #[command(after_help = "Example:
  stripe-reconciler keys list --json | jq -r '.[] | select(.revokedAt == null) | .id'")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Revoke a key immediately
    #[command(after_help = "Example:\n  stripe-reconciler keys revoke key_0197f3c2d1b47a90")]
    Revoke {
        /// Id of the key in `keys list`
        id: String,
    },
}

#[derive(Args)]
// With `#[group(...)]` clap would put every argument of the struct into the group, although
// `--expires-in` is not a scope.
#[command(group = clap::ArgGroup::new("scope").required(true).args(["tenant", "operator"]))]
struct Create {
    /// Let the key read this tenant's invoices
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    /// Let the key read and write the invoices of all tenants
    #[arg(long)]
    operator: bool,
    /// Validity: a number and s, m, h or d [default: unlimited]
    #[arg(long, value_name = "DURATION")]
    expires_in: Option<String>,
}

impl Keys {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        match self.command {
            Command::Create(create) => create.run(settings).await,
            Command::List { json } => list(&settings.store(Access::Reads).await?, json).await,
            Command::Revoke { id } => revoke(&settings.store(Access::Writes).await?, &id).await,
        }
    }
}

impl Create {
    async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let now_ms = Clock::system().now_ms();
        let scope = match self.tenant {
            Some(tenant_uid) => {
                validate_uid(&tenant_uid)
                    .map_err(|reason| ConfigErrors(vec![format!("--tenant {reason}")]))?;
                Scope::Tenant(tenant_uid)
            }
            None => Scope::Operator,
        };

        let expires_ms = self
            .expires_in
            .map(|text| duration_ms("--expires-in", &text))
            .transpose()?
            .map(|ms| now_ms.saturating_add(ms));

        let store = settings.store(Access::Writes).await?;
        let (key, secret) = make(&store, scope, now_ms, expires_ms).await?;
        output::note(format!(
            "{}: {}, shown only once",
            key.id,
            describe(&key.scope)
        ));
        output::line(secret)?;
        Ok(Exit::Done)
    }
}

/// Creates a key. Also returns its secret part, which is not stored.
pub(super) async fn make(
    store: &Store,
    scope: Scope,
    created_ms: i64,
    expires_ms: Option<i64>,
) -> Result<(ApiKey, String), StoreError> {
    let key = ApiKey {
        id: format!("key_{}", Uuid::now_v7().simple()),
        scope,
        created_ms,
        expires_ms,
        revoked_ms: None,
    };
    let mut random = [0; 32];
    rand::fill(&mut random[..]);

    let secret = api_key::from_random(random);
    store
        .insert_key(&key, &api_key::hash(secret.as_bytes()))
        .await?;
    Ok((key, secret))
}

fn describe(scope: &Scope) -> String {
    match scope {
        Scope::Tenant(tenant_uid) => format!("reads tenant {tenant_uid}"),
        Scope::Operator => "operator".to_owned(),
    }
}

async fn list(store: &Store, json: bool) -> anyhow::Result<Exit> {
    let keys = store.keys().await?;
    if json {
        let items: Vec<_> = keys.iter().map(as_json).collect();
        output::line(serde_json::to_string_pretty(&items)?)?;
        return Ok(Exit::Done);
    }

    let now_ms = Clock::system().now_ms();
    output::line(output::table(
        &["ID", "SCOPE", "STATE", "CREATED", "EXPIRES"],
        keys.iter().map(|key| table_row(key, now_ms)).collect(),
    ))?;

    Ok(Exit::Done)
}

fn table_row(key: &ApiKey, now_ms: i64) -> Vec<String> {
    let state = if key.revoked_ms.is_some() {
        "revoked"
    } else if key.expires_ms.is_some_and(|ms| ms <= now_ms) {
        "expired"
    } else {
        "valid"
    };

    vec![
        key.id.clone(),
        describe(&key.scope),
        state.to_owned(),
        output::time(Some(key.created_ms)),
        output::time(key.expires_ms),
    ]
}

fn as_json(key: &ApiKey) -> serde_json::Value {
    let tenant_uid = match &key.scope {
        Scope::Tenant(tenant_uid) => Some(tenant_uid),
        Scope::Operator => None,
    };
    json!({
        "id": key.id,
        "operator": tenant_uid.is_none(),
        "tenantUid": tenant_uid,
        "createdAt": output::time(Some(key.created_ms)),
        "expiresAt": key.expires_ms.map(|ms| output::time(Some(ms))),
        "revokedAt": key.revoked_ms.map(|ms| output::time(Some(ms))),
    })
}

async fn revoke(store: &Store, id: &str) -> anyhow::Result<Exit> {
    if store.revoke_key(id, Clock::system().now_ms()).await? {
        output::line(format!("revoked {id}"))?;
        return Ok(Exit::Done);
    }
    output::note(format!(
        "error: no valid key {id}; `keys list` shows all keys"
    ));
    Ok(Exit::Refused)
}

//! Stored progress of the log scanner and of each step of reconciliation.

use std::fmt;

use crate::store::engine::connection::{execute, rows};
use crate::store::{Store, StoreError};

/// A step whose progress is stored, or a connected account that was found.
///
/// [`Display`](fmt::Display) writes the stored key. Stored keys never change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProgressKey {
    /// Unix milliseconds up to which the log scanner has read.
    LogScan,
    /// Unix seconds up to which the events of the key's own account were read.
    Events,
    /// Unix seconds up to which the events of a connected account were read.
    AccountEvents(String),
    /// Unix milliseconds when a connected account was found.
    Account(String),
    /// Unix milliseconds when connected accounts were last searched for.
    AccountSearch,
    /// Unix seconds up to which Stripe's list of invoices was read.
    InvoiceList,
    /// Unix milliseconds when settled invoices were last sampled.
    InvoiceSample,
}

const ACCOUNT_PREFIX: &str = "account ";

impl fmt::Display for ProgressKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProgressKey::LogScan => f.write_str("signs"),
            ProgressKey::Events => f.write_str("events"),
            ProgressKey::AccountEvents(account) => write!(f, "events of {account}"),
            ProgressKey::Account(account) => write!(f, "{ACCOUNT_PREFIX}{account}"),
            ProgressKey::AccountSearch => f.write_str("accounts seen"),
            ProgressKey::InvoiceList => f.write_str("invoices listed"),
            ProgressKey::InvoiceSample => f.write_str("invoices sampled"),
        }
    }
}

const PROGRESS: &str = "select value from progress where name = $1";
const SET_PROGRESS: &str = "
    insert into progress (name, value) values ($1, $2)
    on conflict (name) do update set value = excluded.value";
/// Prefix search: `$2` is an upper bound above every name that starts with `$1`.
const ACCOUNTS: &str = "
    select name from progress where name >= $1 and name < $2 order by name limit $3";

impl Store {
    /// Returns the progress of a step, or `None` if it never ran.
    pub async fn progress(&self, key: &ProgressKey) -> Result<Option<i64>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(session, fetch_optional, (i64,), PROGRESS, key.to_string())?;
        session.done().await?;

        Ok(found.map(|(value,)| value))
    }

    /// Saves the progress of a step.
    pub async fn set_progress(&self, key: &ProgressKey, value: i64) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        execute!(session, SET_PROGRESS, key.to_string(), value)?;
        session.commit().await
    }

    /// Returns the connected accounts that were found so far, in order.
    pub async fn known_accounts(&self, limit: u32) -> Result<Vec<String>, StoreError> {
        let mut session = self.session().await?;
        let end = format!("{ACCOUNT_PREFIX}\u{7f}");
        let found = rows!(
            session,
            fetch_all,
            (String,),
            ACCOUNTS,
            ACCOUNT_PREFIX,
            end.as_str(),
            i64::from(limit)
        )?;
        session.done().await?;

        Ok(found
            .iter()
            .filter_map(|(name,)| name.strip_prefix(ACCOUNT_PREFIX))
            .map(str::to_owned)
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_progress_keys_never_change() {
        let account = || "acct_1".to_owned();
        for (key, stored) in [
            (ProgressKey::LogScan, "signs"),
            (ProgressKey::Events, "events"),
            (ProgressKey::AccountEvents(account()), "events of acct_1"),
            (ProgressKey::Account(account()), "account acct_1"),
            (ProgressKey::AccountSearch, "accounts seen"),
            (ProgressKey::InvoiceList, "invoices listed"),
            (ProgressKey::InvoiceSample, "invoices sampled"),
        ] {
            assert_eq!(key.to_string(), stored);
        }
    }
}

//! Leases for work that only one process may do at a time.

use crate::clock::MAX_SKEW_MS;
use crate::store::engine::connection::{execute, rows};
use crate::store::{Store, StoreError};

/// A single statement that takes a lease, so that two processes cannot both take it.
const TAKE: &str = "
    insert into leases (name, holder, expires_ms) values ($1, $2, $3)
    on conflict (name) do update set holder = excluded.holder, expires_ms = excluded.expires_ms
    where leases.holder = excluded.holder or leases.expires_ms <= $4 or leases.expires_ms > $5";
const FIND: &str = "select holder, expires_ms from leases where name = $1";
const RELEASE: &str = "delete from leases where name = $1 and holder = $2";

impl Store {
    /// Takes or renews a lease until `expires_ms`. Returns `false` if another process holds it.
    ///
    /// A lease that expires implausibly late was taken under a skewed clock and counts as expired.
    pub async fn take_lease(
        &self,
        name: &str,
        holder: &str,
        now_ms: i64,
        expires_ms: i64,
    ) -> Result<bool, StoreError> {
        let implausible_ms = expires_ms + MAX_SKEW_MS;
        let mut session = self.writing().await?;
        let taken = execute!(
            session,
            TAKE,
            name,
            holder,
            expires_ms,
            now_ms,
            implausible_ms
        )?;
        session.commit().await?;

        Ok(taken == 1)
    }

    /// Returns the holder of a lease and when it expires, even if it was taken under a skewed
    /// clock.
    pub async fn lease(&self, name: &str) -> Result<Option<(String, i64)>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(session, fetch_optional, (String, i64), FIND, name)?;
        session.done().await?;

        Ok(found)
    }

    /// Releases a lease if this holder has it.
    pub async fn release_lease(&self, name: &str, holder: &str) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        execute!(session, RELEASE, name, holder)?;
        session.commit().await
    }
}

//! Reports of the last runs.

use serde_json::value::RawValue;

use crate::store::engine::connection::{execute, rows};
use crate::store::{Store, StoreError};

/// A finished run. Times in Unix milliseconds.
#[derive(Clone, Debug)]
pub struct Run {
    pub id: String,
    pub started_ms: i64,
    pub ended_ms: i64,
    /// The report, as JSON.
    pub report: Box<RawValue>,
}

/// Number of reports that are stored; older ones are deleted.
const MAX_RUNS: i64 = 200;

const SAVE: &str = "insert into runs (id, started_ms, ended_ms, report) values ($1, $2, $3, $4)";
const DELETE_OLD: &str = "
    delete from runs where id not in (select id from runs order by started_ms desc, id limit $1)";
const LAST: &str = "
    select id, started_ms, ended_ms, report from runs
    where started_ms <= $2 order by started_ms desc, id limit $1";

/// Columns of a run: id, started, ended, report.
type RunRow = (String, i64, i64, String);

impl Store {
    /// Saves the report of a run, and deletes the oldest reports beyond 200.
    pub async fn save_run(&self, run: &Run) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        execute!(
            session,
            SAVE,
            &run.id,
            run.started_ms,
            run.ended_ms,
            run.report.get()
        )?;
        execute!(session, DELETE_OLD, MAX_RUNS)?;
        session.commit().await
    }

    /// Returns the last runs that began no later than `until_ms`, the latest first.
    pub async fn last_runs(&self, limit: u32, until_ms: i64) -> Result<Vec<Run>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(session, fetch_all, RunRow, LAST, i64::from(limit), until_ms)?;
        session.done().await?;

        found.into_iter().map(run).collect()
    }
}

fn run((id, started_ms, ended_ms, report): RunRow) -> Result<Run, StoreError> {
    let report = RawValue::from_string(report)
        .map_err(|error| StoreError::damaged(format!("the report of run {id}: {error}")))?;

    Ok(Run {
        id,
        started_ms,
        ended_ms,
        report,
    })
}

//! The store's side of `copy`: reads tables in pages by primary key, and overwrites the rows of
//! another database with them.
//!
//! The target's `progress` table records which run may write to it, so that `copy` never overwrites
//! what another command wrote.

use futures_util::{Stream, TryStreamExt};
use sqlx::{AssertSqlSafe, ColumnIndex, Decode, Type};

use super::tables::{Column, Kind, Table};
use crate::store::engine::connection::{Connection, EngineConnection, execute, rows};
use crate::store::{Store, StoreError};

/// Size in bytes at which a page of rows ends.
const PAGE_BYTES: usize = 2 << 20;

/// The value of one column.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    Text(Option<String>),
    Number(Option<i64>),
    Bytes(Option<Vec<u8>>),
}

/// A row of a [`Table`], with its payload or only the payload's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    cells: Vec<Value>,
    key: usize,
}

/// A page of rows in the order of their keys.
#[derive(Clone, Debug)]
pub struct CopyPage {
    pub rows: Vec<Row>,
    /// `true` if no row follows.
    pub is_last: bool,
}

/// The result of checking whether `copy` may write to a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyTarget {
    Ready,
    /// A command other than `copy` wrote to the database.
    InUse,
    /// This table has rows that no copy wrote.
    HoldsOther(&'static str),
    /// The database is a copy of another one.
    CopyOfAnother,
}

impl Row {
    /// Returns the primary key. Both engines order rows by it.
    pub fn key(&self) -> &[Value] {
        &self.cells[..self.key]
    }
}

impl Value {
    fn bytes(&self) -> usize {
        8 + match self {
            Value::Text(text) => text.as_ref().map_or(0, String::len),
            Value::Bytes(bytes) => bytes.as_ref().map_or(0, Vec::len),
            Value::Number(_) => 0,
        }
    }

    fn text(&self) -> Option<&str> {
        if let Value::Text(text) = self {
            text.as_deref()
        } else {
            None
        }
    }

    fn number(&self) -> Option<i64> {
        if let Value::Number(number) = self {
            *number
        } else {
            None
        }
    }

    fn blob(&self) -> Option<&[u8]> {
        if let Value::Bytes(bytes) = self {
            bytes.as_deref()
        } else {
            None
        }
    }
}

const COPY_ID: &str = "select value from progress where name = 'copy id'";
const SET_COPY_ID: &str =
    "insert into progress (name, value) values ('copy id', $1) on conflict (name) do nothing";
const COPY_NOTES: &str = "select name, value from progress where name in ('copy of', 'copy over')";
const BEGIN_COPY: &str = "
    insert into progress (name, value) values ('copy of', $1), ('copy run', $2)
    on conflict (name) do update set value = excluded.value";
/// Changes no row if another `copy` has started since, or if another command has written here.
const IS_STILL_MINE: &str = "
    update progress set value = $1 where name = 'copy run' and value = $1
                                     and not exists (select 1 from progress as noted where noted.name = 'copy over')";
const END_COPYING: &str =
    "insert into progress (name, value) values ('copy over', $1) on conflict (name) do nothing";
/// Takes the row lock. It waits for a page in progress and makes the next page fail the "still
/// mine" check.
const END_RUN: &str = "update progress set value = 0 where name = 'copy run'";

impl Store {
    /// Returns the id by which copies identify this database. Stores `new_id` if the database has
    /// no id yet.
    pub async fn copy_id(&self, new_id: i64) -> Result<i64, StoreError> {
        let mut session = self.writing().await?;
        execute!(session, SET_COPY_ID, new_id)?;
        let (id,) = rows!(session, fetch_one, (i64,), COPY_ID)?;
        session.commit().await?;
        Ok(id)
    }

    /// Makes this database a copy of `of` if it is empty or already a copy of `of`. From then on
    /// only `run` may write to the database; earlier runs may not.
    pub async fn begin_copy(&self, of: i64, run: i64) -> Result<CopyTarget, StoreError> {
        let mut session = self.transaction().await?;
        let notes = rows!(session, fetch_all, (String, i64), COPY_NOTES)?;
        let note = |name: &str| {
            notes
                .iter()
                .find(|(noted, _)| noted == name)
                .map(|(_, value)| *value)
        };
        let held = self.first_that_holds_rows(&mut session).await?;
        let target = match (note("copy over"), note("copy of"), held) {
            (Some(_), ..) => CopyTarget::InUse,
            (None, _, None) => CopyTarget::Ready,
            (None, Some(known), Some(_)) if known == of => CopyTarget::Ready,
            (None, Some(_), Some(_)) => CopyTarget::CopyOfAnother,
            (None, None, Some(table)) => CopyTarget::HoldsOther(table),
        };

        if target == CopyTarget::Ready {
            execute!(session, BEGIN_COPY, of, run)?;
        }

        session.commit().await?;

        Ok(target)
    }

    /// Ends copying into this database, because another command writes to it from now on.
    pub async fn end_copying(&self, now_ms: i64) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        execute!(session, END_RUN)?;
        execute!(session, END_COPYING, now_ms)?;
        session.commit().await
    }

    /// Returns whether the database has rows to copy.
    pub async fn holds_rows(&self) -> Result<bool, StoreError> {
        let mut session = self.session().await?;
        let held = self.first_that_holds_rows(&mut session).await?;
        session.done().await?;
        Ok(held.is_some())
    }

    async fn first_that_holds_rows(
        &self,
        session: &mut Connection,
    ) -> Result<Option<&'static str>, StoreError> {
        for table in Table::ALL {
            let found = read(
                session,
                table.any(),
                &[],
                &table.columns[..table.key],
                table.key,
            )
            .await?;
            if !found.rows.is_empty() {
                return Ok(Some(table.name));
            }
        }

        Ok(None)
    }

    /// Returns the rows after this key in the form used for comparison, with each payload replaced
    /// by its length.
    pub async fn rows_after(
        &self,
        table: Table,
        after: Option<&[Value]>,
    ) -> Result<CopyPage, StoreError> {
        let sql = if after.is_some() {
            table.next_page()
        } else {
            table.first_page()
        };
        let compared = read_as(table, Kind::Number);
        let mut session = self.session().await?;
        let binds = [
            after.unwrap_or_default(),
            &[Value::Number(Some(table.page))],
        ]
        .concat();
        let mut page = read(&mut session, sql, &binds, &compared, table.key).await?;
        session.done().await?;
        page.is_last &= (page.rows.len() as i64) < table.page;

        Ok(page)
    }

    /// Returns the complete rows between two keys, both included. Returns only the first rows if
    /// all of them exceed a page in bytes.
    pub async fn rows_between(
        &self,
        table: Table,
        from: &[Value],
        to: &[Value],
    ) -> Result<CopyPage, StoreError> {
        let mut session = self.session().await?;
        let page = read(
            &mut session,
            table.between(),
            &[from, to].concat(),
            &read_as(table, Kind::Bytes),
            table.key,
        )
        .await?;
        session.done().await?;

        Ok(page)
    }

    /// Overwrites rows and deletes others, in one transaction. Returns `false` and leaves the
    /// database unchanged if this run may no longer write to it.
    pub async fn apply(
        &self,
        run: i64,
        table: Table,
        rows: &[Row],
        deleted: &[Row],
    ) -> Result<bool, StoreError> {
        let mut session = self.writing().await?;
        if execute!(session, IS_STILL_MINE, run)? != 1 {
            session.commit().await?;
            return Ok(false);
        }

        for row in deleted {
            change(&mut session, table.delete(), row.key()).await?;
        }

        if !rows.is_empty() {
            write(&mut session, table, rows).await?;
        }

        session.commit().await?;

        Ok(true)
    }
}

/// Returns the columns of a table, with payloads read as `payload`.
fn read_as(table: Table, payload: Kind) -> Vec<Column> {
    table
        .columns
        .iter()
        .map(|(name, kind)| {
            (
                *name,
                if *kind == Kind::Payload {
                    payload
                } else {
                    *kind
                },
            )
        })
        .collect()
}

macro_rules! bound {
    ($query:expr, $cells:expr) => {{
        let mut query = $query;
        for cell in $cells {
            query = match cell {
                Value::Text(text) => query.bind(text),
                Value::Number(number) => query.bind(number),
                Value::Bytes(bytes) => query.bind(bytes),
            };
        }
        query
    }};
}

/// Reads rows up to the byte limit, so that a page fits into memory even if the rows are large.
async fn read(
    session: &mut Connection,
    sql: String,
    binds: &[Value],
    columns: &[Column],
    key: usize,
) -> Result<CopyPage, StoreError> {
    let sql = AssertSqlSafe(sql);

    match &mut session.connection {
        EngineConnection::Sqlite(connection) => {
            let query = bound!(sqlx::query(sql), binds);
            let ended = page_of(query.fetch(connection.start()), columns, key).await;
            connection.end(ended)
        }
        EngineConnection::Postgres(connection) => {
            let (inner, named, watch) = connection.start();
            let query = bound!(sqlx::query(sql).persistent(named), binds);
            let ended = watch.run(page_of(query.fetch(inner), columns, key)).await;
            Ok(connection.end(ended)?)
        }
    }
}

async fn page_of<R>(
    mut found: impl Stream<Item = Result<R, sqlx::Error>> + Unpin,
    columns: &[Column],
    key: usize,
) -> Result<CopyPage, sqlx::Error>
where
    R: sqlx::Row,
    usize: ColumnIndex<R>,
    String: Type<R::Database> + for<'r> Decode<'r, R::Database>,
    i64: Type<R::Database> + for<'r> Decode<'r, R::Database>,
    Vec<u8>: Type<R::Database> + for<'r> Decode<'r, R::Database>,
{
    let (mut rows, mut bytes) = (Vec::new(), 0);
    while let Some(row) = found.try_next().await? {
        let cells = columns
            .iter()
            .enumerate()
            .map(|(n, (_, kind))| match kind {
                Kind::Text => row.try_get(n).map(Value::Text),
                Kind::Number => row.try_get(n).map(Value::Number),
                Kind::Bytes | Kind::Payload => row.try_get(n).map(Value::Bytes),
            })
            .collect::<Result<Vec<Value>, _>>()?;

        bytes += cells.iter().map(Value::bytes).sum::<usize>();
        rows.push(Row { cells, key });

        if bytes >= PAGE_BYTES {
            return Ok(CopyPage {
                rows,
                is_last: false,
            });
        }
    }

    Ok(CopyPage {
        rows,
        is_last: true,
    })
}

async fn change(session: &mut Connection, sql: String, binds: &[Value]) -> Result<(), StoreError> {
    let sql = AssertSqlSafe(sql);

    match &mut session.connection {
        EngineConnection::Sqlite(connection) => {
            let query = bound!(sqlx::query(sql), binds);
            let ended = query.execute(connection.start()).await;
            connection.end(ended).map(drop)
        }
        EngineConnection::Postgres(connection) => {
            let (inner, named, watch) = connection.start();
            let query = bound!(sqlx::query(sql).persistent(named), binds);
            let ended = watch.run(query.execute(inner)).await;
            connection.end(ended)?;
            Ok(())
        }
    }
}

/// Writes rows: one by one in SQLite, where a statement needs no round trip; in PostgreSQL all in
/// one statement, column by column.
async fn write(session: &mut Connection, table: Table, rows: &[Row]) -> Result<(), StoreError> {
    if let EngineConnection::Postgres(connection) = &mut session.connection {
        let (inner, named, watch) = connection.start();
        let mut query = sqlx::query(AssertSqlSafe(table.write_in_postgres())).persistent(named);
        for (n, (_, kind)) in table.columns.iter().enumerate() {
            let cells = rows.iter().map(|row| &row.cells[n]);
            query = match kind {
                Kind::Text => query.bind(cells.map(Value::text).collect::<Vec<_>>()),
                Kind::Number => query.bind(cells.map(Value::number).collect::<Vec<_>>()),
                Kind::Bytes | Kind::Payload => {
                    query.bind(cells.map(Value::blob).collect::<Vec<_>>())
                }
            };
        }
        let ended = watch.run(query.execute(inner)).await;
        connection.end(ended)?;
        return Ok(());
    }

    for row in rows {
        change(session, table.write_in_sqlite(), &row.cells).await?;
    }

    Ok(())
}

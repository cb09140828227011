//! The tables that `copy` copies to another database, and the statements for it.
//!
//! Every table and column that a migration adds must also be added to [`Table::ALL`]; a test below
//! compares the two. Two things are not copied: `leases`, because a lease is valid only in its own
//! database, and the entries of `copy` itself in `progress`.

/// A table that `copy` transfers. Its statements are built from these constants alone; they contain
/// no input.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub name: &'static str,
    /// All columns, the primary key first.
    pub(in crate::store) columns: &'static [Column],
    /// Number of columns of the primary key.
    pub(in crate::store) key: usize,
    /// Condition on the rows to copy.
    only: &'static str,
    /// Largest number of rows in a page.
    pub(in crate::store) page: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Kind {
    Text,
    Number,
    Bytes,
    /// A large value that never changes except by pruning, so equal lengths mean equal bytes.
    Payload,
}
use Kind::{Bytes, Number, Payload, Text};

pub(in crate::store) type Column = (&'static str, Kind);

const ALL_ROWS: &str = "1 = 1";

impl Table {
    /// All tables, in the order of copying. Progress is copied before the rows that depend on it.
    /// If others write meanwhile, the copy then repeats some work instead of skipping it. Events
    /// are copied before their links, so that no event lacks its links.
    pub const ALL: [Table; 9] = [
        Table {
            name: "api_keys",
            columns: &[
                ("id", Text),
                ("secret_sha256", Bytes),
                ("tenant_uid", Text),
                ("created_ms", Number),
                ("expires_ms", Number),
                ("revoked_ms", Number),
            ],
            key: 1,
            only: ALL_ROWS,
            page: 500,
        },
        Table {
            name: "progress",
            columns: &[("name", Text), ("value", Number)],
            key: 1,
            only: "substr(name, 1, 5) <> 'copy '",
            page: 500,
        },
        Table {
            name: "moments",
            columns: &[("name", Text), ("at_ms", Number)],
            key: 1,
            only: ALL_ROWS,
            page: 500,
        },
        Table {
            name: "delivery_hours",
            columns: &[("hour", Number)],
            key: 1,
            only: ALL_ROWS,
            page: 5000,
        },
        Table {
            name: "awaited",
            columns: &[("stripe_invoice_id", Text), ("received_ms", Number)],
            key: 1,
            only: ALL_ROWS,
            page: 5000,
        },
        Table {
            name: "runs",
            columns: &[
                ("id", Text),
                ("started_ms", Number),
                ("ended_ms", Number),
                ("report", Text),
            ],
            key: 1,
            only: ALL_ROWS,
            page: 50,
        },
        Table {
            name: "invoices",
            columns: &[
                ("tenant_uid", Text),
                ("invoice_uid", Text),
                ("stripe_invoice_id", Text),
                ("document", Text),
                ("imported_states", Text),
                ("stored_ms", Number),
                ("revision", Number),
                ("check_due_ms", Number),
                ("checked_ms", Number),
                ("confirmed_ms", Number),
                ("differs_since_ms", Number),
            ],
            key: 2,
            only: ALL_ROWS,
            page: 500,
        },
        Table {
            name: "events",
            columns: &[
                ("key", Bytes),
                ("id", Text),
                ("event_type", Text),
                ("api_version", Text),
                ("object_id", Text),
                ("created_s", Number),
                ("received_ms", Number),
                ("source", Text),
                ("secret_label", Text),
                ("outcome", Text),
                ("unreadable_reason", Text),
                ("telling", Text),
                ("linked", Text),
                ("ask_due_ms", Number),
                ("ask_attempts", Number),
                ("body", Payload),
            ],
            key: 1,
            only: ALL_ROWS,
            page: 1000,
        },
        Table {
            name: "mentions",
            columns: &[("object_id", Text), ("event_key", Bytes)],
            key: 2,
            only: ALL_ROWS,
            page: 5000,
        },
    ];

    /// Returns whether the rows have a payload, so that [`Store::rows_between`] must read them in
    /// full before they are written.
    pub fn has_payload(&self) -> bool {
        self.columns.iter().any(|(_, kind)| *kind == Payload)
    }

    fn names(&self) -> String {
        self.columns
            .iter()
            .map(|(name, _)| *name)
            .collect::<Vec<_>>()
            .join(", ")
    }

    fn key_names(&self) -> String {
        self.columns[..self.key]
            .iter()
            .map(|(name, _)| *name)
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// Returns the placeholders of a key's cells, such as `$1, $2`.
    fn binds(first: usize, count: usize) -> String {
        (first..first + count)
            .map(|n| format!("${n}"))
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// Returns the statement that selects rows for comparison, with each payload replaced by its
    /// length.
    fn select(&self) -> String {
        format!(
            "select {} from {}",
            self.columns
                .iter()
                .map(|(name, kind)| match kind {
                    Payload => format!("cast(length({name}) as bigint)"),
                    Text | Number | Bytes => (*name).to_owned(),
                })
                .collect::<Vec<_>>()
                .join(", "),
            self.name
        )
    }

    pub(in crate::store) fn first_page(&self) -> String {
        format!(
            "{} where {} order by {} limit $1",
            self.select(),
            self.only,
            self.key_names()
        )
    }

    pub(in crate::store) fn next_page(&self) -> String {
        let (key, after, limit) = (self.key_names(), Table::binds(1, self.key), self.key + 1);
        format!(
            "{} where {} and ({key}) > ({after}) order by {key} limit ${limit}",
            self.select(),
            self.only
        )
    }

    pub(in crate::store) fn between(&self) -> String {
        let (names, key, from, to) = (
            self.names(),
            self.key_names(),
            Table::binds(1, self.key),
            Table::binds(self.key + 1, self.key),
        );
        format!(
            "select {names} from {} where ({key}) >= ({from}) and ({key}) <= ({to}) order by {key}",
            self.name
        )
    }

    /// Returns the statement that reads one row if the table has any.
    pub(in crate::store) fn any(&self) -> String {
        format!(
            "select {} from {} where {} limit 1",
            self.key_names(),
            self.name,
            self.only
        )
    }

    pub(in crate::store) fn delete(&self) -> String {
        format!(
            "delete from {} where ({}) = ({})",
            self.name,
            self.key_names(),
            Table::binds(1, self.key)
        )
    }

    /// Returns the clause that overwrites existing rows.
    fn on_conflict_clause(&self) -> String {
        let mut sql = format!(" on conflict ({}) do ", self.key_names());
        let others = &self.columns[self.key..];
        if others.is_empty() {
            sql.push_str("nothing");
        } else {
            let set = others
                .iter()
                .map(|(name, _)| format!("{name} = excluded.{name}"))
                .collect::<Vec<_>>()
                .join(", ");
            sql.push_str("update set ");
            sql.push_str(&set);
        }

        sql
    }

    /// Returns the statement that writes one row.
    pub(in crate::store) fn write_in_sqlite(&self) -> String {
        let (names, values) = (self.names(), Table::binds(1, self.columns.len()));
        format!(
            "insert into {} ({names}) values ({values}){}",
            self.name,
            self.on_conflict_clause()
        )
    }

    /// Returns the statement that writes all rows at once, one array per column.
    pub(in crate::store) fn write_in_postgres(&self) -> String {
        let (names, arrays) = (
            self.names(),
            self.columns
                .iter()
                .enumerate()
                .map(|(n, (_, kind))| match kind {
                    Text => format!("${}::text[]", n + 1),
                    Number => format!("${}::bigint[]", n + 1),
                    Bytes | Payload => format!("${}::bytea[]", n + 1),
                })
                .collect::<Vec<_>>()
                .join(", "),
        );
        let over = self.on_conflict_clause();

        format!(
            "insert into {} ({names}) select * from unnest({arrays}) as incoming ({names}){over}",
            self.name
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::store::migrations::MIGRATIONS;

    /// Returns the columns and the primary key of each table that the migrations create.
    fn created(engine: usize) -> BTreeMap<String, (BTreeSet<String>, Vec<String>)> {
        let (mut tables, mut table) = (BTreeMap::new(), None);
        for line in MIGRATIONS
            .iter()
            .flat_map(|(_, _, sql)| sql[engine].lines())
        {
            let words: Vec<&str> = line
                .trim_matches([' ', ',', ';', '('])
                .split_whitespace()
                .collect();
            match words[..] {
                ["create", "table", name, ..] => {
                    tables.insert(name.to_owned(), (BTreeSet::new(), Vec::new()));
                    table = Some(name.to_owned());
                }
                ["alter", "table", name, "add", "column", column, ..] => {
                    tables.get_mut(name).unwrap().0.insert(column.to_owned());
                }
                [")", ..] => table = None,
                ["primary", "key", ..] => {
                    let key = line
                        .split(['(', ')'])
                        .nth(1)
                        .unwrap()
                        .split(", ")
                        .map(str::to_owned)
                        .collect();
                    tables.get_mut(table.as_ref().unwrap()).unwrap().1 = key;
                }
                [column, ..] => {
                    if let Some((columns, key)) =
                        table.as_ref().and_then(|table| tables.get_mut(table))
                    {
                        columns.insert(column.to_owned());
                        if line.contains("primary key") {
                            *key = vec![column.to_owned()];
                        }
                    }
                }
                [] => {}
            }
        }

        tables
    }

    #[test]
    fn every_column_of_every_table_is_copied() {
        for engine in [0, 1] {
            let mut tables = created(engine);
            assert!(
                tables.remove("leases").is_some(),
                "leases stay in their database"
            );
            for table in Table::ALL {
                let (columns, key) = tables
                    .remove(table.name)
                    .unwrap_or_else(|| panic!("table {} exists", table.name));
                let copied: Vec<String> = table
                    .columns
                    .iter()
                    .map(|(name, _)| (*name).to_owned())
                    .collect();
                assert_eq!(copied[..table.key], key, "{}: the key", table.name);
                assert_eq!(
                    copied.into_iter().collect::<BTreeSet<_>>(),
                    columns,
                    "{}",
                    table.name
                );
            }
            assert!(tables.is_empty(), "not copied: {:?}", tables.keys());
        }
    }
}

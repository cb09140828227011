//! Rules about the source code that no lint knows: imports between rooms and files, words that
//! belong to one room, retired names, and the size of files and functions.
//!
//! The table in `src/lib.rs` is the import law. The rules apply to parsed text, so they also cover
//! code that a feature or a platform would leave out.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod retired_names;
mod source;

use std::collections::{BTreeMap, BTreeSet};

use source::{Kind, Source, sources};

/// Maximum number of lines in a file.
const MAX_FILE_LINES: usize = 500;

/// Maximum number of lines in a function.
const MAX_FUNCTION_LINES: usize = 70;

/// Circles between files that remain to be opened. Delete a line with its circle.
const REMAINING_CIRCLES: &[&[&str]] = &[];

/// Files and functions that remain to be split, by path or by path and name.
const REMAINING_LONG: &[&str] = &[
    "testkit/src/openapi.rs: assert_documented",
    "testkit/src/stripe/api.rs",
    "testkit/src/stripe/story.rs: after_finalization",
];

/// Retired names that remain to be replaced, by path and name.
const REMAINING_NAMES: &[&str] = &["src/http/server/connection.rs: heard"];

/// Rooms that a room may import.
#[derive(Debug, PartialEq, Eq)]
enum Importable {
    EveryRoom,
    Only(BTreeSet<String>),
}

impl Importable {
    fn contains(&self, room: &str) -> bool {
        match self {
            Importable::EveryRoom => true,
            Importable::Only(rooms) => rooms.contains(room),
        }
    }
}

/// Parses the table in the documentation of the crate: the first column names rooms, the last the
/// rooms that they may import. Returns the rows in order.
fn import_table(documentation: &str) -> Vec<(String, Importable)> {
    let mut table = Vec::new();
    for row in documentation
        .lines()
        .filter_map(|line| line.strip_prefix("//! | "))
        .filter(|row| row.starts_with(['[', '`']))
    {
        let cells: Vec<&str> = row.trim_end().trim_end_matches('|').split(" | ").collect();
        for room in quoted_words(cells[0]) {
            let importable = match cells[2].trim() {
                "every room" => Importable::EveryRoom,
                rooms => Importable::Only(quoted_words(rooms).into_iter().collect()),
            };
            table.push((room, importable));
        }
    }
    table
}

/// Returns the words between backticks.
fn quoted_words(text: &str) -> Vec<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// Returns the imports of a file that the table does not allow.
fn violations(source: &Source, table: &BTreeMap<String, Importable>) -> Vec<String> {
    let room = source.room();
    let importable = table.get(&room);

    source
        .imported_rooms()
        .into_iter()
        .filter(|other| table.contains_key(other) || other == "*")
        .filter(|other| !importable.is_some_and(|rooms| rooms.contains(other)))
        .map(|other| {
            format!(
                "{} imports {other}: see the table in src/lib.rs",
                source.path
            )
        })
        .collect()
}

/// Returns the files that each file imports.
///
/// A name that a module re-exports leads to the file that defines it. A module may use its own
/// child modules, which makes no circle with children that use their parent.
fn file_imports(sources: &[Source]) -> BTreeMap<&str, BTreeSet<&str>> {
    let modules: Modules = sources
        .iter()
        .map(|source| (source.module(), (source, source.bindings())))
        .collect();

    sources
        .iter()
        .map(|source| {
            let module = source.module();
            let imported = source
                .paths()
                .into_iter()
                .filter_map(|path| defining_file(path, &modules))
                .filter(|other| other.path != source.path && !other.module().starts_with(&module))
                .map(|other| other.path.as_str())
                .collect();
            (source.path.as_str(), imported)
        })
        .collect()
}

/// Files with the names that they import, by their module.
type Modules<'s> = BTreeMap<Vec<String>, (&'s Source, BTreeMap<String, Vec<String>>)>;

/// Returns the file that defines the item at a path. `None` for a path into another crate.
fn defining_file<'s>(mut path: Vec<String>, modules: &Modules<'s>) -> Option<&'s Source> {
    // A re-export may lead to another one, but not in a circle.
    for _ in 0..modules.len() {
        let depth = (1..=path.len())
            .rev()
            .find(|n| modules.contains_key(&path[..*n]))?;
        let (file, bindings) = &modules[&path[..depth]];
        let binding = path
            .get(depth)
            .and_then(|name| bindings.get(name).cloned())
            .filter(|target| *target != path);
        match binding {
            Some(target) => path = [&target, &path[depth + 1..]].concat(),
            None => return Some(file),
        }
    }

    None
}

/// Returns the groups of files that import each other, directly or through other files.
fn circles<'s>(imports: &BTreeMap<&'s str, BTreeSet<&'s str>>) -> BTreeSet<Vec<&'s str>> {
    let reachable: BTreeMap<&str, BTreeSet<&str>> = imports
        .keys()
        .map(|file| {
            let mut found = BTreeSet::new();
            let mut pending: Vec<&str> = imports[file].iter().copied().collect();
            while let Some(next) = pending.pop() {
                if found.insert(next) {
                    pending.extend(&imports[next]);
                }
            }
            (*file, found)
        })
        .collect();

    imports
        .keys()
        .filter(|file| reachable[*file].contains(*file))
        .map(|file| {
            reachable[file]
                .iter()
                .copied()
                .filter(|other| reachable[other].contains(file))
                .collect()
        })
        .collect()
}

#[test]
fn rooms_import_only_what_the_table_allows() {
    let sources = sources(&["src"]);
    assert!(sources.len() > 30, "the sources must be found");

    let root = sources
        .iter()
        .find(|source| source.path == "src/lib.rs")
        .unwrap();
    let rows = import_table(&root.text);
    let table: BTreeMap<String, Importable> = rows.into_iter().collect();
    let declared: BTreeSet<String> = root
        .definitions()
        .into_iter()
        .filter(|definition| definition.kind == Kind::Module)
        .map(|definition| definition.name)
        .chain(["main".to_owned()])
        .collect();
    assert_eq!(
        table.keys().cloned().collect::<BTreeSet<_>>(),
        declared,
        "every room must have one row in the table"
    );

    let found: Vec<String> = sources
        .iter()
        .flat_map(|source| violations(source, &table))
        .collect();
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn table_names_only_rooms_of_lower_rows() {
    let sources = sources(&["src"]);
    let root = sources
        .iter()
        .find(|source| source.path == "src/lib.rs")
        .unwrap();

    let mut lower = BTreeSet::new();
    for (room, importable) in import_table(&root.text) {
        if let Importable::Only(rooms) = importable {
            let upward: Vec<&String> = rooms.difference(&lower).collect();
            assert!(
                upward.is_empty(),
                "{room} imports {upward:?}, which must stand in an earlier row"
            );
        }
        lower.insert(room);
    }
}

#[test]
fn files_import_each_other_in_no_circle() {
    let sources = sources(&["src"]);
    let imports = file_imports(&sources);
    assert!(
        imports["src/ingest/mod.rs"].contains("src/store/mod.rs"),
        "imports must be found"
    );

    let mut found = circles(&imports);
    found.retain(|files| !REMAINING_CIRCLES.contains(&files.as_slice()));
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn words_stay_in_their_room() {
    let exclusive: [(&[&str], &str, &str); 3] = [
        (&["sqlx"], "store", "the engines differ in no other room"),
        (
            &["axum"],
            "http",
            "one room turns failures into status codes",
        ),
        (
            &["clap", "comfy_table", "indicatif", "anstream"],
            "cli",
            "every other room works without a terminal",
        ),
    ];
    let impure = [
        "tokio",
        "async",
        "await",
        "clock",
        "Clock",
        "SystemTime",
        "Instant",
        "sleep",
        "env",
        "fs",
        "net",
        "tracing",
        "rand",
    ];

    for source in sources(&["src"]) {
        let (room, identifiers) = (source.room(), source.identifiers());
        for (words, owner, reason) in exclusive {
            let is_main = source.path == "src/main.rs" && words.contains(&"clap");
            for word in words.iter().filter(|word| identifiers.contains(**word)) {
                assert!(
                    room == owner || is_main,
                    "{} mentions {word}, which only {owner} may: {reason}",
                    source.path
                );
            }
        }

        let found: Vec<&&str> = impure
            .iter()
            .filter(|word| identifiers.contains(**word))
            .collect();
        assert!(
            room != "domain" || found.is_empty(),
            "{} mentions {found:?}: domain is pure, so a history depends on its events only",
            source.path
        );
    }
}

#[test]
fn retired_names_are_not_used() {
    let mut found = Vec::new();
    for source in sources(&["src", "tests", "benches", "fuzz/src", "testkit/src"]) {
        for definition in source.definitions() {
            let retired = match definition.kind {
                Kind::Module => retired_names::MODULES,
                Kind::Type => retired_names::TYPES,
                Kind::Function => retired_names::FUNCTIONS,
            };
            for (name, standard) in retired.iter().filter(|(name, _)| *name == definition.name) {
                if !REMAINING_NAMES.contains(&format!("{}: {name}", source.path).as_str()) {
                    found.push(format!("{}: {name} is now {standard}", source.path));
                }
            }
        }
    }

    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn every_file_states_its_purpose() {
    for source in sources(&["src", "tests", "benches", "fuzz/src", "testkit/src"]) {
        assert!(
            source.text.starts_with("//! "),
            "{} must open with `//!` and its purpose",
            source.path
        );
    }
}

#[test]
fn files_and_functions_stay_short() {
    let mut found = Vec::new();
    for source in sources(&["src", "testkit/src"]) {
        let lines = source.text.lines().count();
        if lines > MAX_FILE_LINES {
            found.push((source.path.clone(), lines));
        }
        for definition in source.definitions() {
            if definition.kind == Kind::Function && definition.lines > MAX_FUNCTION_LINES {
                let name = format!("{}: {}", source.path, definition.name);
                found.push((name, definition.lines));
            }
        }
    }

    found.retain(|(name, _)| !REMAINING_LONG.contains(&name.as_str()));
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn forbidden_imports_are_found_in_any_spelling() {
    let table: BTreeMap<String, Importable> = import_table(
        "//! | room | for | may import |\n//! | --- | --- | --- |\n\
         //! | [`domain`] | facts | nothing |\n//! | [`clock`] | time | nothing |\n\
         //! | [`store`] | SQL | `domain` |\n//! | [`flows`] | paths | `clock`, `domain`, `store` |\n\
         //! | [`config`], [`cli`] | settings | `flows` |\n//! | `main` | start | `cli` |\n",
    )
    .into_iter()
    .collect();

    let forbidden = [
        ("src/domain/a.rs", "use crate::clock::Clock;"),
        ("src/domain/a.rs", "use crate::{domain::fact, clock};"),
        (
            "src/domain/a.rs",
            "use crate::{domain::{fact, event}, clock::{self, Clock}};",
        ),
        ("src/domain/a.rs", "fn f() -> crate::clock::Clock { 'x' }"),
        ("src/domain/a.rs", "use super::super::clock;"),
        ("src/domain/a.rs", "use super::super::{fact, clock};"),
        ("src/domain/mod.rs", "use super::clock;"),
        (
            "src/domain/a.rs",
            "mod tests { use super::super::super::clock; }",
        ),
        ("src/clock.rs", "use super::store;"),
        (
            "src/domain/a.rs",
            "fn f() { assert!(crate::store::Store::is_open()) }",
        ),
        (
            "src/domain/a.rs",
            "macro_rules! m { () => { $crate::store::Store } }",
        ),
        ("src/main.rs", "use stripe_reconciler::flows;"),
        ("src/cli/a.rs", "use crate::*;"),
    ];
    for (path, text) in forbidden {
        let found = violations(&Source::parse(path, text), &table);
        assert!(!found.is_empty(), "{path}: {text}");
    }

    let allowed = [
        (
            "src/domain/a.rs",
            "use super::fact; use crate::domain::event; // crate::clock\n\
             const TEXT: &str = \"crate::clock\"; /* crate::clock */",
        ),
        (
            "src/domain/a.rs",
            "mod tests { use super::*; use super::super::fact; }",
        ),
        (
            "src/flows/a.rs",
            "use crate::{clock::Clock, domain::{clock, fact}, store};",
        ),
        (
            "src/cli/a.rs",
            "use super::super::flows; pub(crate) fn f<'a>(x: &'a str) {}",
        ),
        (
            "src/main.rs",
            "use stripe_reconciler::cli::{self, Arguments}; use other_crate::flows;",
        ),
    ];
    for (path, text) in allowed {
        let found = violations(&Source::parse(path, text), &table);
        assert!(found.is_empty(), "{path}: {text}: {found:?}");
    }
}

#[test]
fn circles_are_found() {
    let sources = [
        Source::parse(
            "src/a/mod.rs",
            "mod b; mod g; pub use b::B; pub use g::G; struct A;",
        ),
        Source::parse("src/a/b.rs", "use super::{A, G}; pub struct B;"),
        Source::parse("src/a/g.rs", "use crate::a::B; pub struct G;"),
        Source::parse("src/c.rs", "use crate::a::B; mod tests { use super::*; }"),
        Source::parse("src/d.rs", "fn f() { format!(\"{}\", crate::e::x()) }"),
        Source::parse("src/e.rs", "use crate::d;"),
    ];

    let found = circles(&file_imports(&sources));
    assert_eq!(
        found,
        BTreeSet::from([
            vec!["src/a/b.rs", "src/a/g.rs"],
            vec!["src/d.rs", "src/e.rs"]
        ])
    );
}

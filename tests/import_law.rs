//! The law of imports, as `src/lib.rs` writes it down, held against the code; and the few rules about files that no lint knows.
//!
//! Read as text, not compiled: so it also sees what a feature or a platform would leave out.

#![expect(clippy::unwrap_used, reason = "what goes wrong in a test fails it")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A source file: where it stands below `src/`, as it is, and without comments and what is inside quotes.
struct Source {
    path: String,
    text: String,
    code: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Source {
        Source {
            path: path.to_owned(),
            text: text.to_owned(),
            code: code_of(text),
        }
    }

    /// `domain` for `domain/event.rs`, `clock` for `clock.rs`.
    fn room(&self) -> &str {
        self.path.split('/').next().unwrap().trim_end_matches(".rs")
    }

    /// How many `super`s lead from its top level to the top of the crate.
    fn depth(&self) -> usize {
        let names = self.path.split('/').count();
        if self.path.ends_with("/mod.rs") {
            names - 1
        } else {
            names
        }
    }

    fn words(&self) -> BTreeSet<&str> {
        self.code
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .filter(|word| !word.is_empty())
            .collect()
    }

    /// The rooms that it imports, by `crate::`, by the crate's name, or by enough `super::`s.
    fn imported(&self) -> BTreeSet<String> {
        let mut rooms = BTreeSet::new();
        for root in ["crate::", "stripe_reconciler::"] {
            for (at, _) in self.code.match_indices(root) {
                if !self.code[..at].ends_with(is_name) {
                    rooms.extend(first_names(&self.code[at + root.len()..]));
                }
            }
        }
        for (at, _) in self.code.match_indices("super::") {
            let (before, after) = (&self.code[..at], &self.code[at..]);
            if before.ends_with("super::") || before.ends_with(is_name) {
                continue;
            }
            let rest = after.trim_start_matches("super::");
            let steps = (after.len() - rest.len()) / "super::".len();
            // A module inside the file is one step further down.
            let depth = self.depth() + usize::from(before.contains("\nmod tests {"));
            assert!(steps <= depth, "{} leaves the crate", self.path);
            if steps == depth {
                rooms.extend(first_names(rest));
            }
        }
        rooms.remove(self.room());
        rooms
    }
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// `a` of `a::b`, and `a`, `c` of `{a::{b}, c}`.
fn first_names(path: &str) -> Vec<String> {
    let name = |text: &str| {
        text.trim_start()
            .chars()
            .take_while(|c| is_name(*c) || *c == '*')
            .collect::<String>()
    };
    let Some(group) = path.strip_prefix('{') else {
        return vec![name(path)];
    };
    let (mut names, mut depth, mut start) = (Vec::new(), 1, 0);
    for (at, c) in group.char_indices() {
        depth = match c {
            '{' => depth + 1,
            '}' => depth - 1,
            _ => depth,
        };
        if depth == 0 || (depth == 1 && c == ',') {
            names.push(name(&group[start..]));
            start = at + 1;
        }
        if depth == 0 {
            break;
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// The text without comments, and with nothing between quotes.
fn code_of(text: &str) -> String {
    let (mut code, mut rest) = (String::new(), text);
    while let Some(c) = rest.chars().next() {
        let raw = rest
            .strip_prefix('r')
            .map(|after| after.trim_start_matches('#'))
            .filter(|after| after.starts_with('"'));
        let skipped = if code.ends_with(is_name) && c == 'r' {
            0
        } else if let Some(body) = raw {
            let hashes = rest.len() - body.len() - 1;
            let end = format!("\"{}", "#".repeat(hashes));
            hashes
                + 2
                + body[1..]
                    .find(&end)
                    .map_or(body.len() - 1, |at| at + end.len())
        } else if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |at| at + 2)
        } else if c == '"' {
            quoted(rest, '"')
        } else if c == '\'' && (rest[1..].starts_with('\\') || rest.chars().nth(2) == Some('\'')) {
            // A character; else it is a lifetime.
            quoted(rest, '\'')
        } else {
            0
        };
        if skipped == 0 {
            code.push(c);
        }
        rest = &rest[if skipped == 0 { c.len_utf8() } else { skipped }..];
    }
    code
}

/// The length of what stands between quotes, with them.
fn quoted(text: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Who may import a room.
#[derive(Debug, PartialEq, Eq)]
enum Importers {
    EverybodyBut(BTreeSet<String>),
    Only(BTreeSet<String>),
}

impl Importers {
    fn allow(&self, room: &str) -> bool {
        match self {
            Importers::EverybodyBut(rooms) => !rooms.contains(room),
            Importers::Only(rooms) => rooms.contains(room),
        }
    }
}

/// The table on the first page of the crate: rooms in the first column, their importers in the last.
fn law(page: &str) -> BTreeMap<String, Importers> {
    let quoted = |cell: &str| {
        cell.split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect::<BTreeSet<String>>()
    };
    let mut law = BTreeMap::new();
    for row in page
        .lines()
        .filter_map(|line| line.strip_prefix("//! | [`"))
    {
        let cells: Vec<&str> = row.trim_end().trim_end_matches('|').split(" | ").collect();
        for room in quoted(&format!("`{}", cells[0])) {
            let named = quoted(cells[2]);
            let is_everybody = cells[2].trim_start().starts_with("everybody");
            law.insert(
                room,
                if is_everybody {
                    Importers::EverybodyBut(named)
                } else {
                    Importers::Only(named)
                },
            );
        }
    }
    law
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut sources) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).unwrap().to_str().unwrap();
                sources.push(Source::new(name, &std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(sources.len() > 30, "the sources are found");
    sources
}

/// What breaks the law, in words.
fn breaches(source: &Source, law: &BTreeMap<String, Importers>) -> Vec<String> {
    let (room, imported) = (source.room(), source.imported());
    let is_breach = |other: &&String| {
        !law.get(*other)
            .is_some_and(|importers| importers.allow(room))
    };
    let told = |other: &String| {
        format!(
            "src/{} imports {other}, which is not for {room}: see the table in src/lib.rs",
            source.path
        )
    };
    imported.iter().filter(is_breach).map(told).collect()
}

#[test]
fn imports_go_one_way_as_the_table_in_lib_rs_says() {
    let sources = sources();
    let page = sources
        .iter()
        .find(|source| source.path == "lib.rs")
        .unwrap();
    let law = law(&page.text);
    let declared: BTreeSet<&str> = page
        .code
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod "))
        .map(|name| name.trim_end_matches(';'))
        .collect();
    assert_eq!(
        law.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        declared,
        "each room has its row in the table, and no other"
    );
    let breaches: Vec<String> = sources
        .iter()
        .flat_map(|source| breaches(source, &law))
        .collect();
    assert!(breaches.is_empty(), "{breaches:#?}");
}

#[test]
fn some_words_stand_in_one_room_only() {
    let only: [(&[&str], &str, &str); 3] = [
        (
            &["sqlx"],
            "store",
            "so that SQL stands in one place, and the engines differ nowhere else",
        ),
        (
            &["axum"],
            "http",
            "so that a failure becomes a status code in one place, and commands and flows know no HTTP server",
        ),
        (
            &["clap", "comfy_table", "indicatif", "anstream"],
            "cli",
            "so that everything else works without a terminal",
        ),
    ];
    let never_in_domain = [
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
    for source in sources() {
        let words = source.words();
        for (named, room, reason) in only {
            let is_main = source.path == "main.rs" && named.contains(&"clap");
            for word in named.iter().filter(|word| words.contains(**word)) {
                assert!(
                    source.room() == room || is_main,
                    "src/{} mentions {word}, which is for {room} only: {reason}",
                    source.path
                );
            }
        }
        let found: Vec<&&str> = never_in_domain
            .iter()
            .filter(|word| words.contains(**word))
            .collect();
        let is_pure = source.room() != "domain" || found.is_empty();
        assert!(
            is_pure,
            "src/{} mentions {found:?}: domain is pure, so that a history depends on what was told only",
            source.path
        );
    }
}

#[test]
fn every_file_says_what_it_is_for_and_can_be_read_at_a_sitting() {
    for Source { path, text, .. } in sources() {
        assert!(
            text.starts_with("//! "),
            "src/{path} does not open with `//!`: who opens it learns first what it is for"
        );
        let lines = text.lines().count();
        assert!(
            lines <= 500,
            "src/{path} has {lines} lines: above 500, nobody reads it from top to bottom; split it by what it is for"
        );
    }
}

#[test]
fn a_breach_is_found_however_it_is_written() {
    let page = "//! | module | what it is for | who may import it |\n//! | --- | --- | --- |\n\
        //! | [`domain`] | pure: facts | everybody |\n//! | [`clock`] | time | everybody but `domain` |\n\
        //! | [`store`] | SQL | `flows` |\n//! | [`flows`] | paths | `cli` |\n//! | [`config`], [`cli`] | settings | `main` |\n";
    let law = law(page);
    let breaches = |path: &str, text: &str| breaches(&Source::new(path, text), &law).len();
    let breaking = [
        ("domain/a.rs", "use crate::clock::Clock;"),
        ("domain/a.rs", "use crate::{domain::fact, clock};"),
        (
            "domain/a.rs",
            "use crate::{domain::{fact, event}, clock::{self, Clock}};",
        ),
        ("domain/a.rs", "fn f() -> crate::clock::Clock { 'x' }"),
        ("domain/a.rs", "use super::super::clock;"),
        (
            "domain/a.rs",
            "let c = '\"'; use super::super::{fact, clock};",
        ),
        ("domain/mod.rs", "use super::clock;"),
        (
            "domain/a.rs",
            "\nmod tests {\n    use super::super::super::clock;\n}",
        ),
        ("clock.rs", "use super::store;"),
        (
            "http/a.rs",
            "let url = \"http://x\"; crate::store::Store::connect(url)",
        ),
        (
            "http/a.rs",
            "let raw = r#\"say \"x\" // \"#; let other = 'a'; crate::store::Store",
        ),
        ("main.rs", "use stripe_reconciler::flows;"),
        ("cli/a.rs", "use crate::unknown;"),
        ("cli/a.rs", "use crate::*;"),
    ];
    for (path, text) in breaking {
        assert!(breaches(path, text) > 0, "{path}: {text}");
    }
    let keeping = [
        (
            "domain/a.rs",
            "use super::fact; use crate::domain::event; // crate::clock\nlet text = \"crate::clock\"; /* crate::clock */",
        ),
        (
            "domain/a.rs",
            "let raw = r#\"crate::clock \"x\" crate::clock\"#;",
        ),
        (
            "domain/a.rs",
            "\nmod tests {\n    use super::*;\n    use super::super::fact;\n}",
        ),
        (
            "flows/a.rs",
            "use crate::{clock::Clock, domain::{clock, fact}, store};",
        ),
        (
            "cli/a.rs",
            "use super::super::flows; pub(crate) fn f<'a>(x: &'a str) {}",
        ),
        (
            "main.rs",
            "use stripe_reconciler::cli::{self, Arguments}; use other_crate::flows;",
        ),
    ];
    for (path, text) in keeping {
        assert_eq!(breaches(path, text), 0, "{path}: {text}");
    }
}

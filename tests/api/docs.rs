//! Checks the docs and the deployment files against the program: commands, flags, settings and
//! links.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use stripe_reconciler::domain::invoice::document;

use testkit::run;

const CONFIG: &str = include_str!("../../src/config.rs");
/// Settings of other programs, of the shell and of the tests, which docs and files name.
const OTHERS: [&str; 10] = [
    "BROWSER_REQUIRED",
    "IMAGE_REGISTRY",
    "SCHEMATHESIS_REQUIRED",
    "STRIPE_CLI_REQUIRED",
    "POSTGRES_",
    "OPERATOR_KEY",
    "TENANT_KEY",
    "X_FILE",
    "AF_",
    "SIMULATOR_",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the files below a folder by their paths from the root.
fn files_below(folder: &str, endings: &[&str]) -> BTreeMap<String, String> {
    let (mut folders, mut files) = (vec![root().join(folder)], BTreeMap::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if endings
                .iter()
                .any(|ending| path.to_str().unwrap().ends_with(ending))
            {
                let name = path
                    .strip_prefix(root())
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned();
                files.insert(name, std::fs::read_to_string(&path).unwrap());
            }
        }
    }

    files
}

fn file(name: &str) -> (String, String) {
    (
        name.to_owned(),
        std::fs::read_to_string(root().join(name)).unwrap(),
    )
}

fn pages() -> BTreeMap<String, String> {
    let mut pages = files_below("docs", &[".md"]);
    pages.extend([
        file("README.md"),
        file("ARCHITECTURE.md"),
        file("CHANGELOG.md"),
        file("CONTRIBUTING.md"),
        file("SECURITY.md"),
    ]);
    assert!(pages.len() > 8, "{:?}", pages.keys());
    pages
}

fn files_for_deployment() -> BTreeMap<String, String> {
    let mut files = files_below("deploy/systemd", &[".service", ".conf"]);
    files.extend([file("Dockerfile"), file("compose.yaml")]);
    files
}

/// Flags and subcommands of each command, by the words that lead to it.
struct Commands(BTreeMap<Vec<String>, (BTreeSet<String>, BTreeSet<String>)>);

impl Commands {
    fn ask() -> Commands {
        let (mut found, mut asked) = (BTreeMap::new(), vec![Vec::<String>::new()]);
        while let Some(command) = asked.pop() {
            let arguments: Vec<&str> = command
                .iter()
                .map(String::as_str)
                .chain(["--help"])
                .collect();
            let help = run(&[], &arguments, b"").with_code(0).stdout;
            let options = help
                .split("\nOptions:\n")
                .nth(1)
                .unwrap()
                .split("\n\n")
                .next()
                .unwrap();
            let flag = |line: &str| {
                line.split_whitespace()
                    .find(|word| word.starts_with("--"))
                    .map(str::to_owned)
            };
            let flags = options
                .lines()
                .filter(|line| line.starts_with("  ") && line.trim_start().starts_with('-'))
                .filter_map(flag);
            let below = help
                .split_once("\nCommands:\n")
                .map_or("", |(_, below)| below.split("\n\n").next().unwrap());
            let names = below
                .lines()
                .filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
            let names: BTreeSet<String> = names
                .filter(|name| !["", "help"].contains(name))
                .map(str::to_owned)
                .collect();
            asked.extend(
                names
                    .iter()
                    .map(|name| [&command[..], std::slice::from_ref(name)].concat()),
            );
            found.insert(command, (flags.collect(), names));
        }

        Commands(found)
    }

    fn top(&self) -> &BTreeSet<String> {
        &self.0[&Vec::new()].1
    }

    /// Returns an error in the words that follow the program's name, or `None`.
    fn find_error(&self, words: &[&str]) -> Option<String> {
        let mut command: Vec<String> = Vec::new();
        for word in words {
            let (flags, below) = &self.0[&command];
            if let Some(flag) = word
                .strip_prefix("--")
                .map(|flag| flag.split('=').next().unwrap())
            {
                if !flags.contains(&format!("--{flag}")) && !["help", "version"].contains(&flag) {
                    return Some(format!("{command:?} has no --{flag}"));
                }
            } else if !below.is_empty() && word.starts_with(|c: char| c.is_ascii_lowercase()) {
                if !below.contains(*word) {
                    return Some(format!("{command:?} has no command {word}"));
                }
                command.push((*word).to_owned());
            }
        }

        None
    }
}

/// Returns the code of a page: text between backticks and the lines of code blocks.
fn code(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (n, part) in page.split("```").enumerate() {
        if n % 2 == 1 {
            found.extend(part.replace("\\\n", " ").lines().skip(1).map(str::to_owned));
        } else {
            found.extend(
                part.split('`')
                    .skip(1)
                    .step_by(2)
                    .map(|inline| inline.replace('\n', " ")),
            );
        }
    }

    found
}

/// Returns the words of every command of the program in a line of code.
fn commands_in<'l>(line: &'l str, commands: &Commands) -> Vec<Vec<&'l str>> {
    let is_command_word = |word: &&str| {
        !word.starts_with(['|', '>', '<', '&', ';', '#', '2', '·'])
            && *word != "see"
            && *word != "beside"
    };
    let words = |text: &'l str| {
        text.split([')', ';', '"', '\''])
            .next()
            .unwrap()
            .split_whitespace()
            .take_while(is_command_word)
            .collect()
    };
    let named = line.match_indices("stripe-reconciler ");
    // At the start of a command, and not the name of a user, an image or a service.
    let is_ours = |at: usize| {
        let before = line[..at]
            .split_whitespace()
            .next_back()
            .unwrap_or_default();
        let begins = before.is_empty()
            || before.contains('=')
            || ["|", "&&", ".", "reconciler", "stripe-reconciler"].contains(&before);
        begins || line[..at].ends_with(['(', ';', '`'])
    };
    let mut found: Vec<Vec<&str>> = named
        .filter(|(at, _)| is_ours(*at))
        .map(|(at, name)| words(&line[at + name.len()..]))
        .collect();
    if line
        .split(' ')
        .next()
        .is_some_and(|first| commands.top().contains(first))
    {
        found.push(words(line));
    }
    found
}

#[test]
fn commands_and_flags_in_docs_exist() {
    let (commands, mut seen) = (Commands::ask(), 0);
    for (name, page) in pages() {
        for line in code(&page) {
            for words in commands_in(&line, &commands) {
                seen += 1;
                assert_eq!(commands.find_error(&words), None, "{name}: {line}");
            }
        }
    }
    assert!(seen > 100, "{seen}");
    let faulty = [
        "keys make",
        "keys create --who x",
        "copy --from x",
        "no-such",
    ];
    assert!(faulty.iter().all(|line| {
        commands
            .find_error(&line.split(' ').collect::<Vec<_>>())
            .is_some()
    }));
}

#[test]
fn docs_mention_every_command_and_setting() {
    let (index, table) = (file("docs/README.md").1, file("docs/configuration.md").1);
    for (command, (_, below)) in Commands::ask().0 {
        let name = command.join(" ");
        assert!(
            !below.is_empty() || index.contains(&format!("`{name}")),
            "docs/README.md does not name {name}"
        );
    }
    let settings = settings();
    assert!(
        settings.len() > 8 && settings.contains("COPY_TO"),
        "{settings:?}"
    );
    for setting in settings {
        assert!(
            table.contains(&format!("`{setting}`")),
            "docs/configuration.md does not say what {setting} is"
        );
    }
}

#[test]
fn readme_fits_on_few_screens() {
    let lines = file("README.md").1.lines().count();
    assert!(
        lines <= 120,
        "README.md has {lines} lines: move details to docs/"
    );
}

#[test]
fn every_page_is_linked_from_the_index() {
    let index = file("docs/README.md").1;
    let pages = files_below("docs", &[".md"]);
    for name in pages.keys().filter(|name| *name != "docs/README.md") {
        let link = format!("]({})", name.strip_prefix("docs/").unwrap());
        assert!(
            index.contains(&link),
            "docs/README.md does not link to {name}"
        );
    }
    assert!(pages.len() > 15, "{:?}", pages.keys());
}

/// Returns the settings that `src/config.rs` reads.
fn settings() -> BTreeSet<&'static str> {
    CONFIG
        .split(".setting(\"")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
        .collect()
}

#[test]
fn settings_in_docs_and_deployment_files_exist() {
    let settings = settings();
    let is_known = |word: &str| {
        let name = word.strip_suffix("_FILE").unwrap_or(word);
        settings.contains(name) || OTHERS.iter().any(|others| word.starts_with(others))
    };
    let mut texts = pages();
    texts.extend(files_for_deployment());
    // It names constants of the code, which have the form of a setting.
    texts.remove("CONTRIBUTING.md");

    let mut seen = 0;
    for (name, text) in texts {
        let words =
            text.split(|c: char| !c.is_ascii_uppercase() && !c.is_ascii_digit() && c != '_');
        // A word of letters only counts as a setting if it is assigned a value.
        for word in words.filter(|word| {
            word.trim_matches('_').contains('_')
                && word.starts_with(|c: char| c.is_ascii_uppercase())
        }) {
            seen += 1;
            assert!(is_known(word), "{name} names {word}, which is no setting");
        }
    }
    assert!(seen > 50, "{seen}");
}

/// Returns the anchor that links to a heading use.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    kept.chars()
        .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[test]
fn links_in_docs_resolve() {
    let (pages, mut seen) = (pages(), 0);
    for (name, page) in &pages {
        for link in page
            .split("](")
            .skip(1)
            .map(|rest| rest.split(')').next().unwrap())
            .filter(|link| !link.contains("://"))
        {
            seen += 1;
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                root().join(name)
            } else {
                root().join(Path::new(name).parent().unwrap()).join(path)
            };
            assert!(
                target.exists(),
                "{name} links to {link}, which is not there"
            );
            if !heading.is_empty() {
                let there = std::fs::read_to_string(&target).unwrap();
                let is_there = there
                    .lines()
                    .any(|line| line.starts_with('#') && anchor(line) == heading);
                assert!(is_there, "{name} links to {link}: there is no such heading");
            }
        }
    }
    assert!(seen > 10, "{seen}");
}

#[test]
fn image_build_context_contains_every_included_file() {
    let ignored = file(".dockerignore").1;
    let kept: BTreeSet<&str> = ignored
        .lines()
        .filter_map(|line| line.strip_prefix('!'))
        .collect();
    let mut seen = 0;
    for (name, text) in files_below("src", &[".rs"]) {
        for path in text
            .split("include_str!(")
            .skip(1)
            .map(|rest| rest.split('"').nth(1).unwrap())
        {
            seen += 1;
            let mut target = Path::new(&name).parent().unwrap().to_path_buf();
            for part in path.split('/') {
                target = if part == ".." {
                    target.parent().unwrap().to_path_buf()
                } else {
                    target.join(part)
                };
            }
            let top = target
                .components()
                .next()
                .unwrap()
                .as_os_str()
                .to_str()
                .unwrap();
            assert!(
                kept.contains(top),
                "src/{name} includes {path}, which .dockerignore leaves out"
            );
        }
    }
    assert!(
        seen > 5
            && ["Cargo.toml", "Cargo.lock", "src", "benches"]
                .iter()
                .all(|name| kept.contains(name)),
        "{kept:?}"
    );
}

#[test]
fn image_contains_manifest_of_every_local_crate() {
    let (manifest, ignored) = (file("Cargo.toml").1, file(".dockerignore").1);
    let members = manifest
        .lines()
        .find_map(|line| line.strip_prefix("members = [\"")?.strip_suffix("\"]"))
        .unwrap();
    let local = manifest
        .lines()
        .filter_map(|line| line.split("path = \"").nth(1)?.split('"').next())
        .filter(|path| root().join(path).join("Cargo.toml").is_file());

    let crates: BTreeSet<&str> = members.split("\", \"").chain(local).collect();
    assert!(crates.contains("testkit"), "{crates:?}");

    for path in crates {
        assert!(
            ignored.lines().any(|line| line == format!("!{path}")),
            ".dockerignore leaves out {path}, whose manifest cargo reads"
        );
    }
}

#[test]
fn moved_document_is_read_completely() {
    let (_, page) = file("docs/moving-from-a-handler.md");
    let document = page
        .split("```json")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();

    let valid = document::validate(serde_json::from_str(document).unwrap()).unwrap();
    assert_eq!(
        valid.imported_states[0].message.as_deref(),
        Some("as the old system knew it")
    );
}

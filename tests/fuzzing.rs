//! What the fuzz targets ask of any bytes, asked of the fixtures, of the seeds, and of changes to them: so that the targets keep
//! compiling, and so that what they have found stays mended. `fuzz/run` goes on from here.

#![expect(clippy::unwrap_used, reason = "what goes wrong in a test fails it")]

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use stripe_reconciler_fuzz as fuzz;
use stripe_reconciler_fuzz::mutate::{Dice, body, json};
use stripe_reconciler_fuzz::world::World;

/// All files below a folder of the project.
fn files(folder: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let (mut folders, mut files) = (
        vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)],
        Vec::new(),
    );
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let bytes = std::fs::read(&path).unwrap();
                files.push((path, bytes));
            }
        }
    }
    assert!(!files.is_empty(), "{folder} is empty");
    files.sort();
    files
}

/// The check, and by which input it was broken.
fn hold(check: impl Fn(&[u8]), path: &Path, input: &[u8]) {
    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(input)));
    assert!(
        checked.is_ok(),
        "see above: by {} as\n{}",
        path.display(),
        String::from_utf8_lossy(input)
    );
}

/// As they are, and changed a few times by a seed.
fn hold_changed(check: impl Fn(&[u8]), files: &[(PathBuf, Vec<u8>)], changes: usize) {
    for (number, (path, bytes)) in files.iter().enumerate() {
        hold(&check, path, bytes);
        let (mut dice, mut changed) = (Dice::new(number as u64), bytes.clone());
        for _ in 0..changes {
            changed = json(&changed, &mut dice).unwrap_or_else(|| bytes.clone());
            hold(&check, path, &changed);
        }
    }
}

#[test]
fn signatures_hold() {
    files("fuzz/seeds/signature")
        .iter()
        .for_each(|(path, input)| hold(fuzz::signature::check, path, input));
}

#[test]
fn messages_hold() {
    files("fuzz/seeds/message")
        .iter()
        .for_each(|(path, input)| hold(fuzz::message::check, path, input));
}

#[test]
fn events_hold() {
    hold_changed(fuzz::event::check, &files("fuzz/seeds/event"), 10);
    hold_changed(fuzz::event::check, &files("fixtures/events"), 2);
    hold_changed(fuzz::event::check, &files("fixtures/stories"), 1);
}

#[test]
fn invoices_hold() {
    let whole = files("fuzz/seeds/invoice");
    let path = Path::new("fixtures/invoices.jsonl");
    let lines = include_str!("../fixtures/invoices.jsonl")
        .lines()
        .map(|line| (path.to_owned(), line.as_bytes().to_vec()));
    hold_changed(
        fuzz::invoice::check,
        &whole.into_iter().chain(lines).collect::<Vec<_>>(),
        8,
    );
}

#[test]
fn paths_hold() {
    let world = RefCell::new(World::start());
    let check = |input: &[u8]| fuzz::paths::check_in(&mut world.borrow_mut(), input);
    for (number, (path, input)) in files("fuzz/seeds/paths").iter().enumerate() {
        assert!(
            fuzz::world::parse(input, &world.borrow()).is_some(),
            "{} is no request",
            path.display()
        );
        hold(check, path, input);
        let mut dice = Dice::new(number as u64);
        for changed in (0..5).filter_map(|_| body(input, &mut dice)) {
            hold(check, path, &changed);
        }
    }
}

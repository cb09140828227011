//! Runs the checks of the fuzz targets on the fixtures, on the seeds and on changes to both, so
//! that the targets keep compiling and fixed bugs stay fixed. `fuzz/run` continues from here.

#![expect(clippy::unwrap_used, reason = "what goes wrong in a test fails it")]

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use stripe_reconciler_fuzz as fuzz;
use stripe_reconciler_fuzz::mutate::{Dice, body, json};
use stripe_reconciler_fuzz::program::Program;

/// Returns all files below a folder of the project.
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

/// Runs the check. Shows the input that fails.
fn assert_passes(check: impl Fn(&[u8]), path: &Path, input: &[u8]) {
    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(input)));
    assert!(
        checked.is_ok(),
        "see above: by {} as\n{}",
        path.display(),
        String::from_utf8_lossy(input)
    );
}

/// Runs the check on the files and on a few changes to them, drawn by a seed.
fn assert_changes_pass(check: impl Fn(&[u8]), files: &[(PathBuf, Vec<u8>)], changes: usize) {
    for (number, (path, bytes)) in files.iter().enumerate() {
        assert_passes(&check, path, bytes);
        let (mut dice, mut changed) = (Dice::new(number as u64), bytes.clone());
        for _ in 0..changes {
            changed = json(&changed, &mut dice).unwrap_or_else(|| bytes.clone());
            assert_passes(&check, path, &changed);
        }
    }
}

#[test]
fn signature_seeds_pass_the_fuzz_check() {
    for (path, input) in &files("fuzz/seeds/signature") {
        assert_passes(fuzz::signature::check, path, input);
    }
}

#[test]
fn message_seeds_pass_the_fuzz_check() {
    for (path, input) in &files("fuzz/seeds/message") {
        assert_passes(fuzz::message::check, path, input);
    }
}

#[test]
fn changed_events_pass_the_fuzz_check() {
    assert_changes_pass(fuzz::event::check, &files("fuzz/seeds/event"), 10);
    assert_changes_pass(fuzz::event::check, &files("fixtures/events"), 2);
    assert_changes_pass(fuzz::event::check, &files("fixtures/stories"), 1);
}

#[test]
fn changed_invoices_pass_the_fuzz_check() {
    let whole = files("fuzz/seeds/invoice");
    let path = Path::new("fixtures/invoices.jsonl");
    let lines = include_str!("../fixtures/invoices.jsonl")
        .lines()
        .map(|line| (path.to_owned(), line.as_bytes().to_vec()));
    assert_changes_pass(
        fuzz::invoice::check,
        &whole.into_iter().chain(lines).collect::<Vec<_>>(),
        8,
    );
}

#[test]
fn changed_requests_pass_the_fuzz_check() {
    let program = RefCell::new(Program::start());
    let check = |input: &[u8]| fuzz::paths::check_in(&mut program.borrow_mut(), input);

    for (number, (path, input)) in files("fuzz/seeds/paths").iter().enumerate() {
        assert!(
            fuzz::program::parse(input, &program.borrow()).is_some(),
            "{} is no request",
            path.display()
        );
        assert_passes(check, path, input);
        let mut dice = Dice::new(number as u64);
        for changed in (0..5).filter_map(|_| body(input, &mut dice)) {
            assert_passes(check, path, &changed);
        }
    }
}

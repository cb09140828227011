//! One recorded story: a stored invoice and Stripe's events about it.

use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;

pub const INVOICES: &str = include_str!("../../fixtures/invoices.jsonl");
const STORY: &str =
    include_str!("../../fixtures/stories/declined-twice-then-paid.2025-11-17.clover.jsonl");

/// Returns the stored invoice of `STORY` and its uid.
pub fn story_invoice() -> (Value, String) {
    let documents = INVOICES
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let is_of_story = |document: &Value| {
        document["metadata"]["annotations"]["story"] == "declined-twice-then-paid.2025-11-17.clover"
    };
    let document = documents.into_iter().find(is_of_story).unwrap();
    let uid = document["metadata"]["uid"].as_str().unwrap().to_owned();
    (document, uid)
}

/// Returns the lines of the story without repetitions: Stripe delivered some of them twice.
pub fn lines() -> Vec<&'static str> {
    let mut lines: Vec<&str> = Vec::new();
    for line in STORY.lines() {
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines
}

pub fn events() -> Vec<Value> {
    lines()
        .into_iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

pub fn event_id(event: &Value) -> &str {
    event["id"].as_str().unwrap()
}

/// A temporary folder for files.
pub struct Files(TempDir);

impl Default for Files {
    fn default() -> Files {
        Files(tempfile::tempdir().unwrap())
    }
}

impl Files {
    pub fn new() -> Files {
        Files::default()
    }

    pub fn add(&self, name: &str, text: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

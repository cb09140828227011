//! Schemathesis: an independent tool that generates valid and invalid requests from the OpenAPI
//! document and checks the answers against it. `tests/schemathesis` configures it and runs it for
//! longer.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use testkit::each_database;
use testkit::{SECRET, TestServer, fixtures};

/// Returns the path where `./test` installs it, or `None`, which skips the test unless the
/// environment requires it.
fn schemathesis() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/schemathesis/bin/st");
    if path.is_file() {
        return Some(path);
    }

    let reason = format!(
        "Schemathesis is not at {}: run tests/schemathesis/install, which installs it from PyPI",
        path.display()
    );
    assert!(
        setting("SCHEMATHESIS_REQUIRED").is_none_or(|value| value != "1"),
        "{reason}"
    );

    println!("not tested: {reason}");
    None
}

#[expect(
    clippy::disallowed_methods,
    reason = "not a setting of the program: it says how long to test"
)]
fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// A caller: the security scheme of the document in Schemathesis's terms, and the key.
type Caller<'a> = Option<(&'a str, &'a str)>;

/// Runs Schemathesis as this caller. The short run is deterministic.
fn run_as(program: &Path, server: &TestServer, caller: Caller, arguments: &[&str]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/schemathesis");
    let temporary = tempfile::tempdir().unwrap();
    let mut settings = std::fs::read_to_string(folder.join("schemathesis.toml")).unwrap();
    settings.extend(caller.map(|(scheme, _)| format!("\n[auth.openapi]\n{scheme}\n")));
    std::fs::write(temporary.path().join("schemathesis.toml"), settings).unwrap();
    let mut command = Command::new(program);
    command.args(["--config-file", "schemathesis.toml", "run"]);
    command
        .arg(format!("{}/openapi.json", server.process.base))
        .args(["--continue-on-failure", "--warnings", "off"])
        .args(arguments);
    command
        .env("SCHEMATHESIS_HOOKS", folder.join("hooks.py"))
        .env("SIGNING_SECRET", SECRET)
        .env("PYTHONDONTWRITEBYTECODE", "1");

    command.envs(caller.map(|(_, key)| ("KEY", key)));
    let output = command.current_dir(temporary.path()).output().unwrap();
    let report = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let scheme_name = caller.map_or("no key", |(scheme, _)| scheme);

    assert!(
        output.status.success(),
        "{scheme_name} on {:?}: {report}",
        server.engine
    );

    let summary: Vec<&str> = report
        .lines()
        .filter(|line| line.contains(" generated, ") || line.starts_with("==="))
        .collect();
    println!(
        "{:?}, {scheme_name}: {}",
        server.engine,
        summary[summary.len() - 2..].join(" ")
    );
}

each_database! {
    async fn schemathesis_finds_no_violation_with_any_key(server: TestServer) {
        let Some(program) = schemathesis() else {
            return;
        };
        let import = ["invoices", "import", "--tenant", "acme", "-"];
        server
            .run_with_input(&import, fixtures::INVOICES.as_bytes())
            .with_code(0);
        for event in fixtures::events() {
            server.deliver(&event).await.with_status(200);
        }

        server
            .deliver_bytes(b"authentic, and no JSON")
            .await
            .with_status(200);
        server
            .put("/v1/tenants/beta/invoices/b", &json!({}))
            .await
            .with_status(201);
        let long = setting("SCHEMATHESIS_SECONDS");
        let seconds = long.as_deref().unwrap_or("12");
        let repeatable: &[&str] = if long.is_some() {
            &[]
        } else {
            &["--seed", "1", "--no-shrink", "--max-examples", "10"]
        };

        let thorough = [&["--max-time", seconds], repeatable].concat();
        let brief = [
            &[
                "--phases",
                if long.is_some() {
                    "examples,coverage,fuzzing"
                } else {
                    "coverage"
                },
            ],
            repeatable,
        ]
        .concat();
        let beta_key = server.key(&["--tenant", "beta"]);

        run_as(
            &program,
            &server,
            Some(("ApiKey = { api_key = '${KEY}' }", &server.operator_key)),
            &thorough,
        );
        run_as(
            &program,
            &server,
            Some(("Bearer = { bearer = '${KEY}' }", &server.acme_key)),
            &brief,
        );
        run_as(
            &program,
            &server,
            Some(("Authorization = { api_key = '${KEY}' }", &beta_key)),
            &brief,
        );

        run_as(&program, &server, None, &brief);
    }
}

//! Output generated from the help, which is shell completions (in a real bash) and manual pages,
//! and the health check of containers.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;

use testkit::binary;
use testkit::each_database;

each_database! {
    async fn healthcheck_reports_readiness_of_local_server(server: TestServer) {
        let mut server = server;
        let authority = server.process.authority().to_owned();
        let ready =
            testkit::run(&[("LISTEN_ADDR", &authority)], &["healthcheck"], b"").with_code(0);
        assert_eq!((&*ready.stdout, &*ready.stderr), ("ready\n", ""));

        let everywhere = authority.replace("127.0.0.1", "0.0.0.0");
        testkit::run(
            &[("LISTEN_ADDR", "127.0.0.1:1")],
            &["healthcheck", "--listen-addr", &everywhere],
            b"",
        )
        .with_code(0);
        server.process.sigkill();
        let gone = testkit::run(&[("LISTEN_ADDR", &authority)], &["healthcheck"], b"").with_code(4);

        assert!(gone.stderr.contains("did not answer"), "{gone:?}");
    }
}

#[test]
fn healthcheck_distinguishes_unready_from_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answering = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        let mut request = [0; 1024];
        let read = connection.read(&mut request).unwrap();
        connection
            .write_all(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
            .unwrap();
        String::from_utf8_lossy(&request[..read]).into_owned()
    });
    let output = testkit::run(&[("LISTEN_ADDR", &address)], &["healthcheck"], b"").with_code(1);

    assert!(output.stderr.contains("503"), "{output:?}");
    assert!(
        answering
            .join()
            .unwrap()
            .starts_with("GET /readyz HTTP/1.1")
    );

    testkit::run(&[("LISTEN_ADDR", "nowhere")], &["healthcheck"], b"").with_code(2);
}

/// Returns the completions that bash offers for the last of these words.
fn offered(words: &[&str]) -> Vec<String> {
    let script = r#"
        source <("$PROGRAM" completions bash)
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        complete=$(complete -p stripe-reconciler); function=${complete##*-F }; function=${function%% *}
        "$function" stripe-reconciler "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let program = binary(&[]).get_program().to_owned();
    let output = Command::new("bash")
        .args(["-c", script, "bash"])
        .args(words)
        .env("PROGRAM", program)
        .output()
        .unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn bash_completes_commands_subcommands_and_flags() {
    assert_eq!(
        offered(&["stripe-reconciler", "re"]),
        ["replay", "rebuild", "reconcile"]
    );
    assert_eq!(offered(&["stripe-reconciler", "keys", "cr"]), ["create"]);
    assert_eq!(
        offered(&["stripe-reconciler", "keys", "create", "--ex"]),
        ["--expires-in"]
    );
    assert!(offered(&["stripe-reconciler", "copy", "--"]).contains(&"--to".to_owned()));

    for shell in ["zsh", "fish"] {
        assert!(
            testkit::run(&[], &["completions", shell], b"")
                .with_code(0)
                .stdout
                .contains("reconcile")
        );
    }

    testkit::run(&[], &["completions", "cmd"], b"").with_code(2);
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    testkit::run(&[], &["man", pages.to_str().unwrap()], b"").with_code(0);
    let page = |name: &str| std::fs::read_to_string(pages.join(format!("{name}.1"))).unwrap();

    for name in [
        "stripe-reconciler",
        "stripe-reconciler-serve",
        "stripe-reconciler-keys-create",
        "stripe-reconciler-man",
    ] {
        let text = page(name);
        assert!(
            text.contains(".SH EXAMPLE")
                && text.contains(".SH OPTIONS")
                && text.contains(".SH SYNOPSIS"),
            "{name}:\n{text}"
        );
    }

    assert!(
        page("stripe-reconciler-copy").contains(r"  stripe\-reconciler copy \-\-to postgres://")
    );

    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    testkit::run(&[], &["man", file.to_str().unwrap()], b"").with_code(1);
}

//! Runs the program's binary to its end.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

/// Exit code and output of a command.
#[derive(Debug)]
pub struct CommandOutput {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Returns the path of the program's binary.
///
/// Cargo names it in the environment of the tests and benchmarks that it runs. A test executable
/// that is started by hand, for example in a debugger, finds it in the parent of its own folder.
#[expect(
    clippy::disallowed_methods,
    reason = "Cargo names the binary in the environment"
)]
pub fn binary_path() -> PathBuf {
    if let Some(path) = std::env::var_os("CARGO_BIN_EXE_stripe-reconciler") {
        return path.into();
    }

    let executable = std::env::current_exe().unwrap();
    let profile = executable.ancestors().nth(2).unwrap();
    profile.join("stripe-reconciler")
}

/// Returns a command for the binary with this environment and nothing else.
pub fn binary(environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(binary_path());
    command.env_clear().envs(environment.iter().copied());
    command
}

pub fn run(environment: &[(&str, &str)], arguments: &[&str], input: &[u8]) -> CommandOutput {
    let mut command = binary(environment);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();

    // The command may end without reading all of its input.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    CommandOutput {
        code: output
            .status
            .code()
            .expect("no command is ended by a signal"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl CommandOutput {
    /// Asserts the exit code. Shows the output if it differs.
    #[track_caller]
    pub fn with_code(self, code: i32) -> CommandOutput {
        assert_eq!(
            self.code, code,
            "stdout:\n{}\nstderr:\n{}",
            self.stdout, self.stderr
        );
        self
    }

    /// Returns standard output as one JSON document.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error} in\n{}", self.stdout))
    }

    /// Returns standard output as one JSON document per line.
    #[track_caller]
    pub fn json_lines(&self) -> Vec<Value> {
        self.stdout
            .lines()
            .map(|line| {
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in\n{line}"))
            })
            .collect()
    }
}

//! etcdctl, the newest and Debian's old one.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::{PATIENCE, Process};

/// One etcdctl and where it asks.
#[derive(Clone, Debug)]
pub struct Ctl {
    program: PathBuf,
    endpoints: String,
}

/// What a run printed and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub stdout: String,
    pub stderr: String,
    pub status: i32,
}

impl Ctl {
    pub fn new(program: PathBuf, endpoints: &str) -> Ctl {
        Ctl { program, endpoints: endpoints.to_owned() }
    }

    /// The same etcdctl, asking elsewhere.
    pub fn at(&self, endpoints: &str) -> Ctl {
        Ctl::new(self.program.clone(), endpoints)
    }

    pub fn run(&self, arguments: &[&str]) -> Answer {
        self.run_with("", arguments)
    }

    /// Runs with `input` on standard input.
    pub fn run_with(&self, input: &str, arguments: &[&str]) -> Answer {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("etcdctl starts");
        // One that refuses its arguments ends without reading, which breaks the pipe and is no failure of ours.
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
        let output = child.wait_with_output().expect("our own child");
        Answer {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            status: output.status.code().unwrap_or(-1),
        }
    }

    /// The standard output of a run that has to succeed.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let answer = self.run(arguments);
        assert_eq!(answer.status, 0, "etcdctl {arguments:?}: {answer:?}");
        answer.stdout
    }

    /// Runs a command that does not end by itself until it printed `count` lines, then kills it.
    pub fn first_lines(&self, count: usize, arguments: &[&str]) -> Vec<String> {
        self.begin(arguments).wait_lines(count, PATIENCE)
    }

    /// Starts a command that does not end by itself.
    pub fn begin(&self, arguments: &[&str]) -> Process {
        Process::start(&format!("etcdctl {}", arguments.join(" ")), &mut self.command(arguments))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.env("ETCDCTL_API", "3").env("ETCDCTL_ENDPOINTS", &self.endpoints).args(arguments);
        command
    }
}

//! etcdctl, the newest and Debian's old one.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use crate::{PATIENCE, Process};

/// How long a run that has to end by itself may take: two commands have no limit of their own, and one that hangs would hang the
/// test. It is killed then, and its status is -1.
const LIMIT: Duration = Duration::from_secs(150);

/// One etcdctl and where it asks.
#[derive(Clone, Debug)]
pub struct Ctl {
    program: PathBuf,
    endpoints: String,
    variables: Vec<(String, String)>,
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
        Ctl { program, endpoints: endpoints.to_owned(), variables: Vec::new() }
    }

    /// The same etcdctl, asking elsewhere.
    pub fn at(&self, endpoints: &str) -> Ctl {
        Ctl { endpoints: endpoints.to_owned(), ..self.clone() }
    }

    /// The same etcdctl with one more variable in its environment.
    pub fn with(&self, name: &str, value: &str) -> Ctl {
        let mut other = self.clone();
        other.variables.push((name.to_owned(), value.to_owned()));
        other
    }

    pub fn run(&self, arguments: &[&str]) -> Answer {
        self.run_with("", arguments)
    }

    /// Runs with `input` on standard input.
    pub fn run_with(&self, input: &str, arguments: &[&str]) -> Answer {
        let output = self.output(input, arguments);
        Answer {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            status: output.status.code().unwrap_or(-1),
        }
    }

    /// The same, its output as it came.
    pub fn output(&self, input: &str, arguments: &[&str]) -> Output {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("etcdctl starts");
        // One that refuses its arguments ends without reading, which breaks the pipe and is no failure of ours.
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
        let (done, waits) = mpsc::channel::<()>();
        let id = child.id().to_string();
        let watchdog = std::thread::spawn(move || {
            if waits.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = Command::new("kill").args(["-KILL", &id]).status();
            }
        });
        let output = child.wait_with_output().expect("our own child");
        drop(done);
        let _ = watchdog.join();
        output
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

    /// The same with a pipe to its input, for [`Process::say`].
    pub fn begin_talking(&self, arguments: &[&str]) -> Process {
        Process::start_talking(&format!("etcdctl {}", arguments.join(" ")), &mut self.command(arguments))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        // 3.7 warns of it, and 3.4 does not need it.
        command.env_remove("ETCDCTL_API");
        // One that asks nobody is told of no one, so that it can be told by a flag without a word about it.
        if !self.endpoints.is_empty() {
            command.env("ETCDCTL_ENDPOINTS", &self.endpoints);
        }
        command.envs(self.variables.iter().map(|(name, value)| (name, value))).args(arguments);
        command
    }
}

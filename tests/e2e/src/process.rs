//! A program that runs: its output is kept, waited on by line, and shown if the test fails.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// A child process, killed by its id when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    output: Arc<Output>,
}

#[derive(Debug, Default)]
struct Output {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    all: Vec<String>,
    /// The process closed its output: it is gone, or as good as gone.
    ended: bool,
}

impl Process {
    /// Bytes of it that are in memory.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("the process runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line that Linux writes");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// Starts `command`, both its outputs in one log.
    pub fn start(name: &str, command: &mut Command) -> Process {
        Process::start_with(name, command, Stdio::null())
    }

    /// The same with a pipe to its input, for [`Process::say`].
    pub fn start_talking(name: &str, command: &mut Command) -> Process {
        Process::start_with(name, command, Stdio::piped())
    }

    fn start_with(name: &str, command: &mut Command, input: Stdio) -> Process {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        command.stdin(input).stdout(writer.try_clone().expect("a second end")).stderr(writer);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // The command keeps its own copies of the writing end: without them the end of the output could not be seen.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let output = Arc::new(Output::default());
        let sink = Arc::clone(&output);
        std::thread::spawn(move || sink.collect(BufReader::new(reader)));
        Process { name: name.to_owned(), input: child.stdin.take(), child, output }
    }

    /// Writes a line to its input. One that is gone does not hear it.
    pub fn say(&mut self, line: &str) {
        let input = self.input.as_mut().expect("it was started to be talked to");
        let _ = writeln!(input, "{line}");
    }

    /// Closes its input.
    pub fn fall_silent(&mut self) {
        self.input = None;
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that holds `text`; returns it.
    pub fn wait_for(&self, text: &str, limit: Duration) -> String {
        self.wait_for_nth(text, 1, limit)
    }

    /// Waits until `count` lines hold `text`; returns the last of them.
    pub fn wait_for_nth(&self, text: &str, count: usize, limit: Duration) -> String {
        self.wait_until(&format!("{text:?}"), limit, |lines| {
            lines.iter().filter(|line| line.contains(text)).nth(count - 1).cloned()
        })
    }

    /// Waits until `count` lines were written; returns them.
    pub fn wait_lines(&self, count: usize, limit: Duration) -> Vec<String> {
        self.wait_until(&format!("{count} lines"), limit, |lines| lines.get(..count).map(<[String]>::to_vec))
    }

    fn wait_until<T>(&self, what: &str, limit: Duration, found: impl Fn(&[String]) -> Option<T>) -> T {
        let deadline = Instant::now() + limit;
        let mut lines = self.output.lines.lock().unwrap();
        loop {
            if let Some(answer) = found(&lines.all) {
                return answer;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if lines.ended || left.is_zero() {
                let why = if lines.ended { "it ended".to_owned() } else { format!("not within {limit:?}") };
                drop(lines);
                panic!("{} never said {what}: {why}\n{}", self.name, self.tail());
            }
            lines = self.output.changed.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// Waits until the process ends by itself.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        let mut lines = self.output.lines.lock().unwrap();
        while !lines.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(lines);
                panic!("{} did not end within {limit:?}\n{}", self.name, self.tail());
            }
            lines = self.output.changed.wait_timeout(lines, left).unwrap().0;
        }
        drop(lines);
        self.child.wait().expect("our own child")
    }

    /// `kill -9`, and gone when this returns.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a signal by name, `TERM` for one.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.id().to_string()).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name} {}", self.id());
    }

    /// All that was written so far.
    pub fn lines(&self) -> Vec<String> {
        self.output.lines.lock().unwrap().all.clone()
    }

    fn tail(&self) -> String {
        let lines = self.lines();
        let last = &lines[lines.len().saturating_sub(12)..];
        format!("---- {} (last {} of {} lines)\n{}", self.name, last.len(), lines.len(), last.join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "{}", self.tail());
        }
    }
}

impl Output {
    fn collect(&self, mut reader: impl BufRead) {
        let mut line = Vec::new();
        // A line cut short by a kill still counts.
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            self.lines.lock().unwrap().all.push(text);
            self.changed.notify_all();
            line.clear();
        }
        self.lines.lock().unwrap().ended = true;
        self.changed.notify_all();
    }
}

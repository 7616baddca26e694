//! Runs the commands of a story and writes down all they say, or only notes what would have been asked.
//!
//! It waits for what is announced: a line, an end, a number of keys. It does not compare.

use std::fmt::{Debug, Write};
use std::path::Path;

use e2e::{Cluster, Ctl, Kind, PATIENCE, Process, eventually, http};
use prost::Message;

use super::Story;

pub(super) struct Recorder {
    /// The newest etcdctl, not Debian's.
    pub(super) new: bool,
    stage: Option<Stage>,
    text: String,
    /// The arguments of each run, for `coverage`.
    asked: Vec<Vec<String>>,
}

/// What a story is told to; a rehearsal has none.
struct Stage {
    ctl: Ctl,
    cluster: Cluster,
    second: Option<Cluster>,
}

/// A command that runs beside the others.
pub(super) struct Running {
    /// How the transcript calls it.
    name: String,
    process: Option<Process>,
    /// The lines that the transcript has already.
    shown: usize,
}

/// Tells `story` to a fresh member by `program` and returns the transcript.
pub(super) fn tell(story: &Story, kind: Kind, program: &Path, new: bool) -> String {
    let cluster = Cluster::start_with(kind, 1, story.flags).expect("the caller asked for the programs");
    let ctl = Ctl::new(program.to_owned(), &cluster.endpoints());
    let stage = Stage { ctl, cluster, second: None };
    let mut recorder = Recorder { new, stage: Some(stage), text: String::new(), asked: Vec::new() };
    (story.tell)(&mut recorder);
    recorder.text
}

/// The arguments of every run of `story`, without any server.
pub(super) fn rehearse(story: &Story, new: bool) -> Vec<Vec<String>> {
    let mut recorder = Recorder { new, stage: None, text: String::new(), asked: Vec::new() };
    (story.tell)(&mut recorder);
    recorder.asked
}

impl Recorder {
    /// Runs a command and returns what it printed; nothing in a rehearsal.
    pub(super) fn run(&mut self, arguments: &[&str]) -> String {
        self.run_with("", arguments)
    }

    pub(super) fn all(&mut self, commands: &[&[&str]]) {
        for arguments in commands {
            self.run(arguments);
        }
    }

    /// The same with `input` on its standard input.
    pub(super) fn run_with(&mut self, input: &str, arguments: &[&str]) -> String {
        self.run_in(&[], input, arguments)
    }

    /// The same with variables in its environment.
    pub(super) fn run_in(&mut self, variables: &[(&str, &str)], input: &str, arguments: &[&str]) -> String {
        let ctl = self.ask("", variables, arguments);
        let Some(ctl) = ctl else { return String::new() };
        self.write('<', if input.len() < 200 { input } else { "much" });
        self.answer(&ctl, input, arguments)
    }

    /// Runs a command that is told by a flag where to ask.
    pub(super) fn run_at(&mut self, arguments: &[&str]) -> String {
        let Some(ctl) = self.ask("", &[], arguments) else { return String::new() };
        self.answer(&ctl.at(""), "", arguments)
    }

    /// Runs a command and writes down only its output: its errors are the client's talk about itself.
    pub(super) fn run_quietly(&mut self, arguments: &[&str]) {
        let Some(ctl) = self.ask(" 2>/dev/null", &[], arguments) else { return };
        let answer = ctl.run(arguments);
        self.write(' ', &answer.stdout);
        self.note(&format!("exit {}", answer.status));
    }

    /// Runs a command whose output is a message, and writes down what is in it.
    pub(super) fn message<M: Message + Default + Debug>(&mut self, arguments: &[&str]) {
        self.message_with::<M>("", arguments);
    }

    /// The same with `input` on its standard input.
    pub(super) fn message_with<M: Message + Default + Debug>(&mut self, input: &str, arguments: &[&str]) {
        let Some(ctl) = self.ask("", &[], arguments) else { return };
        let output = ctl.output(input, arguments);
        self.write('!', &String::from_utf8_lossy(&output.stderr));
        match M::decode(&output.stdout[..]) {
            Ok(message) => {
                self.write(' ', &format!("{message:?}"));
                assert_eq!(message.encode_to_vec(), output.stdout, "{arguments:?}: our messages lack a field of it");
            }
            Err(error) => self.write(' ', &format!("no message: {error}")),
        }
        self.note(&format!("exit {:?}", output.status.code()));
    }

    /// The first lines of a command that does not end by itself.
    pub(super) fn watch(&mut self, count: usize, arguments: &[&str]) {
        self.watch_in(&[], count, arguments);
    }

    /// The same with variables in its environment.
    pub(super) fn watch_in(&mut self, variables: &[(&str, &str)], count: usize, arguments: &[&str]) {
        let ctl = self.ask(" & # it", variables, arguments);
        let mut running = Running { name: "it".to_owned(), process: ctl.map(|ctl| ctl.begin(arguments)), shown: 0 };
        self.lines(&mut running, count);
    }

    /// Starts a command that does not end by itself. `name` is what the transcript calls it.
    pub(super) fn begin(&mut self, name: &str, arguments: &[&str]) -> Running {
        let ctl = self.ask(&format!(" & # {name}"), &[], arguments);
        Running { name: name.to_owned(), process: ctl.map(|ctl| ctl.begin(arguments)), shown: 0 }
    }

    /// The same with a pipe to its input.
    pub(super) fn talk(&mut self, name: &str, arguments: &[&str]) -> Running {
        let ctl = self.ask(&format!(" & # {name}"), &[], arguments);
        Running { name: name.to_owned(), process: ctl.map(|ctl| ctl.begin_talking(arguments)), shown: 0 }
    }

    /// Writes a line to the input of `running`.
    pub(super) fn say(&mut self, running: &mut Running, line: &str) {
        self.note(&format!("{} < {line}", running.name));
        if let Some(process) = &mut running.process {
            process.say(line);
        }
    }

    /// Closes the input of `running`.
    pub(super) fn fall_silent(&mut self, running: &mut Running) {
        self.note(&format!("{} hears no more", running.name));
        if let Some(process) = &mut running.process {
            process.fall_silent();
        }
    }

    /// Waits for the next `count` lines of `running`.
    pub(super) fn lines(&mut self, running: &mut Running, count: usize) {
        let Some(process) = &running.process else { return };
        let lines = process.wait_lines(running.shown + count, PATIENCE);
        for line in &lines[running.shown..] {
            let _ = writeln!(self.text, "{} > {line}", running.name);
        }
        running.shown += count;
    }

    /// Waits for the end of `running`, after a signal if one is named; writes down the rest of its lines and its status.
    pub(super) fn end(&mut self, mut running: Running, signal: &str) {
        self.note(&format!("{} ends {signal}", running.name));
        let Some(process) = &mut running.process else { return };
        if !signal.is_empty() {
            process.signal(signal);
        }
        let status = process.wait(PATIENCE);
        for line in &process.lines()[running.shown..] {
            let _ = writeln!(self.text, "{} > {line}", running.name);
        }
        let _ = writeln!(self.text, "{} exit {:?}", running.name, status.code());
    }

    /// `kill -9`: what it was saying then is nobody's affair.
    pub(super) fn kill(&mut self, mut running: Running) {
        self.note(&format!("{} is killed", running.name));
        if let Some(process) = &mut running.process {
            process.kill();
        }
    }

    /// A remark between the commands.
    pub(super) fn note(&mut self, text: &str) {
        let _ = writeln!(self.text, "# {text}");
    }

    /// Waits until `count` keys begin with `prefix`; returns them in order.
    pub(super) fn settle(&mut self, prefix: &str, count: usize) -> Vec<String> {
        let Some(stage) = &self.stage else { return vec![String::new(); count] };
        settle(&stage.ctl, prefix, count)
    }

    /// The same at the second server.
    pub(super) fn settle_second(&mut self, prefix: &str, count: usize) {
        let Some(stage) = &self.stage else { return };
        let second = stage.second.as_ref().expect("the story began it");
        settle(&stage.ctl.at(&second.endpoints()), prefix, count);
    }

    /// Starts a second store if there is none yet; its address, without a scheme.
    pub(super) fn second(&mut self) -> String {
        let Some(stage) = &mut self.stage else { return "127.0.0.1:1".to_owned() };
        if stage.second.is_none() {
            stage.second = Cluster::start(stage.cluster.kind, 1);
        }
        let second = stage.second.as_ref().expect("its program is there: the first runs");
        format!("127.0.0.1:{}", second.members[0].client_port)
    }

    /// The address of the member that the story is told to.
    pub(super) fn address(&self) -> String {
        let port = self.stage.as_ref().map_or(1, |stage| stage.cluster.members[0].client_port);
        format!("127.0.0.1:{port}")
    }

    /// Asks the second server from now on, or the first again.
    pub(super) fn turn_to_second(&mut self, second: bool) {
        self.note(if second { "at the second" } else { "at the first" });
        let Some(stage) = &mut self.stage else { return };
        let cluster = if second { stage.second.as_ref().expect("the story began it") } else { &stage.cluster };
        stage.ctl = stage.ctl.at(&cluster.endpoints());
    }

    /// Sends the member's process a signal.
    pub(super) fn signal_member(&mut self, signal: &str) {
        self.note(&format!("the member gets {signal}"));
        if let Some(stage) = &self.stage {
            stage.cluster.members[0].process().signal(signal);
        }
    }

    /// Repeats a command, unrecorded, until it fails.
    pub(super) fn until_refused(&mut self, input: &str, arguments: &[&str]) {
        self.note(&format!("until it fails: etcdctl {}", arguments.join(" ")));
        let Some(stage) = &self.stage else { return };
        eventually("a write is refused", PATIENCE, || (stage.ctl.run_with(input, arguments).status != 0).then_some(()));
    }

    /// The cluster's version and the storage's are decided a moment after the start; Status shows both.
    pub(super) fn wait_for_versions(&mut self) {
        let Some(stage) = &self.stage else { return };
        eventually("the cluster's version is decided", PATIENCE, || {
            let version = http::get(stage.cluster.members[0].client_port, "/version");
            (version.contains(r#""etcdcluster":"3.7.0""#) && version.contains(r#""storage":"3.7.0""#)).then_some(())
        });
    }

    /// Notes that a command is run; the etcdctl to run it with, unless this is a rehearsal.
    fn ask(&mut self, suffix: &str, variables: &[(&str, &str)], arguments: &[&str]) -> Option<Ctl> {
        self.asked.push(arguments.iter().map(|&word| word.to_owned()).collect());
        let stage = self.stage.as_ref()?;
        let mut ctl = stage.ctl.clone();
        let _ = write!(self.text, "$ ");
        for (name, value) in variables {
            ctl = ctl.with(name, value);
            let _ = write!(self.text, "{name}={value} ");
        }
        let _ = writeln!(self.text, "etcdctl {}{suffix}", arguments.join(" "));
        Some(ctl)
    }

    fn answer(&mut self, ctl: &Ctl, input: &str, arguments: &[&str]) -> String {
        let answer = ctl.run_with(input, arguments);
        self.write(' ', &answer.stdout);
        self.write('!', &answer.stderr);
        let _ = writeln!(self.text, "exit {}", answer.status);
        answer.stdout
    }

    fn write(&mut self, sign: char, text: &str) {
        for line in text.lines() {
            let _ = writeln!(self.text, "{sign}{line}");
        }
    }
}

fn settle(ctl: &Ctl, prefix: &str, count: usize) -> Vec<String> {
    eventually(&format!("{count} keys begin with {prefix:?}"), PATIENCE, || {
        let keys = ctl.run(&["get", prefix, "--prefix", "--keys-only", "--sort-by", "CREATE"]).stdout;
        let keys: Vec<String> = keys.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
        (keys.len() == count).then_some(keys)
    })
}

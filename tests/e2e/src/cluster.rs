//! One or three members of a store, ours or etcd, started the same way.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::peers::{self, Program};
use crate::{Ctl, Folder, PATIENCE, Process, ports};

/// Which store a test body runs against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Keelson,
    Etcd,
}

/// What both log once clients are served, and not before.
pub const READY: &str = "ready to serve client requests";

/// The members of one store and the folder their data is in.
#[derive(Debug)]
pub struct Cluster {
    pub kind: Kind,
    pub members: Vec<Member>,
    folder: Folder,
}

/// One member: how it is started, and its process while it runs.
#[derive(Debug)]
pub struct Member {
    pub name: String,
    pub client_port: u16,
    pub peer_port: u16,
    pub metrics_port: u16,
    pub data_dir: PathBuf,
    program: PathBuf,
    arguments: Vec<String>,
    /// What the program is started by: nothing, or a program that becomes it.
    wrapper: Vec<String>,
    process: Option<Process>,
}

impl Cluster {
    /// Starts `size` members and waits until all are ready; `None` after a loud skip because the store's program is missing.
    pub fn start(kind: Kind, size: usize) -> Option<Cluster> {
        Cluster::start_with(kind, size, &[])
    }

    /// The same with more flags, given to every member.
    pub fn start_with(kind: Kind, size: usize, extra: &[&str]) -> Option<Cluster> {
        let mut cluster = Cluster::prepare(kind, size, extra)?;
        cluster.members.iter_mut().for_each(Member::spawn);
        cluster.members.iter().for_each(Member::wait_ready);
        Some(cluster)
    }

    /// Chooses ports, folders and arguments, and starts nothing.
    pub fn prepare(kind: Kind, size: usize, extra: &[&str]) -> Option<Cluster> {
        let program = peers::need(match kind {
            Kind::Keelson => Program::Keelson,
            Kind::Etcd => Program::Etcd,
        })?;
        Some(Cluster::prepare_program(program, kind, size, extra))
    }

    /// The same with another program of its kind.
    pub fn prepare_program(program: PathBuf, kind: Kind, size: usize, extra: &[&str]) -> Cluster {
        let folder = Folder::new(match kind {
            Kind::Keelson => "keelson",
            Kind::Etcd => "etcd",
        });
        let peer_ports: Vec<u16> = (0..size).map(|_| ports::free()).collect();
        let names: Vec<String> = (1..=size).map(|number| format!("m{number}")).collect();
        let founders: Vec<String> =
            names.iter().zip(&peer_ports).map(|(name, port)| format!("{name}=http://127.0.0.1:{port}")).collect();
        let members = names
            .iter()
            .zip(&peer_ports)
            .map(|(name, &peer_port)| {
                let mut member = Member {
                    name: name.clone(),
                    client_port: ports::free(),
                    peer_port,
                    metrics_port: ports::free(),
                    data_dir: folder.path().join(format!("{name}.data")),
                    program: program.clone(),
                    arguments: Vec::new(),
                    wrapper: Vec::new(),
                    process: None,
                };
                member.arguments = member.flags(&founders.join(","), extra);
                member
            })
            .collect();
        Cluster { kind, members, folder }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The client URLs of all members, comma-separated.
    pub fn endpoints(&self) -> String {
        self.members.iter().map(Member::client_url).collect::<Vec<_>>().join(",")
    }

    /// etcdctl 3.7 at all members; `None` after a loud skip.
    pub fn ctl(&self) -> Option<Ctl> {
        Some(Ctl::new(peers::need(Program::Etcdctl)?, &self.endpoints()))
    }
}

impl Member {
    pub fn client_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    pub fn metrics_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.metrics_port)
    }

    /// The command line of a kubeadm static pod without its TLS, with flags of ours at the end.
    fn flags(&self, founders: &str, extra: &[&str]) -> Vec<String> {
        let mut flags = vec![
            format!("--name={}", self.name),
            format!("--data-dir={}", self.data_dir.display()),
            format!("--listen-client-urls={}", self.client_url()),
            format!("--advertise-client-urls={}", self.client_url()),
            format!("--listen-peer-urls=http://127.0.0.1:{}", self.peer_port),
            format!("--initial-advertise-peer-urls=http://127.0.0.1:{}", self.peer_port),
            format!("--initial-cluster={founders}"),
            "--initial-cluster-state=new".to_owned(),
            "--initial-cluster-token=e2e".to_owned(),
            format!("--listen-metrics-urls={}", self.metrics_url()),
        ];
        flags.extend(extra.iter().map(|&flag| flag.to_owned()));
        flags
    }

    /// Runs on one core only from its next start on.
    pub fn pin(&mut self, core: usize) {
        self.wrapper = vec!["taskset".to_owned(), "-c".to_owned(), core.to_string()];
    }

    /// Runs in a network namespace from its next start on: its loopback is that one's.
    pub fn move_into(&mut self, space: &str) {
        self.wrapper = ["ip", "netns", "exec", space].map(str::to_owned).to_vec();
    }

    /// More flags, for this member alone, from its next start on.
    pub fn add_flags(&mut self, flags: &[&str]) {
        self.arguments.extend(flags.iter().map(|&flag| flag.to_owned()));
    }

    /// Starts the process, with the same arguments each time.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "{} runs already", self.name);
        let mut words = self.wrapper.iter().map(OsStr::new).chain([self.program.as_os_str()]);
        let mut command = Command::new(words.next().expect("the program at least"));
        command.args(words);
        command.args(&self.arguments);
        self.process = Some(Process::start(&self.name, &mut command));
    }

    pub fn wait_ready(&self) {
        self.process().wait_for(READY, PATIENCE);
    }

    /// Starts it and waits until it serves.
    pub fn restart(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.process.take().unwrap_or_else(|| panic!("{} does not run", self.name)).kill();
    }

    /// SIGTERM, and the exit that follows.
    pub fn stop(&mut self) -> std::process::ExitStatus {
        let mut process = self.process.take().unwrap_or_else(|| panic!("{} does not run", self.name));
        process.signal("TERM");
        process.wait(Duration::from_secs(20))
    }

    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    pub fn process(&self) -> &Process {
        self.process.as_ref().unwrap_or_else(|| panic!("{} does not run", self.name))
    }
}

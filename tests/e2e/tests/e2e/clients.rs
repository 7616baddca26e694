//! Other people's clients: Python's etcd3, Node's etcd3, and Rust's etcd-client, each in a program of its own that reads, writes, watches,
//! leases and locks, and prints what it saw (`tests/e2e/clients`). What it prints of ours is what it prints of etcd.
//!
//! The programs print nothing that a store may choose, so nothing is masked. It does not say what is right: etcd does.

use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::peers::{self, Program};
use e2e::{Cluster, Kind, PATIENCE, Process};

on_both!(python, node, rust);

fn python(kind: Kind) {
    compare(kind, "python");
}

fn node(kind: Kind) {
    compare(kind, "node");
}

fn rust(kind: Kind) {
    compare(kind, "rust");
}

fn compare(kind: Kind, name: &str) {
    let Some(client) = Client::find(name) else { return };
    if peers::need(Program::Etcd).is_none() {
        return;
    }
    let (got, want) = std::thread::scope(|scope| {
        let other = scope.spawn(|| client.run(Kind::Etcd));
        let got = client.run(kind);
        (got, other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    assert!(want.len() > 30, "{name} saw next to nothing: {want:#?}");
    let differ: Vec<_> = want.iter().zip(&got).filter(|(want, got)| want != got).collect();
    assert!(got == want, "{name} sees another store in {kind:?} ({} lines, {}): {differ:#?}", want.len(), got.len());
}

/// How a client is run: its program, its script if it has one, and where its modules are if the program does not know.
struct Client {
    words: Vec<PathBuf>,
    modules: Option<PathBuf>,
}

impl Client {
    /// The client of this name; `None` after a loud skip if it is not installed.
    fn find(name: &str) -> Option<Client> {
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/build");
        let output = Command::new(&build).arg("--print").output().expect("it starts");
        let text = String::from_utf8(output.stdout).expect("paths of ours");
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("it names every client");
        let mut words: Vec<PathBuf> = line.split_whitespace().map(PathBuf::from).collect();
        let installed = words.remove(0);
        if !installed.join(".whole").is_file() {
            peers::skip(&format!("the {name} client is not installed: make peers"));
            return None;
        }
        let modules = (name == "node").then(|| installed.join("node_modules"));
        Some(Client { words, modules })
    }

    /// What it prints of a fresh member.
    fn run(&self, kind: Kind) -> Vec<String> {
        let cluster = Cluster::start(kind, 1).expect("the caller asked for the programs");
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).arg(cluster.members[0].client_port.to_string());
        if let Some(modules) = &self.modules {
            command.env("NODE_PATH", modules);
        }
        let mut process = Process::start("client", &mut command);
        let status = process.wait(2 * PATIENCE);
        assert!(status.success(), "{kind:?}: {status}\n{}", process.lines().join("\n"));
        process.lines()
    }
}

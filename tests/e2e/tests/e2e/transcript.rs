//! What etcdctl prints, text for text: the same commands against ours and against etcd, the newest etcdctl and Debian's old one.
//!
//! A transcript is every command with its output, its errors and its exit status. What differs from server to server is
//! masked by `tests/e2e/masks.txt`, which says why. The same is done with two etcds, so that a mask that is missing is not
//! taken for a fault of ours, nor a fault for a difference that etcd has with itself.

use std::fmt::Write;

use e2e::peers::{self, Program};
use e2e::{Cluster, Ctl, Kind, PATIENCE, eventually, http};
use regex_lite::Regex;

on_both!(new_etcdctl, old_etcdctl);

fn new_etcdctl(kind: Kind) {
    compare(kind, Program::Etcdctl);
}

fn old_etcdctl(kind: Kind) {
    compare(kind, Program::Etcdctl34);
}

fn compare(kind: Kind, client: Program) {
    let Some(client) = peers::need(client) else { return };
    let (Some(ours), Some(theirs)) = (Cluster::start(kind, 1), Cluster::start(Kind::Etcd, 1)) else { return };
    let record = |cluster: &Cluster| {
        wait_for_versions(cluster);
        mask(&transcript(&Ctl::new(client.clone(), &cluster.endpoints())))
    };
    let (got, want) = (record(&ours), record(&theirs));
    assert!(got == want, "the transcripts differ (- etcd, + {kind:?}):\n{}", differences(&want, &got));
}

/// The cluster's version and the storage's are decided a moment after the start; Status shows both.
fn wait_for_versions(cluster: &Cluster) {
    eventually("the cluster's version is decided", PATIENCE, || {
        let version = http::get(cluster.members[0].client_port, "/version");
        (version.contains(r#""etcdcluster":"3.7.0""#) && version.contains(r#""storage":"3.7.0""#)).then_some(())
    });
}

/// Runs the commands and writes down all they say.
struct Recorder<'a> {
    ctl: &'a Ctl,
    text: String,
}

impl Recorder<'_> {
    fn run(&mut self, arguments: &[&str]) -> String {
        self.run_with("", arguments)
    }

    fn run_with(&mut self, input: &str, arguments: &[&str]) -> String {
        let answer = self.ctl.run_with(input, arguments);
        let text = &mut self.text;
        let _ = writeln!(text, "$ etcdctl {}", arguments.join(" "));
        for (sign, lines) in [("<", input), ("", &answer.stdout), ("!", &answer.stderr)] {
            for line in lines.lines() {
                let _ = writeln!(text, "{sign}{line}");
            }
        }
        let _ = writeln!(text, "exit {}", answer.status);
        answer.stdout
    }

    fn watch(&mut self, count: usize, arguments: &[&str]) {
        let lines = self.ctl.first_lines(count, arguments);
        let _ = writeln!(self.text, "$ etcdctl {} # {count} lines\n{}", arguments.join(" "), lines.join("\n"));
    }
}

fn transcript(ctl: &Ctl) -> String {
    let mut story = Recorder { ctl, text: String::new() };
    keys(&mut story);
    transactions(&mut story);
    watches(&mut story);
    leases(&mut story);
    compaction(&mut story);
    refusals(&mut story);
    cluster(&mut story);
    story.text
}

fn keys(story: &mut Recorder) {
    for arguments in [
        &["put", "a", "b"][..],
        &["get", "a"],
        &["get", "a", "-w", "json"],
        &["get", "a", "-w", "fields"],
        &["get", "a", "--print-value-only"],
        &["get", "--prefix", ""],
        &["get", "nothing"],
        &["put", "a", "b2", "--prev-kv"],
        &["put", "dir/1", "one"],
        &["put", "dir/2", "two"],
        &["put", "dir/3", ""],
        &["get", "dir/", "--prefix", "--keys-only"],
        &["get", "dir/", "--prefix", "--limit", "2", "-w", "json"],
        &["get", "dir/1", "dir/3"],
        &["get", "dir/2", "--from-key"],
        &["get", "dir/", "--prefix", "--order", "DESCEND", "--sort-by", "MODIFY"],
        &["get", "a", "--rev", "2"],
        &["get", "a", "--consistency", "s"],
        &["get", "--prefix", "", "--count-only", "-w", "fields"],
        &["get", "a", "--hex"],
        &["del", "dir/3", "--prev-kv"],
        &["del", "nothing"],
        &["del", "dir/", "--prefix"],
        &["get", "--prefix", ""],
        &["put", "a", "--ignore-lease", "b3"],
        &["put", "a", "--ignore-value"],
        &["get", "a", "-w", "json"],
    ] {
        story.run(arguments);
    }
    story.run_with("from the input", &["put", "piped"]);
    story.run(&["get", "piped"]);
    story.run(&["del", "a"]);
}

fn transactions(story: &mut Recorder) {
    story.run(&["put", "t", "1"]);
    story.run_with("value(\"t\") = \"1\"\n\nput t 2\nget t\n\nput t 3\n\n", &["txn"]);
    story.run_with("value(\"t\") = \"1\"\n\nput t 2\n\nget t\ndel t\nget t\n\n", &["txn"]);
    story.run_with("mod(\"t\") > \"0\"\n\nput t 4\n\nput u 1\nput v 2\n\n", &["txn", "-w", "json"]);
    story.run_with("version(\"u\") = \"1\"\ncreate(\"v\") > \"1\"\n\ndel u\ndel v\n\n\n", &["txn"]);
    story.run_with("\nput x 1\nput x 2\n\n\n", &["txn"]);
    story.run_with("\nput \"\" 1\n\n\n", &["txn"]);
}

fn watches(story: &mut Recorder) {
    story.run(&["put", "w", "first"]);
    story.run(&["put", "w", "second"]);
    story.run(&["del", "w"]);
    story.run(&["put", "w/1", "one"]);
    story.watch(3, &["watch", "a", "--rev", "1"]);
    story.watch(8, &["watch", "w", "--rev", "1"]);
    story.watch(11, &["watch", "w", "--prefix", "--rev", "1"]);
    story.watch(10, &["watch", "w", "--rev", "1", "--prev-kv"]);
    story.watch(1, &["watch", "w", "--prefix", "--rev", "1", "-w", "json"]);
}

fn leases(story: &mut Recorder) {
    let granted = story.run(&["lease", "grant", "100"]);
    let lease = granted.split_whitespace().nth(1).unwrap_or("none").to_owned();
    for arguments in [
        &["put", "leased", "v", "--lease", &lease][..],
        &["get", "leased", "-w", "json"],
        &["lease", "list"],
        &["lease", "timetolive", &lease],
        &["lease", "timetolive", &lease, "--keys"],
        &["lease", "timetolive", &lease, "--keys", "-w", "json"],
        &["lease", "keep-alive", "--once", &lease],
        &["lease", "revoke", &lease],
        &["get", "leased"],
        &["lease", "list"],
        &["lease", "timetolive", &lease],
        &["lease", "keep-alive", "--once", &lease],
        &["lease", "revoke", &lease],
        &["lease", "grant", "1"],
        &["lease", "grant", "9000000001"],
        &["lease", "grant", "many"],
        &["put", "leased", "v", "--lease", "1234abcd"],
    ] {
        story.run(arguments);
    }
}

fn compaction(story: &mut Recorder) {
    for arguments in [
        &["compact", "5"][..],
        &["compact", "5"],
        &["compact", "4"],
        &["compact", "100000"],
        &["compact", "7", "--physical"],
        &["get", "w", "--rev", "3"],
        &["get", "w", "--rev", "7"],
        &["get", "w", "--rev", "100000"],
        &["watch", "w", "--rev", "2"],
    ] {
        story.run(arguments);
    }
}

fn refusals(story: &mut Recorder) {
    for arguments in [
        &["put", "", "v"][..],
        &["get", ""],
        &["del", ""],
        &["put", "only-a-key", "--ignore-value"],
        &["put", "k", "v", "--ignore-value"],
        &["get"],
        &["unheard-of"],
    ] {
        story.run(arguments);
    }
}

fn cluster(story: &mut Recorder) {
    for arguments in [
        &["endpoint", "health"][..],
        &["endpoint", "health", "-w", "json"],
        &["endpoint", "status"],
        &["endpoint", "status", "-w", "table"],
        &["endpoint", "status", "-w", "json"],
        &["endpoint", "status", "-w", "fields"],
        &["member", "list"],
        &["member", "list", "-w", "table"],
        &["member", "list", "-w", "json"],
    ] {
        story.run(arguments);
    }
}

/// Applies the masks, then takes out what only follows from them: the widths of a table's columns.
fn mask(text: &str) -> String {
    let masks: Vec<(Regex, String)> = include_str!("../../masks.txt")
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let (pattern, rest) = line.split_once(" => ").expect("a mask has a ` => `");
            let (stand_in, reason) = rest.split_once(" # ").expect("a mask has a reason");
            assert!(!reason.trim().is_empty(), "a mask has a reason: {line}");
            (Regex::new(&format!("(?m){pattern}")).expect("a regular expression"), stand_in.trim_end().to_owned())
        })
        .collect();
    let mut masked = text.to_owned();
    for (pattern, stand_in) in &masks {
        masked = pattern.replace_all(&masked, stand_in.as_str()).into_owned();
    }
    for (run, one) in [("-{2,}", "--"), ("─{2,}", "──"), (" {2,}", " ")] {
        masked = Regex::new(run).expect("a regular expression").replace_all(&masked, one).into_owned();
    }
    masked
}

/// The lines that differ, each with the command it belongs to.
fn differences(want: &str, got: &str) -> String {
    let blocks = |text: &str| -> Vec<String> { text.split("\n$ ").map(str::to_owned).collect() };
    let (want, got) = (blocks(want), blocks(got));
    let mut text = String::new();
    for (want, got) in want.iter().zip(&got).filter(|(want, got)| want != got) {
        let _ = writeln!(text, "$ {}", want.lines().next().unwrap_or_default());
        let (old, new): (Vec<&str>, Vec<&str>) = (want.lines().skip(1).collect(), got.lines().skip(1).collect());
        old.iter().filter(|line| !new.contains(line)).for_each(|line| {
            let _ = writeln!(text, "  - {line}");
        });
        new.iter().filter(|line| !old.contains(line)).for_each(|line| {
            let _ = writeln!(text, "  + {line}");
        });
    }
    if want.len() != got.len() {
        let _ = writeln!(text, "{} commands against {}", want.len(), got.len());
    }
    text
}

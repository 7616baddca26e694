//! Holds that the stories leave out no command and no flag of either etcdctl, but for those that a file lists with a reason.
//!
//! What there is is read off `--help`, at test time; what is used is noted by rehearsing each story without a server. Output
//! is not its affair.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use e2e::peers::{self, Program};

use super::{STORIES, recorder};

/// Commands with their flags; the flags of every command stand under `*`.
type Known = BTreeMap<String, BTreeSet<String>>;

#[test]
fn every_command_and_flag_is_told_or_left_out_for_a_reason() {
    let (Some(new), Some(old)) = (peers::need(Program::Etcdctl), peers::need(Program::Etcdctl34)) else { return };
    let listed = left_out();
    let mut useless = listed.clone();
    let mut faults = Vec::new();
    for (version, program, is_new) in [("3.7", new, true), ("3.4", old, false)] {
        let known = if is_new { new_commands(&program) } else { old_commands(&program) };
        assert!(known.len() > 40, "the help of {version} was not understood: {known:?}");
        let told = told(&known, is_new);
        for (command, flags) in &known {
            let all = std::iter::once("").chain(flags.iter().map(String::as_str));
            for flag in all.filter(|flag| !(command == "*" && flag.is_empty())) {
                let covered = told.contains(&(command.clone(), flag.to_owned()));
                let reason = [(command.as_str(), flag), (command.as_str(), "*"), ("*", flag)]
                    .into_iter()
                    .map(|(command, flag)| (command.to_owned(), flag.to_owned()))
                    .find(|line| listed.contains(line));
                match (covered, reason) {
                    (false, None) => faults.push(format!("etcdctl {version}: no story tells `{command} {flag}`")),
                    (true, Some(line)) if line.1 == flag && line.0 == *command => {
                        faults.push(format!("etcdctl {version}: `{command} {flag}` is told, and listed as left out"));
                    }
                    (_, Some(line)) => _ = useless.remove(&line),
                    _ => (),
                }
            }
        }
    }
    faults.extend(useless.iter().map(|(command, flag)| format!("left out, but unknown: `{command} {flag}`")));
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// The lines of the file: a command (or `*`), then a flag, `*` for all of its flags, or nothing; then ` # ` and the reason.
fn left_out() -> BTreeSet<(String, String)> {
    let lines = include_str!("../../../etcdctl-left-out.txt").lines();
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .flat_map(|line| {
            let (what, reason) = line.split_once(" # ").expect("a line has a reason");
            assert!(!reason.trim().is_empty(), "a line has a reason: {line}");
            let words: Vec<&str> = what.split_whitespace().collect();
            let is_flag = |word: &&str| word.starts_with("--");
            let (command, flags) = words.split_at(words.iter().position(is_flag).unwrap_or(words.len()));
            let (command, whole) = match command {
                [command @ .., "*"] if !command.is_empty() => (command, true),
                command => (command, false),
            };
            let command = command.join(" ");
            let flags: Vec<&str> = if whole { vec!["*"] } else { flags.to_vec() };
            assert!(!flags.is_empty(), "neither a flag nor a star: {line}");
            flags.into_iter().map(|flag| (command.clone(), flag.to_owned())).collect::<Vec<_>>()
        })
        .collect()
}

/// What the stories use: commands alone, and with each of their flags; a flag of every command counts for `*`.
fn told(known: &Known, new: bool) -> BTreeSet<(String, String)> {
    let mut told = BTreeSet::new();
    for arguments in STORIES.iter().flat_map(|story| recorder::rehearse(story, new)) {
        let words = arguments.iter().take_while(|word| *word != "--");
        let (flags, plain): (Vec<&String>, Vec<&String>) = words.partition(|word| word.starts_with('-'));
        let named = (1..=plain.len().min(2)).rev().find_map(|count| {
            let name = plain[..count].iter().map(|word| word.as_str()).collect::<Vec<_>>().join(" ");
            known.contains_key(&name).then_some(name)
        });
        // A flag may come first, with a value: then the command is behind it.
        let named = named.or_else(|| plain.iter().find(|word| known.contains_key(**word)).map(|word| (*word).clone()));
        let command = named.unwrap_or_default();
        told.insert((command.clone(), String::new()));
        for flag in flags {
            let name = flag.split('=').next().expect("split gives one").to_owned();
            let name = long(&name).map_or(name.clone(), str::to_owned);
            let own = known.get(&command).is_some_and(|flags| flags.contains(&name));
            told.insert((if own { command.clone() } else { "*".to_owned() }, name));
        }
    }
    told
}

/// The long name of the few flags that have a short one.
fn long(flag: &str) -> Option<&'static str> {
    match flag {
        "-w" => Some("--write-out"),
        "-i" => Some("--interactive"),
        "-l" => Some("--listen"),
        _ => None,
    }
}

fn help(program: &Path, command: &str) -> String {
    let words = command.split_whitespace();
    let output = Command::new(program).env("ETCDCTL_API", "3").args(words).arg("--help").output().expect("it starts");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The flags of a help text: lines that begin with one, below a heading.
fn flags(text: &str) -> BTreeSet<String> {
    let headings = ["Flags:", "Global Flags:", "OPTIONS:", "The following options can be passed to any command:"];
    let mut found = BTreeSet::new();
    let mut below = false;
    for line in text.lines() {
        below = headings.contains(&line) || below && (line.is_empty() || line.starts_with([' ', '\t']));
        let line = line.trim_start();
        let rest = match line.split_once(", ") {
            Some((short, rest)) if short.len() == 2 && short.starts_with('-') => rest,
            _ => line,
        };
        if below && rest.starts_with("--") {
            let name: String =
                rest.chars().take_while(|letter| letter.is_ascii_alphanumeric() || *letter == '-').collect();
            found.insert(name);
        }
    }
    found
}

/// 3.7 lists the commands below one another: each is asked for its own.
fn new_commands(program: &Path) -> Known {
    let everywhere = Command::new(program).arg("options").output().expect("it starts").stdout;
    let everywhere = flags(&String::from_utf8_lossy(&everywhere));
    let mut known = Known::from([("*".to_owned(), everywhere)]);
    let mut open = vec![String::new()];
    while let Some(command) = open.pop() {
        let text = help(program, &command);
        let mut below = false;
        let mut children = Vec::new();
        for line in text.lines() {
            if !line.starts_with(' ') {
                below = line == "Available Commands:" || command.is_empty() && line.ends_with(" commands");
            } else if below && let Some(name) = line.split_whitespace().next() {
                children.push(format!("{command} {name}").trim().to_owned());
            }
        }
        if children.is_empty() {
            known.insert(command, flags(&text));
        }
        open.extend(children);
    }
    known
}

/// 3.4 lists all its commands at once, and the flags of each together with those of every command.
fn old_commands(program: &Path) -> Known {
    let text = help(program, "");
    let commands = text.lines().skip_while(|line| *line != "COMMANDS:").skip(1).take_while(|line| !line.ends_with(':'));
    let names = commands.filter_map(|line| line.strip_prefix('\t')).filter_map(|line| line.split('\t').next());
    let mut known: Known = names.map(|name| (name.to_owned(), flags(&help(program, name)))).collect();
    known.insert("*".to_owned(), flags(&text));
    known
}

//! The rules of the house that a compiler does not hold: who may name what, which way dependencies point, how long a file may
//! be. They are read off the source text, tests and comments left out. Each failure names every offender.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a file without its tests; the rule of thumb is 600.
const FILE_LINES: usize = 700;
/// Lines of a function, from its name to its closing brace.
const FUNCTION_LINES: usize = 70;

/// A word, where it may be named, and why nowhere else. Paths are files, or folders with a slash at the end.
const ONLY_HERE: &[(&str, &str, &[&str], &str)] = &[
    ("rocksdb::", "kvstore/", &["kvstore/src/disk.rs", "kvstore/src/disk/"], "the database is one module's affair"),
    (
        "tonic",
        "kvstore/",
        &["kvstore/src/rpc.rs", "kvstore/src/rpc/", "kvstore/src/peer.rs", "kvstore/src/peer/"],
        "gRPC ends where requests become values",
    ),
    (
        "eraftpb",
        "kvstore/",
        &["kvstore/core/src/replica/wire.rs"],
        "raft is on prost 0.11: its messages are opaque bytes elsewhere",
    ),
    ("raft::prelude", "kvstore/", &[], "it brings raft's messages in by the back door"),
    (
        "Instant::now",
        "kvstore/",
        &["kvstore/src/clock.rs", "kvstore/src/mailbox.rs", "kvstore/src/rpc/watch.rs"],
        "what a machine decides by is a Timestamp of the server's clock; the others only wait",
    ),
    ("SystemTime::now", "kvstore/", &["kvstore/src/server"], "clocks become a Timestamp in one place"),
    ("std::env::var", "", &["kvstore/src/cli.rs", "proxy/src/cli.rs"], "only the command line reads the environment"),
    ("process::Command", "", &[], "nothing of ours runs another program"),
    ("anyhow", "", &["kvstore/src/bin/", "proxy/src/main.rs"], "errors have names below main"),
];

/// What a core may depend on: nothing that has a thread, a clock, a file or a socket.
const CORE_DEPENDENCIES: &[(&str, &[&str])] = &[
    (
        "kvstore/core",
        &["keelson-proto", "raft", "prost", "prost_011", "bytes", "thiserror", "tracing", "slog", "crc32c", "sha1"],
    ),
    ("proxy/core", &["serde", "serde_path_to_error", "ipnet", "thiserror"]),
];

/// The arrows between our crates. A new one is a design change and belongs into ARCHITECTURE.md first.
const ARROWS: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("kvstore/core", &["keelson-proto"]),
    ("kvstore", &["kvstore-core", "keelson-proto"]),
    ("proxy/core", &[]),
    ("proxy", &["proxy-core", "keelson-proto"]),
    ("tests/check", &[]),
    ("tests/sim", &["kvstore-core", "check", "keelson-proto"]),
    ("tests/e2e", &["keelson-proto", "check"]),
    ("benches", &["e2e", "keelson-proto"]),
];

/// Inside the store's shell: a file or folder, and the modules it may not look up to.
const UPWARD: &[(&str, &[&str])] = &[
    ("kvstore/src/disk", &["rpc", "peer", "driver", "applier", "logger", "server", "http", "cli"]),
    ("kvstore/src/driver", &["rpc", "server", "http", "cli"]),
    // Both tell the raft thread what they have done: `driver::Input` is the word for it.
    ("kvstore/src/applier", &["rpc", "server", "http", "cli", "logger"]),
    ("kvstore/src/logger", &["rpc", "server", "http", "cli", "applier"]),
    ("kvstore/src/peer", &["rpc", "server", "http", "cli"]),
    ("kvstore/src/rpc", &["server", "cli"]),
    ("proxy/src/nft", &["source", "sync", "cli", "apply"]),
    ("proxy/src/netlink", &["source", "sync", "cli", "apply", "nft"]),
];

/// What several services of the store's edge stand on; the services themselves do not import each other.
const RPC_LEAVES: &[&str] =
    &["status", "encoded", "framing", "intercept", "unary", "header", "leader", "authority", "recipe"];

/// A source file: its path from the root, and its lines without comments and tests.
struct Source {
    path: String,
    lines: Vec<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the clone")
}

/// All our Rust below `folder`, programs and libraries; tests of a crate lie elsewhere or behind `#[cfg(test)]`.
fn sources(folder: &str) -> Vec<Source> {
    let root = root();
    let mut found = Vec::new();
    let mut open = vec![root.join(folder)];
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).unwrap().display().to_string();
                let test = name.ends_with("/tests.rs") || name.contains("/tests/");
                if !test {
                    found.push(Source { path: name, lines: without_tests(&fs::read_to_string(&path).unwrap()) });
                }
            }
        }
    }
    assert!(!found.is_empty(), "{folder} has no source");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn product() -> Vec<Source> {
    ["kvstore/core/src", "kvstore/src", "proxy/core/src", "proxy/src"].into_iter().flat_map(sources).collect()
}

/// Drops comments, and each item behind `#[cfg(test)]`: to its closing brace in rustfmt's layout, or to its semicolon.
fn without_tests(text: &str) -> Vec<String> {
    let mut kept = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let indent = line.len() - line.trim_start().len();
        if line.trim_start().starts_with("#[cfg(test)]") {
            let closing = format!("{}}}", " ".repeat(indent));
            lines
                .by_ref()
                .find(|line| *line == closing || line.ends_with(';') && !line.starts_with(&" ".repeat(indent + 1)));
            continue;
        }
        if !line.trim_start().starts_with("//") {
            kept.push(line.to_owned());
        }
    }
    kept
}

fn none(offenders: &[String], rule: &str) {
    assert!(offenders.is_empty(), "{rule}:\n{}", offenders.join("\n"));
}

/// `word` as a word: not as the end or the beginning of another.
fn names(line: &str, word: &str) -> bool {
    let part = |letter: char| letter.is_alphanumeric() || letter == '_';
    line.match_indices(word).any(|(start, _)| {
        let (before, after) = (line[..start].chars().next_back(), line[start + word.len()..].chars().next());
        !before.is_some_and(part) && (word.ends_with(':') || !after.is_some_and(part))
    })
}

#[test]
fn some_words_belong_to_some_files() {
    let product = product();
    for (word, within, places, reason) in ONLY_HERE {
        let offenders: Vec<String> = product
            .iter()
            .filter(|source| source.path.starts_with(within))
            .filter(|source| !places.iter().any(|place| source.path.starts_with(place)))
            .flat_map(|source| {
                source
                    .lines
                    .iter()
                    .filter(|line| names(line, word))
                    .map(|line| format!("{}: {}", source.path, line.trim()))
            })
            .collect();
        none(&offenders, &format!("`{word}` is named only in {places:?}: {reason}"));
    }
}

/// The names in one table of a manifest.
fn dependencies(folder: &str, table: &str) -> BTreeSet<String> {
    let text =
        fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let heading = format!("[{table}]");
    text.lines()
        .skip_while(|line| line.trim() != heading)
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split(['.', '=', ' ']).next())
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

#[test]
fn cores_depend_on_no_shell() {
    for (core, allowed) in CORE_DEPENDENCIES {
        let others: Vec<String> =
            dependencies(core, "dependencies").into_iter().filter(|name| !allowed.contains(&name.as_str())).collect();
        none(&others, &format!("{core} may depend on {allowed:?} only"));
        assert!(root().join(core).join("clippy.toml").is_file(), "{core} has a clippy.toml of its own");
    }
}

#[test]
fn arrows_between_crates_point_down() {
    let ours: BTreeSet<String> = ARROWS
        .iter()
        .map(|(folder, _)| {
            let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
            let line = manifest.lines().find(|line| line.starts_with("name = ")).expect("a crate has a name");
            line.trim_start_matches("name = ").trim_matches('"').to_owned()
        })
        .collect();
    for (folder, allowed) in ARROWS {
        let offenders: Vec<String> = dependencies(folder, "dependencies")
            .into_iter()
            .filter(|name| ours.contains(name) && !allowed.contains(&name.as_str()))
            .collect();
        none(&offenders, &format!("{folder} may depend on {allowed:?} of our crates"));
    }
    let listed = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let members = listed.split_once("members = [").unwrap().1.split_once(']').unwrap().0;
    for member in members.lines().map(|line| line.trim().trim_matches([',', '"'])).filter(|member| !member.is_empty()) {
        assert!(ARROWS.iter().any(|(folder, _)| *folder == member), "{member} has no arrows in this test");
    }
}

#[test]
fn arrows_inside_a_shell_point_down() {
    let product = product();
    let mut offenders = Vec::new();
    for (low, above) in UPWARD {
        let inside = |path: &str| path == format!("{low}.rs") || path.starts_with(&format!("{low}/"));
        for source in product.iter().filter(|source| inside(&source.path)) {
            for module in *above {
                let path = format!("crate::{module}");
                let lines = source.lines.iter().filter(|line| names(line, &path));
                offenders.extend(lines.map(|line| format!("{}: {}", source.path, line.trim())));
            }
        }
    }
    none(&offenders, "a lower module does not look up");
}

#[test]
fn services_do_not_import_each_other() {
    let services: Vec<Source> =
        sources("kvstore/src").into_iter().filter(|source| source.path.starts_with("kvstore/src/rpc/")).collect();
    let name = |source: &Source| source.path.rsplit('/').next().unwrap().trim_end_matches(".rs").to_owned();
    let all: Vec<String> = services.iter().map(name).filter(|name| !RPC_LEAVES.contains(&name.as_str())).collect();
    let mut offenders = Vec::new();
    for source in services.iter().filter(|source| all.contains(&name(source))) {
        for other in all.iter().filter(|other| **other != name(source)) {
            for path in [format!("super::{other}"), format!("crate::rpc::{other}")] {
                let lines = source.lines.iter().filter(|line| names(line, &path));
                offenders.extend(lines.map(|line| format!("{}: {}", source.path, line.trim())));
            }
        }
    }
    none(&offenders, "a service stands on the leaves of rpc, not on another service");
}

#[test]
fn files_fit_a_story_and_functions_a_screen() {
    let mut offenders = Vec::new();
    for source in product() {
        if source.lines.len() > FILE_LINES {
            offenders.push(format!("{}: {} lines", source.path, source.lines.len()));
        }
        for (start, line) in source.lines.iter().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let declares = line.trim_start().trim_start_matches("pub ").trim_start_matches("pub(crate) ");
            let declares =
                declares.trim_start_matches("const ").trim_start_matches("async ").trim_start_matches("unsafe ");
            if !declares.starts_with("fn ") {
                continue;
            }
            let closing = format!("{}}}", " ".repeat(indent));
            let length = source.lines[start..].iter().position(|line| *line == closing).unwrap_or(0);
            if length >= FUNCTION_LINES {
                offenders.push(format!("{}: {} ({length} lines)", source.path, line.trim()));
            }
        }
    }
    none(&offenders, &format!("files have at most {FILE_LINES} lines without tests, functions {FUNCTION_LINES}"));
}

#[test]
fn nothing_is_left_for_later() {
    let mut offenders = Vec::new();
    // Written apart, so that this file does not find itself.
    let words = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[ig", "nore"), concat!("dbg", "!(")];
    for folder in ["kvstore", "proxy", "proto", "tests", "benches"] {
        for source in everything(folder) {
            let text = fs::read_to_string(&source).unwrap();
            for (number, line) in text.lines().enumerate() {
                if words.iter().any(|word| line.contains(word)) {
                    offenders.push(format!("{}:{}: {}", source.display(), number + 1, line.trim()));
                }
            }
        }
    }
    none(&offenders, "what is here is done");
}

/// Every Rust file below `folder`, tests too.
fn everything(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(folder)];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn a_folder_stands_beside_the_file_that_tells_its_story() {
    let mut offenders = Vec::new();
    for source in product() {
        let folder = Path::new(&source.path).parent().unwrap();
        if folder.ends_with("src") || folder.ends_with("src/bin") {
            continue;
        }
        if !root().join(folder.with_extension("rs")).is_file() {
            offenders.push(source.path.clone());
        }
    }
    none(&offenders, "x/ exists only beside x.rs");
}

#[test]
fn modules_open_with_their_story() {
    let offenders: Vec<String> = product()
        .iter()
        .filter(|source| !fs::read_to_string(root().join(&source.path)).unwrap().starts_with("//! "))
        .map(|source| source.path.clone())
        .collect();
    none(&offenders, "a file begins with what it is about");
}

//! That each text of the error table is held by a case, shown on the built program: a copy in which one character of one text is
//! changed must fail the story of that text, each text in turn.
//!
//! The rows are those of `rpc/status.golden` and a few that etcd keeps elsewhere; the story of a row is `texts/<row>.txt`, which the
//! suite also plays with the program as it is. A row without a story is in `unreachable.txt` with its reason.
//!
//! What it does not do: it changes no code of a status, only texts; codes are compared by the stories like all else.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;

use e2e::peers::{self, Program};
use e2e::{Folder, Kind, rpc};

use super::mask::Masks;
use super::player::{Answer, Side};
use super::script::{self, Story};
use super::{corpus, same, tell};

/// Texts that clients see and that the error table does not list.
const MORE: [(&str, &str); 6] = [
    ("WatchDuplicateId", "mvcc: duplicate watch ID provided on the WatchStream"),
    ("WatchEmptyRange", "mvcc: watcher range is empty"),
    ("ElectionNoLeader", "election: no leader"),
    ("ElectionNotLeader", "election: not leader"),
    ("LeaderFieldMissing", "\"leader\" field must be provided"),
    ("SessionExpired", "mutex: session is expired"),
];

/// How many rows are tried at once: each waits more than it computes.
const AT_ONCE: usize = 3;

/// Row and text.
fn table() -> BTreeMap<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kvstore/src/rpc/status.golden");
    let golden = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let rows = golden.lines().map(|line| {
        let mut columns = line.splitn(3, " | ");
        let (Some(row), Some(_), Some(text)) = (columns.next(), columns.next(), columns.next()) else {
            panic!("{line:?} is no row");
        };
        (row.to_owned(), text.to_owned())
    });
    rows.chain(MORE.map(|(row, text)| (row.to_owned(), text.to_owned()))).collect()
}

fn row_of(story: &Story) -> &str {
    story.name.rsplit('/').next().unwrap_or(&story.name)
}

#[test]
fn each_row_has_a_case_or_a_reason() {
    let table = table();
    let mut held: Vec<String> =
        script::area(&corpus().join("texts")).iter().map(|story| row_of(story).to_owned()).collect();
    for line in fs::read_to_string(corpus().join("unreachable.txt")).unwrap().lines() {
        if !line.starts_with('#') {
            let (row, reason) = line.split_once(" # ").unwrap_or_else(|| panic!("{line:?} has no reason"));
            assert!(!reason.trim().is_empty(), "{row} has no reason");
            held.push(row.to_owned());
        }
    }
    held.sort();
    let rows: Vec<String> = table.keys().cloned().collect();
    assert_eq!(held, rows, "each row once, in texts/ or in unreachable.txt");
}

#[test]
fn each_changed_text_fails() {
    let (Some(ours), Some(_)) = (peers::need(Program::Keelson), peers::need(Program::Etcd)) else { return };
    let program = fs::read(&ours).unwrap();
    let (table, masks, begun) = (table(), Masks::load(), Instant::now());
    let only = std::env::var("KEELSON_STORY").unwrap_or_default();
    let mut stories = script::area(&corpus().join("texts"));
    stories.retain(|story| story.name.contains(&only));
    // The long ones first, so that none is left alone at the end.
    stories.sort_by_key(|story| std::cmp::Reverse(story.needs.members));
    let count = stories.len();
    let (waiting, unheld) = (Mutex::new(stories.into_iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                let mut etcd = None;
                loop {
                    let Some(story) = waiting.lock().unwrap().next() else { break };
                    let changed = changed(&program, &table[row_of(&story)], &table);
                    match changed.and_then(|changed| fails(&story, &table, &changed, &mut etcd, &masks)) {
                        Ok(()) => {}
                        Err(why) => unheld.lock().unwrap().push(format!("{}: {why}", story.name)),
                    }
                }
            });
        }
    });
    let unheld = unheld.into_inner().unwrap();
    assert!(unheld.is_empty(), "texts that no case holds:\n{}", unheld.join("\n"));
    tell(&format!(
        "differential: {count} texts changed by one character, each failed its case, in {:?}",
        begun.elapsed()
    ));
}

/// Whether the story of a text fails on a program in which the text is another one.
fn fails(
    story: &Story,
    table: &BTreeMap<String, String>,
    changed: &[u8],
    etcd: &mut Option<Side>,
    masks: &Masks,
) -> Result<(), String> {
    let mut right = match etcd.take().filter(|side| side.suits(&story.needs)) {
        Some(side) => side,
        None => Side::start(Kind::Etcd, &story.needs).ok_or("etcd is missing")?,
    };
    let wanted = rpc::run(right.play(story, masks));
    *etcd = Some(right);
    let text = &table[row_of(story)];
    if !wanted.iter().any(|answer| says(answer, text)) {
        return Err(format!("etcd does not say {text:?} in this story"));
    }
    let folder = Folder::new("changed");
    let mut wrong = Side::start_program(written(&folder, changed), &story.needs);
    let got = rpc::run(wrong.play(story, masks));
    // It must be the text's own step that fails, and not one that failed anyway.
    let failed = wanted.iter().zip(&got).any(|(wanted, got)| says(wanted, text) && !same(wanted, got));
    if failed { Ok(()) } else { Err(format!("{text:?} was changed, and nothing failed")) }
}

fn says(answer: &Answer, text: &str) -> bool {
    answer.parts.iter().any(|part| part.text.contains(text) || part.text.contains(&text.replace('"', "\\\"")))
}

/// Writes a program where it can be started at once. Another process makes the copy: a file that this one has open for writing may be
/// open in a server, too, that another thread starts just now, and then it is busy.
fn written(folder: &Folder, program: &[u8]) -> PathBuf {
    let (bytes, path) = (folder.path().join("bytes"), folder.path().join("keelson"));
    fs::write(&bytes, program).unwrap();
    let status = Command::new("install").args(["-m", "755"]).args([&bytes, &path]).status().expect("install runs");
    assert!(status.success(), "install {}: {status}", path.display());
    path
}

/// The program with another last letter in `text`, wherever it stands by itself and not as a part of another row's text.
fn changed(program: &[u8], text: &str, table: &BTreeMap<String, String>) -> Result<Vec<u8>, String> {
    let around: Vec<(&str, usize)> = table
        .values()
        .filter(|other| other.len() > text.len())
        .flat_map(|other| other.match_indices(text).map(move |(at, _)| (other.as_str(), at)))
        .collect();
    let letter = text.rfind(|letter: char| letter.is_ascii_lowercase()).ok_or("no letter")?;
    let mut out = program.to_vec();
    let mut places = 0;
    for at in memchr::memmem::find_iter(program, text) {
        let part = around.iter().any(|(other, before)| {
            at.checked_sub(*before).and_then(|start| program.get(start..start + other.len())) == Some(other.as_bytes())
        });
        if !part {
            out[at + letter] = if text.as_bytes()[letter] == b'z' { b'y' } else { b'z' };
            places += 1;
        }
    }
    if places == 0 { Err(format!("{text:?} is nowhere in the program")) } else { Ok(out) }
}

#[test]
fn a_text_is_changed_where_it_stands_alone() {
    let table = BTreeMap::from([
        ("Short".to_owned(), "timed out".to_owned()),
        ("Long".to_owned(), "timed out, slowly".to_owned()),
        ("Before".to_owned(), "it timed out".to_owned()),
    ]);
    let program = b"..timed out, slowly..it timed out..timed out..";
    let out = changed(program, "timed out", &table).unwrap();
    assert_eq!(out, b"..timed out, slowly..it timed out..timed ouz..");
    assert!(changed(b"nothing", "timed out", &table).is_err());
}

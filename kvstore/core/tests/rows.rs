//! The index of the golden stories, `testscripts/ROWS.md`, against the stories and the contract: each row of the contract's
//! tables of KV, Txn, Watch and Lease has a story that is named after it, or a body of the end-to-end tests, or the later
//! piece of work that brings it; and no story stands outside the index.
//!
//! The contract lies beside the checkout and not in it: where it is not found, its rows are not checked, and that is said.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "in a test a panic is the report")]
#![allow(clippy::disallowed_methods, reason = "a test reads its index from a file")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The sections that are tables in the contract, and what a story of one of their rows begins with.
const TABLES: [(&str, &str); 4] = [("2.6.2", "range_"), ("2.6.6", "txn_"), ("2.7", "watch_"), ("2.8", "lease_")];

/// The smallest story: a command and its answer.
const MIN_LINES: usize = 3;

/// A line of the index: section, row, and what holds it.
struct Row {
    section: String,
    name: String,
    held: Vec<Holder>,
}

enum Holder {
    /// A path below `testscripts/`.
    Story(String),
    /// A file of the end-to-end tests, and the body in it.
    Body(String, String),
    /// A later piece of work.
    Later,
}

fn core() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn index() -> String {
    fs::read_to_string(core().join("testscripts/ROWS.md")).unwrap()
}

fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).collect()
}

/// The rows of the tables in a part of a page, headings left out.
fn table(text: &str) -> Vec<Vec<&str>> {
    let lines: Vec<&str> = text.lines().collect();
    let heading = |at: usize| lines.get(at + 1).is_some_and(|next| next.starts_with("|-"));
    let row = |at: usize| lines[at].starts_with("| ") && !heading(at);
    (0..lines.len()).filter(|&at| row(at)).map(|at| cells(lines[at])).collect()
}

fn holder(word: &str) -> Holder {
    if word.starts_with("later: ") {
        return Holder::Later;
    }
    let name = word.strip_prefix('`').and_then(|word| word.strip_suffix('`'));
    let name = name.unwrap_or_else(|| panic!("neither a story, nor a body, nor later: {word}"));
    match name.strip_prefix("e2e::") {
        Some(body) => {
            let (file, body) = body.split_once("::").unwrap();
            Holder::Body(file.into(), body.into())
        }
        None => Holder::Story(name.into()),
    }
}

/// The first table of the index.
fn rows() -> Vec<Row> {
    let index = index();
    let (rows, _) = index.split_once("## Stories of the machines themselves").expect("the second part of the index");
    let rows = table(rows).into_iter().map(|cells| {
        let [section, name, held] = cells[..] else { panic!("not a row of three: {cells:?}") };
        Row { section: section.into(), name: name.into(), held: held.split(", ").map(holder).collect() }
    });
    rows.collect()
}

/// All stories, as paths below `testscripts/`.
fn stories() -> BTreeSet<String> {
    let root = core().join("testscripts");
    let mut found = BTreeSet::new();
    for machine in fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        for story in fs::read_dir(machine).unwrap() {
            found.insert(story.unwrap().path().strip_prefix(&root).unwrap().display().to_string());
        }
    }
    found
}

#[test]
fn every_row_is_held() {
    for Row { section, name, held } in rows() {
        for holder in &held {
            match holder {
                Holder::Story(story) => {
                    let text = fs::read_to_string(core().join("testscripts").join(story))
                        .unwrap_or_else(|error| panic!("{section} {name}: {story}: {error}"));
                    let told = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).count();
                    assert!(told >= MIN_LINES && text.contains("\n---"), "{story} tells nothing");
                    let prefix = TABLES.iter().find(|(table, _)| *table == section).map_or("", |(_, prefix)| *prefix);
                    let file = story.split('/').next_back().unwrap();
                    assert!(file.starts_with(prefix), "{section} {name}: {story} is not named after its row");
                }
                Holder::Body(file, body) => {
                    let path = core().join("../../tests/e2e/tests/e2e").join(format!("{file}.rs"));
                    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                    assert!(text.contains(&format!("fn {body}(")), "{section} {name}: {file}.rs has no body {body}");
                }
                Holder::Later => {}
            }
        }
    }
}

#[test]
fn every_story_is_in_the_index() {
    let index = index();
    let named: BTreeSet<String> =
        index.split('`').skip(1).step_by(2).filter(|name| name.contains('/')).map(str::to_owned).collect();
    let stories = stories();
    let missing: Vec<_> = stories.difference(&named).collect();
    assert!(missing.is_empty(), "stories that testscripts/ROWS.md does not name: {missing:#?}");
    let gone: Vec<_> = named.difference(&stories).collect();
    assert!(gone.is_empty(), "testscripts/ROWS.md names what is not there: {gone:#?}");
}

/// `shared/reference/etcd-contract.md` beside the checkout, or beside a folder that it lies in.
fn contract() -> Option<PathBuf> {
    let root = core().canonicalize().unwrap();
    root.ancestors().map(|folder| folder.join("shared/reference/etcd-contract.md")).find(|path| path.is_file())
}

#[test]
fn every_row_of_the_contract_is_in_the_index() {
    let Some(path) = contract() else {
        println!("the contract is not beside this checkout: only the index itself is checked");
        return;
    };
    let contract = fs::read_to_string(&path).unwrap();
    let rows = rows();
    let mut missing = Vec::new();
    for (section, _) in TABLES {
        let heading = |line: &str| line.trim_start_matches('#').trim_start().starts_with(&format!("{section} "));
        let mut lines = contract.lines().skip_while(|line| !(line.starts_with("##") && heading(line)));
        lines.next().unwrap_or_else(|| panic!("the contract has no section {section}"));
        let part: Vec<&str> = lines.take_while(|line| !line.starts_with("##")).collect();
        let part = part.join("\n");
        let table = table(&part);
        assert!(table.len() > 5, "{section} is a table");
        for cells in table {
            if !rows.iter().any(|row| row.section == section && row.name == cells[0]) {
                missing.push(format!("| {section} | {} |", cells[0]));
            }
        }
    }
    assert!(missing.is_empty(), "rows of the contract that testscripts/ROWS.md does not have:\n{}", missing.join("\n"));
}

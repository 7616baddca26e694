//! Golden stories: a script of commands and what they printed, in one file under `testscripts/`.
//!
//! ```text
//! # a comment, up to the next empty line
//!
//! put a 1
//! get a
//! ----
//! rev 2
//! a=1 ...
//! ```
//!
//! Commands stand above `----`, their output below it up to an empty line. `UPDATE=1 cargo test` writes the output that
//! came into the file, to be read in the diff.

use std::fmt::Write as _;
use std::path::Path;

/// Runs every story of a folder under `testscripts/`; `start` makes the runner of one story, which takes a command line
/// and gives what it prints.
pub(crate) fn stories<F: FnMut(&str) -> String>(folder: &str, mut start: impl FnMut() -> F) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testscripts").join(folder);
    let mut files: Vec<_> = read_dir(&folder).filter(|path| path.extension().is_some_and(|e| e == "txt")).collect();
    files.sort();
    assert!(!files.is_empty(), "no stories in {}", folder.display());
    let mut wrong = String::new();
    for file in files {
        let told = read(&file);
        let found = play(&told, &mut start());
        if told == found {
            continue;
        }
        if update() {
            write(&file, &found);
        } else {
            writeln!(wrong, "{}:\n{}", file.display(), difference(&told, &found)).unwrap();
        }
    }
    assert!(wrong.is_empty(), "stories went otherwise (UPDATE=1 rewrites them):\n{wrong}");
}

fn play(told: &str, run: &mut impl FnMut(&str) -> String) -> String {
    let mut found = String::new();
    let mut printed: Option<String> = None;
    let mut commands = Vec::new();
    for line in told.lines() {
        match &printed {
            Some(_) if !line.is_empty() => continue, // what was told before
            Some(output) => {
                found.push_str(output);
                printed = None;
            }
            None if line == "----" => {
                printed = Some(commands.drain(..).map(&mut *run).fold(String::new(), |all: String, one: String| {
                    let one = one.trim_end();
                    if one.is_empty() { all } else { all + one + "\n" }
                }));
            }
            None if line.is_empty() || line.starts_with('#') => {}
            None => commands.push(line),
        }
        found.push_str(line);
        found.push('\n');
    }
    found + &printed.unwrap_or_default()
}

fn difference(told: &str, found: &str) -> String {
    let mut lines = String::new();
    let at = told.lines().zip(found.lines()).take_while(|(a, b)| a == b).count();
    for line in told.lines().skip(at.saturating_sub(6)).take(6.min(at)) {
        writeln!(lines, "  {line}").unwrap();
    }
    for line in told.lines().skip(at).take(6) {
        writeln!(lines, "- {line}").unwrap();
    }
    for line in found.lines().skip(at).take(6) {
        writeln!(lines, "+ {line}").unwrap();
    }
    lines
}

#[allow(clippy::disallowed_methods, reason = "a test may read its own script")]
fn read(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap()
}

#[allow(clippy::disallowed_methods, reason = "a test may rewrite its own script when asked")]
fn write(file: &Path, text: &str) {
    std::fs::write(file, text).unwrap();
}

fn read_dir(folder: &Path) -> impl Iterator<Item = std::path::PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path())
}

#[allow(clippy::disallowed_methods, reason = "a test may be asked to rewrite its script")]
fn update() -> bool {
    std::env::var_os("UPDATE").is_some_and(|value| value == "1")
}

/// A command line as a tree: words, and lists in parentheses. `\xNN` in a word is a byte, `""` the empty word.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Word {
    Atom(Vec<u8>),
    List(Vec<Word>),
}

impl Word {
    pub(crate) fn parse(line: &str) -> Vec<Word> {
        let mut stack = vec![Vec::new()];
        for token in line.replace('(', " ( ").replace(')', " ) ").split_whitespace() {
            match token {
                "(" => stack.push(Vec::new()),
                ")" => {
                    let list = stack.pop().unwrap();
                    stack.last_mut().expect("a ) without its (").push(Word::List(list));
                }
                "\"\"" => stack.last_mut().unwrap().push(Word::Atom(Vec::new())),
                word => stack.last_mut().unwrap().push(Word::Atom(unescape(word))),
            }
        }
        assert_eq!(stack.len(), 1, "a ( without its ): {line}");
        stack.pop().unwrap()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Word::Atom(bytes) => bytes,
            Word::List(_) => panic!("a list where a word should be: {self:?}"),
        }
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(self.bytes()).unwrap()
    }

    pub(crate) fn list(&self) -> &[Word] {
        match self {
            Word::List(words) => words,
            Word::Atom(_) => panic!("a word where a list should be: {self:?}"),
        }
    }
}

fn unescape(word: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = word;
    while let Some(at) = rest.find("\\x") {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        bytes.push(u8::from_str_radix(&rest[at + 2..at + 4], 16).unwrap());
        rest = &rest[at + 4..];
    }
    bytes.extend_from_slice(rest.as_bytes());
    bytes
}

/// Bytes as a script writes them.
pub(crate) fn shown(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "\"\"".into();
    }
    bytes.iter().fold(String::new(), |mut all, &b| {
        if b.is_ascii_graphic() {
            all.push(b as char);
        } else {
            write!(all, "\\x{b:02x}").unwrap();
        }
        all
    })
}

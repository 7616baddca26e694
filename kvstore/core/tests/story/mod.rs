//! Golden stories: what a machine was told, and what it said.
//!
//! A story is a file of `testscripts/<machine>/`. Paragraphs are separated by blank lines; lines that begin with `#` are for
//! the reader; the others are commands, `name word… key=value…`, up to a line `---`; what follows is what came out.
//! `UPDATE=1 cargo test -p kvstore-core` writes what came out into the files; read the difference before committing it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

/// One command of a story.
pub(crate) struct Command {
    pub(crate) name: String,
    /// The words without `=`, in order.
    pub(crate) words: Vec<String>,
    options: BTreeMap<String, String>,
    /// Everything after the name.
    pub(crate) rest: String,
}

impl Command {
    fn parse(line: &str) -> Command {
        let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
        let mut command = Command {
            name: name.to_owned(),
            words: Vec::new(),
            options: BTreeMap::new(),
            rest: rest.trim().to_owned(),
        };
        for word in rest.split_whitespace() {
            match word.split_once('=') {
                Some((key, value)) => {
                    command.options.insert(key.to_owned(), value.to_owned());
                }
                None => command.words.push(word.to_owned()),
            }
        }
        command
    }

    /// The option, if it was given.
    pub(crate) fn option<T: std::str::FromStr<Err: std::fmt::Debug>>(&self, name: &str) -> Option<T> {
        self.options.get(name).map(|value| value.parse().unwrap())
    }

    /// The word at `at`.
    pub(crate) fn word<T: std::str::FromStr<Err: std::fmt::Debug>>(&self, at: usize) -> T {
        self.words.get(at).unwrap_or_else(|| panic!("{}: word {at} is missing", self.name)).parse().unwrap()
    }

    pub(crate) fn has(&self, word: &str) -> bool {
        self.words.iter().any(|other| other == word)
    }
}

/// Something that can be told a story; what it says ends up below the command.
pub(crate) trait Teller: Default {
    fn tell(&mut self, command: &Command, out: &mut String);
}

/// Plays every story in `testscripts/<machine>`.
pub(crate) fn play_all<T: Teller>(machine: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testscripts").join(machine);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no stories in {}", folder.display());
    let update = env::var("UPDATE").is_ok_and(|value| value == "1");
    let mut failed = Vec::new();
    for file in files {
        println!("story {}", file.display());
        let text = fs::read_to_string(&file).unwrap();
        let played = play::<T>(&text);
        if played == text {
            continue;
        }
        if update {
            fs::write(&file, &played).unwrap();
        } else {
            println!("{}", difference(&text, &played));
            failed.push(file);
        }
    }
    assert!(failed.is_empty(), "stories that ended differently: {failed:?}");
}

fn play<T: Teller>(text: &str) -> String {
    let mut teller = T::default();
    let mut paragraphs = Vec::new();
    for paragraph in text.split("\n\n") {
        let (told, _) = paragraph.split_once("\n---").unwrap_or((paragraph, ""));
        let told = told.trim_matches('\n');
        let mut out = String::new();
        let mut commands = 0;
        for line in told.lines().filter(|line| !line.starts_with('#')) {
            commands += 1;
            teller.tell(&Command::parse(line), &mut out);
        }
        let mut paragraph = told.to_owned();
        if commands > 0 {
            let said = out.trim_end_matches('\n');
            write!(paragraph, "\n---{}{said}", if said.is_empty() { "" } else { "\n" }).unwrap();
        }
        if !paragraph.is_empty() {
            paragraphs.push(paragraph);
        }
    }
    paragraphs.join("\n\n") + "\n"
}

/// The first lines that differ, with some before them.
fn difference(expected: &str, played: &str) -> String {
    let (expected, played): (Vec<_>, Vec<_>) = (expected.lines().collect(), played.lines().collect());
    let at = expected.iter().zip(&played).take_while(|(a, b)| a == b).count();
    let show = |lines: &[&str]| lines[at.saturating_sub(4).min(lines.len())..(at + 12).min(lines.len())].join("\n");
    format!("line {}\n== expected ==\n{}\n== played ==\n{}", at + 1, show(&expected), show(&played))
}

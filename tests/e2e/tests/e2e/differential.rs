//! The differential suite: one corpus of scripts played on ours and on a real etcd in one run, every answer compared byte for byte.
//!
//! The corpus is `tests/e2e/differential/<area>/<case>.txt` (its language: [`script`]); what may differ is said in `masks.txt` there,
//! with the reason, and nowhere else. [`player`] plays a story on one side over a client that sees bytes, headers, trailers and
//! resets ([`wire`]); here both sides' answers are held against each other. [`random`] plays seeded sequences the same way and
//! makes a difference small; [`texts`] shows that each text of the error table is held by a case.
//!
//! `KEELSON_STORY=area/case` plays stories by name, and `KEELSON_SHOW=1` shows what etcd answered to each step;
//! `KEELSON_SEED=n` plays one random sequence.
//!
//! What it does not do: it says nothing of speed, and of several members only what a story with `members 3` asks.

mod mask;
mod player;
mod random;
mod schema;
mod script;
mod texts;
mod wire;

use std::io::Write;
use std::path::{Path, PathBuf};

use e2e::{Kind, rpc};

use mask::Masks;
use player::{Answer, Part, Side};
use script::Story;

/// Makes a test of each area of the corpus.
macro_rules! areas {
    ($($area:ident),* $(,)?) => {
        $(#[test]
        fn $area() {
            area(stringify!($area));
        })*

        /// A folder that no test plays would hold nothing.
        #[test]
        fn every_area_is_played() {
            let mut folders: Vec<String> = std::fs::read_dir(corpus())
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .filter(|path| path.is_dir())
                .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
                .collect();
            folders.sort();
            let mut played = vec![$(stringify!($area).to_owned()),*];
            played.sort();
            assert_eq!(folders, played);
        }
    };
}

areas!(
    range,
    range_stream,
    put,
    delete,
    txn,
    compact,
    watch,
    lease,
    lock,
    election,
    maintenance,
    cluster,
    transport,
    kubernetes,
    texts,
);

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("differential")
}

/// Says something past the harness, which swallows the output of a test that passes.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Both stores, started the same way.
struct Pair {
    ours: Side,
    etcd: Side,
}

impl Pair {
    /// A pair for `story`: the one at hand if it suits, else a new one. `None` after a loud skip.
    fn suited(at_hand: Option<Pair>, story: &Story) -> Option<Pair> {
        if let Some(pair) = at_hand.filter(|pair| pair.ours.suits(&story.needs) && pair.etcd.suits(&story.needs)) {
            return Some(pair);
        }
        let etcd = std::thread::scope(|scope| {
            let etcd = scope.spawn(|| Side::start(Kind::Etcd, &story.needs));
            let ours = Side::start(Kind::Keelson, &story.needs);
            Some((ours?, etcd.join().expect("etcd starts")?))
        });
        etcd.map(|(ours, etcd)| Pair { ours, etcd })
    }

    /// Plays a story on both at once.
    fn play(&mut self, story: &Story, masks: &Masks) -> (Vec<Answer>, Vec<Answer>) {
        std::thread::scope(|scope| {
            let etcd = scope.spawn(|| rpc::run(self.etcd.play(story, masks)));
            let ours = rpc::run(self.ours.play(story, masks));
            (ours, etcd.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }
}

/// Plays every story of an area; all differences are told together.
fn area(name: &str) {
    let masks = Masks::load();
    let stories = script::area(&corpus().join(name));
    let only = std::env::var("KEELSON_STORY").unwrap_or_default();
    let (mut pair, mut told, mut cases, mut steps) = (None, Vec::new(), 0, 0);
    for story in stories.iter().filter(|story| story.name.contains(&only)) {
        let Some(mut both) = Pair::suited(pair.take(), story) else { return };
        let (ours, etcd) = both.play(story, &masks);
        if std::env::var_os("KEELSON_SHOW").is_some() {
            tell(&shown(story, &etcd));
        }
        cases += 1;
        steps += story.steps.len();
        let found = differences(story, &ours, &etcd);
        // After a difference the revisions may differ as well: the next story shall not suffer for it.
        pair = found.is_empty().then_some(both);
        told.extend(found);
    }
    assert!(told.is_empty(), "{} differences\n{}", told.len(), told.join("\n"));
    tell(&format!("differential: {name}: {cases} cases, {steps} steps"));
}

/// Each step whose answers differ, told.
fn differences(story: &Story, ours: &[Answer], etcd: &[Answer]) -> Vec<String> {
    let waits = |answer: &Answer| answer.parts.iter().any(|part| part.text.starts_with(player::NOTHING));
    if let Some(place) = etcd.iter().position(waits) {
        // Equal on both, and yet a mistake: of the script, or of etcd.
        return vec![format!("---- {} step {}: etcd says nothing to `{}`", story.name, place + 1, story.steps[place])];
    }
    let pairs = ours.iter().zip(etcd).enumerate().filter(|(_, (ours, etcd))| !same(ours, etcd));
    pairs
        .map(|(place, (ours, etcd))| {
            let step = &story.steps[place];
            let (mut left, mut right) = (text(ours, false), text(etcd, false));
            if left == right {
                // The text can't show a zero that was sent, or an unusual order.
                (left, right) = (text(ours, true), text(etcd, true));
            }
            format!(
                "---- {} step {}: {}\n{}",
                story.name,
                place + 1,
                cut(&step.to_string(), 600),
                compared(&left, &right)
            )
        })
        .collect()
}

fn same(ours: &Answer, etcd: &Answer) -> bool {
    ours.parts.len() == etcd.parts.len()
        && ours.parts.iter().zip(&etcd.parts).all(|(ours, etcd)| ours.bytes == etcd.bytes)
}

fn text(answer: &Answer, bytes: bool) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let shown = |part: &Part| match bytes && part.is_message() {
        true => format!("{}\n  [{}]\n", part.text, hex(&part.bytes)),
        false => format!("{}\n", part.text),
    };
    answer.parts.iter().map(shown).collect()
}

/// A story with etcd's answers, for who writes one.
fn shown(story: &Story, answers: &[Answer]) -> String {
    let told = story.steps.iter().zip(answers).map(|(step, answer)| {
        let parts: Vec<&str> = answer.parts.iter().map(|part| part.text.as_str()).collect();
        format!("> {step}\n{}\n", cut(&parts.join("\n--\n"), 1500))
    });
    format!("==== {} ({})\n{}", story.name, story.about, told.collect::<String>())
}

/// Two texts line by line: what both say, what ours says (`-`), what etcd says (`+`).
fn compared(ours: &str, etcd: &str) -> String {
    let (ours, etcd): (Vec<&str>, Vec<&str>) = (ours.lines().collect(), etcd.lines().collect());
    let (mut out, mut a, mut b) = (String::new(), 0, 0);
    let mut say = |mark: char, line: &str| {
        out.push(mark);
        out.push(' ');
        out.push_str(&cut(line, 400));
        out.push('\n');
    };
    while a < ours.len() || b < etcd.len() {
        if a < ours.len() && b < etcd.len() && ours[a] == etcd[b] {
            say(' ', ours[a]);
            (a, b) = (a + 1, b + 1);
            continue;
        }
        // The nearest place where both go on alike.
        let ahead = (1..40).find_map(|distance| {
            (0..=distance)
                .map(|left| (left, distance - left))
                .find(|(left, right)| ours.get(a + left).is_some_and(|line| etcd.get(b + right) == Some(line)))
        });
        let (left, right) = ahead.unwrap_or((ours.len() - a, etcd.len() - b));
        ours[a..a + left].iter().for_each(|line| say('-', line));
        etcd[b..b + right].iter().for_each(|line| say('+', line));
        (a, b) = (a + left, b + right);
    }
    out
}

fn cut(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((place, _)) => format!("{}… ({} characters)", &text[..place], text.len()),
        None => text.to_owned(),
    }
}

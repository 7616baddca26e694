//! Takes out of a transcript what differs from server to server, by `tests/e2e/masks.txt`, and shows what is left.
//!
//! It knows no reason to mask anything: the file does.

use std::fmt::Write;

use regex_lite::Regex;

/// Applies the masks, then takes out what only follows from them: the widths of a table's columns.
pub(super) fn apply(text: &str) -> String {
    let masks: Vec<(Regex, String)> = include_str!("../../../masks.txt")
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

/// The commands whose lines differ, with those lines; all of them where only their order does.
pub(super) fn differences(want: &str, got: &str) -> String {
    let blocks = |text: &str| -> Vec<String> { text.split("\n$ ").map(str::to_owned).collect() };
    let (want, got) = (blocks(want), blocks(got));
    let mut text = String::new();
    for (want, got) in want.iter().zip(&got).filter(|(want, got)| want != got) {
        let _ = writeln!(text, "$ {}", want.lines().next().unwrap_or_default());
        let (old, new): (Vec<&str>, Vec<&str>) = (want.lines().collect(), got.lines().collect());
        let missing = |from: &[&str], of: &[&str]| -> Vec<String> {
            of.iter().filter(|line| !from.contains(line)).map(|&line| line.to_owned()).collect()
        };
        let (mut lost, mut added) = (missing(&new, &old), missing(&old, &new));
        if lost.is_empty() && added.is_empty() {
            let all = |lines: &[&str]| lines.iter().map(|&line| line.to_owned()).collect();
            (lost, added) = (all(&old), all(&new));
        }
        for (sign, lines) in [('-', lost), ('+', added)] {
            for line in lines {
                let _ = writeln!(text, "  {sign} {line}");
            }
        }
    }
    if want.len() != got.len() {
        let _ = writeln!(text, "{} commands against {}", want.len(), got.len());
    }
    text
}

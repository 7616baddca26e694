//! Which of the `state-N` directories is the state: the pointer file, and what else may lie in a member's directory.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use kvstore_core::Fatal;
use kvstore_core::replica::Position;

use super::{disk_error, sync_dir};

const POINTER: &str = "CURRENT-STATE";
const POINTER_NEW: &str = "CURRENT-STATE.new";
const PREFIX: &str = "state-";

pub(super) fn state_dir(member_dir: &Path, number: u64) -> PathBuf {
    member_dir.join(format!("{PREFIX}{number}"))
}

/// What the pointer file says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Current {
    pub(super) number: u64,
    /// Where the state was founded or installed: a log may restart there and nowhere else (trap 3).
    pub(super) installed: Position,
}

/// The state that counts, or `None` if no bootstrap was ever finished.
pub(super) fn read(member_dir: &Path) -> Result<Option<Current>, Fatal> {
    let path = member_dir.join(POINTER);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(disk_error(&path)(e)),
    };
    parse(&text).map(Some).ok_or_else(|| disk_error(&path)(format!("{text:?} does not name a state")))
}

fn parse(text: &str) -> Option<Current> {
    let mut words = text.split_whitespace();
    let number = words.next()?.strip_prefix(PREFIX)?.parse().ok()?;
    let index = words.next()?.parse().ok()?;
    let term = words.next()?.parse().ok()?;
    words.next().is_none().then_some(Current { number, installed: Position { index, term } })
}

/// Makes this the state, durably: a new file, synced, renamed over the old one, and the directory synced.
pub(super) fn point_to(member_dir: &Path, current: Current) -> Result<(), Fatal> {
    let new = member_dir.join(POINTER_NEW);
    let Current { number, installed } = current;
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&new)?;
        writeln!(file, "{PREFIX}{number} {} {}", installed.index, installed.term)?;
        file.sync_all()?;
        fs::rename(&new, member_dir.join(POINTER))
    };
    write().map_err(disk_error(&new))?;
    sync_dir(member_dir)
}

/// The numbers of all states that have files, finished or not.
fn states(member_dir: &Path) -> Result<Vec<u64>, Fatal> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(member_dir).map_err(disk_error(member_dir))? {
        let name = entry.map_err(disk_error(member_dir))?.file_name();
        if let Some(number) = name.to_str().and_then(|n| n.strip_prefix(PREFIX)).and_then(|n| n.parse().ok()) {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

/// The highest number in use; 0 for none.
pub(super) fn highest_state(member_dir: &Path) -> Result<u64, Fatal> {
    Ok(states(member_dir)?.into_iter().max().unwrap_or(0))
}

/// Removes states that no pointer names: transfers that a crash cut short, and predecessors.
pub(super) fn remove_strays(member_dir: &Path, keep: u64) -> Result<(), Fatal> {
    for number in states(member_dir)? {
        if number != keep {
            let path = state_dir(member_dir, number);
            fs::remove_dir_all(&path).map_err(disk_error(&path))?;
        }
    }
    Ok(())
}

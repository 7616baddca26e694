//! What a member may start from. A crash can come between any two writes; these are the states it can leave, and what is
//! made of each. Everything else is damage, and refused: starting from it could lose acknowledged writes or forget a vote.
//!
//! | the log beside the state's applied position | is | then |
//! |---|---|---|
//! | has it, in the same term | the common case | commit is raised to it |
//! | does not have it, and the state was founded or installed exactly there | the log was not reset yet | the log restarts there, the term is raised and the vote cleared |
//! | does not have it otherwise (too short, begins later, another term) | lost or foreign log | refused (traps 3, 4) |
//!
//! What it does not do: read the disk; `disk/log.rs` in the shell does.

use super::log::{Log, Parts};
use super::wire::{self, RawEntry, RawHardState};
use super::{Boot, LogWrite};
use crate::Fatal;
use crate::types::Index;

/// Checks what the disk holds; returns Raft's storage, and the write that must be made before anything else.
pub(super) fn recover(boot: Boot, tail_limit: usize) -> Result<(Log, Option<LogWrite>), Fatal> {
    let conf_state = wire::decode_conf_state(&boot.conf_state)?;
    let mut hard_state = match &boot.hard_state {
        Some(bytes) => wire::decode_hard_state(bytes)?,
        None => RawHardState::default(),
    };
    let tail = decode_tail(&boot)?;
    let parts = Parts {
        start: boot.log_start,
        terms: boot.terms,
        tail,
        applied: boot.applied,
        hard_state: hard_state.clone(),
        conf_state: conf_state.clone(),
    };
    let mut log = Log::new(parts, tail_limit);
    let applied = boot.applied;
    if applied.index == 0 {
        // A member that joins: it may know nothing at all (trap 2).
        if log.last_index() != 0 || boot.conf_state != wire::conf_state(&[], &[]) {
            return Err(Fatal::Invariant("the state was never founded, but there is a log or a configuration".into()));
        }
        return Ok((log, None));
    }
    if log.position(applied.index) == Some(applied) {
        check_terms(&log, &hard_state)?;
        if hard_state.commit > log.last_index() {
            return Err(damaged(format!(
                "entries up to {} were committed, but the log ends at {}",
                hard_state.commit,
                log.last_index()
            )));
        }
        hard_state.commit = hard_state.commit.max(applied.index);
        if log.tail_first() > applied.index + 1 {
            return Err(Fatal::Invariant(format!("entries {} and on are missing at start", applied.index + 1)));
        }
        log.set_hard_state(hard_state);
        return Ok((log, None));
    }
    if boot.installed != Some(applied) {
        return Err(damaged(format!(
            "the state has applied index {} of term {}, but the log holds {} to {}{}, and the state was not installed there",
            applied.index,
            applied.term,
            log.start().index + 1,
            log.last_index(),
            log.position(applied.index).map(|at| format!(" (term {} there)", at.term)).unwrap_or_default(),
        )));
    }
    if hard_state.term < applied.term {
        hard_state.term = applied.term;
        hard_state.vote = 0;
    }
    hard_state.commit = applied.index;
    let write = LogWrite {
        number: 0,
        reset: Some(applied),
        hard_state: Some(wire::encode_hard_state(&hard_state)),
        must_sync: true,
        ..LogWrite::default()
    };
    let parts = Parts { start: applied, terms: Vec::new(), tail: Vec::new(), applied, hard_state, conf_state };
    Ok((Log::new(parts, tail_limit), Some(write)))
}

fn check_terms(log: &Log, hard_state: &RawHardState) -> Result<(), Fatal> {
    let last = log.position(log.last_index()).unwrap_or_default();
    if hard_state.term < last.term {
        return Err(damaged(format!(
            "the log ends in term {}, but the hard state knows {}",
            last.term, hard_state.term
        )));
    }
    Ok(())
}

fn decode_tail(boot: &Boot) -> Result<Vec<RawEntry>, Fatal> {
    let mut tail: Vec<RawEntry> = Vec::with_capacity(boot.entries.len());
    let mut before: Option<Index> = None;
    for stored in &boot.entries {
        let entry = wire::decode_entry(&stored.bytes)?;
        let follows = before.map_or(entry.index > boot.log_start.index, |before| entry.index == before + 1);
        if !follows || (entry.index, entry.term) != (stored.index, stored.term) {
            return Err(damaged(format!("entry {} of term {} stands at {}", entry.index, entry.term, stored.index)));
        }
        before = Some(entry.index);
        tail.push(entry);
    }
    if let (None, Some((index, _))) = (tail.first(), boot.terms.last()) {
        return Err(Fatal::Invariant(format!("the log has entry {index}, but its last one was not handed over")));
    }
    let first = tail.first().map_or(boot.log_start.index + 1, |entry| entry.index);
    let known_from = boot.terms.first().map_or(first, |(index, _)| *index);
    if known_from != boot.log_start.index + 1 {
        return Err(damaged(format!("the log begins at {} but should at {}", known_from, boot.log_start.index + 1)));
    }
    Ok(tail)
}

fn damaged(message: String) -> Fatal {
    Fatal::Damaged { table: "log", message }
}

//! Linearizability of operations on single keys: each takes effect at one moment between its call and its answer.
//!
//! The search is Wing and Gong's with Lowe's memory of visited states: take any operation that was called before the
//! first open one ended, see whether a register would have answered so, go on, go back. Keys are judged one by one, which
//! is enough (the property is local). Revisions cut the search to almost a line: an order in which they fall is none, and
//! writes whose revisions are known follow each other by them. An operation that was never answered may take effect at
//! any time after its call, or not at all; answered ones are tried first.
//!
//! What it does not do: judge operations on several keys as one.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::ops::ControlFlow;

use crate::history::{Action, Answer, Ended, Moment, Operation, Version};

/// Judges all operations; the error tells the key and where every order got stuck.
pub fn judge(history: &[Operation]) -> Result<(), String> {
    let mut keys: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in history.iter().filter(|operation| needed(operation)) {
        keys.entry(&operation.key).or_default().push(operation);
    }
    for (key, mut operations) in keys {
        operations.sort_by_key(|operation| operation.called);
        judge_key(&operations).map_err(|stuck| format!("key {key} is not linearizable: {stuck}"))?;
    }
    Ok(())
}

/// An unanswered read, and what was refused, say nothing.
fn needed(operation: &Operation) -> bool {
    match operation.ended {
        Ended::Answered { .. } => true,
        Ended::Refused => false,
        Ended::Late { .. } => true,
        Ended::Unknown => operation.action != Action::Get,
    }
}

/// A key between two operations. `None` in a number: a write whose answer nobody saw made it.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
struct Register {
    now: Option<Held>,
    /// No later operation may have a smaller revision in its header.
    floor: i64,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Held {
    value: String,
    mod_revision: Option<i64>,
    version: i64,
}

/// States looked at before a key is given up as undecided; reached only where very many answers are missing.
const PATIENCE: usize = 2_000_000;

struct Search<'a> {
    operations: &'a [&'a Operation],
    done: Done,
    /// Writes of known revision, by it; and how many of them are done.
    by_revision: Vec<usize>,
    written: usize,
    visited: HashSet<(Vec<u64>, Register)>,
}

/// A choice: the operation taken to get here, and the next candidate to try from here.
struct Frame {
    register: Register,
    took: Option<usize>,
    next: usize,
}

fn judge_key(operations: &[&Operation]) -> Result<(), String> {
    let mut by_revision: Vec<usize> =
        (0..operations.len()).filter(|at| operations[*at].write_revision().is_some()).collect();
    by_revision.sort_by_key(|at| operations[*at].write_revision());
    let mut search =
        Search { operations, done: Done::new(operations.len()), by_revision, written: 0, visited: HashSet::new() };
    let mut open = operations.iter().filter(|operation| answered(operation)).count();
    let mut frames = vec![Frame { register: Register::default(), took: None, next: 0 }];
    let mut longest = Vec::new();
    while open > 0 {
        if search.visited.len() > PATIENCE {
            return Err(format!("undecided after {PATIENCE} states; {}", stuck(operations, &longest)));
        }
        let Some(frame) = frames.last_mut() else { return Err(stuck(operations, &longest)) };
        if let Some((at, register)) = search.next(frame) {
            open -= usize::from(answered(operations[at]));
            frames.push(Frame { register, took: Some(at), next: 0 });
            if frames.len() > longest.len() + 1 {
                longest = frames.iter().filter_map(|frame| frame.took).collect();
            }
        } else if let Some(at) = frames.pop().and_then(|frame| frame.took) {
            search.set(at, false);
            open += usize::from(answered(operations[at]));
        }
    }
    Ok(())
}

fn answered(operation: &Operation) -> bool {
    matches!(operation.ended, Ended::Answered { .. })
}

impl Search<'_> {
    /// The next operation that can follow `frame` into a state that was not seen yet; it is marked as done.
    fn next(&mut self, frame: &mut Frame) -> Option<(usize, Register)> {
        let first_end = self.first_end();
        let count = self.operations.len();
        while frame.next < 2 * count {
            let (at, wanted) = (frame.next % count, frame.next < count);
            frame.next += 1;
            let operation = self.operations[at];
            if operation.called > first_end {
                // Nothing after it either: on to those without an answer, or to the end.
                frame.next = if wanted { count } else { 2 * count };
                continue;
            }
            if answered(operation) == wanted
                && let ControlFlow::Break(register) = self.try_one(at, &frame.register)
            {
                return Some((at, register));
            }
        }
        None
    }

    fn try_one(&mut self, at: usize, before: &Register) -> ControlFlow<Register> {
        let operation = self.operations[at];
        let in_turn = operation.write_revision().is_none() || self.by_revision.get(self.written) == Some(&at);
        if self.done.has(at) || !in_turn {
            return ControlFlow::Continue(());
        }
        let Some(register) = before.after(operation) else { return ControlFlow::Continue(()) };
        self.set(at, true);
        if self.visited.insert((self.done.bits.clone(), register.clone())) {
            return ControlFlow::Break(register);
        }
        self.set(at, false);
        ControlFlow::Continue(())
    }

    fn set(&mut self, at: usize, on: bool) {
        self.done.set(at, on);
        if self.operations[at].write_revision().is_some() {
            if on { self.written += 1 } else { self.written -= 1 }
        }
    }

    /// The first end of an operation that has not taken effect yet: whatever was called later comes after it.
    fn first_end(&self) -> Moment {
        let mut first = Moment::MAX;
        for (at, operation) in self.operations.iter().enumerate() {
            if operation.called > first {
                break;
            }
            if let Ended::Answered { at: end, .. } = operation.ended
                && !self.done.has(at)
            {
                first = first.min(end);
            }
        }
        first
    }
}

struct Done {
    bits: Vec<u64>,
}

impl Done {
    fn new(len: usize) -> Done {
        Done { bits: vec![0; len.div_ceil(64)] }
    }

    fn has(&self, at: usize) -> bool {
        self.bits[at / 64] >> (at % 64) & 1 == 1
    }

    fn set(&mut self, at: usize, on: bool) {
        if on {
            self.bits[at / 64] |= 1 << (at % 64);
        } else {
            self.bits[at / 64] &= !(1 << (at % 64));
        }
    }
}

impl Register {
    /// The register after `operation`, if it could have been answered as it was.
    fn after(&self, operation: &Operation) -> Option<Register> {
        let (revision, answer) = match &operation.ended {
            Ended::Answered { revision, answer, .. } => (Some(*revision), Some(answer)),
            Ended::Late { revision } => (Some(*revision), None),
            Ended::Unknown => (None, None),
            Ended::Refused => return None,
        };
        match (&operation.action, answer) {
            (Action::Get, Some(Answer::Got(seen))) => self.seen(seen.as_ref(), revision?),
            (Action::Put { value }, Some(Answer::Put) | None) => self.put(value, revision),
            (Action::Delete, Some(Answer::Deleted { count })) => match (count, &self.now) {
                (0, None) => self.read(revision?),
                (1, Some(_)) => self.delete(revision),
                _ => None,
            },
            (Action::Delete, None) => self.now.as_ref().and_then(|_| self.delete(revision)),
            (Action::Swap { expected, value }, Some(Answer::Swapped) | None) => {
                if self.now.as_ref().map(|held| &held.value) == expected.as_ref() {
                    self.put(value, revision)
                } else {
                    None
                }
            }
            (Action::Swap { expected, .. }, Some(Answer::NotSwapped(seen))) => {
                let same = self.now.as_ref().map(|held| &held.value) == expected.as_ref();
                if same { None } else { self.seen(seen.as_ref(), revision?) }
            }
            _ => None,
        }
    }

    fn read(&self, revision: i64) -> Option<Register> {
        (revision >= self.floor).then(|| Register { now: self.now.clone(), floor: revision })
    }

    fn seen(&self, seen: Option<&Version>, revision: i64) -> Option<Register> {
        let mut next = self.read(revision)?;
        match (&mut next.now, seen) {
            (None, None) => Some(next),
            (Some(held), Some(seen)) => {
                let same = held.value == seen.value
                    && held.version == seen.version
                    && held.mod_revision.is_none_or(|mod_revision| mod_revision == seen.mod_revision)
                    && seen.mod_revision <= revision;
                held.mod_revision = Some(seen.mod_revision);
                same.then_some(next)
            }
            _ => None,
        }
    }

    fn put(&self, value: &str, revision: Option<i64>) -> Option<Register> {
        let version = self.now.as_ref().map_or(0, |held| held.version) + 1;
        let held = Held { value: value.to_owned(), mod_revision: revision, version };
        self.written(Some(held), revision)
    }

    fn delete(&self, revision: Option<i64>) -> Option<Register> {
        self.written(None, revision)
    }

    /// A write's own revision is above everything before it; one that nobody was told is above it all the same.
    fn written(&self, now: Option<Held>, revision: Option<i64>) -> Option<Register> {
        let floor = revision.unwrap_or(self.floor + 1);
        (floor > self.floor).then_some(Register { now, floor })
    }
}

fn stuck(operations: &[&Operation], order: &[usize]) -> String {
    let mut text = String::from("the longest order found ends with\n");
    for at in order.iter().skip(order.len().saturating_sub(8)) {
        let _ = writeln!(text, "    {}", operations[*at]);
    }
    text.push_str("  and none of these can follow:\n");
    let left = operations.iter().enumerate().filter(|(at, _)| !order.contains(at));
    for (_, operation) in left.take(8) {
        let _ = writeln!(text, "    {operation}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(key: &str, called: Moment, action: Action, ended: Ended) -> Operation {
        Operation { client: called, key: key.into(), action, called, ended }
    }

    fn put(called: Moment, at: Moment, value: &str, revision: i64) -> Operation {
        let ended = Ended::Answered { at, revision, answer: Answer::Put };
        operation("k", called, Action::Put { value: value.into() }, ended)
    }

    fn lost_put(called: Moment, value: &str) -> Operation {
        operation("k", called, Action::Put { value: value.into() }, Ended::Unknown)
    }

    fn get(called: Moment, at: Moment, seen: Option<(&str, i64, i64)>, revision: i64) -> Operation {
        let seen = seen.map(|(value, mod_revision, version)| Version { value: value.into(), mod_revision, version });
        operation("k", called, Action::Get, Ended::Answered { at, revision, answer: Answer::Got(seen) })
    }

    fn swap(
        called: Moment,
        at: Moment,
        expected: Option<&str>,
        value: &str,
        revision: i64,
        answer: Answer,
    ) -> Operation {
        let action = Action::Swap { expected: expected.map(Into::into), value: value.into() };
        operation("k", called, action, Ended::Answered { at, revision, answer })
    }

    #[test]
    fn reads_see_what_was_written_before() {
        let history = [put(1, 2, "a", 2), get(3, 4, Some(("a", 2, 1)), 2), get(5, 6, Some(("a", 2, 1)), 3)];
        assert_eq!(judge(&history), Ok(()));
    }

    #[test]
    fn a_stale_read_is_found() {
        let history = [put(1, 2, "a", 2), put(3, 4, "b", 3), get(5, 6, Some(("a", 2, 1)), 2)];
        assert!(judge(&history).unwrap_err().contains("key k"));
    }

    #[test]
    fn concurrent_operations_may_go_either_way() {
        let either =
            |seen| [put(1, 2, "a", 2), put(3, 10, "b", 3), get(4, 9, seen, 3), get(11, 12, Some(("b", 3, 2)), 3)];
        assert_eq!(judge(&either(Some(("b", 3, 2)))), Ok(()));
        let mut old = either(Some(("a", 2, 1)));
        old[2] = get(4, 9, Some(("a", 2, 1)), 2);
        assert_eq!(judge(&old), Ok(()));
    }

    #[test]
    fn a_lost_write_may_happen_late_but_not_vanish_again() {
        let late =
            [put(1, 2, "a", 2), lost_put(3, "b"), get(4, 5, Some(("a", 2, 1)), 2), get(6, 7, Some(("b", 3, 2)), 3)];
        assert_eq!(judge(&late), Ok(()));
        let mut gone = late.to_vec();
        gone.push(get(8, 9, Some(("a", 2, 1)), 3));
        assert!(judge(&gone).is_err());
    }

    #[test]
    fn an_acknowledged_write_that_vanishes_is_found() {
        let history = [put(1, 2, "a", 2), get(3, 4, None, 2)];
        assert!(judge(&history).is_err());
    }

    #[test]
    fn a_write_applied_twice_is_found_by_its_version() {
        let history = [put(1, 2, "a", 2), get(3, 4, Some(("a", 3, 2)), 3)];
        assert!(judge(&history).is_err());
    }

    #[test]
    fn two_swaps_from_one_value_cannot_both_win() {
        let won = |called, at, value, revision| swap(called, at, Some("a"), value, revision, Answer::Swapped);
        let history = [put(1, 2, "a", 2), won(3, 8, "b", 3), won(4, 7, "c", 4)];
        assert!(judge(&history).is_err());
        let seen = Version { value: "b".into(), mod_revision: 3, version: 2 };
        let lost = swap(4, 7, Some("a"), "c", 3, Answer::NotSwapped(Some(seen)));
        assert_eq!(judge(&[put(1, 2, "a", 2), won(3, 8, "b", 3), lost]), Ok(()));
    }

    #[test]
    fn deletes_count_what_was_there() {
        let delete = |called, at, count, revision| {
            operation("k", called, Action::Delete, Ended::Answered { at, revision, answer: Answer::Deleted { count } })
        };
        assert_eq!(judge(&[put(1, 2, "a", 2), delete(3, 4, 1, 3), delete(5, 6, 0, 3), get(7, 8, None, 3)]), Ok(()));
        assert!(judge(&[put(1, 2, "a", 2), delete(3, 4, 0, 2)]).is_err());
        assert!(judge(&[delete(3, 4, 1, 2)]).is_err());
    }

    #[test]
    fn revisions_may_not_fall() {
        let history = [put(1, 2, "a", 5), get(3, 4, Some(("a", 5, 1)), 4)];
        assert!(judge(&history).is_err());
    }

    #[test]
    fn many_lost_writes_do_not_explode() {
        let mut history = Vec::new();
        for n in 0..40u64 {
            history.push(lost_put(10 * n, &format!("lost{n}")));
            history.push(put(10 * n + 1, 10 * n + 2, &format!("kept{n}"), n as i64 + 2));
            history.push(get(
                10 * n + 3,
                10 * n + 4,
                Some((&format!("kept{n}"), n as i64 + 2, n as i64 + 1)),
                n as i64 + 2,
            ));
        }
        assert_eq!(judge(&history), Ok(()));
    }
}

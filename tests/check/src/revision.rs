//! Revisions: they rise with time over all keys, and the store's own history holds each acknowledged write, once.
//!
//! What it does not do: explain what a reader saw ([`crate::linear`] does).

use std::collections::BTreeMap;

use crate::history::{Action, Answer, Ended, Operation};

/// One change in the store's own history, read at the end. `value: None` is a deletion.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    pub revision: i64,
    pub key: String,
    pub value: Option<String>,
}

/// If one operation ended before another was called, the other's header is not older; a write's is newer.
pub fn judge_time(history: &[Operation]) -> Result<(), String> {
    let mut answered: Vec<&Operation> =
        history.iter().filter(|operation| matches!(operation.ended, Ended::Answered { .. })).collect();
    answered.sort_by_key(|operation| operation.called);
    let mut ends: Vec<(u64, i64, &Operation)> = answered.iter().filter_map(|operation| end(operation)).collect();
    ends.sort_by_key(|(at, ..)| *at);
    let mut ends = ends.into_iter().peekable();
    let mut newest: Option<(i64, &Operation)> = None;
    for operation in answered {
        while let Some((at, revision, before)) = ends.peek()
            && *at < operation.called
        {
            if newest.is_none_or(|(most, _)| *revision > most) {
                newest = Some((*revision, before));
            }
            ends.next();
        }
        let Some((_, revision, _)) = end(operation) else { continue };
        if let Some((most, before)) = newest
            && (revision < most || (operation.writes() && revision == most))
        {
            return Err(format!("the revision fell:\n    {before}\n  and later\n    {operation}"));
        }
    }
    Ok(())
}

fn end(operation: &Operation) -> Option<(u64, i64, &Operation)> {
    match operation.ended {
        Ended::Answered { at, revision, .. } => Some((at, revision, operation)),
        Ended::Late { .. } | Ended::Refused | Ended::Unknown => None,
    }
}

/// Every acknowledged write stands in the store's history at its revision; nothing stands there that nobody asked for, or
/// twice. `all` holds every change since the first operation.
pub fn judge_kept(history: &[Operation], all: &[Change]) -> Result<(), String> {
    let mut by_revision: BTreeMap<(i64, &str), &Change> = BTreeMap::new();
    let mut by_value: BTreeMap<&str, &Change> = BTreeMap::new();
    for change in all {
        if by_revision.insert((change.revision, &change.key), change).is_some() {
            return Err(format!("two changes of one key at one revision: {change:?}"));
        }
        if let Some(value) = &change.value
            && let Some(first) = by_value.insert(value, change)
        {
            return Err(format!("one write happened twice: {first:?} and {change:?}"));
        }
    }
    let mut asked: BTreeMap<&str, &Operation> = BTreeMap::new();
    for operation in history {
        if let Action::Put { value } | Action::Swap { value, .. } = &operation.action {
            asked.insert(value, operation);
        }
        if let Some(wanted) = acknowledged(operation) {
            match by_revision.get(&(wanted.revision, operation.key.as_str())) {
                Some(change) if change.value == wanted.value => {}
                found => return Err(format!("acknowledged, but the store has {found:?}:\n    {operation}")),
            }
        }
    }
    for (value, change) in by_value {
        match asked.get(value) {
            None => return Err(format!("nobody asked for {change:?}")),
            Some(operation) if !operation.writes() => {
                return Err(format!("refused, but it happened as {change:?}:\n    {operation}"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// What the store's history says about unanswered writes: those that stand there happened at that revision, those that do
/// not never did. Deletions have no value to be known by and stay unknown. The store must be quiet by now.
pub fn resolve(history: &[Operation], all: &[Change]) -> Vec<Operation> {
    let values: BTreeMap<&str, i64> =
        all.iter().filter_map(|change| Some((change.value.as_deref()?, change.revision))).collect();
    history
        .iter()
        .map(|operation| {
            let mut operation = operation.clone();
            if operation.ended == Ended::Unknown
                && let Action::Put { value } | Action::Swap { value, .. } = &operation.action
            {
                operation.ended = match values.get(value.as_str()) {
                    Some(revision) => Ended::Late { revision: *revision },
                    None => Ended::Refused,
                };
            }
            operation
        })
        .collect()
}

fn acknowledged(operation: &Operation) -> Option<Change> {
    let Ended::Answered { revision, answer, .. } = &operation.ended else { return None };
    let value = match (&operation.action, answer) {
        (Action::Put { value }, Answer::Put) | (Action::Swap { value, .. }, Answer::Swapped) => Some(value.clone()),
        (Action::Delete, Answer::Deleted { count: 1 }) => None,
        _ => return None,
    };
    Some(Change { revision: *revision, key: operation.key.clone(), value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(called: u64, value: &str, ended: Ended) -> Operation {
        Operation { client: 1, key: "k".into(), action: Action::Put { value: value.into() }, called, ended }
    }

    fn answered(at: u64, revision: i64) -> Ended {
        Ended::Answered { at, revision, answer: Answer::Put }
    }

    fn change(revision: i64, value: &str) -> Change {
        Change { revision, key: "k".into(), value: Some(value.into()) }
    }

    #[test]
    fn revisions_rise_with_time() {
        assert_eq!(judge_time(&[put(1, "a", answered(2, 2)), put(3, "b", answered(4, 3))]), Ok(()));
        assert!(judge_time(&[put(1, "a", answered(2, 3)), put(3, "b", answered(4, 2))]).is_err());
        assert!(judge_time(&[put(1, "a", answered(2, 3)), put(3, "b", answered(4, 3))]).is_err());
        // Open at the same time: either order.
        assert_eq!(judge_time(&[put(1, "a", answered(4, 3)), put(2, "b", answered(5, 2))]), Ok(()));
    }

    #[test]
    fn acknowledged_writes_are_kept() {
        let history = [put(1, "a", answered(2, 2)), put(3, "b", Ended::Unknown)];
        assert_eq!(judge_kept(&history, &[change(2, "a")]), Ok(()));
        assert_eq!(judge_kept(&history, &[change(2, "a"), change(3, "b")]), Ok(()));
        assert!(judge_kept(&history, &[change(3, "b")]).is_err(), "lost");
        assert!(judge_kept(&history, &[change(3, "a")]).is_err(), "at another revision");
    }

    #[test]
    fn the_stores_history_settles_what_was_not_answered() {
        let history = [put(1, "a", Ended::Unknown), put(2, "b", Ended::Unknown)];
        let resolved = resolve(&history, &[change(7, "b")]);
        assert_eq!(resolved[0].ended, Ended::Refused);
        assert_eq!(resolved[1].ended, Ended::Late { revision: 7 });
    }

    #[test]
    fn nothing_happens_twice_or_unasked_or_though_refused() {
        let history = [put(1, "a", Ended::Unknown), put(2, "b", Ended::Refused)];
        assert!(judge_kept(&history, &[change(2, "a"), change(3, "a")]).is_err());
        assert!(judge_kept(&history, &[change(2, "c")]).is_err());
        assert!(judge_kept(&history, &[change(2, "b")]).is_err());
    }
}

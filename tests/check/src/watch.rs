//! A watcher's promises (contract 3): ordered, unique, without a gap, a revision never torn, and bookmarks that tell the
//! truth.
//!
//! What it does not do: judge how soon something was told.

use crate::revision::Change;

/// What came on one watch, in the order in which it came.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Told {
    /// The events of one response.
    Events(Vec<Change>),
    /// Everything up to this revision was told (a progress notification).
    Progress(i64),
    /// The watch ended because what it wanted next was compacted.
    Compacted(i64),
}

/// Judges one watch that wanted everything that `wants` says yes to, from revision `from` on, against the store's own
/// history `all` (in order). If `until` is given, everything up to it must have come.
pub fn judge(
    all: &[Change],
    from: i64,
    until: Option<i64>,
    wants: impl Fn(&Change) -> bool,
    told: &[Told],
) -> Result<(), String> {
    let mut expected = all.iter().filter(|change| change.revision >= from && wants(change)).peekable();
    let mut last = from - 1;
    for (at, response) in told.iter().enumerate() {
        match response {
            Told::Events(events) => {
                for event in events {
                    match expected.next() {
                        Some(change) if change == event => last = event.revision,
                        other => return Err(format!("response {at}: {event:?} came where {other:?} was due")),
                    }
                }
                if let Some(next) = expected.peek()
                    && !events.is_empty()
                    && next.revision == last
                {
                    return Err(format!("response {at}: revision {last} was torn, {next:?} is missing"));
                }
            }
            Told::Progress(revision) => {
                if let Some(next) = expected.peek()
                    && next.revision <= *revision
                {
                    return Err(format!("response {at}: told to be at {revision}, but {next:?} did not come"));
                }
                if *revision < last {
                    return Err(format!("response {at}: progress fell from {last} to {revision}"));
                }
                last = *revision;
            }
            Told::Compacted(revision) => {
                if at + 1 != told.len() {
                    return Err(format!("response {at}: something came after the end"));
                }
                // Whether anything was due in between nobody can say any more: where the watch stood is what counts.
                return if last + 1 < *revision {
                    Ok(())
                } else {
                    Err(format!("ended as compacted at {revision}, but it only wanted {} and later", last + 1))
                };
            }
        }
    }
    match expected.peek() {
        Some(next) if until.is_some_and(|until| next.revision <= until) => Err(format!("{next:?} never came")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(revision: i64, key: &str) -> Change {
        Change { revision, key: key.into(), value: Some(format!("{key}{revision}")) }
    }

    fn all() -> Vec<Change> {
        vec![change(2, "a"), change(3, "b"), change(4, "a"), change(4, "b"), change(5, "a")]
    }

    fn events(changes: &[(i64, &str)]) -> Told {
        Told::Events(changes.iter().map(|(revision, key)| change(*revision, key)).collect())
    }

    #[test]
    fn all_that_was_wanted_in_order() {
        let told = [events(&[(3, "b"), (4, "a"), (4, "b")]), Told::Progress(4), events(&[(5, "a")])];
        assert_eq!(judge(&all(), 3, Some(5), |_| true, &told), Ok(()));
        let only_a = [events(&[(2, "a"), (4, "a")]), Told::Progress(4)];
        assert_eq!(judge(&all(), 1, None, |change| change.key == "a", &only_a), Ok(()));
        assert!(judge(&all(), 1, Some(5), |change| change.key == "a", &only_a).is_err());
    }

    #[test]
    fn gaps_duplicates_disorder_and_torn_revisions_are_found() {
        for told in [
            vec![events(&[(2, "a"), (4, "a"), (4, "b")])],
            vec![events(&[(2, "a")]), events(&[(2, "a")])],
            vec![events(&[(3, "b")])],
            vec![events(&[(2, "a"), (3, "b"), (4, "a")]), events(&[(4, "b")])],
            vec![Told::Progress(2)],
            vec![events(&[(2, "a"), (3, "b")]), Told::Progress(2)],
        ] {
            assert!(judge(&all(), 1, None, |_| true, &told).is_err(), "{told:?}");
        }
    }

    #[test]
    fn compaction_ends_a_watch_that_was_behind_it() {
        assert_eq!(judge(&all(), 2, None, |_| true, &[Told::Compacted(4)]), Ok(()));
        assert!(judge(&all(), 5, None, |_| true, &[Told::Compacted(4)]).is_err());
        assert!(judge(&all(), 2, None, |_| true, &[Told::Compacted(4), Told::Progress(9)]).is_err());
    }
}

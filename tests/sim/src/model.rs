//! What must be true at every moment, whatever the members do: one leader a term, one entry an index, one outcome a
//! request, one history of changes; and what must be true at the end.
//!
//! What it does not do: judge what clients saw; crate `check` does, with the history of changes that is gathered here.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Debug;
use std::hash::{Hash, Hasher};

use check::revision::Change;
use keelson_proto::mvccpb::KeyValue;
use kvstore_core::mvcc::EventKind;
use kvstore_core::replica::Leadership;
use kvstore_core::store::{Applied, Facts};
use kvstore_core::types::{Entry, Index, MemberId, RequestId, Term};
use prost::Message;

#[derive(Debug, Default)]
pub struct Model {
    leaders: BTreeMap<Term, MemberId>,
    committed: BTreeMap<Index, (Term, u64)>,
    outcomes: BTreeMap<RequestId, u64>,
    changes: BTreeMap<i64, (u64, Vec<Change>)>,
    facts: BTreeMap<Index, (i64, i64, i64, usize)>,
}

fn digest(what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

fn same<K: Ord + Copy + Debug, V: PartialEq + Debug>(
    known: &mut BTreeMap<K, V>,
    what: &str,
    key: K,
    value: V,
) -> Result<(), String> {
    match known.get(&key) {
        Some(first) if *first != value => Err(format!("{what} {key:?}: {first:?} at one member, {value:?} at another")),
        Some(_) => Ok(()),
        None => {
            known.insert(key, value);
            Ok(())
        }
    }
}

impl Model {
    pub fn elections(&self) -> usize {
        self.leaders.len()
    }

    pub fn leads(&mut self, member: MemberId, leadership: Leadership) -> Result<(), String> {
        if leadership.is_leader {
            same(&mut self.leaders, "leader of term", leadership.term, member)?;
        }
        Ok(())
    }

    pub fn committed(&mut self, entries: &[Entry]) -> Result<(), String> {
        for entry in entries {
            same(&mut self.committed, "entry", entry.index, (entry.term, digest(&entry.data)))?;
        }
        Ok(())
    }

    /// The newest index that anyone was told to apply.
    pub fn last_committed(&self) -> Index {
        self.committed.last_key_value().map_or(1, |(index, _)| *index)
    }

    pub fn applied(&mut self, applied: &Applied, facts: &Facts) -> Result<(), String> {
        for (id, outcome) in &applied.outcomes {
            same(&mut self.outcomes, "outcome of", *id, digest(format!("{outcome:?}")))?;
        }
        for revision in &applied.events {
            let mut changes = Vec::new();
            for event in &revision.events {
                let kv = KeyValue::decode(event.kv.clone()).map_err(|error| error.to_string())?;
                let value = (event.kind == EventKind::Put).then(|| text(&kv.value));
                changes.push(Change { revision: revision.revision, key: text(&event.key), value });
            }
            // A previous value is left out where it is compacted, which is the same everywhere.
            let known = (digest(format!("{:?}", revision.events)), changes);
            same(&mut self.changes, "revision", revision.revision, known)?;
        }
        let numbers = (facts.revision, facts.compacted, facts.size_in_use, facts.lease_count);
        same(&mut self.facts, "facts at index", applied.index, numbers)
    }

    /// The whole history of changes, in order.
    pub fn changes(&self) -> Vec<Change> {
        self.changes.values().flat_map(|(_, changes)| changes.iter().cloned()).collect()
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

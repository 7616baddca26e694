//! What the kernel holds, what it should hold, and the changes between: per map, key by key.
//!
//! A replaced key is deleted and added again in one batch, because the kernel has no change in place. A key that is only
//! dropped, in a map that a packet reaches by its second or a later lookup, is dropped in a batch of its own a while
//! later: the packet's first lookup may have seen the generation before (`dataplane-traps.md` 10).
//!
//! What it does not do: it does not look at what keys and data mean.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use proxy_core::model::Family;

use super::object::{Data, Element, Key, Op, SetId};

/// How long a dropped key stays behind, for packets that still are on their way to it.
pub const RETIRE_AFTER: Duration = Duration::from_millis(100);

/// The elements that the kernel holds in one table, exactly.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Picture {
    sets: [HashMap<Key, Data>; SetId::ALL.len()],
}

impl Picture {
    pub fn get(&self, set: SetId, key: &Key) -> Option<&Data> {
        self.sets[set as usize].get(key)
    }

    pub fn insert(&mut self, set: SetId, element: Element) {
        self.sets[set as usize].insert(element.key, element.data);
    }

    pub fn remove(&mut self, set: SetId, key: &Key) {
        self.sets[set as usize].remove(key);
    }

    pub fn iter(&self) -> impl Iterator<Item = (SetId, &Key, &Data)> {
        SetId::ALL.into_iter().flat_map(|set| self.set(set).map(move |(key, data)| (set, key, data)))
    }

    pub fn set(&self, set: SetId) -> impl Iterator<Item = (&Key, &Data)> {
        self.sets[set as usize].iter()
    }

    pub fn count(&self) -> usize {
        self.sets.iter().map(HashMap::len).sum()
    }
}

/// What should become of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    Hold(Data),
    /// Deleted, if it is there, and added again, for what depends on it within its set.
    Renew(Data),
    Drop,
    /// Drop it once no packet can be on its way to it.
    DropLater,
}

impl Want {
    fn rank(&self) -> u8 {
        match self {
            Want::Hold(_) | Want::Renew(_) => 0,
            Want::Drop => 1,
            Want::DropLater => 2,
        }
    }
}

/// What should become of the keys that a change concerns, in the order in which it was asked for.
#[derive(Debug, Default)]
pub struct Wants {
    keys: Vec<((SetId, Key), Want)>,
    exclusive: bool,
}

impl Wants {
    pub fn hold(&mut self, set: SetId, key: Key, data: Data) {
        self.keys.push(((set, key), Want::Hold(data)));
    }

    pub fn renew(&mut self, set: SetId, key: Key, data: Data) {
        self.keys.push(((set, key), Want::Renew(data)));
    }

    /// A key that moves from one Service to another is dropped by the one and held by the other, in any order.
    pub fn drop(&mut self, set: SetId, key: Key, later: bool) {
        self.keys.push(((set, key), if later { Want::DropLater } else { Want::Drop }));
    }

    /// Whatever else the kernel holds is to go.
    pub fn nothing_else(&mut self) {
        self.exclusive = true;
    }

    /// The changes that make `picture` what is wanted, grouped by set, and the keys to retire.
    pub fn resolve(mut self, picture: &Picture, retired: &Retired) -> Delta {
        // Of several wishes for a key the first of the strongest kind counts, and to hold it is the strongest.
        self.keys.sort_by(|(a, wish_a), (b, wish_b)| a.cmp(b).then(wish_a.rank().cmp(&wish_b.rank())));
        self.keys.dedup_by(|later, first| later.0 == first.0);
        let mut delta = Delta::default();
        let mut met = 0;
        let others =
            if self.exclusive { Some(self.keys.iter().map(|(key, _)| *key).collect::<Vec<_>>()) } else { None };
        for ((set, key), want) in self.keys {
            let held = picture.get(set, &key);
            met += usize::from(held.is_some());
            match (held, want) {
                (Some(held), Want::Hold(data)) if *held == data => {
                    if retired.contains(set, &key) {
                        delta.kept.push((set, key));
                    }
                }
                (held, Want::Hold(data) | Want::Renew(data)) => {
                    if held.is_some() {
                        delta.change(set).deleted.push(key);
                    }
                    delta.change(set).added.push(Element { key, data });
                }
                (Some(_), Want::Drop) => delta.change(set).deleted.push(key),
                (Some(_), Want::DropLater) => delta.retired.push((set, key)),
                (None, Want::Drop | Want::DropLater) => {}
            }
        }
        if let Some(wanted) = others.filter(|_| met < picture.count()) {
            for (set, key, _) in picture.iter() {
                if wanted.binary_search(&(set, *key)).is_ok() || retired.contains(set, key) {
                    continue;
                }
                if set.is_behind() { delta.retired.push((set, *key)) } else { delta.change(set).deleted.push(*key) }
            }
        }
        delta
    }
}

/// The difference between a picture and what is wanted.
#[derive(Debug, Default)]
pub struct Delta {
    sets: BTreeMap<SetId, SetDelta>,
    retired: Vec<(SetId, Key)>,
    /// Held already and wanted: no longer to be retired, if it was.
    kept: Vec<(SetId, Key)>,
}

#[derive(Debug, Default)]
struct SetDelta {
    deleted: Vec<Key>,
    added: Vec<Element>,
}

impl Delta {
    fn change(&mut self, set: SetId) -> &mut SetDelta {
        self.sets.entry(set).or_default()
    }

    pub fn added(&self) -> usize {
        self.sets.values().map(|set| set.added.len()).sum()
    }

    pub fn deleted(&self) -> usize {
        self.sets.values().map(|set| set.deleted.len()).sum()
    }

    /// Deletes before adds, set by set.
    pub fn ops(&self, family: Family) -> Vec<Op> {
        let mut ops = Vec::new();
        for (set, delta) in &self.sets {
            if !delta.deleted.is_empty() {
                ops.push(Op::DeleteElements { family, set: *set, keys: delta.deleted.clone() });
            }
            if !delta.added.is_empty() {
                ops.push(Op::AddElements { family, set: *set, elements: delta.added.clone() });
            }
        }
        ops
    }

    /// The kernel has done it: so does the picture.
    pub fn commit(self, picture: &mut Picture, retired: &mut Retired, now: Instant) {
        for (set, delta) in self.sets {
            for key in delta.deleted {
                picture.remove(set, &key);
                retired.keys.remove(&(set, key));
            }
            for element in delta.added {
                picture.insert(set, element);
            }
        }
        for key in self.kept {
            retired.keys.remove(&key);
        }
        for key in self.retired {
            retired.keys.entry(key).or_insert(now + RETIRE_AFTER);
        }
    }
}

/// Keys that nobody wants and that are still held for packets on their way.
#[derive(Debug, Default)]
pub struct Retired {
    keys: BTreeMap<(SetId, Key), Instant>,
}

impl Retired {
    pub fn contains(&self, set: SetId, key: &Key) -> bool {
        !self.keys.is_empty() && self.keys.contains_key(&(set, *key))
    }

    pub fn next_due(&self) -> Option<Instant> {
        self.keys.values().min().copied()
    }

    pub fn clear(&mut self) {
        self.keys.clear();
    }

    /// Wants the due keys dropped. They leave the list when the kernel has done it.
    pub fn due(&self, now: Instant) -> Wants {
        let mut wants = Wants::default();
        for ((set, key), due) in &self.keys {
            if *due <= now {
                wants.drop(*set, *key, false);
            }
        }
        wants
    }
}

#[cfg(test)]
mod tests {
    use super::super::object::{Id, key};
    use super::*;

    fn picture(ids: &[(u32, u32)]) -> Picture {
        let mut picture = Picture::default();
        for (from, to) in ids {
            picture.insert(SetId::Outside, Element { key: key().id(Id(*from)), data: Data::Id(Id(*to)) });
        }
        picture
    }

    #[test]
    fn a_replaced_key_is_deleted_and_added_in_the_same_batch() {
        let held = picture(&[(1, 10), (2, 20)]);
        let mut wants = Wants::default();
        wants.hold(SetId::Outside, key().id(Id(1)), Data::Id(Id(11)));
        wants.hold(SetId::Outside, key().id(Id(2)), Data::Id(Id(20)));
        let delta = wants.resolve(&held, &Retired::default());
        let ops = delta.ops(Family::V4);
        assert_eq!((delta.added(), delta.deleted()), (1, 1));
        assert!(matches!(&ops[..], [Op::DeleteElements { .. }, Op::AddElements { .. }]), "{ops:?}");
    }

    #[test]
    fn a_dropped_key_waits_unless_it_is_wanted_again() {
        let mut held = picture(&[(1, 10), (2, 20)]);
        let mut retired = Retired::default();
        let start = Instant::now();
        let mut wants = Wants::default();
        wants.nothing_else();
        let delta = wants.resolve(&held, &retired);
        assert!(delta.ops(Family::V4).is_empty());
        delta.commit(&mut held, &mut retired, start);
        assert_eq!(retired.next_due(), Some(start + RETIRE_AFTER));

        let mut wants = Wants::default();
        wants.hold(SetId::Outside, key().id(Id(1)), Data::Id(Id(10)));
        wants.resolve(&held, &retired).commit(&mut held, &mut retired, start);

        assert_eq!(retired.due(start).resolve(&held, &retired).deleted(), 0);
        let due = retired.due(start + RETIRE_AFTER).resolve(&held, &retired);
        assert_eq!(due.deleted(), 1);
        due.commit(&mut held, &mut retired, start + RETIRE_AFTER);
        assert_eq!(held, picture(&[(1, 10)]));
        assert_eq!(retired.next_due(), None);
    }

    #[test]
    fn a_key_that_changes_hands_is_held() {
        let held = picture(&[(1, 10)]);
        for drop_first in [true, false] {
            let mut wants = Wants::default();
            if drop_first {
                wants.drop(SetId::Outside, key().id(Id(1)), false);
            }
            wants.hold(SetId::Outside, key().id(Id(1)), Data::Id(Id(10)));
            wants.drop(SetId::Outside, key().id(Id(1)), false);
            assert!(wants.resolve(&held, &Retired::default()).ops(Family::V4).is_empty());
        }
    }
}

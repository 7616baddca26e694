//! A keyspace as naive as can be: all events since the beginning, and the newest value of each key. It plays the store's part
//! beside a hub.

use std::collections::BTreeMap;

use bytes::Bytes;
use keelson_proto::mvccpb;
use kvstore_core::Fatal;
use kvstore_core::mvcc::{Bounds, Event, EventKind, RevisionEvents};
use prost::Message;

pub(crate) struct History {
    /// The store's revision; the hub's may lag behind.
    pub(crate) revision: i64,
    pub(crate) compacted: i64,
    pub(crate) revisions: Vec<RevisionEvents>,
    pub(crate) keys: BTreeMap<Bytes, mvccpb::KeyValue>,
}

/// One change inside a revision.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Put(String, String),
    Delete(String),
}

impl Default for History {
    fn default() -> Self {
        History { revision: 1, compacted: -1, revisions: Vec::new(), keys: BTreeMap::new() }
    }
}

impl History {
    pub(crate) fn bounds(&self) -> Bounds {
        Bounds { revision: self.revision, compacted: self.compacted }
    }

    /// Applies changes as one revision; those that change nothing are left out, and if nothing is left there is no revision.
    pub(crate) fn apply(&mut self, changes: &[Change]) {
        let revision = self.revision + 1;
        let events: Vec<Event> = changes.iter().filter_map(|change| self.change(revision, change)).collect();
        if !events.is_empty() {
            self.revision = revision;
            self.revisions.push(RevisionEvents { revision, events });
        }
    }

    /// What the store says when it is asked for history.
    pub(crate) fn read(
        &self,
        from: i64,
        to: i64,
        max_rows: usize,
        wanted: &dyn Fn(&[u8]) -> bool,
    ) -> Result<(Vec<RevisionEvents>, i64), Fatal> {
        assert!(from >= self.compacted && to <= self.revision);
        let mut rows = 0;
        let mut found = Vec::new();
        for changes in self.revisions.iter().filter(|changes| changes.revision >= from && changes.revision <= to) {
            rows += changes.events.len();
            if rows > max_rows && rows > changes.events.len() {
                return Ok((found, changes.revision));
            }
            let mut events: Vec<Event> = changes.events.iter().filter(|event| wanted(&event.key)).cloned().collect();
            if changes.revision - 1 < self.compacted {
                events.iter_mut().for_each(|event| event.prev = None);
            }
            if !events.is_empty() {
                found.push(RevisionEvents { revision: changes.revision, events });
            }
        }
        Ok((found, to + 1))
    }

    fn change(&mut self, revision: i64, change: &Change) -> Option<Event> {
        let encoded = |kv: &mvccpb::KeyValue| Bytes::from(kv.encode_to_vec());
        match change {
            Change::Put(key, value) => {
                let key = Bytes::from(key.clone());
                let before = self.keys.get(&key);
                let kv = mvccpb::KeyValue {
                    key: key.clone(),
                    value: Bytes::from(value.clone()),
                    create_revision: before.map_or(revision, |kv| kv.create_revision),
                    mod_revision: revision,
                    version: before.map_or(1, |kv| kv.version + 1),
                    lease: 0,
                };
                let event = Event {
                    key: key.clone(),
                    kind: EventKind::Put,
                    create: before.is_none(),
                    kv: encoded(&kv),
                    prev: before.map(encoded),
                };
                self.keys.insert(key, kv);
                Some(event)
            }
            Change::Delete(key) => {
                let before = self.keys.remove(key.as_bytes())?;
                let key = before.key.clone();
                let kv = mvccpb::KeyValue { key: key.clone(), mod_revision: revision, ..Default::default() };
                let prev = Some(encoded(&before));
                Some(Event { key, kind: EventKind::Delete, create: false, kv: encoded(&kv), prev })
            }
        }
    }
}

//! The store against a naive model, and against itself.

use std::collections::{BTreeMap, BTreeSet};

use keelson_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::{Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest};
use keelson_proto::mvccpb::KeyValue;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::backend::{Overlay, Table};
use crate::mvcc::{Moment, ReadError, history, range};

#[derive(Clone, Debug)]
enum Op {
    Put {
        key: u8,
        value: u8,
        lease: i64,
    },
    Delete {
        key: u8,
        end: u8,
    },
    /// Put if the mod revision is the present one (or, if `wrong`, another), else delete.
    Guarded {
        key: u8,
        wrong: bool,
    },
    /// Two puts and a delete of other keys at one revision.
    Several {
        key: u8,
    },
    Grant {
        lease: i64,
    },
    Revoke {
        lease: i64,
    },
    /// To this part of what can be compacted, in 256ths.
    Compact {
        part: u8,
    },
    Slice {
        rows: usize,
    },
    Reopen,
}

fn ops(max: usize) -> impl Strategy<Value = Vec<Op>> {
    let key = || 0..6u8;
    let op = prop_oneof![
        8 => (key(), any::<u8>(), 0..3i64).prop_map(|(key, value, lease)| Op::Put { key, value, lease }),
        3 => (key(), key()).prop_map(|(key, end)| Op::Delete { key, end }),
        3 => (key(), any::<bool>()).prop_map(|(key, wrong)| Op::Guarded { key, wrong }),
        2 => key().prop_map(|key| Op::Several { key }),
        2 => (1..3i64).prop_map(|lease| Op::Grant { lease }),
        1 => (1..3i64).prop_map(|lease| Op::Revoke { lease }),
        2 => any::<u8>().prop_map(|part| Op::Compact { part }),
        2 => (1..20usize).prop_map(|rows| Op::Slice { rows }),
        1 => Just(Op::Reopen),
    ];
    vec(op, 1..max)
}

/// Keys that need escaping stand among the plain ones.
fn key_of(key: u8) -> Bytes {
    const KEYS: [&[u8]; 6] = [b"a", b"a\0", b"a\0\xff", b"a\x01", b"b", b"\xff"];
    Bytes::from_static(KEYS[usize::from(key)])
}

fn put_request(key: u8, value: u8, lease: i64) -> PutRequest {
    PutRequest { key: key_of(key), value: vec![value; usize::from(value % 5)].into(), lease, ..PutRequest::default() }
}

fn delete_request(key: u8, end: u8) -> DeleteRangeRequest {
    let range_end = if key == end { Bytes::new() } else { key_of(end) };
    DeleteRangeRequest { key: key_of(key), range_end, prev_kv: true }
}

/// The request of an operation; `model` says what is there.
fn request(op: &Op, model: &Model) -> Option<InternalRaftRequest> {
    let wrap = |request| RequestOp { request: Some(request) };
    Some(match op {
        Op::Put { key, value, lease } => {
            InternalRaftRequest { put: Some(put_request(*key, *value, *lease)), ..Default::default() }
        }
        Op::Delete { key, end } => {
            InternalRaftRequest { delete_range: Some(delete_request(*key, *end)), ..Default::default() }
        }
        Op::Guarded { key, wrong } => make::txn(TxnRequest {
            compare: vec![Compare {
                result: CompareResult::Equal as i32,
                target: CompareTarget::Mod as i32,
                key: key_of(*key),
                target_union: Some(TargetUnion::ModRevision(model.mod_revision(*key) + i64::from(*wrong))),
                range_end: Bytes::new(),
            }],
            success: vec![wrap(Request::RequestPut(put_request(*key, 9, 0)))],
            failure: vec![wrap(Request::RequestDeleteRange(delete_request(*key, *key)))],
        }),
        Op::Several { key } => make::txn(TxnRequest {
            success: vec![
                wrap(Request::RequestPut(put_request(*key, 3, 0))),
                wrap(Request::RequestDeleteRange(delete_request((key + 1) % 6, (key + 1) % 6))),
                wrap(Request::RequestPut(put_request((key + 2) % 6, 4, 0))),
            ],
            ..TxnRequest::default()
        }),
        Op::Grant { lease } => make::grant(*lease, 60),
        Op::Revoke { lease } => make::revoke(*lease),
        Op::Compact { part } => {
            let room = model.revision - model.compacted.max(0);
            make::compact(model.compacted.max(0) + room * i64::from(*part) / 256)
        }
        Op::Slice { .. } | Op::Reopen => return None,
    })
}

/// Everything that ever was, in the simplest form.
#[derive(Clone, Debug)]
struct Model {
    revision: i64,
    compacted: i64,
    /// Every version of every key; `None` is a deletion.
    history: BTreeMap<Bytes, Vec<(i64, Option<KeyValue>)>>,
    /// (revision, key) in the order of the changes.
    changes: Vec<(i64, Bytes)>,
    leases: BTreeSet<i64>,
}

impl Model {
    fn new() -> Self {
        Model { revision: 1, compacted: -1, history: BTreeMap::new(), changes: Vec::new(), leases: BTreeSet::new() }
    }

    fn at(&self, key: &Bytes, revision: i64) -> Option<&KeyValue> {
        let versions = self.history.get(key)?;
        versions.iter().rev().find(|(mod_revision, _)| *mod_revision <= revision)?.1.as_ref()
    }

    fn all_at(&self, revision: i64) -> Vec<KeyValue> {
        self.history.keys().filter_map(|key| self.at(key, revision).cloned()).collect()
    }

    fn mod_revision(&self, key: u8) -> i64 {
        self.at(&key_of(key), self.revision).map_or(0, |kv| kv.mod_revision)
    }

    fn put(&mut self, at: i64, request: &PutRequest) {
        let before = self.at(&request.key, at).cloned();
        let kv = KeyValue {
            key: request.key.clone(),
            create_revision: before.as_ref().map_or(at, |kv| kv.create_revision),
            mod_revision: at,
            version: before.map_or(0, |kv| kv.version) + 1,
            value: request.value.clone(),
            lease: request.lease,
        };
        self.history.entry(request.key.clone()).or_default().push((at, Some(kv)));
        self.changes.push((at, request.key.clone()));
    }

    fn delete(&mut self, at: i64, doomed: impl Fn(&KeyValue) -> bool) -> i64 {
        let doomed: Vec<_> = self.all_at(at).into_iter().filter(doomed).map(|kv| kv.key).collect();
        for key in &doomed {
            self.history.get_mut(key).unwrap().push((at, None));
            self.changes.push((at, key.clone()));
        }
        doomed.len() as i64
    }

    fn apply(&mut self, op: &Op) -> Result<(), Error> {
        let next = self.revision + 1;
        let changes = self.changes.len();
        match *op {
            Op::Put { lease, .. } if lease != 0 && !self.leases.contains(&lease) => return Err(Error::LeaseNotFound),
            Op::Put { key, value, lease } => self.put(next, &put_request(key, value, lease)),
            Op::Delete { key, end } => {
                let (first, end) = (key_of(key), if key == end { None } else { Some(key_of(end)) });
                self.delete(next, |kv| match &end {
                    None => kv.key == first,
                    Some(end) => first <= kv.key && kv.key < *end,
                });
            }
            Op::Guarded { key, wrong: false } => self.put(next, &put_request(key, 9, 0)),
            Op::Guarded { key, wrong: true } => {
                self.delete(next, |kv| kv.key == key_of(key));
            }
            Op::Several { key } => {
                self.put(next, &put_request(key, 3, 0));
                self.delete(next, |kv| kv.key == key_of((key + 1) % 6));
                self.put(next, &put_request((key + 2) % 6, 4, 0));
            }
            Op::Grant { lease } if !self.leases.insert(lease) => return Err(Error::LeaseExists),
            Op::Grant { .. } => {}
            Op::Revoke { lease } if !self.leases.remove(&lease) => return Err(Error::LeaseNotFound),
            Op::Revoke { lease } => {
                self.delete(next, |kv| kv.lease == lease);
            }
            Op::Compact { part } => {
                let to = self.compacted.max(0) + (self.revision - self.compacted.max(0)) * i64::from(part) / 256;
                if to <= self.compacted {
                    return Err(Error::Compacted);
                }
                self.compacted = to;
            }
            Op::Slice { .. } | Op::Reopen => {}
        }
        if self.changes.len() > changes {
            self.revision = next;
        }
        Ok(())
    }
}

fn everything(revision: i64) -> RangeRequest {
    RangeRequest { key: vec![0].into(), range_end: vec![0].into(), revision, ..RangeRequest::default() }
}

/// Every question at every readable revision.
fn check_reads(member: &TestMember, model: &Model) {
    let published = member.publish();
    let (bounds, moment) = (published.facts.bounds(), published.moment());
    assert_eq!((bounds.revision, bounds.compacted), (model.revision, model.compacted));
    for revision in model.compacted.max(1)..=model.revision {
        let expected = model.all_at(revision);
        let all = range(moment, &everything(revision)).unwrap();
        assert_eq!((all.count as usize, all.more), (expected.len(), false), "at {revision}");
        assert_eq!(all.into_response(0).unwrap().kvs, expected, "at {revision}");
        let first_two = RangeRequest { limit: 2, ..everything(revision) };
        let page = range(moment, &first_two).unwrap();
        assert_eq!((page.count as usize, page.more), (expected.len(), expected.len() > 2));
        assert_eq!(page.into_response(0).unwrap().kvs, expected[..expected.len().min(2)]);
        let counted = range(moment, &RangeRequest { count_only: true, ..everything(revision) }).unwrap();
        assert_eq!((counted.count as usize, counted.len), (expected.len(), 0));
        for key in (0..6).map(key_of) {
            let one = RangeRequest { key: key.clone(), revision, ..RangeRequest::default() };
            let found = range(moment, &one).unwrap().into_response(0).unwrap().kvs;
            assert_eq!(found.first(), model.at(&key, revision), "{key:?} at {revision}");
        }
    }
    let refused = |revision| match range(moment, &everything(revision)) {
        Err(ReadError::Answer(error)) => error,
        other => panic!("revision {revision} should not be readable: {other:?}"),
    };
    assert_eq!(refused(model.revision + 1), Error::FutureRevision);
    if model.compacted > 1 {
        assert_eq!(refused(model.compacted - 1), Error::Compacted);
    }
}

/// Catching up from every readable revision, in every size of slice.
fn check_history(member: &TestMember, model: &Model, max_rows: usize) {
    let (view, bounds) = (member.view(), member.store.facts().bounds());
    let mut from = model.compacted.max(1);
    let expected: Vec<_> = model.changes.iter().filter(|(revision, _)| *revision >= from).collect();
    let mut found = Vec::new();
    while from <= model.revision {
        let (events, next) = history::events(&view, bounds, from, model.revision, max_rows, &|_| true, true).unwrap();
        assert!(next > from, "it moves on");
        found.extend(events);
        from = next;
    }
    let flat: Vec<_> = found.iter().flat_map(|r| r.events.iter().map(|e| (r.revision, e))).collect();
    assert_eq!(flat.len(), expected.len());
    for ((revision, event), (expected_revision, key)) in flat.into_iter().zip(expected) {
        assert_eq!((revision, &event.key), (*expected_revision, key));
        let kv = KeyValue::decode(event.kv.clone()).unwrap();
        match model.at(key, revision) {
            Some(expected) => assert_eq!((event.kind, &kv), (crate::mvcc::EventKind::Put, expected)),
            None => {
                let tombstone = KeyValue { key: key.clone(), mod_revision: revision, ..KeyValue::default() };
                assert_eq!((event.kind, kv), (crate::mvcc::EventKind::Delete, tombstone));
            }
        }
        let prev = event.prev.clone().map(|prev| KeyValue::decode(prev).unwrap());
        let before = model.at(key, revision - 1).filter(|_| revision > model.compacted);
        assert_eq!(prev.as_ref(), before, "prev of {key:?} at {revision}");
    }
}

/// Leases, their keys, and what the quota counts once all deletion is done.
fn check_tables(member: &mut TestMember, model: &Model) {
    let view = member.view();
    let granted: Vec<_> = crate::lease::all(&view).unwrap().iter().map(|lease| lease.id.0).collect();
    assert_eq!(granted, model.leases.iter().copied().collect::<Vec<_>>());
    for lease in 0..3 {
        let attached: Vec<_> =
            model.all_at(model.revision).into_iter().filter(|kv| lease != 0 && kv.lease == lease).collect();
        let attached: Vec<_> = attached.into_iter().map(|kv| kv.key).collect();
        assert_eq!(crate::lease::keys(&view, LeaseId(lease)).unwrap(), attached);
    }
    while member.slice(7).is_some() {}
    let rows = member.view().rows(Table::Rev);
    let in_use: u64 = rows.iter().map(|(_, row)| crate::mvcc::logical_size(row).unwrap()).sum();
    let leases = model.leases.len() as i64 * quota::LEASE_COST;
    assert_eq!(member.store.facts().size_in_use, in_use as i64 + leases, "the sums are what the rows are");
    // A mark for every 4th record of a chain, and none for a record that is gone. No operation here changes a key twice.
    let marks = member.view().rows(Table::Old);
    let mut marked: Vec<_> = marks.iter().map(|(key, value)| keys::decode_old(key, value).unwrap()).collect();
    marked.sort();
    let deep = rows.iter().filter(|(_, row)| crate::mvcc::depth(row).unwrap().is_multiple_of(4));
    assert_eq!(marked, deep.map(|(key, _)| keys::decode_rev(key).unwrap()).collect::<Vec<_>>());
    let keys = member.view().rows(Table::Key);
    let needed = |key: &Bytes| {
        let newest = model.history[key].last().unwrap();
        newest.1.is_some() || newest.0 >= model.compacted
    };
    assert_eq!(
        keys.into_iter().map(|(key, _)| key).collect::<Vec<_>>(),
        model.history.keys().filter(|key| needed(key)).cloned().collect::<Vec<_>>()
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_is_its_model(ops in ops(60), max_rows in 1..9usize) {
        let mut model = Model::new();
        let mut member = TestMember::new(config());
        for op in &ops {
            match op {
                Op::Slice { rows } => drop(member.slice(*rows)),
                Op::Reopen => member.reopen(config()),
                _ => {
                    let (outcome, _) = member.apply(&request(op, &model).unwrap());
                    prop_assert_eq!(outcome.map(|_| ()), model.apply(op), "{:?}", op);
                }
            }
        }
        check_reads(&member, &model);
        check_history(&member, &model, max_rows);
        check_tables(&mut member, &model);
        check_reads(&member, &model);
        check_history(&member, &model, max_rows);
        let before = member.store.facts();
        member.reopen(config());
        prop_assert_eq!(before, member.store.facts());
    }

    /// However a log is cut into batches, whatever the caches hold and wherever a member was restarted: equal answers,
    /// equal events, equal tables. And what the overlay shows is what is there once it is written.
    #[test]
    fn batches_change_nothing(ops in ops(50), cuts in vec(1..7usize, 1..50), cache in 0..600usize) {
        let mut model = Model::new();
        let mut entries = Vec::new();
        let mut one_by_one = TestMember::new(config());
        let mut expected = Vec::new();
        for op in &ops {
            let Some(request) = request(op, &model) else { continue };
            let _ = model.apply(op);
            entries.push(TestMember::entry(one_by_one.store.facts().applied_index + 1, &request));
            expected.push(one_by_one.apply(&request));
            if let Op::Compact { .. } = op {
                // This member deletes at once, the other one at the very end.
                while one_by_one.slice(3).is_some() {}
            }
        }
        let config = StoreConfig { record_cache_bytes: cache, ..config() };
        let mut batched = TestMember::new(config.clone());
        let (mut outcomes, mut events) = (Vec::new(), Vec::new());
        let mut rest = entries.as_slice();
        for (n, cut) in cuts.iter().cycle().enumerate() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            let view = batched.view();
            let mut batch = WriteBatch::new();
            let applied = batched.store.apply(&view, now, &mut batch).unwrap();
            let bounds = batched.store.facts().bounds();
            let overlay = Overlay { view: &view, batch: &batch };
            let keys = batched.publish().keys;
            let seen = range(Moment { read: &overlay, bounds, keys: &keys }, &everything(0)).unwrap();
            batched.backend.write(batch).unwrap();
            prop_assert_eq!(&seen, &range(batched.publish().moment(), &everything(0)).unwrap());
            outcomes.extend(applied.outcomes.into_iter().map(|(_, outcome)| outcome));
            events.extend(applied.events);
            if n % 5 == 4 {
                batched.reopen(config.clone());
            }
            rest = later;
        }
        prop_assert_eq!(outcomes, expected.iter().map(|(outcome, _)| outcome.clone()).collect::<Vec<_>>());
        prop_assert_eq!(events, expected.into_iter().flat_map(|(_, applied)| applied.events).collect::<Vec<_>>());
        while batched.slice(5).is_some() {}
        for table in Table::ALL {
            prop_assert_eq!(one_by_one.view().rows(table), batched.view().rows(table), "{:?}", table);
        }
    }
}

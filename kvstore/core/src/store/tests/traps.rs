//! Schedules that must not happen (the reference's list of store traps, and etcd's own track record), each by name.

use std::sync::atomic::{AtomicUsize, Ordering};

use keelson_proto::etcdserverpb::alarm_request::AlarmAction;
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::{AlarmType, RequestOp, TxnRequest};
use keelson_proto::mvccpb::KeyValue;

use super::make::{compact, delete, grant, key, put, range, revoke, txn};
use super::*;
use crate::backend::{ReadView, Table};
use crate::keys;
use crate::mvcc::{ReadError, history};
use crate::types::Revision;

fn fresh() -> TestMember {
    TestMember::new(config())
}

fn has_row(member: &TestMember, main: i64) -> bool {
    member.view().get(Table::Rev, &keys::rev(Revision::new(main, 0))).unwrap().is_some()
}

fn finish(member: &mut TestMember) {
    while member.slice(1).is_some() {}
}

#[test]
fn trap_2_founders_begin_alike_at_index_1_term_1() {
    let mut reversed = founders();
    reversed.reverse();
    let rows = |founders: &[Founder]| {
        let mut backend = MemoryBackend::new();
        backend.write(Store::bootstrap(founders, ClusterId(7))).unwrap();
        Table::ALL.map(|table| backend.view().rows(table))
    };
    assert_eq!(rows(&founders()), rows(&reversed));
    let member = fresh();
    let facts = member.store.facts();
    assert_eq!((facts.applied_index, facts.applied_term, facts.revision, facts.compacted), (1, 1, 1, -1));
    assert_eq!(view::conf_state(&member.view()).unwrap().unwrap().voters, [1, 2]);
    assert_eq!(view::cluster_id(&member.view()).unwrap(), Some(ClusterId(7)));
}

#[test]
fn trap_2_an_empty_state_is_at_index_0_without_members() {
    let backend = MemoryBackend::new();
    let facts = Store::open(&backend.view(), config()).unwrap().facts();
    assert_eq!((facts.applied_index, facts.members.len()), (0, 0));
    assert_eq!(view::conf_state(&backend.view()).unwrap(), None);
}

#[test]
fn trap_5_prev_is_left_out_exactly_below_the_compacted_revision() {
    let mut member = fresh();
    for value in ["1", "2", "3", "4"] {
        member.apply(&put("k", value)).0.unwrap(); // revisions 2 to 5
    }
    member.apply(&compact(4)).0.unwrap();
    // Nothing is deleted yet: the old row of 3 is still there, and must not be shown all the same.
    assert!(has_row(&member, 3));
    let prevs = |member: &TestMember| {
        let bounds = member.store.facts().bounds();
        let (events, _) = history::events(&member.view(), bounds, 4, 5, 99, &|_| true, true).unwrap();
        events.iter().map(|r| r.events[0].prev.is_some()).collect::<Vec<_>>()
    };
    assert_eq!(prevs(&member), [false, true]);
    finish(&mut member);
    assert!(!has_row(&member, 3));
    assert_eq!(prevs(&member), [false, true]);
}

#[test]
fn trap_7_an_outcome_is_found_by_the_request_and_never_by_its_content() {
    let mut member = fresh();
    let entries = [TestMember::entry(2, &put("k", "v")), TestMember::entry(3, &put("k", "v"))];
    let applied = member.apply_entries(&entries);
    assert_eq!(applied.outcomes.iter().map(|(id, _)| id.0).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn trap_9_a_tombstone_at_the_compacted_revision_stays_and_goes_with_the_next() {
    let mut member = fresh();
    member.apply(&put("k", "v")).0.unwrap();
    member.apply(&delete("k", "")).0.unwrap(); // 3
    member.apply(&put("other", "v")).0.unwrap(); // 4
    member.apply(&compact(3)).0.unwrap();
    finish(&mut member);
    assert!(!has_row(&member, 2) && has_row(&member, 3));
    // etcd lost this event once (#18089, #19179).
    let bounds = member.store.facts().bounds();
    let (events, _) = history::events(&member.view(), bounds, 3, 3, 99, &|_| true, true).unwrap();
    assert_eq!(events[0].events[0].kind, crate::mvcc::EventKind::Delete);
    member.apply(&compact(4)).0.unwrap();
    finish(&mut member);
    assert!(!has_row(&member, 3), "the next run begins at the last compacted revision, inclusive");
    assert_eq!(member.view().get(Table::Key, b"k").unwrap(), None);
}

#[test]
fn trap_9_a_removed_tombstones_own_signpost_goes_too() {
    let mut member = fresh();
    for _ in 0..2 {
        member.apply(&put("k", "v")).0.unwrap();
        member.apply(&delete("k", "")).0.unwrap();
    }
    assert_eq!(member.view().rows(Table::Old).len(), 1, "the 4th of the chain, a tombstone, is marked");
    member.apply(&put("other", "v")).0.unwrap();
    member.apply(&compact(6)).0.unwrap();
    finish(&mut member);
    assert_eq!(member.view().rows(Table::Old), []);
    assert_eq!(member.view().rows(Table::Rev).len(), 1);
}

#[test]
fn trap_9_a_tombstone_below_the_compacted_revision_counts_as_absent() {
    let mut quick = fresh();
    let mut slow = fresh();
    for member in [&mut quick, &mut slow] {
        member.apply(&put("k", "v")).0.unwrap();
        member.apply(&delete("k", "")).0.unwrap();
        member.apply(&put("other", "v")).0.unwrap();
        member.apply(&compact(4)).0.unwrap();
    }
    finish(&mut quick); // and the slow one still has the tombstone
    for member in [&mut quick, &mut slow] {
        member.apply(&put("k", "again")).0.unwrap();
    }
    finish(&mut slow);
    for table in Table::ALL {
        assert_eq!(quick.view().rows(table), slow.view().rows(table), "{table:?}");
    }
}

#[test]
fn trap_9_the_quota_falls_at_once_and_alike() {
    let mut quick = fresh();
    let mut slow = fresh();
    for member in [&mut quick, &mut slow] {
        for _ in 0..10 {
            member.apply(&put("k", "0123456789")).0.unwrap();
        }
        let full = member.store.facts().size_in_use;
        member.apply(&compact(11)).0.unwrap();
        assert_eq!(member.store.facts().size_in_use * 10, full, "nine of ten went, before any row did");
    }
    finish(&mut quick);
    assert_eq!(quick.store.facts().size_in_use, slow.store.facts().size_in_use);
}

#[test]
fn a_compaction_goes_on_where_a_restart_left_it() {
    let mut member = fresh();
    for _ in 0..10 {
        member.apply(&put("k", "v")).0.unwrap();
    }
    member.apply(&compact(11)).0.unwrap();
    assert!(!member.slice(4).unwrap().finished);
    member.reopen(config());
    assert!(member.store.facts().compacting);
    assert!(!member.slice(4).unwrap().finished);
    assert!(member.slice(4).unwrap().finished);
    assert_eq!(member.slice(4), None);
    assert_eq!(member.view().rows(Table::Rev).len(), 1);
}

#[test]
fn a_compaction_that_overtakes_another_misses_no_row() {
    let mut member = fresh();
    member.apply(&put("a", "v")).0.unwrap(); // 2
    member.apply(&delete("a", "")).0.unwrap(); // 3
    member.apply(&put("b", "v")).0.unwrap(); // 4
    member.apply(&compact(3)).0.unwrap();
    member.slice(2).unwrap(); // the tombstone at 3 was looked at, and stays
    member.apply(&compact(4)).0.unwrap(); // before the first one is finished
    finish(&mut member);
    assert_eq!(member.view().rows(Table::Rev).len(), 1);
}

#[test]
fn a_compaction_that_overtakes_another_in_the_middle_of_a_revision_misses_no_row() {
    let mut member = fresh();
    for k in ["a", "b"] {
        member.apply(&put(k, "v")).0.unwrap(); // 2, 3
    }
    member.apply(&delete("a", "z")).0.unwrap(); // 4, twice
    member.apply(&put("c", "v")).0.unwrap(); // 5
    member.apply(&compact(4)).0.unwrap();
    assert!(!member.slice(3).unwrap().finished, "it stands between the two tombstones of revision 4");
    member.apply(&compact(5)).0.unwrap();
    finish(&mut member);
    assert_eq!(member.view().rows(Table::Rev).len(), 1);
}

/// A view that counts how often it is asked.
#[derive(Clone)]
struct Counting(MemoryView, Arc<AtomicUsize>);

impl ReadView for Counting {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Fatal> {
        self.1.fetch_add(1, Ordering::Relaxed);
        ReadView::get(&self.0, table, key)
    }

    fn scan(
        &self,
        table: Table,
        range: crate::backend::Range<'_>,
        direction: crate::backend::Direction,
        visit: &mut crate::backend::Visit<'_>,
    ) -> Result<(), Fatal> {
        self.1.fetch_add(1, Ordering::Relaxed);
        ReadView::scan(&self.0, table, range, direction, visit)
    }
}

/// Pointers alone would be quadratic: 5 us a hop (storage-measurements 5.1).
#[test]
fn any_version_of_a_long_chain_is_a_few_reads_away() {
    let mut member = fresh();
    for n in 0..200 {
        if n % 3 == 2 {
            member.apply(&delete("k", "")).0.unwrap(); // versions restart, the chain does not
        } else {
            member.apply(&put("k", "v")).0.unwrap();
        }
    }
    let reads = |revision| {
        let view = Counting(member.view(), Arc::default());
        crate::mvcc::range(member.store.publish(view.clone()).moment(), &range("k", "", revision)).unwrap();
        view.1.load(Ordering::Relaxed)
    };
    assert_eq!(reads(0), 1, "the newest is one get");
    assert_eq!(reads(member.store.facts().revision - 1), 2, "the one before it is a pointer away");
    for revision in 2..=200 {
        assert!(reads(revision) <= 7, "{} reads at {revision}", reads(revision));
    }
}

/// etcd #17780: the tail revision was compacted away, and a restart went back.
#[test]
fn the_revision_does_not_fall_when_its_rows_are_compacted() {
    let mut member = fresh();
    member.apply(&put("k", "v")).0.unwrap();
    member.apply(&delete("k", "")).0.unwrap();
    member.apply(&compact(3)).0.unwrap();
    finish(&mut member);
    member.reopen(config());
    assert_eq!(member.store.facts().revision, 3);
}

/// etcd #18667: one member had deleted the rows and another had not, and a Txn answered differently.
#[test]
fn a_txn_that_reads_a_compacted_revision_fails_alike_whatever_is_deleted() {
    let mut quick = fresh();
    let mut slow = fresh();
    let read_then_put = txn(TxnRequest {
        success: vec![
            RequestOp { request: Some(Request::RequestPut(put("k", "new").put.unwrap())) },
            RequestOp { request: Some(Request::RequestRange(range("k", "", 2))) },
        ],
        ..TxnRequest::default()
    });
    for member in [&mut quick, &mut slow] {
        member.apply(&put("k", "1")).0.unwrap();
        member.apply(&put("k", "2")).0.unwrap();
        member.apply(&compact(3)).0.unwrap();
    }
    finish(&mut quick);
    for member in [&mut quick, &mut slow] {
        let before = member.store.facts();
        let (outcome, applied) = member.apply(&read_then_put);
        assert_eq!(outcome, Err(Error::Compacted));
        let after = member.store.facts();
        assert_eq!((after.revision, after.size_in_use), (before.revision, before.size_in_use));
        assert!(applied.events.is_empty());
        assert_eq!(applied.index, before.applied_index + 1, "a refused entry is applied all the same");
    }
}

/// The state carries the applied index of the same moment: what a crash leaves plus the log is what was there.
#[test]
fn a_crash_loses_what_was_not_flushed_and_the_log_brings_it_back() {
    let mut member = fresh();
    member.backend.start_flush().unwrap();
    member.backend.complete_flush();
    let log: Vec<Entry> = [put("a", "1"), grant(5, 60), put("b", "1"), put("a", "2"), delete("b", ""), revoke(5)]
        .iter()
        .zip(2..)
        .map(|(request, index)| TestMember::entry(index, request))
        .collect();
    member.apply_entries(&log[..3]);
    member.backend.start_flush().unwrap();
    member.apply_entries(&log[3..5]);
    member.backend.complete_flush(); // of what was there when it began
    assert_eq!(member.backend.durable_applied().unwrap(), 4);
    member.apply_entries(&log[5..]);
    let before = Table::ALL.map(|table| member.view().rows(table));
    member.backend.crash();
    member.reopen(config());
    assert_eq!(member.store.facts().applied_index, 4);
    let again = member.apply_entries(&log);
    assert_eq!(again.outcomes.len(), 3, "entries that the state holds are passed over");
    assert_eq!(before, Table::ALL.map(|table| member.view().rows(table)));
}

#[test]
fn a_gap_in_the_log_is_fatal() {
    let mut member = fresh();
    let entry = TestMember::entry(3, &put("k", "v"));
    let result = member.store.apply(&member.backend.view(), &[entry], &mut WriteBatch::new());
    assert!(matches!(result, Err(Fatal::Invariant(_))));
}

#[test]
fn a_format_of_the_future_is_refused() {
    let mut member = fresh();
    let mut batch = WriteBatch::new();
    batch.put(Table::Meta, keys::META_FORMAT, Bytes::copy_from_slice(&(view::FORMAT + 1).to_be_bytes()));
    member.backend.write(batch).unwrap();
    let refused = Store::open(&member.view(), config()).unwrap_err().to_string();
    assert!(refused.contains("newer version"), "{refused}");
}

#[test]
fn a_missing_record_is_damage_and_not_an_absent_key() {
    let mut member = fresh();
    member.apply(&put("k", "1")).0.unwrap();
    member.apply(&put("k", "2")).0.unwrap();
    let mut batch = WriteBatch::new();
    batch.delete(Table::Rev, Bytes::copy_from_slice(&keys::rev(Revision::new(2, 0))));
    member.backend.write(batch).unwrap();
    let found = crate::mvcc::range(member.publish().moment(), &range("k", "", 2));
    assert!(matches!(found, Err(ReadError::Fatal(Fatal::Damaged { .. }))));
}

/// The hash of two stores can only be equal if the bytes are: a record carries what prost, and so etcd, would write.
#[test]
fn records_hold_the_bytes_of_the_wire() {
    let mut member = fresh();
    member.apply(&grant(300, 60)).0.unwrap();
    member.apply(&make::put_leased("k", "value", 300)).0.unwrap();
    let (_, applied) = member.apply(&put("empty", ""));
    let bytes = applied.events[0].events[0].kv.clone();
    assert_eq!(bytes, KeyValue::decode(bytes.clone()).unwrap().encode_to_vec());
    let response = crate::mvcc::range(member.publish().moment(), &range("k", "", 0)).unwrap();
    let kv =
        KeyValue { key: key("k"), create_revision: 2, mod_revision: 2, version: 1, value: key("value"), lease: 300 };
    let mut framed = vec![0x12, kv.encoded_len() as u8];
    framed.extend(kv.encode_to_vec());
    assert_eq!(response.kvs, framed);
}

/// Members may have different quotas; what they hold may not differ.
#[test]
fn a_quota_of_one_member_changes_its_answer_and_nothing_else() {
    let mut small = TestMember::new(StoreConfig { quota_backend_bytes: 1, ..config() });
    let mut large = fresh();
    let (refused, applied) = small.apply(&put("k", "v"));
    assert_eq!((refused, applied.over_quota), (Err(Error::NoSpace), true));
    assert_eq!(applied.events.len(), 1, "the write that goes over is done");
    assert!(large.apply(&put("k", "v")).0.is_ok());
    for table in Table::ALL {
        assert_eq!(small.view().rows(table), large.view().rows(table));
    }
    // The alarm, once it is in the log, makes both refuse.
    for member in [&mut small, &mut large] {
        member.apply(&make::alarm(AlarmAction::Activate, 1, AlarmType::Nospace)).0.unwrap();
        let (outcome, applied) = member.apply(&put("k", "v"));
        assert_eq!((outcome, applied.over_quota), (Err(Error::NoSpace), false));
        assert!(member.apply(&delete("k", "")).0.is_ok());
    }
}

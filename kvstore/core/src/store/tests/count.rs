//! The counted index: whatever happened, it counts what a scan counts, of now and of every revision that can be read.

use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::response_op::Response;
use keelson_proto::etcdserverpb::{
    DeleteRangeRequest, InternalRaftRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::make::{compact, delete, put};
use super::*;
use crate::backend::{Install, Table};
use crate::mvcc::range;

/// A span: from one key to another, or without an end.
type Asked = (u16, Option<u16>);

#[derive(Clone, Debug)]
enum Op {
    /// Puts so many keys, each by itself, a step apart.
    Puts {
        first: u16,
        count: u16,
        step: u16,
    },
    /// Deletes a span; one that holds nothing makes no revision.
    Delete(Asked),
    /// Deletes the first span, puts one key of the second, and counts the third: all in one Txn.
    Txn {
        doomed: Asked,
        put: u16,
        asked: Asked,
    },
    /// To this part of what can be compacted, in 256ths.
    Compact {
        part: u8,
    },
    Slice {
        rows: usize,
    },
    Reopen,
    /// Another member is given the rows, as by a snapshot.
    Install,
}

const KEYS: u16 = 400;

fn asked() -> impl Strategy<Value = Asked> {
    (0..KEYS, prop::option::weighted(0.8, 0..KEYS))
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (0..KEYS, 1..80u16, 1..4u16).prop_map(|(first, count, step)| Op::Puts { first, count, step }),
        4 => asked().prop_map(Op::Delete),
        4 => (asked(), 0..KEYS, asked()).prop_map(|(doomed, put, asked)| Op::Txn { doomed, put, asked }),
        2 => any::<u8>().prop_map(|part| Op::Compact { part }),
        2 => (1..200usize).prop_map(|rows| Op::Slice { rows }),
        1 => Just(Op::Reopen),
        1 => Just(Op::Install),
    ];
    vec(op, 1..25)
}

fn key_of(n: u16) -> String {
    format!("/registry/{}/{n:03}", ["pods", "nodes", "leases"][usize::from(n % 3)])
}

fn range_end((first, end): Asked) -> (String, String) {
    (key_of(first), end.map_or("\0".into(), key_of))
}

fn question(asked: Asked, revision: i64) -> RangeRequest {
    let (key, range_end) = range_end(asked);
    RangeRequest { key: key.into(), range_end: range_end.into(), revision, ..RangeRequest::default() }
}

fn request_op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn txn(doomed: Asked, put: u16, asked: Asked) -> InternalRaftRequest {
    let (key, range_end) = range_end(doomed);
    let delete = DeleteRangeRequest { key: key.into(), range_end: range_end.into(), prev_kv: false };
    let put = PutRequest { key: key_of(put).into(), ..PutRequest::default() };
    let list = question(asked, 0);
    let success = vec![
        request_op(Request::RequestRange(list.clone())),
        request_op(Request::RequestDeleteRange(delete)),
        request_op(Request::RequestRange(RangeRequest { count_only: true, ..list.clone() })),
        request_op(Request::RequestRange(list.clone())),
        request_op(Request::RequestPut(put)),
        request_op(Request::RequestRange(RangeRequest { limit: 1, ..list.clone() })),
        request_op(Request::RequestRange(list)),
    ];
    make::txn(TxnRequest { success, ..TxnRequest::default() })
}

/// Inside a Txn every count is that of the list beside it.
fn check_txn(outcome: Outcome) {
    let Outcome::Txn(response) = outcome else { panic!("{outcome:?}") };
    let ranges: Vec<_> = response
        .responses
        .into_iter()
        .filter_map(|op| match op.response {
            Some(Response::ResponseRange(range)) => Some(range),
            _ => None,
        })
        .collect();
    let [_, counted, list, page, list_after] = &ranges[..] else { panic!("{ranges:?}") };
    assert_eq!((counted.count, list.count), (list.kvs.len() as i64, list.kvs.len() as i64));
    assert_eq!((page.count, list_after.count), (list_after.kvs.len() as i64, list_after.kvs.len() as i64));
    assert_eq!(page.more, list_after.kvs.len() > 1);
}

fn step(member: &mut TestMember, op: &Op) {
    match *op {
        Op::Puts { first, count, step } => {
            let index = member.store.facts().applied_index + 1;
            let key = |n: u16| key_of((first + n * step) % KEYS);
            let entry = |n: u16| TestMember::entry(index + u64::from(n), &put(&key(n), "v"));
            member.apply_entries(&(0..count).map(entry).collect::<Vec<_>>());
        }
        Op::Delete(asked) => {
            let (key, end) = range_end(asked);
            member.apply(&delete(&key, &end)).0.unwrap();
        }
        Op::Txn { doomed, put, asked } => check_txn(member.apply(&txn(doomed, put, asked)).0.unwrap()),
        Op::Compact { part } => {
            let (from, to) = (member.store.facts().compacted.max(0), member.store.facts().revision);
            // One that is compacted already is refused, and that is fine here.
            let _ = member.apply(&compact(from + (to - from) * i64::from(part) / 256)).0;
        }
        Op::Slice { rows } => drop(member.slice(rows)),
        Op::Reopen => member.reopen(config()),
        Op::Install => {
            let mut new = member.backend.begin_install().unwrap();
            for table in Table::ALL {
                for (key, value) in member.view().rows(table) {
                    new.put(table, &key, &value).unwrap();
                }
            }
            new.finish().unwrap();
            member.backend.install(new).unwrap();
            member.reopen(config());
        }
    }
}

/// The index against a list of everything in the span, which counts nothing.
fn check_count(member: &TestMember, asked: Asked, revision: i64, limit: i64) {
    let published = member.publish();
    let request = question(asked, revision);
    let list = range(published.moment(), &request).unwrap();
    let keys = list.len as i64;
    assert_eq!((list.count, list.more), (keys, false));
    let counted = range(published.moment(), &RangeRequest { count_only: true, ..request.clone() }).unwrap();
    assert_eq!(counted.count, keys, "{asked:?} at {revision}");
    let page = range(published.moment(), &RangeRequest { limit, ..request.clone() }).unwrap();
    assert_eq!((page.len as i64, page.more, page.count), (keys.min(limit), keys > limit, keys));
    let sorted = RangeRequest { limit, sort_target: 1, ..request };
    let sorted = range(published.moment(), &sorted).unwrap();
    assert_eq!((sorted.len as i64, sorted.more, sorted.count), (keys.min(limit), keys > limit, keys));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_index_counts_what_a_scan_counts(
        ops in ops(),
        questions in vec((asked(), any::<u8>(), 1..300i64), 20),
    ) {
        let mut member = TestMember::new(config());
        for op in &ops {
            let before = member.publish();
            let total = before.keys.total();
            step(&mut member, op);
            member.publish().keys.check(&member.view());
            prop_assert_eq!(before.keys.total(), total, "a published version never changes");
            before.keys.check(&before.view);
            let (asked, part, limit) = questions[0];
            check_count(&member, asked, 0, limit);
            let facts = member.store.facts();
            let from = facts.compacted.max(1);
            check_count(&member, asked, from + (facts.revision - from) * i64::from(part) / 255, limit);
        }
        let facts = member.store.facts();
        let from = facts.compacted.max(1);
        for (asked, part, limit) in questions {
            check_count(&member, asked, 0, limit);
            check_count(&member, asked, from + (facts.revision - from) * i64::from(part) / 255, limit);
        }
    }
}

#[test]
fn trap_9_a_delete_and_its_compaction_before_a_crash_are_not_counted_afterwards() {
    let mut member = TestMember::new(config());
    for n in 0..100 {
        member.apply(&put(&key_of(n), "v")).0.unwrap();
    }
    member.backend.start_flush().unwrap();
    member.backend.complete_flush(); // what an old copy of the index would have been written with
    member.apply(&delete(&key_of(7), "")).0.unwrap(); // 102
    member.apply(&put("other", "v")).0.unwrap();
    member.apply(&compact(103)).0.unwrap();
    while member.slice(10).is_some() {}
    member.backend.start_flush().unwrap();
    member.backend.complete_flush();
    member.backend.crash();
    member.reopen(config());
    member.publish().keys.check(&member.view());
    assert_eq!(member.publish().keys.total(), 100);
    check_count(&member, (0, None), 0, 5);
}

#[test]
fn trap_9_a_tombstone_that_one_member_still_has_changes_no_count() {
    let (mut quick, mut slow) = (TestMember::new(config()), TestMember::new(config()));
    for member in [&mut quick, &mut slow] {
        for n in 0..60 {
            member.apply(&put(&key_of(n), "v")).0.unwrap();
        }
        member.apply(&delete("/registry/nodes/", "/registry/nodes0")).0.unwrap();
        member.apply(&put("other", "v")).0.unwrap();
        member.apply(&compact(63)).0.unwrap();
    }
    while quick.slice(10).is_some() {}
    for member in [&mut quick, &mut slow] {
        member.apply(&put(&key_of(1), "again")).0.unwrap();
        member.publish().keys.check(&member.view());
        assert_eq!(member.publish().keys.total(), 42);
        check_count(member, (1, Some(59)), 0, 3);
        check_count(member, (1, Some(59)), 63, 3);
    }
    while slow.slice(1).is_some() {}
    slow.publish().keys.check(&slow.view());
}

#[test]
fn blocks_grow_with_the_keys_and_go_with_them() {
    let mut member = TestMember::new(config());
    let blocks = |member: &TestMember| member.publish().keys.blocks();
    assert_eq!(blocks(&member), 1);
    for n in 0..KEYS {
        member.apply(&put(&key_of(n), "v")).0.unwrap();
    }
    member.publish().keys.check(&member.view());
    let full = blocks(&member);
    assert!((25..=100).contains(&full), "{full} blocks of 4 to 16 for 400 keys");
    member.apply(&delete("\0", "\0")).0.unwrap();
    assert_eq!((member.publish().keys.total(), blocks(&member)), (0, full), "tombstones are rows");
    member.apply(&put("other", "v")).0.unwrap();
    let revision = member.store.facts().revision;
    member.apply(&compact(revision)).0.unwrap();
    while member.slice(13).is_some() {
        member.publish().keys.check(&member.view());
    }
    assert!(blocks(&member) <= 8, "{} blocks for one key", blocks(&member));
}

#[test]
fn a_range_says_beforehand_about_how_many_rows_it_may_read() {
    let mut member = TestMember::new(config());
    for n in 0..KEYS {
        member.apply(&put(&key_of(n), "v")).0.unwrap();
    }
    let published = member.publish();
    let said = |change: &dyn Fn(&mut RangeRequest)| {
        let mut request = RangeRequest { key: "\0".into(), range_end: "\0".into(), ..RangeRequest::default() };
        change(&mut request);
        crate::mvcc::rows(published.moment(), &request)
    };
    let (all, ends) = (u64::from(KEYS), 16);
    assert_eq!(said(&|_| ()), all);
    assert_eq!(said(&|list| list.range_end = Bytes::new()), 1, "a key");
    let block = said(&|list| list.range_end = "\0\0".into());
    assert!((1..=ends).contains(&block), "{block} rows of a block, though none of its keys is asked for");
    assert_eq!(said(&|page| page.limit = 10), 10 + ends);
    assert_eq!(said(&|counted| counted.count_only = true), ends);
    assert_eq!(said(&|sorted| (sorted.limit, sorted.sort_target, sorted.sort_order) = (10, 1, 0)), 10 + ends);
    assert_eq!(said(&|sorted| (sorted.limit, sorted.sort_target, sorted.sort_order) = (10, 1, 1)), all);
    assert_eq!(said(&|reversed| (reversed.key, reversed.range_end) = ("b".into(), "a".into())), 0);
    let revision = published.facts.revision;
    assert_eq!(said(&|page| (page.limit, page.revision) = (10, revision - 5)), 10 + ends + 5);
    assert_eq!(said(&|page| (page.limit, page.revision) = (10, revision - 200)), 2 * (10 + ends) + 200);
}

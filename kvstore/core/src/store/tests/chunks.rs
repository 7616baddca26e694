//! RangeStream: whatever happens between two chunks, together they are the Range of the first one's moment.

use keelson_proto::etcdserverpb::{RangeRequest, RangeResponse};
use proptest::collection::vec;
use proptest::prelude::*;

use super::make::{compact, delete, put};
use super::*;
use crate::mvcc::chunks::{Chunk, Chunks};
use crate::mvcc::{ReadError, range};

const KEYS: u8 = 60;

/// A change; a deletion of nothing makes no revision.
#[derive(Clone, Debug)]
enum Op {
    Put(u8, usize),
    Delete(u8, u8),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..KEYS, 0..120usize).prop_map(|(key, bytes)| Op::Put(key, bytes)),
        1 => (0..KEYS, 1..8u8).prop_map(|(key, count)| Op::Delete(key, key + count)),
    ]
}

fn key_of(n: u8) -> String {
    format!("k{n:02}")
}

fn apply(member: &mut TestMember, op: &Op) {
    let request = match op {
        Op::Put(key, bytes) => put(&key_of(*key), &"v".repeat(*bytes)),
        Op::Delete(key, end) => delete(&key_of(*key), &key_of(*end)),
    };
    member.apply(&request).0.unwrap();
}

fn kvs(chunk: &Chunk) -> Vec<keelson_proto::mvccpb::KeyValue> {
    RangeResponse::decode(chunk.kvs.clone()).unwrap().kvs
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn chunks_are_one_moment(
        before in vec(op(), 1..150),
        between in vec(vec(op(), 0..6), 12),
        (from, to) in (0..KEYS, prop::option::of(0..KEYS)),
        (limit, back) in (0..70i64, 0..40i64),
        (keys_only, target) in (any::<bool>(), 100..4_000usize),
    ) {
        let mut member = TestMember::new(config());
        before.iter().for_each(|op| apply(&mut member, op));
        let revision = member.store.facts().revision;
        let request = RangeRequest {
            key: key_of(from).into(),
            range_end: to.map_or("\0".into(), key_of).into(),
            revision: if back == 0 { 0 } else { (revision - back).max(1) },
            limit,
            keys_only,
            ..RangeRequest::default()
        };
        let whole = range(member.publish().moment(), &request).unwrap();
        let mut chunks = Chunks::new(request.clone(), target);
        let (mut sent, mut end, mut between) = (Vec::new(), None, between.iter());
        while let Some(chunk) = chunks.next(member.publish().moment()).unwrap() {
            prop_assert!(end.is_none(), "nothing comes after the last");
            prop_assert!(chunk.end.is_some() || !chunk.kvs.is_empty());
            sent.extend(kvs(&chunk));
            end = chunk.end;
            between.next().into_iter().flatten().for_each(|op| apply(&mut member, op));
        }
        let end = end.expect("a last chunk");
        let response = whole.into_response(revision).unwrap();
        prop_assert_eq!((end.revision, end.more, end.count), (revision, response.more, response.count));
        prop_assert_eq!(sent, response.kvs);
    }
}

#[test]
fn a_compaction_in_between_ends_it() {
    let mut member = TestMember::new(config());
    for n in 0..30 {
        member.apply(&put(&key_of(n), "v")).0.unwrap();
    }
    let request = RangeRequest { key: "k".into(), range_end: "l".into(), ..RangeRequest::default() };
    let mut chunks = Chunks::new(request, 1_000_000);
    assert_eq!(kvs(&chunks.next(member.publish().moment()).unwrap().unwrap()).len(), 10);
    // At the revision itself it can be read, above it no longer.
    let revision = member.store.facts().revision;
    member.apply(&compact(revision)).0.unwrap();
    let mut other = Chunks::new(RangeRequest { key: "k".into(), range_end: "l".into(), ..Default::default() }, 1_000);
    assert!(other.next(member.publish().moment()).unwrap().is_some());
    member.apply(&put("other", "v")).0.unwrap();
    member.apply(&compact(revision + 1)).0.unwrap();
    for mut stream in [chunks, other] {
        assert!(matches!(stream.next(member.publish().moment()), Err(ReadError::Answer(Error::Compacted))));
    }
}

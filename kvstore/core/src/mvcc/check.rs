//! What is refused before it is proposed: etcd's checks of a request that need no state, in etcd's order and words.
//!
//! Contract 2.6.2 to 2.6.6; the rule of duplicates was held against etcd 3.7.3, blind spots included: a delete from a key
//! to the end (`range_end` "\0") or of an empty range overlaps nothing, and a delete in a *later* sibling Txn
//! does not see the puts of an earlier one. So one revision can change a key twice, and the store must bear it.
//!
//! One check is ours alone: a Txn nested deeper than [`MAX_NESTING`] is refused, because what is decoded as a request must
//! be decodable as a log entry too, one level deeper, and messages that nest beyond 100 are refused by the decoder. An
//! entry that does not decode would stop every member.
//!
//! What it does not do: anything that depends on the store.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use bytes::{BufMut, Bytes, BytesMut};
use keelson_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::{DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest};

use crate::Error;

/// Levels of Txn in a Txn, the outermost included. Each takes two levels of messages.
pub const MAX_NESTING: usize = 40;

pub fn validate_range(request: &RangeRequest) -> Result<(), Error> {
    if request.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    if SortOrder::try_from(request.sort_order).is_err() || SortTarget::try_from(request.sort_target).is_err() {
        return Err(Error::InvalidSortOption);
    }
    Ok(())
}

/// A stream can't be sorted or filtered: that would have to gather it first.
pub fn validate_range_stream(request: &RangeRequest) -> Result<(), Error> {
    validate_range(request)?;
    let by_key = request.sort_target == SortTarget::Key as i32 && request.sort_order == SortOrder::Ascend as i32;
    if request.sort_order != SortOrder::None as i32 && !by_key {
        return Err(Error::RangeStreamSortOrder);
    }
    let filters =
        [request.min_mod_revision, request.max_mod_revision, request.min_create_revision, request.max_create_revision];
    if filters.iter().any(|revision| *revision != 0) {
        return Err(Error::RangeStreamRevisionFilter);
    }
    Ok(())
}

pub fn validate_put(request: &PutRequest) -> Result<(), Error> {
    if request.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(Error::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(Error::LeaseProvided);
    }
    Ok(())
}

pub fn validate_delete_range(request: &DeleteRangeRequest) -> Result<(), Error> {
    if request.key.is_empty() { Err(Error::EmptyKey) } else { Ok(()) }
}

/// `max_ops` is `--max-txn-ops`.
pub fn validate_txn(request: &TxnRequest, max_ops: usize) -> Result<(), Error> {
    validate_ops(request, max_ops, 1)?;
    changes(&request.success)?;
    changes(&request.failure)?;
    Ok(())
}

/// Whether all operations of both branches are Ranges, so that the Txn is served without the log. A nested Txn is
/// never read-only (contract 2.6.6).
pub fn is_read_only(request: &TxnRequest) -> bool {
    request.success.iter().chain(&request.failure).all(|op| matches!(op.request, Some(Request::RequestRange(_))))
}

fn validate_ops(request: &TxnRequest, max_ops: usize, level: usize) -> Result<(), Error> {
    let ops = request.compare.len().max(request.success.len()).max(request.failure.len());
    if ops > max_ops || level > MAX_NESTING {
        return Err(Error::TooManyOps);
    }
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Error::EmptyKey);
    }
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(Request::RequestRange(range)) => validate_range(range)?,
            Some(Request::RequestPut(put)) => validate_put(put)?,
            Some(Request::RequestDeleteRange(delete)) => validate_delete_range(delete)?,
            Some(Request::RequestTxn(txn)) => validate_ops(txn, max_ops - ops, level + 1)?,
            None => return Err(Error::KeyNotFound),
        }
    }
    Ok(())
}

/// What one level of a Txn and those below it change.
#[derive(Default)]
struct Changes {
    puts: BTreeSet<Bytes>,
    /// First key → end, merged so that no two overlap: requests choose how many there are.
    deletes: BTreeMap<Bytes, Bytes>,
}

impl Changes {
    fn delete(&mut self, request: &DeleteRangeRequest) {
        if request.range_end.is_empty() {
            let mut end = BytesMut::with_capacity(request.key.len() + 1);
            end.put_slice(&request.key);
            end.put_u8(0);
            self.delete_keys(request.key.clone(), end.freeze());
        } else {
            self.delete_keys(request.key.clone(), request.range_end.clone());
        }
    }

    fn delete_keys(&mut self, mut first: Bytes, mut end: Bytes) {
        if first >= end {
            return; // empty, or to the end of all keys: etcd sees no overlap either
        }
        while let Some((before, until)) = self.deletes.range(..=end.clone()).next_back()
            && *until >= first
        {
            let before = before.clone();
            end = end.max(until.clone());
            first = first.min(before.clone());
            self.deletes.remove(&before);
        }
        self.deletes.insert(first, end);
    }

    fn deletes(&self, key: &[u8]) -> bool {
        let at_or_before = (Bound::Unbounded, Bound::Included(key));
        self.deletes.range::<[u8], _>(at_or_before).next_back().is_some_and(|(_, end)| key < end.as_ref())
    }
}

/// Collects the changes of some operations; a key that would be changed twice is refused.
fn changes(ops: &[RequestOp]) -> Result<Changes, Error> {
    let mut all = Changes::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(delete)) = &op.request {
            all.delete(delete);
        }
    }
    for op in ops {
        if let Some(Request::RequestTxn(txn)) = &op.request {
            nested(&mut all, txn)?;
        }
    }
    for op in ops {
        if let Some(Request::RequestPut(put)) = &op.request
            && (all.deletes(&put.key) || !all.puts.insert(put.key.clone()))
        {
            return Err(Error::DuplicateKey);
        }
    }
    Ok(all)
}

/// Adds the changes of a nested Txn; its two branches exclude each other and may change the same keys.
fn nested(all: &mut Changes, txn: &TxnRequest) -> Result<(), Error> {
    let then = changes(&txn.success)?;
    let otherwise = changes(&txn.failure)?;
    for key in &then.puts {
        if all.deletes(key) || all.puts.contains(key) {
            return Err(Error::DuplicateKey);
        }
    }
    for key in otherwise.puts.difference(&then.puts) {
        if all.puts.contains(key) {
            return Err(Error::DuplicateKey);
        }
    }
    if otherwise.puts.iter().any(|key| all.deletes(key)) {
        return Err(Error::DuplicateKey);
    }
    all.puts.extend(then.puts);
    all.puts.extend(otherwise.puts);
    for (first, end) in then.deletes.into_iter().chain(otherwise.deletes) {
        all.delete_keys(first, end);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use keelson_proto::etcdserverpb::InternalRaftRequest;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    fn nested(levels: usize) -> TxnRequest {
        let put = PutRequest { key: "k".into(), ..PutRequest::default() };
        let mut txn = TxnRequest {
            success: vec![RequestOp { request: Some(Request::RequestPut(put)) }],
            ..TxnRequest::default()
        };
        for _ in 1..levels {
            txn = TxnRequest {
                success: vec![RequestOp { request: Some(Request::RequestTxn(txn)) }],
                ..TxnRequest::default()
            };
        }
        txn
    }

    #[test]
    fn what_may_be_proposed_can_be_decoded_from_the_log() {
        let deepest = nested(MAX_NESTING);
        assert_eq!(validate_txn(&deepest, 128), Ok(()));
        assert_eq!(validate_txn(&nested(MAX_NESTING + 1), 128), Err(Error::TooManyOps));
        let entry = InternalRaftRequest { txn: Some(deepest), ..InternalRaftRequest::default() };
        assert_eq!(InternalRaftRequest::decode(entry.encode_to_vec().as_slice()).unwrap(), entry);
    }

    #[test]
    fn the_operations_of_a_level_are_its_longest_list() {
        let get = RequestOp {
            request: Some(Request::RequestRange(RangeRequest { key: "k".into(), ..RangeRequest::default() })),
        };
        let txn = TxnRequest { success: vec![get.clone(); 3], failure: vec![get; 5], ..TxnRequest::default() };
        assert_eq!(validate_txn(&txn, 5), Ok(()));
        assert_eq!(validate_txn(&txn, 4), Err(Error::TooManyOps));
        assert!(is_read_only(&txn));
        assert!(!is_read_only(&nested(2)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// However deletes overlap, the merged ones cover the same keys.
        #[test]
        fn merged_deletes_cover_what_the_deletes_cover(deletes in vec((vec(0..4u8, 1..3), vec(0..4u8, 0..3)), 0..12)) {
            let mut changes = Changes::default();
            for (key, end) in &deletes {
                changes.delete(&DeleteRangeRequest {
                    key: key.clone().into(),
                    range_end: end.clone().into(),
                    prev_kv: false,
                });
            }
            for a in 0..4u8 {
                for key in [vec![a], vec![a, 0], vec![a, 1], vec![a, 3], vec![a, 0, 0]] {
                    let covered = deletes.iter().any(|(first, end)| {
                        if end.is_empty() { *first == key } else { *first <= key && key < *end }
                    });
                    prop_assert_eq!(changes.deletes(&key), covered, "{:?}", key);
                }
            }
        }
    }
}

//! What is refused before it is proposed: etcd's checks of a request that need no state, in etcd's order and words.
//!
//! Contract 2.6.2 to 2.6.6; the rule of duplicates was held against etcd 3.7.3, blind spots included: a delete from a key
//! to the end (`range_end` "\0") or of an empty range overlaps nothing, and a delete in a *later* sibling Txn
//! does not see the puts of an earlier one. So one revision can change a key twice, and the store must bear it.
//!
//! What it does not do: anything that depends on the store.

use std::collections::BTreeSet;

use bytes::Bytes;
use keelson_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::{DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest};

use crate::Error;

pub fn validate_range(request: &RangeRequest) -> Result<(), Error> {
    if request.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    if SortOrder::try_from(request.sort_order).is_err() || SortTarget::try_from(request.sort_target).is_err() {
        return Err(Error::InvalidSortOption);
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
    validate_ops(request, max_ops)?;
    changes(&request.success)?;
    changes(&request.failure)?;
    Ok(())
}

/// Whether all operations of both branches are Ranges, so that the Txn is served without the log. A nested Txn is
/// never read-only (contract 2.6.6).
pub fn is_read_only(request: &TxnRequest) -> bool {
    request.success.iter().chain(&request.failure).all(|op| matches!(op.request, Some(Request::RequestRange(_))))
}

fn validate_ops(request: &TxnRequest, max_ops: usize) -> Result<(), Error> {
    let ops = request.compare.len().max(request.success.len()).max(request.failure.len());
    if ops > max_ops {
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
            Some(Request::RequestTxn(txn)) => validate_ops(txn, max_ops - ops)?,
            None => return Err(Error::KeyNotFound),
        }
    }
    Ok(())
}

/// What one level of a Txn and those below it change.
#[derive(Default)]
struct Changes {
    puts: BTreeSet<Bytes>,
    /// (first, end); an empty end is the key alone.
    deletes: Vec<(Bytes, Bytes)>,
}

impl Changes {
    fn deletes(&self, key: &[u8]) -> bool {
        self.deletes.iter().any(|(first, end)| {
            if end.is_empty() { first.as_ref() == key } else { first.as_ref() <= key && key < end.as_ref() }
        })
    }
}

/// Collects the changes of some operations; a key that would be changed twice is refused.
fn changes(ops: &[RequestOp]) -> Result<Changes, Error> {
    let mut all = Changes::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(delete)) = &op.request {
            all.deletes.push((delete.key.clone(), delete.range_end.clone()));
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
    all.deletes.extend(then.deletes);
    all.deletes.extend(otherwise.deletes);
    Ok(())
}

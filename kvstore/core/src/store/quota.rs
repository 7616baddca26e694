//! The quota: how much the keyspace may grow, and what a request costs (contract 2.9).
//!
//! What is counted is logical and replicated (`mvcc/write.rs`); the limit is each member's own flag. So going over it
//! changes an answer and asks for an alarm, and never what is written: the alarm, once it is in the log, is what makes all
//! members refuse alike.

use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::{PutRequest, RequestOp, TxnRequest};

/// `--quota-backend-bytes=0`.
pub const DEFAULT_BYTES: i64 = 2 * 1024 * 1024 * 1024;

/// What a lease counts for, when it is granted and as long as it stands.
pub const LEASE_COST: i64 = 64;

const PUT_OVERHEAD: i64 = 256;

/// The limit that `--quota-backend-bytes` means; `None`: no limit.
pub fn limit(quota_backend_bytes: i64) -> Option<i64> {
    match quota_backend_bytes {
        0 => Some(DEFAULT_BYTES),
        bytes if bytes < 0 => None,
        bytes => Some(bytes),
    }
}

pub fn put_cost(request: &PutRequest) -> i64 {
    PUT_OVERHEAD + request.key.len() as i64 + request.value.len() as i64
}

/// The dearer of the two branches; 0 for one that puts nothing.
pub fn txn_cost(request: &TxnRequest) -> i64 {
    let branch = |ops: &[RequestOp]| ops.iter().map(op_cost).sum::<i64>();
    branch(&request.success).max(branch(&request.failure))
}

fn op_cost(op: &RequestOp) -> i64 {
    match &op.request {
        Some(Request::RequestPut(put)) => put_cost(put),
        Some(Request::RequestTxn(txn)) => txn_cost(txn),
        _ => 0,
    }
}

/// Whether a request of this cost fits. What costs nothing always does.
pub fn fits(limit: Option<i64>, size_in_use: i64, cost: i64) -> bool {
    cost == 0 || limit.is_none_or(|limit| size_in_use.saturating_add(cost) < limit)
}

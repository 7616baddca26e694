//! What is refused before it is proposed: etcd's checks of a request that need no state, in etcd's order and words.
//!
//! Sources: `v3rpc/key.go` (contract 2.6.2 to 2.6.6). What it does not do: anything that depends on the store.

use keelson_proto::etcdserverpb::{DeleteRangeRequest, PutRequest, RangeRequest, TxnRequest};

use crate::Error;

pub fn validate_range(request: &RangeRequest) -> Result<(), Error> {
    let _ = request;
    Ok(())
}

pub fn validate_put(request: &PutRequest) -> Result<(), Error> {
    let _ = request;
    Ok(())
}

pub fn validate_delete_range(request: &DeleteRangeRequest) -> Result<(), Error> {
    let _ = request;
    Ok(())
}

/// `max_ops` is `--max-txn-ops`.
pub fn validate_txn(request: &TxnRequest, max_ops: usize) -> Result<(), Error> {
    let _ = (request, max_ops);
    Ok(())
}

/// Whether all operations of both branches are Ranges, so that the Txn is served without the log. A nested Txn is
/// never read-only (contract 2.6.6).
pub fn is_read_only(request: &TxnRequest) -> bool {
    let _ = request;
    false
}

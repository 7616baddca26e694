//! The raft thread.

use bytes::Bytes;
use kvstore_core::Error;
use kvstore_core::types::{LeaseId, RequestId};
use tokio::sync::oneshot;

use crate::inbox::Waiter;

/// What the raft thread is told.
pub(crate) enum Input {
    /// One request, encoded; proposed once.
    Propose { id: RequestId, data: Bytes, waiter: Waiter },
    /// A linearizable read; all that come in one batch share a round.
    Read { waiter: Waiter },
    /// A keep-alive, answered by the leader's clock; `NotLeader` elsewhere.
    KeepAlive { id: LeaseId, answer: oneshot::Sender<Result<i64, Error>> },
    /// What is left of a lease, by the leader's clock; `NotLeader` elsewhere.
    Remaining { id: LeaseId, answer: oneshot::Sender<Result<Option<Remaining>, Error>> },
}

/// What the leader's clock says of a lease, in seconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Remaining {
    pub(crate) remaining_s: i64,
    pub(crate) granted_s: i64,
}

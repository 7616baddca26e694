//! What locks and elections are made of: a lease, a guarded Txn, and waiting until a key is deleted.
//!
//! etcd serves both through its own client library inside the server. The compositions here are that library's
//! (contract 2.12), down to which step fails with which error, on the machines themselves: proposals and reads go through the
//! inbox, and who waits is woken by the watch hub.
//!
//! What it does not do: hold a session. A lease that is granted here is kept alive by nobody; its holder has to do that.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use keelson_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use keelson_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::response_op::Response;
use keelson_proto::etcdserverpb::{
    Compare, DeleteRangeRequest, InternalRaftRequest, LeaseGrantRequest, PutRequest, RangeRequest, RangeResponse,
    RequestOp, ResponseHeader, TxnRequest, TxnResponse, WatchCreateRequest,
};
use keelson_proto::mvccpb::event::EventType;
use keelson_proto::mvccpb::{Event, KeyValue};
use kvstore_core::Error;
use kvstore_core::mvcc::{self, ReadError, check};
use kvstore_core::store::{Outcome, quota};
use kvstore_core::watch::Frame;
use prost::Message;
use tokio_util::sync::CancellationToken;

use super::{complete, header};
use crate::Inbox;
use crate::inbox::WatchStream;

/// Of a lease that a request did not bring, seconds.
const SESSION_TTL_S: i64 = 60;

/// The means of a recipe.
#[derive(Clone)]
pub(super) struct Recipe {
    inbox: Inbox,
    max_txn_ops: usize,
    session_ttl_s: i64,
    shutdown: CancellationToken,
}

impl Recipe {
    /// `min_ttl_s` is the shortest TTL that is granted; cancelling `shutdown` ends whoever waits.
    pub(super) fn new(inbox: Inbox, max_txn_ops: usize, min_ttl_s: i64, shutdown: CancellationToken) -> Recipe {
        Recipe { inbox, max_txn_ops, session_ttl_s: SESSION_TTL_S.max(min_ttl_s), shutdown }
    }

    pub(super) fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// The lease to go by: the one that was brought, known or not, or a new one.
    pub(super) async fn session(&self, lease: i64) -> Result<i64, Error> {
        if lease != 0 {
            return Ok(lease);
        }
        self.inbox.check_quota(quota::LEASE_COST).await?;
        let grant = LeaseGrantRequest { ttl: self.session_ttl_s, id: self.inbox.next_id() };
        match self.propose(InternalRaftRequest { lease_grant: Some(grant), ..Default::default() }).await? {
            Outcome::LeaseGrant(granted) => Ok(granted.id),
            _ => Err(unfit()),
        }
    }

    /// If the key was created at `created` (0: does not exist) then the one, else the other.
    pub(super) async fn if_created_at(
        &self,
        key: &Bytes,
        created: i64,
        success: Vec<Request>,
        failure: Vec<Request>,
    ) -> Result<TxnResponse, Error> {
        let compare = Compare {
            key: key.clone(),
            result: CompareResult::Equal.into(),
            target: CompareTarget::Create.into(),
            target_union: Some(TargetUnion::CreateRevision(created)),
            ..Default::default()
        };
        let ops = |ops: Vec<Request>| ops.into_iter().map(|op| RequestOp { request: Some(op) }).collect();
        let txn = TxnRequest { compare: vec![compare], success: ops(success), failure: ops(failure) };
        self.inbox.check_quota(quota::txn_cost(&txn)).await?;
        check::validate_txn(&txn, self.max_txn_ops)?;
        match self.propose(InternalRaftRequest { txn: Some(txn), ..Default::default() }).await? {
            Outcome::Txn(mut response) => {
                complete(&self.inbox, &mut response.header);
                Ok(response)
            }
            _ => Err(unfit()),
        }
    }

    pub(super) async fn delete(&self, key: Bytes) -> Result<ResponseHeader, Error> {
        let delete = DeleteRangeRequest { key, ..Default::default() };
        check::validate_delete_range(&delete)?;
        match self.propose(InternalRaftRequest { delete_range: Some(delete), ..Default::default() }).await? {
            Outcome::DeleteRange(mut response) => {
                complete(&self.inbox, &mut response.header);
                Ok(response.header.unwrap_or_default())
            }
            _ => Err(unfit()),
        }
    }

    async fn propose(&self, request: InternalRaftRequest) -> Result<Outcome, Error> {
        Box::pin(self.inbox.propose(request)).await
    }

    /// A linearizable read.
    pub(super) async fn get(&self, request: RangeRequest) -> Result<RangeResponse, Error> {
        self.inbox.read_index().await?;
        let inbox = self.inbox.clone();
        let read = tokio::task::spawn_blocking(move || {
            let published = inbox.published();
            let revision = published.facts.revision;
            let response = mvcc::range(published.moment(), &request)?.into_response(revision)?;
            Ok::<_, ReadError>(response)
        });
        // The pool's thread panicked or the runtime is going away.
        let mut response = match read.await.map_err(|_| Error::Stopped)? {
            Ok(response) => response,
            Err(ReadError::Answer(error)) => return Err(error),
            Err(ReadError::Fatal(fatal)) => return Err(self.inbox.broken(&fatal)),
        };
        complete(&self.inbox, &mut response.header);
        Ok(response)
    }

    /// Waits until no key with `prefix` is left that was created at `created` or before.
    pub(super) async fn wait_deletes(&self, prefix: &Bytes, created: i64) -> Result<(), Error> {
        loop {
            let before = RangeRequest { max_create_revision: created, ..newest_of(prefix) };
            let response = self.get(before).await?;
            let Some(last) = response.kvs.into_iter().next() else { return Ok(()) };
            let revision = response.header.map_or(0, |header| header.revision);
            let mut watched = self.watch(last.key, Bytes::new(), revision);
            while !watched.next().await?.events.iter().any(|event| event.r#type() == EventType::Delete) {}
        }
    }

    /// Watches from `revision` on.
    pub(super) fn watch(&self, key: Bytes, range_end: Bytes, revision: i64) -> Watched {
        let stream = self.inbox.watch();
        let create = WatchCreateRequest { key, range_end, start_revision: revision, ..Default::default() };
        stream.with(|hub, id| hub.create(id, &create));
        Watched { stream, recipe: self.clone(), frames: VecDeque::new() }
    }

    /// Does what has to be done for a client that is no longer there.
    pub(super) fn afterwards(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) {
        // Without a runtime everything ends, and the lease sees to the rest.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            if let Err(error) = work.await {
                tracing::warn!(%error, "{what} was not given back; its lease will");
            }
        });
    }
}

/// A watch of some keys.
pub(super) struct Watched {
    stream: WatchStream,
    recipe: Recipe,
    frames: VecDeque<Frame>,
}

/// Events that came together, and the header of their moment.
pub(super) struct Seen {
    pub(super) header: ResponseHeader,
    pub(super) events: Vec<Event>,
}

impl Watched {
    /// The next events; none at all for an answer without any. An error once the watch is cancelled.
    pub(super) async fn next(&mut self) -> Result<Seen, Error> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return self.seen(frame);
            }
            let frames = tokio::select! {
                frames = poll_fn(|cx| poll_take(&self.stream, cx)) => frames,
                () = self.recipe.shutdown.cancelled() => return Err(Error::Stopped),
            };
            self.frames.extend(frames);
        }
    }

    fn seen(&self, frame: Frame) -> Result<Seen, Error> {
        if frame.canceled {
            return Err(if frame.compact_revision != 0 { Error::Compacted } else { Error::WatchCanceled });
        }
        let events = frame.events.into_iter().map(Event::decode).collect::<Result<_, _>>().map_err(|_| unfit())?;
        Ok(Seen { header: header(&self.recipe.inbox, frame.revision), events })
    }
}

/// Some frames of a stream.
fn poll_take(stream: &WatchStream, cx: &mut Context<'_>) -> Poll<Vec<Frame>> {
    // Before looking: who rings from here on wakes us.
    stream.listen(cx.waker());
    let frames = stream.with(|hub, id| hub.take(id, TAKE));
    if frames.is_empty() { Poll::Pending } else { Poll::Ready(frames) }
}

/// Frames taken from the hub under one lock.
const TAKE: usize = 8;

fn unfit() -> Error {
    tracing::error!("the store's outcome does not fit the request");
    Error::Other("keelson: the outcome does not fit the request")
}

/// The keys of a name: `name/lease`, the lease in hexadecimal.
pub(super) fn prefix_of(name: &[u8]) -> Bytes {
    [name, b"/"].concat().into()
}

/// The key of a lease under a prefix.
pub(super) fn key_of(prefix: &[u8], lease: i64) -> Bytes {
    let sign = if lease < 0 { "-" } else { "" };
    let mut key = BytesMut::from(prefix);
    key.extend_from_slice(format!("{sign}{:x}", lease.unsigned_abs()).as_bytes());
    key.freeze()
}

pub(super) fn put(key: &Bytes, value: Bytes, lease: i64) -> Request {
    Request::RequestPut(PutRequest { key: key.clone(), value, lease, ..Default::default() })
}

pub(super) fn get(key: &Bytes) -> RangeRequest {
    RangeRequest { key: key.clone(), ..Default::default() }
}

/// The first created key with `prefix`, which ends with a slash: whoever has the lock or leads.
pub(super) fn oldest_of(prefix: &Bytes) -> RangeRequest {
    let order = SortOrder::Ascend.into();
    RangeRequest { sort_order: order, ..newest_of(prefix) }
}

fn newest_of(prefix: &Bytes) -> RangeRequest {
    RangeRequest {
        key: prefix.clone(),
        range_end: end_of(prefix),
        limit: 1,
        sort_order: SortOrder::Descend.into(),
        sort_target: SortTarget::Create.into(),
        ..Default::default()
    }
}

/// Behind all keys with `prefix`, which ends with a slash.
pub(super) fn end_of(prefix: &Bytes) -> Bytes {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end.into()
}

/// The first pair that the operation at `place` of a Txn's branch found.
pub(super) fn found(response: &TxnResponse, place: usize) -> Option<&KeyValue> {
    match response.responses.get(place)?.response.as_ref()? {
        Response::ResponseRange(range) => range.kvs.first(),
        _ => None,
    }
}

/// The revision of a header.
pub(super) fn revision(header: Option<&ResponseHeader>) -> i64 {
    header.map_or(0, |header| header.revision)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_spelled_as_go_prints_a_lease() {
        let prefix = prefix_of(b"n\xff");
        assert_eq!(prefix, &b"n\xff/"[..]);
        assert_eq!(key_of(&prefix, 0x12c8), &b"n\xff/12c8"[..]);
        assert_eq!(key_of(&prefix_of(b""), -1), "/-1");
        assert_eq!(key_of(&prefix_of(b"a"), i64::MIN), "a/-8000000000000000");
        assert_eq!(end_of(&prefix_of(b"a")), "a0");
    }
}

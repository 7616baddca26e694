//! The KV service: what each RPC does, once, for the thin handler ([`super::unary`]) and for tonic's routes alike.
//!
//! A write is checked, proposed, and answered with its outcome. A read confirms by ReadIndex that this member is up to
//! date, unless it asked for less, and is served from the published view. A read that may touch many rows, as
//! the counted index knows beforehand, leaves the runtime for tokio's blocking pool, so that a big list never delays a
//! heartbeat's worth of small requests.
//!
//! What it does not do: RangeStream (`range_stream`).

use std::sync::Arc;
use std::time::Duration;

use keelson_proto::etcdserverpb::kv_server::Kv;
use keelson_proto::etcdserverpb::request_op::Request as Op;
use keelson_proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, InternalRaftRequest, PutRequest,
    PutResponse, RangeRequest, RangeResponse, RangeStreamResponse, ResponseHeader, TxnRequest, TxnResponse,
};
use kvstore_core::Error;
use kvstore_core::mvcc::{self, Ranged, ReadError, check};
use kvstore_core::store::{Outcome, quota};
use tonic::{Request, Response, Status};

use super::status::{read_status, status};
use super::{Context, complete, unexpected};
use crate::inbox::Published;

/// Bounds of what a runtime reads itself: about half a millisecond. A trip to the pool and back costs some 20 µs, and a
/// heartbeat's worth of small requests may wait behind what is read here.
const INLINE_ROWS: u64 = 2_048;
const INLINE_BYTES: u64 = 1 << 20;

/// How often a physical compaction looks whether this member has deleted what it had to.
const PHYSICAL_POLL: Duration = Duration::from_millis(10);

/// What a Range found, and the header of the moment it was read at.
pub(crate) struct Found {
    pub(crate) header: ResponseHeader,
    pub(crate) ranged: Ranged,
}

pub(crate) async fn range(context: &Context, request: RangeRequest) -> Result<Found, Status> {
    check::validate_range(&request).map_err(|e| status(&e))?;
    if !request.serializable {
        context.inbox.read_index().await.map_err(|e| status(&e))?;
    }
    let published = context.inbox.published();
    let bounds = published.facts.bounds();
    let header = super::header(&context.inbox, bounds.revision);
    let ranged = if is_small(&published, [&request]) {
        mvcc::range(published.moment(), &request)
    } else {
        on_the_pool(move || mvcc::range(published.moment(), &request)).await
    };
    Ok(Found { header, ranged: ranged.map_err(|e| read_status(&e))? })
}

pub(crate) async fn put(context: &Context, request: PutRequest) -> Result<PutResponse, Status> {
    context.inbox.check_quota(quota::put_cost(&request)).await.map_err(|e| status(&e))?;
    check::validate_put(&request).map_err(|e| status(&e))?;
    match propose(context, InternalRaftRequest { put: Some(request), ..Default::default() }).await? {
        Outcome::Put(mut response) => {
            complete(&context.inbox, &mut response.header);
            Ok(response)
        }
        _ => Err(unexpected()),
    }
}

pub(crate) async fn delete_range(
    context: &Context,
    request: DeleteRangeRequest,
) -> Result<DeleteRangeResponse, Status> {
    check::validate_delete_range(&request).map_err(|e| status(&e))?;
    match propose(context, InternalRaftRequest { delete_range: Some(request), ..Default::default() }).await? {
        Outcome::DeleteRange(mut response) => {
            complete(&context.inbox, &mut response.header);
            Ok(response)
        }
        _ => Err(unexpected()),
    }
}

pub(crate) async fn txn(context: &Context, request: TxnRequest) -> Result<TxnResponse, Status> {
    context.inbox.check_quota(quota::txn_cost(&request)).await.map_err(|e| status(&e))?;
    check::validate_txn(&request, context.limits.max_txn_ops).map_err(|e| status(&e))?;
    if check::is_read_only(&request) {
        return read_only_txn(context, request).await;
    }
    match propose(context, InternalRaftRequest { txn: Some(request), ..Default::default() }).await? {
        Outcome::Txn(mut response) => {
            complete(&context.inbox, &mut response.header);
            Ok(response)
        }
        _ => Err(unexpected()),
    }
}

pub(crate) async fn compact(context: &Context, request: CompactionRequest) -> Result<CompactionResponse, Status> {
    let physical = request.physical;
    match propose(context, InternalRaftRequest { compaction: Some(request), ..Default::default() }).await? {
        Outcome::Compaction(mut response) => {
            // The deletion runs in slices between applies, and every slice publishes how far it is.
            while physical && context.inbox.published().facts.compacting {
                tokio::time::sleep(PHYSICAL_POLL).await;
            }
            complete(&context.inbox, &mut response.header);
            Ok(response)
        }
        _ => Err(unexpected()),
    }
}

/// A Txn that can change nothing needs no place in the log.
async fn read_only_txn(context: &Context, request: TxnRequest) -> Result<TxnResponse, Status> {
    let serializable = request.success.iter().chain(&request.failure).all(|op| match &op.request {
        Some(Op::RequestRange(range)) => range.serializable,
        _ => false,
    });
    if !serializable {
        context.inbox.read_index().await.map_err(|e| status(&e))?;
    }
    let published = context.inbox.published();
    let ops = || request.success.iter().chain(&request.failure).filter_map(|op| op.request.as_ref());
    let ranges = ops().filter_map(|op| match op {
        Op::RequestRange(range) => Some(range),
        _ => None,
    });
    let small = is_small(&published, ranges);
    let read = move || mvcc::txn::read(published.moment(), &request);
    let mut response = if small { read() } else { on_the_pool(read).await }.map_err(|e| read_status(&e))?;
    complete(&context.inbox, &mut response.header);
    Ok(response)
}

async fn propose(context: &Context, request: InternalRaftRequest) -> Result<Outcome, Status> {
    Box::pin(context.inbox.propose(request)).await.map_err(|e| status(&e))
}

/// Whether ranges are done sooner than a trip to another thread pays: the counts say beforehand how many rows they may
/// look at, and the store's size how large those are.
fn is_small<'a>(published: &Published, ranges: impl IntoIterator<Item = &'a RangeRequest>) -> bool {
    let moment = published.moment();
    let rows = ranges.into_iter().fold(0_u64, |rows, range| rows.saturating_add(mvcc::rows(moment, range)));
    let row_bytes = published.facts.size_in_use.max(0) as u64 / published.keys.rows().max(1);
    rows <= 1 || (rows <= INLINE_ROWS && rows.saturating_mul(row_bytes) <= INLINE_BYTES)
}

async fn on_the_pool<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, ReadError> + Send + 'static,
) -> Result<T, ReadError> {
    match tokio::task::spawn_blocking(read).await {
        Ok(result) => result,
        // The pool's thread panicked or the runtime is going away.
        Err(_) => Err(ReadError::Answer(Error::Stopped)),
    }
}

/// tonic's face of the same functions.
#[derive(Clone)]
pub(crate) struct KvService(pub(crate) Arc<Context>);

#[tonic::async_trait]
impl Kv for KvService {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let found = range(&self.0, request.into_inner()).await?;
        let mut response =
            found.ranged.into_response(found.header.revision).map_err(|e| read_status(&ReadError::Fatal(e)))?;
        response.header = Some(found.header);
        Ok(Response::new(response))
    }

    type RangeStreamStream = tokio_stream::Empty<Result<RangeStreamResponse, Status>>;

    async fn range_stream(&self, _: Request<RangeRequest>) -> Result<Response<Self::RangeStreamStream>, Status> {
        // Dispatched before the routes are asked.
        Err(unexpected())
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        put(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        delete_range(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        txn(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn compact(&self, request: Request<CompactionRequest>) -> Result<Response<CompactionResponse>, Status> {
        compact(&self.0, request.into_inner()).await.map(Response::new)
    }
}

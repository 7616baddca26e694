//! What this member offers its peers.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use keelson_proto::etcdserverpb::LeaseKeepAliveResponse;
use keelson_proto::peer::peer_server::{Peer, PeerServer};
use keelson_proto::peer::snapshot_chunk::Chunk;
use keelson_proto::peer::{
    ForwardRequest, ForwardResponse, HelloRequest, HelloResponse, RaftBatch, RaftSummary, SnapshotChunk, SnapshotHead,
    SnapshotSummary, forward_request, forward_response,
};
use kvstore_core::Fatal;
use kvstore_core::backend::Installed;
use kvstore_core::replica::wire;
use kvstore_core::types::LeaseId;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::{CONNECTION_WINDOW_BYTES, Ids, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, STREAM_WINDOW_BYTES, write_error};
use crate::disk::snapshot::{ROWS_VERSION, ReadIn};
use crate::disk::{NewState, Nursery};
use crate::driver::Input;
use crate::inbox::Inbox;
use crate::mailbox::{Mailbox, Refused};

/// Pings to a peer that is silent, and how long an answer may take.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Between two chunks of a snapshot.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(10);

/// Inputs that may wait for the raft thread before peers are told to wait.
const DRIVER_QUEUE: usize = 65_536;

/// The peers' port, until `stop`.
pub(crate) async fn serve(
    listeners: Vec<TcpListener>,
    service: PeerService,
    stop: CancellationToken,
) -> Result<(), Fatal> {
    let service =
        PeerServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(usize::MAX);
    for listener in listeners {
        let listener = tokio::net::TcpListener::from_std(listener)
            .map_err(|error| Fatal::Invariant(format!("the peers' listener can't be used: {error}")))?;
        // A sender that is gone without a word must not keep its streams, or its snapshot the place of the next one's.
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .add_service(service.clone());
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tokio::spawn(server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()));
    }
    stop.cancelled().await;
    Ok(())
}

/// The next chunk of a snapshot; a sender that pings and sends none has lost its turn.
async fn next_chunk(stream: &mut Streaming<SnapshotChunk>) -> Result<Option<SnapshotChunk>, Status> {
    tokio::time::timeout(CHUNK_TIMEOUT, stream.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no chunk of the snapshot came for too long"))?
}

#[derive(Clone)]
pub(crate) struct PeerService {
    ids: Ids,
    driver: Mailbox<Input>,
    inbox: Inbox,
    nursery: Arc<Mutex<Nursery>>,
}

impl PeerService {
    pub(crate) fn new(ids: Ids, driver: Mailbox<Input>, inbox: Inbox, nursery: Nursery) -> Self {
        PeerService { ids, driver, inbox, nursery: Arc::new(Mutex::new(nursery)) }
    }

    fn check(&self, cluster: u64, to: u64) -> Result<(), Status> {
        if cluster != self.ids.cluster.0 {
            return Err(Status::failed_precondition(format!(
                "cluster ID mismatch: this member is in {}, the caller in {cluster:x}",
                self.ids.cluster
            )));
        }
        if to != self.ids.member.0 {
            return Err(Status::failed_precondition(format!("this is member {}, not {to:x}", self.ids.member)));
        }
        Ok(())
    }

    fn tell(&self, input: Input) -> Result<(), Status> {
        self.driver.try_push(input, DRIVER_QUEUE).map_err(|refused| match refused {
            Refused::Full => Status::resource_exhausted("the raft thread is behind"),
            Refused::Closed => Status::unavailable("this member is stopping"),
        })
    }
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        let caller = request.into_inner();
        if caller.cluster_id != self.ids.cluster.0 {
            tracing::warn!(
                peer = format!("{:x}", caller.member_id),
                "request cluster ID mismatch: it is in {:x}, this member in {}",
                caller.cluster_id,
                self.ids.cluster
            );
        }
        Ok(Response::new(HelloResponse {
            cluster_id: self.ids.cluster.0,
            member_id: self.ids.member.0,
            protocol_version: PROTOCOL_VERSION,
            server_version: env!("CARGO_PKG_VERSION").into(),
        }))
    }

    async fn raft(&self, request: Request<Streaming<RaftBatch>>) -> Result<Response<RaftSummary>, Status> {
        let mut stream = request.into_inner();
        let mut summary = RaftSummary::default();
        while let Some(batch) = stream.message().await? {
            self.check(batch.cluster_id, batch.to)?;
            summary.batches += 1;
            summary.messages += batch.messages.len() as u64;
            self.tell(Input::Messages(batch.messages))?;
        }
        Ok(Response::new(summary))
    }

    /// Answered once the state is complete and on disk and Raft has been asked whether it wants it.
    async fn snapshot(&self, request: Request<Streaming<SnapshotChunk>>) -> Result<Response<SnapshotSummary>, Status> {
        let mut stream = request.into_inner();
        let Some(SnapshotChunk { chunk: Some(Chunk::Head(head)) }) = stream.message().await? else {
            return Err(Status::invalid_argument("a snapshot begins with its head"));
        };
        self.check(head.cluster_id, head.to)?;
        if head.format_version != ROWS_VERSION {
            return Err(Status::failed_precondition(format!(
                "rows of format {} are unknown here",
                head.format_version
            )));
        }
        let Ok(nursery) = Arc::clone(&self.nursery).try_lock_owned() else {
            return Err(Status::resource_exhausted("another snapshot is on its way here"));
        };
        let (chunks, incoming) = mpsc::channel(4);
        // RocksDB's writes must not hold up the heartbeats of this runtime.
        let writer = tokio::task::spawn_blocking(move || write_snapshot(&nursery, incoming));
        while let Some(chunk) = next_chunk(&mut stream).await? {
            if chunks.send(chunk).await.is_err() {
                break;
            }
        }
        drop(chunks);
        let written = writer.await.map_err(|error| Status::internal(error.to_string()))?;
        let (new, installed, rows) = written.map_err(|fatal| Status::data_loss(fatal.to_string()))?;
        check_position(&head, &installed)?;
        tracing::info!(index = installed.index, rows, "received and saved a database snapshot");
        self.tell(Input::SnapshotReceived { message: head.message, new })?;
        Ok(Response::new(SnapshotSummary { rows }))
    }

    async fn forward(&self, request: Request<ForwardRequest>) -> Result<Response<ForwardResponse>, Status> {
        let request = request.into_inner();
        self.check(request.cluster_id, request.to)?;
        let response = match request.request {
            Some(forward_request::Request::LeaseKeepAlive(ask)) => {
                let ttl = self.inbox.keep_alive_here(LeaseId(ask.id)).await.map_err(|e| write_error(&e))?;
                let response = LeaseKeepAliveResponse { id: ask.id, ttl, ..LeaseKeepAliveResponse::default() };
                forward_response::Response::LeaseKeepAlive(response)
            }
            Some(forward_request::Request::LeaseTimeToLive(ask)) => {
                let answer = self.inbox.time_to_live_here(LeaseId(ask.id), ask.keys).await;
                forward_response::Response::LeaseTimeToLive(answer.map_err(|e| write_error(&e))?)
            }
            None => return Err(Status::unimplemented("this member does not know the forwarded request")),
        };
        Ok(Response::new(ForwardResponse { response: Some(response) }))
    }
}

fn write_snapshot(
    nursery: &Nursery,
    mut chunks: mpsc::Receiver<SnapshotChunk>,
) -> Result<(NewState, Installed, u64), Fatal> {
    let mut state = ReadIn::new(nursery.begin()?);
    while let Some(chunk) = chunks.blocking_recv() {
        match chunk.chunk {
            Some(Chunk::Rows(rows)) => state.rows(&rows)?,
            Some(Chunk::Tail(tail)) => return state.finish(&tail),
            Some(Chunk::Head(_)) | None => break,
        }
    }
    Err(Fatal::Damaged { table: "snapshot", message: "the stream ended before its tail".into() })
}

/// The rows must hold exactly what the message promises to Raft.
fn check_position(head: &SnapshotHead, installed: &Installed) -> Result<(), Status> {
    let promised = wire::facts(&head.message).map_err(|fatal| Status::invalid_argument(fatal.to_string()))?.snapshot;
    if promised.is_none_or(|at| (at.index, at.term) != (installed.index, installed.term)) {
        return Err(Status::data_loss(format!("the message promises {promised:?}, the rows hold {installed:?}")));
    }
    Ok(())
}

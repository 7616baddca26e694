//! The sending side of a link: connect, introduce, stream; and again.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use keelson_proto::peer::peer_client::PeerClient;
use keelson_proto::peer::snapshot_chunk::Chunk;
use keelson_proto::peer::{HelloRequest, RaftBatch, SnapshotChunk, SnapshotHead};
use kvstore_core::Fatal;
use kvstore_core::replica::{Position, SnapshotBuild, wire};
use kvstore_core::store::view;
use kvstore_core::types::MemberId;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use super::{CONNECTION_WINDOW_BYTES, Ids, Link, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, STREAM_WINDOW_BYTES};
use crate::disk::snapshot::{ROWS_VERSION, read_out};
use crate::driver::Input;
use crate::inbox::Published;
use crate::mailbox::Mailbox;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Between two attempts; doubled up to the second while nobody answers.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(320));
/// Messages of one batch, in bytes; a larger one travels alone.
const BATCH_BYTES: usize = 2 << 20;

/// A link's task: for ever, until `stop`.
pub(super) async fn run(link: Arc<Link>, ids: Ids, driver: Mailbox<Input>, stop: CancellationToken) {
    let mut backoff = BACKOFF.0;
    let mut told = false;
    let mut next_url = 0;
    while !stop.is_cancelled() {
        let url = link.urls.get(next_url % link.urls.len().max(1)).cloned().unwrap_or_default();
        next_url += 1;
        let attempt = tokio::select! {
            attempt = connect(&url, &link, ids) => attempt,
            () = stop.cancelled() => return,
        };
        match attempt {
            Ok(client) => {
                tracing::info!(peer = %link.id, url, "established connection with remote peer");
                (backoff, told) = (BACKOFF.0, false);
                link.connected(client.clone());
                let ended = tokio::select! {
                    ended = stream_to(client, &link, ids) => ended,
                    () = stop.cancelled() => return,
                };
                tracing::warn!(peer = %link.id, "lost connection with remote peer: {ended}");
            }
            Err(error) => {
                if !told {
                    tracing::warn!(peer = %link.id, url, "can't reach remote peer: {error}");
                    told = true;
                }
            }
        }
        link.disconnected();
        let _ = driver.push(Input::Unreachable(link.id));
        tokio::select! {
            () = tokio::time::sleep(backoff) => backoff = (backoff * 2).min(BACKOFF.1),
            () = stop.cancelled() => return,
        }
    }
}

async fn connect(url: &str, link: &Link, ids: Ids) -> Result<PeerClient<Channel>, String> {
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|e| e.to_string())?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    let channel = endpoint.connect().await.map_err(|e| chain(&e))?;
    let mut client =
        PeerClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(usize::MAX);
    let hello = HelloRequest {
        cluster_id: ids.cluster.0,
        member_id: ids.member.0,
        protocol_version: PROTOCOL_VERSION,
        server_version: env!("CARGO_PKG_VERSION").into(),
    };
    let mut hello = tonic::Request::new(hello);
    hello.set_timeout(CONNECT_TIMEOUT);
    let answer = client.hello(hello).await.map_err(|status| status.message().to_owned())?.into_inner();
    if answer.cluster_id != ids.cluster.0 {
        return Err(format!("cluster ID mismatch: it is in {:x}, this member in {}", answer.cluster_id, ids.cluster));
    }
    if answer.member_id != link.id.0 {
        return Err(format!("member {:x} answers there, not {}", answer.member_id, link.id));
    }
    if answer.protocol_version != PROTOCOL_VERSION {
        return Err(format!("it speaks version {} of the peer protocol", answer.protocol_version));
    }
    Ok(client)
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

/// Streams what the queue gets until the connection ends; says how.
async fn stream_to(mut client: PeerClient<Channel>, link: &Arc<Link>, ids: Ids) -> String {
    let start = (Arc::clone(link), Vec::new().into_iter());
    let batches = stream::unfold(start, move |(link, mut waiting)| async move {
        loop {
            let messages = next_batch(&mut waiting);
            if !messages.is_empty() {
                let batch = RaftBatch {
                    cluster_id: ids.cluster.0,
                    from: ids.member.0,
                    to: link.id.0,
                    protocol_version: PROTOCOL_VERSION,
                    messages,
                };
                return Some((batch, (link, waiting)));
            }
            // A ring that came meanwhile is kept by the bell.
            link.filled.notified().await;
            waiting = link.take().into_iter();
        }
    });
    match client.raft(batches).await {
        Ok(_) => "the peer closed the stream".into(),
        Err(status) => chain(&status),
    }
}

/// The next messages, as many as fit into a batch.
fn next_batch(waiting: &mut std::vec::IntoIter<Bytes>) -> Vec<Bytes> {
    let mut bytes = 0;
    let mut batch = Vec::new();
    while let Some(message) = waiting.as_slice().first() {
        bytes += message.len();
        if !batch.is_empty() && bytes > BATCH_BYTES {
            break;
        }
        batch.extend(waiting.next());
    }
    batch
}

/// Tells Raft how a transfer ended, also if its task just vanished (trap 4).
pub(super) struct Transfer {
    to: MemberId,
    driver: Mailbox<Input>,
    ok: bool,
}

impl Transfer {
    pub(super) fn begin(to: MemberId, driver: Mailbox<Input>) -> Transfer {
        Transfer { to, driver, ok: false }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let _ = self.driver.push(Input::SnapshotSent { to: self.to, ok: self.ok });
    }
}

/// Streams a view to a peer.
pub(super) async fn send_snapshot(
    link: Arc<Link>,
    ids: Ids,
    build: SnapshotBuild,
    published: Arc<Published>,
    mut outcome: Transfer,
) {
    let Some(mut client) = link.client() else { return };
    let (chunks, outgoing) = mpsc::channel(4);
    let to = link.id;
    let reader = tokio::task::spawn_blocking(move || read_snapshot(&published, ids, to, &build, &chunks));
    let answer = client.snapshot(ReceiverStream::new(outgoing)).await;
    match (reader.await, answer) {
        (Ok(Ok(())), Ok(summary)) => {
            outcome.ok = true;
            tracing::info!(peer = %to, rows = summary.into_inner().rows, "sent database snapshot");
        }
        (Ok(Err(fatal)), _) => tracing::warn!(peer = %to, "failed to read a snapshot: {fatal}"),
        (_, Err(status)) => tracing::warn!(peer = %to, "failed to send a snapshot: {}", status.message()),
        (Err(error), _) => tracing::warn!(peer = %to, "failed to read a snapshot: {error}"),
    }
}

/// Index, term and configuration are those of the view itself, which may be later than what was asked for (trap 4).
fn read_snapshot(
    published: &Published,
    ids: Ids,
    to: MemberId,
    build: &SnapshotBuild,
    chunks: &mpsc::Sender<SnapshotChunk>,
) -> Result<(), Fatal> {
    let view = &published.view;
    let applied = view::applied(view)?;
    let conf_state = view::conf_state_bytes(view)?.unwrap_or_default();
    let at = Position { index: applied.index, term: applied.term };
    let head = SnapshotHead {
        cluster_id: ids.cluster.0,
        from: ids.member.0,
        to: to.0,
        message: wire::with_snapshot(&build.message, at, &conf_state)?,
        total_rows: 0,
        format_version: ROWS_VERSION,
    };
    let send = |chunk| chunks.blocking_send(SnapshotChunk { chunk: Some(chunk) }).is_ok();
    if send(Chunk::Head(head))
        && let Some(tail) = read_out(view, &mut |rows| send(Chunk::Rows(rows)))?
    {
        send(Chunk::Tail(tail));
    }
    Ok(())
}

//! One watch stream: requests in, responses out, in order.

use std::time::Duration;

use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{
    WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
};
use keelson_proto::mvccpb::event::EventType;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};

use crate::rpc::Rpc;

/// How long a response that has to come may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A stream of watches. Dropping it ends the stream.
#[derive(Debug)]
pub struct Watcher {
    requests: mpsc::Sender<WatchRequest>,
    responses: Streaming<WatchResponse>,
}

impl Watcher {
    /// Opens a stream with its first watch: a server may answer the stream itself only with the first response.
    pub async fn open(rpc: &mut Rpc, first: WatchCreateRequest) -> Watcher {
        Watcher::open_with(rpc, first, |_| ()).await.expect("the stream opens")
    }

    /// The same, with the request's metadata for the caller to fill in.
    pub async fn open_with(
        rpc: &mut Rpc,
        first: WatchCreateRequest,
        prepare: impl FnOnce(&mut Request<ReceiverStream<WatchRequest>>),
    ) -> Result<Watcher, Status> {
        let (requests, queue) = mpsc::channel(16);
        requests.send(request(RequestUnion::CreateRequest(first))).await.expect("we hold the queue");
        let mut call = Request::new(ReceiverStream::new(queue));
        prepare(&mut call);
        Ok(Watcher { requests, responses: rpc.watch.watch(call).await?.into_inner() })
    }

    pub async fn create(&self, create: WatchCreateRequest) {
        self.send(RequestUnion::CreateRequest(create)).await;
    }

    pub async fn cancel(&self, watch_id: i64) {
        self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })).await;
    }

    pub async fn ask_progress(&self) {
        self.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    }

    async fn send(&self, union: RequestUnion) {
        self.requests.send(request(union)).await.expect("the stream is open");
    }

    /// The next response, or how the stream ended.
    pub async fn next(&mut self) -> Result<WatchResponse, Status> {
        let message = tokio::time::timeout(LIMIT, self.responses.message());
        message.await.expect("a response in time")?.ok_or_else(|| Status::ok("the stream ended"))
    }

    /// The next response, or `None` if the stream ended or nothing came for `limit`.
    pub async fn next_within(&mut self, limit: Duration) -> Option<Result<WatchResponse, Status>> {
        tokio::time::timeout(limit, self.responses.message()).await.ok()?.transpose()
    }

    /// The next response of a stream that has to go on.
    pub async fn response(&mut self) -> WatchResponse {
        self.next().await.expect("the stream goes on")
    }

    /// Whether nothing comes for as long as `pause`.
    pub async fn silent_for(&mut self, pause: Duration) -> bool {
        tokio::time::timeout(pause, self.responses.message()).await.is_err()
    }

    /// The next `count` events, however they are spread over responses, each as `put k=v @revision` or `delete k @revision`.
    pub async fn events(&mut self, count: usize) -> Vec<String> {
        let mut events = Vec::new();
        while events.len() < count {
            events.extend(spell(&self.response().await));
        }
        events
    }
}

/// The events of one response, one line each.
pub fn spell(response: &WatchResponse) -> Vec<String> {
    let text = |bytes: &bytes::Bytes| String::from_utf8_lossy(bytes).into_owned();
    let line = |event: &keelson_proto::mvccpb::Event| {
        let kv = event.kv.as_ref().expect("an event has its key");
        let mut line = match event.r#type() {
            EventType::Put => format!("put {}={} @{}", text(&kv.key), text(&kv.value), kv.mod_revision),
            EventType::Delete => format!("delete {} @{}", text(&kv.key), kv.mod_revision),
        };
        if let Some(previous) = &event.prev_kv {
            line += &format!(" was {} @{}", text(&previous.value), previous.mod_revision);
        }
        line
    };
    response.events.iter().map(line).collect()
}

fn request(union: RequestUnion) -> WatchRequest {
    WatchRequest { request_union: Some(union) }
}

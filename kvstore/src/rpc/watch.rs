//! The Watch service: one bidirectional stream, many watches.
//!
//! A stream is one loop: it takes frames from its session in the hub and frames them into `WatchResponse`s, and in between reads
//! the client's requests, the progress timer, the leader monitor and the shutdown. It sleeps only when the session is empty.
//! Events go out as the hub encoded them; only the header is written for each response.
//!
//! A client that does not read is bounded twice: HTTP/2 stops polling this loop, and the hub keeps the rest as cursors. A client
//! that closes its side goes on receiving; one that cancels is gone, and its watches with it.
//!
//! What it does not do: it knows no event and no cursor ([`kvstore_core::watch`] does), and checks no permission (a later room:
//! `WatchHub::refuse` has the answer).

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, Bytes};
use futures_util::{FutureExt, Stream, stream};
use http_body::Body as HttpBody;
use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{ResponseHeader, WatchRequest, WatchResponse};
use kvstore_core::Error;
use kvstore_core::watch::{Frame, WatchHub};
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, StdError};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};

use super::leader::{LeaderGuard, LeaderMonitor};
use crate::Inbox;
use crate::inbox::WatchStream;
use crate::rpc::{header, status};

/// Frames taken from the session under one lock.
const TAKE: usize = 32;

/// Requests taken in a row while there are frames to send.
const REQUESTS: usize = 16;

#[derive(Clone, Copy, Debug)]
pub(super) struct WatchConfig {
    /// `--watch-progress-notify-interval`; a tenth of it at most is added, so that streams don't fire together.
    pub(super) progress_notify_interval: Duration,
    /// The largest request that is read.
    pub(super) max_request_bytes: usize,
}

/// The service, for a router: `etcdserverpb.Watch`.
#[derive(Clone)]
pub(super) struct WatchService {
    inbox: Inbox,
    monitor: LeaderMonitor,
    config: WatchConfig,
    /// Ends every stream; tonic would wait for them for ever.
    shutdown: CancellationToken,
}

impl WatchService {
    pub(super) fn new(inbox: Inbox, monitor: LeaderMonitor, config: WatchConfig, shutdown: CancellationToken) -> Self {
        WatchService { inbox, monitor, config, shutdown }
    }

    fn open(&self, request: Request<Streaming<WatchRequest>>) -> Result<WatchLoop, Error> {
        let leader = self.monitor.admit(&self.inbox, request.metadata())?;
        let watch = self.inbox.watch();
        Ok(WatchLoop {
            inbox: self.inbox.clone(),
            progress: progress_timer(self.config.progress_notify_interval, watch.id().0),
            watch,
            leader,
            shutdown: self.shutdown.clone(),
            requests: Some(request.into_inner()),
            frames: VecDeque::new(),
        })
    }
}

impl NamedService for WatchService {
    const NAME: &'static str = "etcdserverpb.Watch";
}

impl<B> tower_service::Service<http::Request<B>> for WatchService
where
    B: HttpBody + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let method = WatchMethod(self.clone());
        Box::pin(async move {
            if request.uri().path() != "/etcdserverpb.Watch/Watch" {
                // Without a text, as a generated service answers: the router knows what to say, and counts no such path.
                return Ok(Status::unimplemented("").into_http());
            }
            let limit = method.0.config.max_request_bytes;
            let mut grpc = Grpc::new(WatchCodec).apply_max_message_size_config(Some(limit), None);
            Ok(grpc.streaming(method, request).await)
        })
    }
}

struct WatchMethod(WatchService);

type Responses = Pin<Box<dyn Stream<Item = Result<Framed, Status>> + Send>>;

impl StreamingService<WatchRequest> for WatchMethod {
    type Response = Framed;
    type ResponseStream = Responses;
    type Future = BoxFuture<Response<Responses>, Status>;

    fn call(&mut self, request: Request<Streaming<WatchRequest>>) -> Self::Future {
        let opened = self.0.open(request).map_err(|error| status(&error));
        Box::pin(async move {
            let responses = stream::unfold(Some(opened?), |open| async move {
                let mut open = open?;
                match open.next().await {
                    Ok(response) => Some((Ok(response), Some(open))),
                    Err(last) => Some((Err(last), None)),
                }
            });
            Ok(Response::new(Box::pin(responses) as Responses))
        })
    }
}

/// One open stream.
struct WatchLoop {
    inbox: Inbox,
    watch: WatchStream,
    leader: LeaderGuard,
    progress: Interval,
    shutdown: CancellationToken,
    /// `None`: the client has closed its side, and still listens.
    requests: Option<Streaming<WatchRequest>>,
    /// Taken from the session, not yet sent.
    frames: VecDeque<Frame>,
}

enum Waking {
    Bell,
    Request(Result<Option<WatchRequest>, Status>),
    Progress,
    NoLeader,
    Stopped,
}

impl WatchLoop {
    /// The next response, or how the stream ends.
    async fn next(&mut self) -> Result<Framed, Status> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                let header = header(&self.inbox, frame.revision);
                return Ok(Framed::new(header, frame));
            }
            self.read_ready_requests()?;
            self.take();
            if !self.frames.is_empty() {
                continue;
            }
            let waking = tokio::select! {
                () = self.watch.wait() => Waking::Bell,
                request = next_request(&mut self.requests) => Waking::Request(request),
                _ = self.progress.tick() => Waking::Progress,
                () = self.leader.lost() => Waking::NoLeader,
                () = self.shutdown.cancelled() => Waking::Stopped,
            };
            match waking {
                Waking::Bell => {}
                Waking::Request(request) => self.request(request)?,
                Waking::Progress => self.with_hub(|hub, stream| hub.progress_tick(stream)),
                Waking::NoLeader => return Err(status(&Error::NoLeader)),
                Waking::Stopped => return Err(status(&Error::Stopped)),
            }
        }
    }

    /// Under a flood of events, too, requests (and what else ends a stream) are looked at before each batch of frames.
    fn read_ready_requests(&mut self) -> Result<(), Status> {
        for _ in 0..REQUESTS {
            if !self.watch.hub().with(|hub| hub.has_room(self.watch.id())) {
                break;
            }
            match next_request(&mut self.requests).now_or_never() {
                Some(request) => self.request(request)?,
                None => break,
            }
        }
        if self.progress.tick().now_or_never().is_some() {
            self.with_hub(|hub, stream| hub.progress_tick(stream));
        }
        if self.leader.lost().now_or_never().is_some() {
            return Err(status(&Error::NoLeader));
        }
        if self.shutdown.is_cancelled() {
            return Err(status(&Error::Stopped));
        }
        Ok(())
    }

    fn request(&mut self, request: Result<Option<WatchRequest>, Status>) -> Result<(), Status> {
        let union = match request {
            Ok(Some(request)) => request.request_union,
            Ok(None) => {
                self.requests = None;
                return Ok(());
            }
            Err(ended) if ended.code() == tonic::Code::Cancelled => return Err(status(&Error::WatchCanceled)),
            Err(ended) => return Err(ended),
        };
        match union {
            Some(RequestUnion::CreateRequest(create)) => self.with_hub(|hub, stream| hub.create(stream, &create)),
            Some(RequestUnion::CancelRequest(cancel)) => {
                self.with_hub(|hub, stream| hub.cancel(stream, cancel.watch_id))
            }
            Some(RequestUnion::ProgressRequest(_)) => self.with_hub(|hub, stream| hub.request_progress(stream)),
            // A request this server does not know is no reason to end the other watches.
            None => {}
        }
        Ok(())
    }

    fn take(&mut self) {
        let frames = self.with_hub(|hub, stream| hub.take(stream, TAKE));
        self.frames.extend(frames);
    }

    /// Works on the hub, and calls the pump if that left somebody behind.
    fn with_hub<R>(&self, work: impl FnOnce(&mut WatchHub, kvstore_core::watch::StreamId) -> R) -> R {
        let hub = self.watch.hub();
        let (done, behind) = hub.with(|hub| (work(hub, self.watch.id()), hub.has_catch_up()));
        if behind {
            hub.nudge();
        }
        done
    }
}

/// The client's next request; never, once it has closed its side.
async fn next_request(requests: &mut Option<Streaming<WatchRequest>>) -> Result<Option<WatchRequest>, Status> {
    match requests {
        Some(requests) => requests.message().await,
        None => std::future::pending().await,
    }
}

/// Fires each interval, a little later for some streams than for others.
fn progress_timer(interval: Duration, stream: u64) -> Interval {
    let parts = u32::try_from(stream.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54).unwrap_or(0);
    let period = interval.max(Duration::from_millis(100)) + interval / 10 * parts / 1024;
    let mut timer = tokio::time::interval(period);
    timer.reset();
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    timer
}

/// A response of which only the head has still to be encoded.
pub(super) struct Framed {
    head: WatchResponse,
    events: Vec<Bytes>,
}

/// Tag of `WatchResponse.events`.
const EVENTS: u8 = 0x5a;

impl Framed {
    fn new(header: ResponseHeader, frame: Frame) -> Framed {
        let head = WatchResponse {
            header: Some(header),
            watch_id: frame.watch_id,
            created: frame.created,
            canceled: frame.canceled,
            compact_revision: frame.compact_revision,
            cancel_reason: frame.cancel_reason,
            fragment: frame.fragment,
            events: Vec::new(),
        };
        Framed { head, events: frame.events }
    }

    fn encode(&self, out: &mut impl BufMut) {
        self.head.encode(out).expect("the buffer grows");
        for event in &self.events {
            out.put_u8(EVENTS);
            encode_varint(event.len() as u64, out);
            out.put_slice(event);
        }
    }

    fn encoded_len(&self) -> usize {
        let field = |event: &Bytes| 1 + encoded_len_varint(event.len() as u64) + event.len();
        self.head.encoded_len() + self.events.iter().map(field).sum::<usize>()
    }
}

struct WatchCodec;

impl Codec for WatchCodec {
    type Encode = Framed;
    type Decode = WatchRequest;
    type Encoder = WatchCodec;
    type Decoder = WatchCodec;

    fn encoder(&mut self) -> WatchCodec {
        WatchCodec
    }

    fn decoder(&mut self) -> WatchCodec {
        WatchCodec
    }
}

impl Encoder for WatchCodec {
    type Item = Framed;
    type Error = Status;

    fn encode(&mut self, response: Framed, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.reserve(response.encoded_len());
        response.encode(out);
        Ok(())
    }
}

impl Decoder for WatchCodec {
    type Item = WatchRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<WatchRequest>, Status> {
        WatchRequest::decode(buffer).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use keelson_proto::mvccpb::{Event, KeyValue};

    use super::*;

    #[test]
    fn a_framed_response_is_what_prost_would_write() {
        let event = |key: &'static str, value: usize| Event {
            kv: Some(KeyValue { key: Bytes::from(key), value: vec![b'v'; value].into(), ..KeyValue::default() }),
            ..Event::default()
        };
        let events = vec![event("a", 1), event("b", 300), event("c", 70_000)];
        let header = ResponseHeader { cluster_id: 1, member_id: u64::MAX, revision: 7, raft_term: 3 };
        let frame = Frame {
            watch_id: -1,
            revision: 7,
            canceled: true,
            compact_revision: 9,
            cancel_reason: "why".to_owned(),
            fragment: true,
            events: events.iter().map(|event| Bytes::from(event.encode_to_vec())).collect(),
            ..Frame::default()
        };
        let framed = Framed::new(header, frame);
        let mut out = Vec::new();
        framed.encode(&mut out);
        assert_eq!(out.len(), framed.encoded_len());
        let expected = WatchResponse {
            header: Some(header),
            watch_id: -1,
            created: false,
            canceled: true,
            compact_revision: 9,
            cancel_reason: "why".to_owned(),
            fragment: true,
            events,
        };
        assert_eq!(WatchResponse::decode(&out[..]).unwrap(), expected);
        assert_eq!(out, expected.encode_to_vec());
    }

    #[tokio::test(start_paused = true)]
    async fn progress_timers_differ_by_a_tenth_at_most() {
        let mut periods: Vec<Duration> =
            (0..100).map(|stream| progress_timer(Duration::from_secs(10), stream).period()).collect();
        periods.sort_unstable();
        assert!(periods[0] >= Duration::from_secs(10) && periods[99] <= Duration::from_secs(11));
        assert!(periods[99] - periods[0] > Duration::from_millis(800));
        assert!(progress_timer(Duration::ZERO, 1).period() >= Duration::from_millis(100));
    }
}

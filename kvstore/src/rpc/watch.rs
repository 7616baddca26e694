//! The Watch service: one bidirectional stream, many watches.
//!
//! A stream is a response body ([`WatchBody`]) that reads its request's body. Each time that HTTP/2 has room it is polled:
//! it reads what the client asks, looks at the progress timer and at what may end it, takes frames from its session in the
//! hub and writes them into one chunk. Events go out as the hub encoded them; only the header is written for each response,
//! and a large event is not even copied. While there is nothing to say a stream owns no buffer: ten thousand of them are
//! idle most of the time.
//!
//! A client that does not read is bounded twice: HTTP/2 stops polling the body, and the hub keeps the rest as cursors. A client
//! that closes its side goes on receiving; one that cancels is gone, and its watches with it.
//!
//! It is served beside tonic's routes, because those keep two buffers a stream, and the last large message in one of them.
//!
//! What it does not do: it knows no event and no cursor ([`kvstore_core::watch`] does), and checks no permission (a later room:
//! `WatchHub::refuse` has the answer).

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame as BodyFrame};
use hyper::body::Incoming;
use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{ResponseHeader, WatchRequest, WatchResponse};
use kvstore_core::Error;
use kvstore_core::watch::Frame;
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;

use super::encoded::PREFIX;
use super::framing::{Shape, announced, decode, trailers};
use super::leader::LeaderMonitor;
use crate::Inbox;
use crate::inbox::WatchStream;
use crate::rpc::{header, status};

/// Where it is served.
pub(super) const PATH: &str = "/etcdserverpb.Watch/Watch";

/// Frames taken from the session under one lock.
const TAKE: usize = 256;

/// Requests taken in a row while there may be frames to send.
const REQUESTS: usize = 16;

/// Events from this size on are sent from where they are, without a copy.
const LARGE_EVENT: usize = 16 * 1024;

#[derive(Clone, Copy, Debug)]
pub(super) struct WatchConfig {
    /// `--watch-progress-notify-interval`, of which 100 ms is the least; a tenth of it at most is added, so that streams don't fire
    /// together.
    pub(super) progress_notify_interval: Duration,
    /// The largest request that is read.
    pub(super) max_request_bytes: usize,
}

/// Opens streams: `etcdserverpb.Watch`.
#[derive(Clone)]
pub(super) struct WatchService {
    inbox: Inbox,
    monitor: LeaderMonitor,
    config: WatchConfig,
    /// Ends every stream; hyper would wait for them for ever.
    shutdown: CancellationToken,
}

impl WatchService {
    pub(super) const NAME: &'static str = "etcdserverpb.Watch";

    pub(super) fn new(inbox: Inbox, monitor: LeaderMonitor, config: WatchConfig, shutdown: CancellationToken) -> Self {
        WatchService { inbox, monitor, config, shutdown }
    }

    /// Opens a stream, or says why not.
    pub(super) fn serve(&self, request: Request<Incoming>) -> Result<Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let mut leader = self.monitor.admit(&self.inbox, &head.headers).map_err(|e| status(&e))?;
        let shutdown = self.shutdown.clone();
        let ending = async move {
            tokio::select! {
                () = leader.lost() => Error::NoLeader,
                () = shutdown.cancelled() => Error::Stopped,
            }
        };
        let body = WatchBody {
            inbox: self.inbox.clone(),
            config: self.config,
            watch: self.inbox.watch(),
            ending: Box::pin(ending),
            progress: None,
            requests: Some(Requests { body, buffer: BytesMut::new(), max: self.config.max_request_bytes }),
            held: None,
            chunks: VecDeque::new(),
            state: State::Open,
        };
        let mut response = Response::new(Body::new(body));
        let grpc = http::HeaderValue::from_static("application/grpc");
        response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
        Ok(response)
    }
}

/// One open stream.
struct WatchBody {
    inbox: Inbox,
    config: WatchConfig,
    watch: WatchStream,
    /// Why the server ends the stream, once it has to.
    ending: Pin<Box<dyn Future<Output = Error> + Send>>,
    /// Runs from the first watch that wants to be told.
    progress: Option<Interval>,
    /// `None`: the client has closed its side, and still listens.
    requests: Option<Requests>,
    /// A request that waits until there is room for its answer.
    held: Option<WatchRequest>,
    /// Encoded, and not yet handed on.
    chunks: VecDeque<Bytes>,
    state: State,
}

enum State {
    Open,
    /// What is left to say is how it ended.
    Ending(Status),
    Ended,
}

impl HttpBody for WatchBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<BodyFrame<Bytes>, Status>>> {
        if self.chunks.is_empty()
            && matches!(self.state, State::Open)
            && let Err(last) = self.fill(cx)
        {
            self.state = State::Ending(last);
        }
        if let Some(chunk) = self.chunks.pop_front() {
            return Poll::Ready(Some(Ok(BodyFrame::data(chunk))));
        }
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Open => {
                self.state = State::Open;
                self.chunks = VecDeque::new();
                Poll::Pending
            }
            State::Ending(last) => Poll::Ready(Some(Ok(BodyFrame::trailers(trailers(&last))))),
            State::Ended => Poll::Ready(None),
        }
    }
}

impl WatchBody {
    /// Gathers what there is to send. If that is nothing, the task will be woken when there is; an `Err` ends the stream.
    fn fill(&mut self, cx: &mut Context<'_>) -> Result<(), Status> {
        // Before looking: who rings from here on wakes us.
        self.watch.listen(cx.waker());
        if let Poll::Ready(error) = self.ending.as_mut().poll(cx) {
            return Err(status(&error));
        }
        while self.progress.as_mut().is_some_and(|timer| timer.poll_tick(cx).is_ready()) {
            self.watch.with(|hub, stream| hub.progress_tick(stream));
        }
        let asked_much = self.read_requests(cx)?;
        let frames = self.watch.with(|hub, stream| hub.take(stream, TAKE));
        if !frames.is_empty() {
            self.encode(frames);
        } else if asked_much {
            // Requests without an answer: others' streams have their turn before the next ones.
            cx.waker().wake_by_ref();
        }
        Ok(())
    }

    /// Does what the client asks, for as long as there is room for the answers. True if there may be more to read.
    fn read_requests(&mut self, cx: &mut Context<'_>) -> Result<bool, Status> {
        for _ in 0..REQUESTS {
            let request = match self.held.take() {
                Some(request) => request,
                None => match self.requests.as_mut().map_or(Poll::Pending, |requests| requests.poll_next(cx)) {
                    Poll::Pending => return Ok(false),
                    Poll::Ready(Some(request)) => request?,
                    Poll::Ready(None) => {
                        self.requests = None;
                        return Ok(false);
                    }
                },
            };
            let room = self.watch.with(|hub, stream| {
                let room = hub.has_room(stream);
                if room {
                    hub.request(stream, &request);
                }
                room
            });
            if !room {
                self.held = Some(request);
                // A full session has frames to take; when they are gone the body is polled again.
                return Ok(false);
            }
            if matches!(&request.request_union, Some(RequestUnion::CreateRequest(create)) if create.progress_notify) {
                let (interval, stream) = (self.config.progress_notify_interval, self.watch.id().0);
                let timer = self.progress.get_or_insert_with(|| progress_timer(interval, stream));
                // Registers the timer; its first tick is an interval away.
                let _ = timer.poll_tick(cx);
            }
        }
        Ok(true)
    }

    fn encode(&mut self, frames: Vec<Frame>) {
        let mut encoder = Encoder::new(header(&self.inbox, 0), &frames);
        for frame in frames {
            encoder.put(frame, &mut self.chunks);
        }
        encoder.finish(&mut self.chunks);
    }
}

/// What the client says.
struct Requests {
    body: Incoming,
    /// Read and not yet decoded; nothing is kept once it is empty.
    buffer: BytesMut,
    max: usize,
}

impl Requests {
    /// The next request; `None`: there are no more.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<WatchRequest, Status>>> {
        loop {
            match message(&mut self.buffer, self.max) {
                Ok(Some(message)) => return Poll::Ready(Some(decode(message, Shape::ClientStream))),
                Ok(None) => {}
                Err(refusal) => return Poll::Ready(Some(Err(refusal))),
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                // The stream was reset, or its connection is gone.
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Some(Err(status(&Error::WatchCanceled)))),
                Poll::Ready(None) if self.buffer.len() < PREFIX => return Poll::Ready(None),
                Poll::Ready(None) => return Poll::Ready(Some(Err(Status::internal("unexpected EOF")))),
            }
        }
    }
}

/// Takes the next message off `buffer`, if all of it is there.
fn message(buffer: &mut BytesMut, max: usize) -> Result<Option<Bytes>, Status> {
    let Some(prefix) = buffer.first_chunk::<PREFIX>() else { return Ok(None) };
    let len = announced(prefix, max)?;
    if buffer.len() < PREFIX + len {
        return Ok(None);
    }
    buffer.advance(PREFIX);
    let message = buffer.split_to(len).freeze();
    if buffer.is_empty() {
        *buffer = BytesMut::new();
    }
    Ok(Some(message))
}

/// Fires each interval, a little later for some streams than for others.
fn progress_timer(interval: Duration, stream: u64) -> Interval {
    let parts = u32::try_from(stream.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54).unwrap_or(0);
    let interval = interval.max(Duration::from_millis(100));
    let period = interval + interval / 10 * parts / 1024;
    let mut timer = tokio::time::interval(period);
    timer.reset();
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    timer
}

/// Writes frames as messages with their prefixes, as many as there are into one chunk.
struct Encoder {
    header: ResponseHeader,
    /// The header as it stands in a response, of the revision above: most frames in a row have the same.
    header_field: Vec<u8>,
    buffer: Vec<u8>,
}

/// Tags of `WatchResponse.header` and `WatchResponse.events`.
const HEADER: u8 = 0x0a;
const EVENTS: u8 = 0x5a;

/// At most what surrounds the events of a frame, without a reason; and one event.
const HEAD_BYTES: usize = 128;
const FIELD_BYTES: usize = 8;

impl Encoder {
    /// For these frames, whose revisions go into `header`.
    fn new(header: ResponseHeader, frames: &[Frame]) -> Encoder {
        let copied = |event: &Bytes| FIELD_BYTES + if event.len() < LARGE_EVENT { event.len() } else { 0 };
        let size =
            |frame: &Frame| HEAD_BYTES + frame.cancel_reason.len() + frame.events.iter().map(copied).sum::<usize>();
        let buffer = Vec::with_capacity(frames.iter().map(size).sum());
        let mut encoder = Encoder { header, header_field: Vec::new(), buffer };
        encoder.turn_to(frames.first().map_or(0, |frame| frame.revision));
        encoder
    }

    fn turn_to(&mut self, revision: i64) {
        self.header.revision = revision;
        self.header_field.clear();
        self.header_field.push(HEADER);
        encode_varint(self.header.encoded_len() as u64, &mut self.header_field);
        self.header.encode_raw(&mut self.header_field);
    }

    /// What is small goes into the buffer, and what is large, after what the buffer held by then, into `chunks`.
    fn put(&mut self, frame: Frame, chunks: &mut VecDeque<Bytes>) {
        if frame.revision != self.header.revision {
            self.turn_to(frame.revision);
        }
        let rest = WatchResponse {
            header: None,
            watch_id: frame.watch_id,
            created: frame.created,
            canceled: frame.canceled,
            compact_revision: frame.compact_revision,
            cancel_reason: frame.cancel_reason,
            fragment: frame.fragment,
            events: Vec::new(),
        };
        let field = |event: &Bytes| 1 + encoded_len_varint(event.len() as u64) + event.len();
        let events = frame.events.iter().map(field).sum::<usize>();
        let len = u32::try_from(self.header_field.len() + rest.encoded_len() + events)
            .expect("a response is below 4 GiB: the hub's frames are bounded");
        self.buffer.push(0);
        self.buffer.extend_from_slice(&len.to_be_bytes());
        self.buffer.extend_from_slice(&self.header_field);
        rest.encode_raw(&mut self.buffer);
        for event in frame.events {
            self.buffer.push(EVENTS);
            encode_varint(event.len() as u64, &mut self.buffer);
            if event.len() < LARGE_EVENT {
                self.buffer.extend_from_slice(&event);
            } else {
                chunks.push_back(std::mem::take(&mut self.buffer).into());
                chunks.push_back(event);
            }
        }
    }

    fn finish(self, chunks: &mut VecDeque<Bytes>) {
        if !self.buffer.is_empty() {
            chunks.push_back(self.buffer.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use keelson_proto::etcdserverpb::{WatchCancelRequest, WatchProgressRequest};
    use keelson_proto::mvccpb::{Event, KeyValue};

    use super::*;

    #[test]
    fn a_framed_response_is_what_prost_would_write() {
        let event = |key: &'static str, value: usize| Event {
            kv: Some(KeyValue { key: Bytes::from(key), value: vec![b'v'; value].into(), ..KeyValue::default() }),
            ..Event::default()
        };
        let events = vec![event("a", 1), event("b", 300), event("c", 70_000), event("d", 5), event("e", 20_000)];
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
        let other = WatchResponse {
            header: Some(ResponseHeader { revision: 0, ..header }),
            watch_id: 3,
            created: true,
            ..WatchResponse::default()
        };
        let small = Frame { watch_id: 3, created: true, ..Frame::default() };
        let frames = vec![frame.clone(), small, frame];
        let (mut encoder, mut chunks) = (Encoder::new(header, &frames), VecDeque::new());
        let room = encoder.buffer.capacity();
        frames.into_iter().for_each(|frame| encoder.put(frame, &mut chunks));
        encoder.finish(&mut chunks);
        assert!(chunks.iter().map(Bytes::len).filter(|len| *len < LARGE_EVENT).sum::<usize>() <= room);
        assert_eq!(
            chunks.iter().filter(|chunk| chunk.len() >= LARGE_EVENT).count(),
            4,
            "large events are their own chunks"
        );
        let mut out: Bytes = chunks.iter().flatten().copied().collect::<Vec<u8>>().into();
        for expected in [&expected, &other, &expected] {
            let (flag, len) = (out.get_u8(), out.get_u32() as usize);
            assert_eq!((flag, &out.split_to(len)[..]), (0, &expected.encode_to_vec()[..]));
        }
        assert!(out.is_empty());
    }

    fn framed(request: &WatchRequest) -> Vec<u8> {
        let bytes = request.encode_to_vec();
        [&[0], &(bytes.len() as u32).to_be_bytes()[..], &bytes].concat()
    }

    #[test]
    fn requests_are_read_however_they_are_cut() {
        let unions = [
            Some(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 7 })),
            None,
            Some(RequestUnion::ProgressRequest(WatchProgressRequest {})),
        ];
        let requests = unions.map(|request_union| WatchRequest { request_union });
        let bytes: Vec<u8> = requests.iter().flat_map(framed).collect();
        for piece in 1..=bytes.len() {
            let (mut buffer, mut read) = (BytesMut::new(), Vec::new());
            for part in bytes.chunks(piece) {
                buffer.extend_from_slice(part);
                while let Some(whole) = message(&mut buffer, 100).unwrap() {
                    read.push(decode::<WatchRequest>(whole, Shape::ClientStream).unwrap());
                }
            }
            assert_eq!(read, requests, "in pieces of {piece}");
            assert_eq!(buffer.capacity(), 0, "nothing is kept");
        }
    }

    #[test]
    fn requests_are_refused_in_grpcs_words() {
        let refusal = |bytes: &[u8]| message(&mut BytesMut::from(bytes), 10).unwrap_err();
        let large = refusal(&[0, 0, 0, 0, 11]);
        assert_eq!(large.code(), tonic::Code::ResourceExhausted);
        assert_eq!(large.message(), "grpc: received message larger than max (11 vs. 10)");
        assert!(refusal(&[1, 0, 0, 0, 3]).message().contains("compressed flag set"));
        assert_eq!(refusal(&[2, 0, 0, 0, 3]).message(), "grpc: received unexpected payload format 2");
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

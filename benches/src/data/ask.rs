//! The questions, and a generator that asks them without reading the answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::{Buf, BufMut, Bytes};
use e2e::rpc::{self, Rpc};
use http::uri::PathAndQuery;
use keelson_proto::etcdserverpb::{RangeRequest, RangeResponse, RangeStreamResponse};
use prost::Message;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::load::{Loaded, pod, random_puts};
use crate::measure::cpu;
use crate::table;

/// How long each part of a measurement goes on, and how many requests it makes at least.
const PART: Duration = Duration::from_secs(3);
const LEAST_REQUESTS: usize = 5;
const MOST_REQUESTS: usize = 20_000;
const IN_FLIGHT: usize = 8;
const CONNECTIONS: usize = 4;
const PUTS_IN_FLIGHT: usize = 64;
/// Different requests of one row.
const REQUESTS: u64 = 64;

/// A row of the table.
pub(crate) struct Question {
    pub(crate) name: &'static str,
    requests: Vec<RangeRequest>,
    stream: bool,
}

/// What one server did with a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// One request at a time.
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// Several at a time.
    pub(crate) requests_per_second: f64,
    pub(crate) cpu_us: f64,
}

/// What an answer held: keys, count, more, and the bytes of all keys and values.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Answer(Vec<(usize, i64, bool, usize)>);

impl Question {
    pub(crate) const PAGE: &str = "page of 500 with its count";

    pub(crate) fn all(loaded: &Loaded) -> Vec<Question> {
        let pods = |key: String| RangeRequest {
            key: key.into(),
            range_end: "/registry/pods0".into(),
            limit: 500,
            ..RangeRequest::default()
        };
        let everything = || RangeRequest { key: vec![0].into(), range_end: vec![0].into(), ..RangeRequest::default() };
        // The first page, and pages that go on from some key, as an apiserver asks for them.
        let some = |n: u64| n * (loaded.keys - 1_000) / REQUESTS;
        let start = |n: u64| if n == 0 { "/registry/pods/".to_owned() } else { pod(some(n)) + "\0" };
        let pages: Vec<_> = (0..REQUESTS).map(|n| pods(start(n))).collect();
        let of_pages = |change: &dyn Fn(&mut RangeRequest)| {
            let mut pages = pages.clone();
            pages.iter_mut().for_each(change);
            pages
        };
        let points = (0..REQUESTS).map(|n| RangeRequest { key: pod(some(n)).into(), ..RangeRequest::default() });
        let ten_thousand = if loaded.keys > 100_000 {
            let prefix = "/registry/pods/ns-042/";
            RangeRequest {
                limit: 10_000,
                key: prefix.into(),
                range_end: rpc::prefix_end(prefix),
                ..pods(String::new())
            }
        } else {
            RangeRequest { limit: 10_000, ..everything() }
        };
        let asked = |name, requests, stream| Question { name, requests, stream };
        vec![
            asked("point Range", points.collect(), false),
            asked("Range of 10,000 keys", vec![ten_thousand], false),
            asked(Question::PAGE, pages.clone(), false),
            asked("the same at an older revision", of_pages(&|page| page.revision = loaded.pinned), false),
            asked("page of 500, keys only", of_pages(&|page| page.keys_only = true), false),
            asked("count_only of everything", vec![RangeRequest { count_only: true, ..everything() }], false),
            asked("RangeStream of everything", vec![everything()], true),
        ]
    }

    /// Asks each request once and says what came.
    pub(crate) fn answer(&self, url: &str) -> Result<Answer> {
        rpc::run(async {
            let mut rpc = Rpc::to(url, Duration::from_secs(60));
            let mut answers = Vec::new();
            for request in &self.requests {
                answers.push(if self.stream {
                    let mut stream = rpc.kv.range_stream(request.clone()).await?.into_inner();
                    let (mut keys, mut bytes, mut last) = (0, 0, RangeResponse::default());
                    while let Some(RangeStreamResponse { range_response: Some(part) }) = stream.message().await? {
                        keys += part.kvs.len();
                        bytes += part.kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum::<usize>();
                        last = part;
                    }
                    (keys, last.count, last.more, bytes)
                } else {
                    let answer = rpc.range(request.clone()).await?;
                    let bytes = answer.kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum();
                    (answer.kvs.len(), answer.count, answer.more, bytes)
                });
            }
            Ok(Answer(answers))
        })
    }

    fn method(&self) -> Method {
        if self.stream { Method::RangeStream } else { Method::Range }
    }

    pub(crate) fn sample(&self, url: &str, server: u32) -> Result<Sample> {
        let bodies: Arc<[Bytes]> = self.requests.iter().map(|request| request.encode_to_vec().into()).collect();
        let least = if self.stream { 1 } else { LEAST_REQUESTS };
        rpc::run(async {
            let channels: Vec<Channel> = (0..CONNECTIONS).map(|_| channel(url)).collect::<Result<_>>()?;
            // Warm: connections, caches.
            for channel in &channels {
                run(channel, self.method(), &bodies, &Shared::new(Duration::ZERO, 1)).await?;
            }
            let before = cpu(server)?;
            let (mut latencies, _) = together(&channels, 1, self.method(), &bodies, least).await?;
            let alone = (cpu(server)? - before).as_secs_f64() * 1e6 / latencies.len() as f64;
            latencies.sort_unstable();
            let (p50_ms, p99_ms) = (percentile(&latencies, 50), percentile(&latencies, 99));
            if self.stream {
                let all: f64 = latencies.iter().map(Duration::as_secs_f64).sum();
                let requests_per_second = latencies.len() as f64 / all;
                return Ok(Sample { p50_ms, p99_ms, requests_per_second, cpu_us: alone });
            }
            let before = cpu(server)?;
            let (done, wall) = together(&channels, IN_FLIGHT, self.method(), &bodies, least).await?;
            Ok(Sample {
                p50_ms,
                p99_ms,
                requests_per_second: done.len() as f64 / wall.as_secs_f64(),
                cpu_us: (cpu(server)? - before).as_secs_f64() * 1e6 / done.len() as f64,
            })
        })
    }
}

fn percentile(sorted: &[Duration], share: usize) -> f64 {
    table::percentile(sorted, share).as_secs_f64() * 1e3
}

/// What one server did with pages while it took puts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beside {
    pub(crate) puts_per_second: f64,
    pub(crate) put_p99_ms: f64,
    pub(crate) page_p50_ms: f64,
    pub(crate) page_p99_ms: f64,
}

/// Pages, one at a time, beside random updates of all pods, many at a time.
pub(crate) fn beside_puts(url: &str, loaded: &Loaded, value_size: usize) -> Result<Beside> {
    let pages = Question::all(loaded).into_iter().find(|question| question.name == Question::PAGE);
    let pages: Arc<[Bytes]> = pages.context("the page")?.requests.iter().map(|r| r.encode_to_vec().into()).collect();
    let puts: Arc<[Bytes]> = random_puts(loaded, value_size).iter().map(|r| r.encode_to_vec().into()).collect();
    rpc::run(async {
        let channels: Vec<Channel> = (0..CONNECTIONS).map(|_| channel(url)).collect::<Result<_>>()?;
        let (put, paged) = tokio::join!(
            together(&channels, PUTS_IN_FLIGHT, Method::Put, &puts, LEAST_REQUESTS),
            together(&channels[..1], 1, Method::Range, &pages, LEAST_REQUESTS),
        );
        let ((mut puts, wall), (mut pages, _)) = (put?, paged?);
        puts.sort_unstable();
        pages.sort_unstable();
        Ok(Beside {
            puts_per_second: puts.len() as f64 / wall.as_secs_f64(),
            put_p99_ms: percentile(&puts, 99),
            page_p50_ms: percentile(&pages, 50),
            page_p99_ms: percentile(&pages, 99),
        })
    })
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Method {
    Range,
    RangeStream,
    Put,
}

impl Method {
    fn path(self) -> &'static str {
        match self {
            Method::Range => "/etcdserverpb.KV/Range",
            Method::RangeStream => "/etcdserverpb.KV/RangeStream",
            Method::Put => "/etcdserverpb.KV/Put",
        }
    }
}

fn channel(url: &str) -> Result<Channel> {
    // Windows that a large answer fits into: the protocol's smallest would measure round trips.
    let endpoint = Endpoint::from_shared(url.to_owned())?.tcp_nodelay(true);
    Ok(endpoint.initial_stream_window_size(16 << 20).initial_connection_window_size(16 << 20).connect_lazy())
}

/// When a part of a measurement ends, and the number of the next request.
struct Shared {
    end: Instant,
    least: usize,
    next: AtomicUsize,
}

impl Shared {
    fn new(part: Duration, least: usize) -> Shared {
        Shared { end: Instant::now() + part, least, next: AtomicUsize::new(0) }
    }
}

/// Asks with so many clients at once; the latencies, and how long it all took.
async fn together(
    channels: &[Channel],
    clients: usize,
    method: Method,
    bodies: &Arc<[Bytes]>,
    least: usize,
) -> Result<(Vec<Duration>, Duration)> {
    let begun = Instant::now();
    let shared = Arc::new(Shared::new(PART, least));
    let mut running = tokio::task::JoinSet::new();
    for channel in channels.iter().cycle().take(clients) {
        let (channel, bodies, shared) = (channel.clone(), Arc::clone(bodies), Arc::clone(&shared));
        running.spawn(async move { run(&channel, method, &bodies, &shared).await });
    }
    let mut latencies = Vec::new();
    while let Some(client) = running.join_next().await {
        latencies.extend(client??);
    }
    ensure!(!latencies.is_empty(), "nothing was asked");
    Ok((latencies, begun.elapsed()))
}

async fn run(channel: &Channel, method: Method, bodies: &[Bytes], shared: &Shared) -> Result<Vec<Duration>> {
    let mut grpc = tonic::client::Grpc::new(channel.clone()).max_decoding_message_size(usize::MAX);
    let mut latencies = Vec::new();
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        if number >= shared.least
            && ((method != Method::Put && number >= MOST_REQUESTS) || Instant::now() >= shared.end)
        {
            return Ok(latencies);
        }
        let request = Request::new(bodies[number % bodies.len()].clone());
        grpc.ready().await.context("the server is away")?;
        let begun = Instant::now();
        let path = PathAndQuery::from_static(method.path());
        let received = if method == Method::RangeStream {
            let mut stream = grpc.server_streaming(request, path, Raw).await?.into_inner();
            let mut received = 0;
            while let Some(part) = stream.message().await? {
                received += part;
            }
            received
        } else {
            grpc.unary(request, path, Raw).await?.into_inner()
        };
        latencies.push(begun.elapsed());
        ensure!(received > 0, "an empty answer");
    }
}

/// Messages as the bytes they are; of an answer only the length.
#[derive(Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = usize;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = usize;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<usize>, Status> {
        let len = from.remaining();
        from.advance(len);
        Ok(Some(len))
    }
}

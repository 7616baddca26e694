//! A client of the etcd API over several endpoints, ours or real etcd's.
//!
//! A unary call goes to the endpoint that answered last; if that one cannot be reached, has no leader or does not answer
//! in time, to the next, with a pause after each round, until `patience` is over. Any call may therefore have been carried
//! out although its answer was lost: reads do not mind, and writes here are all guarded by revisions (`apply.rs`), so a
//! repeated one fails its guard and is looked at again.
//!
//! A stream (watch) belongs to one endpoint; who reads it asks for another when it breaks.
//!
//! What it does not do: TLS and login, which come later.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use keelson_proto::etcdserverpb::kv_client::KvClient;
use keelson_proto::etcdserverpb::watch_client::WatchClient;
use keelson_proto::etcdserverpb::{RangeRequest, RangeResponse, TxnRequest, TxnResponse, WatchRequest, WatchResponse};
use keelson_proto::mvccpb::KeyValue;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::storage::prefix_end;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// etcd refuses pings that come more often than every five seconds.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Objects in a page of a list, as many as an API server asks for.
const PAGE: i64 = 500;
/// A page of large objects exceeds the 4 MiB that gRPC allows by default.
const LONGEST_MESSAGE_BYTES: usize = 1 << 30;

#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    #[error("{endpoint:?} is no URL of a store: {reason}")]
    Endpoint { endpoint: String, reason: String },
    /// No endpoint answered in time.
    #[error("no answer from {endpoints}: {last}")]
    Unreachable { endpoints: String, last: String },
    /// The store answered, with an error.
    #[error("{0}")]
    Refused(String),
    /// The revision asked for is no longer there.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
}

/// The store, by all its endpoints. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Etcd {
    shared: Arc<Shared>,
    patience: Duration,
}

#[derive(Debug)]
struct Shared {
    endpoints: Vec<(String, Channel)>,
    /// The one that answered last.
    current: AtomicUsize,
}

/// A page's worth of keys, and the revision they are of.
#[derive(Clone, Debug)]
pub struct Listed {
    pub revision: i64,
    pub cluster_id: u64,
    pub kvs: Vec<KeyValue>,
}

/// What a list brings of each key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bring {
    Values,
    Keys,
}

/// A watch stream: requests go in, responses come out.
#[derive(Debug)]
pub struct WatchStream {
    pub requests: mpsc::Sender<WatchRequest>,
    pub responses: Streaming<WatchResponse>,
}

impl Etcd {
    /// Connects to nobody yet. `patience` is how long a call goes on trying endpoints.
    pub fn new(endpoints: &[String], patience: Duration) -> Result<Etcd, EtcdError> {
        let mut list = Vec::with_capacity(endpoints.len());
        for url in endpoints {
            let refuse = |reason: String| EtcdError::Endpoint { endpoint: url.clone(), reason };
            let endpoint = Endpoint::from_shared(url.clone()).map_err(|error| refuse(error.to_string()))?;
            let channel = endpoint
                .connect_timeout(CONNECT_TIMEOUT)
                .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                .keep_alive_while_idle(true)
                .tcp_nodelay(true)
                .connect_lazy();
            list.push((url.clone(), channel));
        }
        let shared = Shared { endpoints: list, current: AtomicUsize::new(0) };
        Ok(Etcd { shared: Arc::new(shared), patience })
    }

    fn channel(&self, index: usize) -> &(String, Channel) {
        &self.shared.endpoints[index % self.shared.endpoints.len()]
    }

    /// Gives up on an endpoint: the next call begins with the one after it, unless somebody has moved on already.
    fn leave(&self, index: usize) {
        let next = index.wrapping_add(1);
        let _ = self.shared.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    async fn call<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let started = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut attempts = 0;
        loop {
            let index = self.shared.current.load(Ordering::Relaxed);
            let (_, channel) = self.channel(index);
            let answer = tokio::time::timeout(CALL_TIMEOUT, call(channel.clone())).await;
            let status = match answer {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("no answer within {} s", CALL_TIMEOUT.as_secs())),
            };
            if !worth_another_endpoint(&status) {
                return Err(refused(&status));
            }
            tracing::debug!(endpoint = %self.channel(index).0, %status, "endpoint failed");
            self.leave(index);
            attempts += 1;
            if started.elapsed() >= self.patience {
                return Err(self.unreachable(&status));
            }
            if attempts % self.shared.endpoints.len() == 0 {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    fn unreachable(&self, last: &Status) -> EtcdError {
        let endpoints: Vec<&str> = self.shared.endpoints.iter().map(|(url, _)| url.as_str()).collect();
        EtcdError::Unreachable { endpoints: endpoints.join(", "), last: innermost(last) }
    }

    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse, EtcdError> {
        self.call(|channel| {
            let request = request.clone();
            async move { kv(channel).range(request).await }
        })
        .await
    }

    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, EtcdError> {
        self.call(|channel| {
            let request = request.clone();
            async move { kv(channel).txn(request).await }
        })
        .await
    }

    /// Every key under `prefix`, page by page, all of one revision: `revision`, or the newest if that is 0.
    pub async fn list(&self, prefix: &str, revision: i64, bring: Bring) -> Result<Listed, EtcdError> {
        let end = prefix_end(prefix);
        let mut listed = Listed { revision, cluster_id: 0, kvs: Vec::new() };
        let mut from = Bytes::copy_from_slice(prefix.as_bytes());
        loop {
            let response = self
                .range(RangeRequest {
                    key: from,
                    range_end: end.clone(),
                    limit: PAGE,
                    revision: listed.revision,
                    keys_only: bring == Bring::Keys,
                    ..Default::default()
                })
                .await?;
            let header = response.header.unwrap_or_default();
            listed.cluster_id = header.cluster_id;
            if listed.revision == 0 {
                listed.revision = header.revision;
            }
            listed.kvs.extend(response.kvs);
            let Some(last) = listed.kvs.last().filter(|_| response.more) else { return Ok(listed) };
            // The smallest key above the last.
            from = [last.key.as_ref(), b"\0"].concat().into();
        }
    }

    /// Opens a watch stream with these first requests (a server need not answer before it has one) at the endpoint that
    /// answered last. If that fails, [`Etcd::move_on`] before the next try.
    pub async fn watch(&self, first: Vec<WatchRequest>) -> Result<WatchStream, EtcdError> {
        let index = self.shared.current.load(Ordering::Relaxed);
        let (_, channel) = self.channel(index);
        let (requests, receiver) = mpsc::channel(first.len() + 16);
        for request in first {
            requests.try_send(request).expect("the queue has room for the first requests");
        }
        let mut request = Request::new(ReceiverStream::new(receiver));
        // A member that has lost its leader ends the stream, instead of falling silent.
        request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        let mut client = WatchClient::new(channel.clone()).max_decoding_message_size(LONGEST_MESSAGE_BYTES);
        let opened = tokio::time::timeout(CALL_TIMEOUT, client.watch(request)).await;
        match opened {
            Ok(Ok(response)) => Ok(WatchStream { requests, responses: response.into_inner() }),
            Ok(Err(status)) => Err(self.unreachable(&status)),
            Err(_) => Err(self.unreachable(&Status::deadline_exceeded("no answer"))),
        }
    }

    /// The endpoint whose stream broke, or could not be opened, is not asked first next time.
    pub fn move_on(&self) {
        self.leave(self.shared.current.load(Ordering::Relaxed));
    }
}

fn kv(channel: Channel) -> KvClient<Channel> {
    KvClient::new(channel).max_decoding_message_size(LONGEST_MESSAGE_BYTES)
}

/// Might another member, or the same one a moment later, answer better?
fn worth_another_endpoint(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => true,
        // What tonic makes of a connection that broke.
        Code::Unknown | Code::Internal => std::error::Error::source(status).is_some(),
        Code::ResourceExhausted => status.message().contains("too many requests"),
        _ => false,
    }
}

fn refused(status: &Status) -> EtcdError {
    if status.code() == Code::OutOfRange && status.message().contains("has been compacted") {
        return EtcdError::Compacted;
    }
    let message = if status.message().is_empty() { status.code().description() } else { status.message() };
    EtcdError::Refused(message.to_owned())
}

/// What went wrong at the bottom: "connection refused", where tonic says "transport error".
fn innermost(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        text = error.to_string();
        source = error.source();
    }
    text
}

//! Thousands of watchers and a crowd of writers: who watches what, who writes what, and whether every watcher heard exactly what
//! it had to.
//!
//! What is written is fixed beforehand: write `n` goes to the hot key if `n` is a multiple of `hot_every`, else to the next of
//! the distinct keys in turn. So each watcher knows how many events it is owed; if their revisions only rise, and their
//! number is that one, then none was lost and none came twice. Each value says when it was sent.
//!
//! What it does not do: memory, CPU and tables (`benches`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{PutRequest, WatchCreateRequest, WatchRequest, WatchResponse};
use keelson_proto::mvccpb::Event;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::rpc::Rpc;

/// How long nothing may come for whom something is owed.
const SILENCE: Duration = Duration::from_secs(60);

const TIMEOUT: Duration = Duration::from_secs(60);

/// Who watches, and what is written.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Distinct keys, each with one watcher.
    pub keys: usize,
    /// Watchers of the hot key.
    pub hot: usize,
    /// Streams that share the watchers of either sort.
    pub streams: usize,
    pub writes: usize,
    /// Every so many writes, one goes to the hot key.
    pub hot_every: usize,
    /// Writers, each with one write under way, and the connections that they share.
    pub writers: usize,
    pub writer_connections: usize,
    pub value_bytes: usize,
    /// Writes a second; `None`: as fast as they go.
    pub rate: Option<f64>,
}

/// What one stream heard.
#[derive(Debug, Default)]
pub struct Heard {
    pub events: usize,
    /// From before its put was sent until the event was there, each in microseconds.
    pub latencies_us: Vec<u32>,
    /// Responses that brought them.
    pub responses: usize,
}

/// Watchers that listen.
#[derive(Debug)]
pub struct Crowd {
    plan: Arc<Plan>,
    epoch: Instant,
    streams: Vec<JoinHandle<Result<Heard, String>>>,
}

impl Plan {
    /// The key of write `number`.
    fn key(&self, number: usize) -> Bytes {
        if self.keys == 0 || number.is_multiple_of(self.hot_every) {
            hot_key()
        } else {
            // The writes before this one that were not hot.
            distinct_key((number - number / self.hot_every - 1) % self.keys)
        }
    }

    /// How often each key is written.
    fn owed(&self) -> BTreeMap<Bytes, usize> {
        let mut owed = BTreeMap::new();
        (0..self.writes).for_each(|number| *owed.entry(self.key(number)).or_default() += 1);
        owed
    }

    /// What each stream watches: the distinct keys dealt out, and the hot key's watchers.
    fn watched(&self) -> Vec<Vec<Bytes>> {
        let mut streams = vec![Vec::new(); self.streams];
        (0..self.keys).for_each(|number| streams[number % self.streams].push(distinct_key(number)));
        (0..self.hot).for_each(|number| streams[number % self.streams].push(hot_key()));
        streams
    }
}

fn hot_key() -> Bytes {
    Bytes::from_static(b"/crowd/hot")
}

fn distinct_key(number: usize) -> Bytes {
    format!("/crowd/distinct/{number:06}").into()
}

impl Crowd {
    /// Opens all streams, each over a connection of its own, and waits until all watches are created.
    pub async fn gather(url: &str, plan: Plan) -> Result<Crowd, String> {
        let (plan, epoch) = (Arc::new(plan), Instant::now());
        let owed = plan.owed();
        let mut streams = Vec::new();
        for keys in plan.watched().into_iter().filter(|keys| !keys.is_empty()) {
            let owed: usize = keys.iter().map(|key| owed.get(key).copied().unwrap_or(0)).sum();
            let (responses, requests) = open(url, &keys).await?;
            streams.push(tokio::spawn(listen(responses, requests, keys, owed, epoch)));
        }
        Ok(Crowd { plan, epoch, streams })
    }

    /// Writes everything; returns how long that took.
    pub async fn write(&self, url: &str) -> Result<Duration, String> {
        let (next, begun) = (Arc::new(AtomicUsize::new(0)), Instant::now());
        let clients: Vec<Rpc> = (0..self.plan.writer_connections).map(|_| Rpc::to(url, TIMEOUT)).collect();
        let writers: Vec<_> = (0..self.plan.writers)
            .map(|number| {
                let rpc = clients[number % clients.len()].clone();
                tokio::spawn(write(rpc, Arc::clone(&self.plan), Arc::clone(&next), begun, self.epoch))
            })
            .collect();
        for writer in writers {
            writer.await.map_err(|error| error.to_string())??;
        }
        Ok(begun.elapsed())
    }

    /// Waits until every watcher has heard what it was owed, or says which did not.
    pub async fn heard(self) -> Result<Vec<Heard>, String> {
        let mut heard = Vec::new();
        for stream in self.streams {
            heard.push(stream.await.map_err(|error| error.to_string())??);
        }
        Ok(heard)
    }
}

async fn write(
    mut rpc: Rpc,
    plan: Arc<Plan>,
    next: Arc<AtomicUsize>,
    begun: Instant,
    epoch: Instant,
) -> Result<(), String> {
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= plan.writes {
            return Ok(());
        }
        if let Some(rate) = plan.rate {
            let due = begun + Duration::from_secs_f64(number as f64 / rate);
            tokio::time::sleep_until(due.into()).await;
        }
        let mut value = vec![b'v'; plan.value_bytes.max(8)];
        value[..8].copy_from_slice(&(epoch.elapsed().as_micros() as u64).to_be_bytes());
        let put = PutRequest { key: plan.key(number), value: value.into(), ..Default::default() };
        rpc.kv_put(put).await.map_err(|status| format!("write {number}: {status}"))?;
    }
}

type Open = (Streaming<WatchResponse>, mpsc::Sender<WatchRequest>);

/// One stream with a watch of each key, whose number is its id.
async fn open(url: &str, keys: &[Bytes]) -> Result<Open, String> {
    let (requests, queue) = mpsc::channel(keys.len());
    for key in keys {
        let create = WatchCreateRequest { key: key.clone(), ..Default::default() };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        requests.try_send(request).map_err(|error| error.to_string())?;
    }
    let mut rpc = Rpc::to(url, Duration::from_secs(24 * 3600));
    let call = rpc.watch.watch(ReceiverStream::new(queue)).await;
    let mut responses = call.map_err(|status| status.to_string())?.into_inner();
    for id in 0..keys.len() {
        let created = next(&mut responses).await?;
        if created.watch_id != id as i64 || !created.created || created.canceled {
            return Err(format!("watch {id} was not created: {created:?}"));
        }
    }
    Ok((responses, requests))
}

async fn next(responses: &mut Streaming<WatchResponse>) -> Result<WatchResponse, String> {
    match tokio::time::timeout(SILENCE, responses.message()).await {
        Ok(Ok(Some(response))) => Ok(response),
        Ok(Ok(None)) => Err("the stream ended".to_owned()),
        Ok(Err(status)) => Err(format!("the stream ended: {status}")),
        Err(_) => Err(format!("nothing came for {SILENCE:?}")),
    }
}

async fn listen(
    mut responses: Streaming<WatchResponse>,
    _open: mpsc::Sender<WatchRequest>,
    keys: Vec<Bytes>,
    owed: usize,
    epoch: Instant,
) -> Result<Heard, String> {
    let mut heard = Heard { latencies_us: Vec::with_capacity(owed), ..Heard::default() };
    let mut revisions = vec![0_i64; keys.len()];
    while heard.events < owed {
        let response = next(&mut responses).await.map_err(|why| format!("{} of {owed} events, {why}", heard.events))?;
        let now = epoch.elapsed().as_micros() as u64;
        let id = usize::try_from(response.watch_id).map_err(|_| format!("not a watch of ours: {response:?}"))?;
        let key = keys.get(id).ok_or_else(|| format!("not a watch of ours: {id}"))?;
        for event in &response.events {
            revisions[id] = told(event, key, revisions[id])?;
            heard.events += 1;
            heard.latencies_us.push(now.saturating_sub(sent(event)).try_into().unwrap_or(u32::MAX));
        }
        heard.responses += 1;
    }
    Ok(heard)
}

/// The revision of an event that `key`'s watcher may hear after `last`.
fn told(event: &Event, key: &Bytes, last: i64) -> Result<i64, String> {
    let kv = event.kv.as_ref().ok_or("an event without its key")?;
    if kv.key != key {
        return Err(format!("the watcher of {key:?} was told of {:?}", kv.key));
    }
    if kv.mod_revision <= last {
        return Err(format!("the watcher of {key:?} was told of {} after {last}", kv.mod_revision));
    }
    Ok(kv.mod_revision)
}

/// When its put was sent, in microseconds after the epoch.
fn sent(event: &Event) -> u64 {
    let value = event.kv.as_ref().and_then(|kv| kv.value.first_chunk::<8>().copied());
    value.map_or(0, u64::from_be_bytes)
}

//! `bench leases`: a hundred thousand leases, ours beside etcd: granted, kept alive, over a restart, and all of them ended.
//!
//! One member on core 0 with its data on a real disk; this program on core 1. What is asked of it: that the server goes on
//! answering while all of them end (a put every few milliseconds measures that), that no event is lost, and that no more
//! of them go in a second than etcd's rule lets go.
//!
//! What it does not do: followers. Their keep-alives are forwarded, which the end-to-end bodies hold.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use e2e::rpc::{Rpc, prefix_end};
use e2e::{Cluster, Kind};
use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseLeasesRequest, PutRequest, WatchCreateRequest, WatchRequest,
};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use crate::measure::{cpu, pin_generator};
use crate::table::percentile;

/// Measures leases on ours beside etcd.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Leases, each with a key.
    #[arg(long, default_value_t = 100_000)]
    leases: i64,
    /// Seconds; long enough for all of them to be granted and kept alive.
    #[arg(long, default_value_t = 90)]
    ttl: i64,
    /// Calls at once.
    #[arg(long, default_value_t = 200)]
    workers: i64,
    /// Milliseconds between two of the puts that watch over the server.
    #[arg(long, default_value_t = 5)]
    put_every_ms: u64,
}

/// What one store did.
#[derive(Debug, Default)]
struct Found {
    grants_per_second: f64,
    keep_alives_per_second: f64,
    keep_alive_p99_ms: f64,
    restart_s: f64,
    idle: Latency,
    ending: Latency,
    /// From the first end to the last.
    ended_in_s: f64,
    most_in_a_second: usize,
    cpu_s: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Latency {
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

pub(crate) fn run(options: Options) -> Result<()> {
    pin_generator()?;
    println!("{} leases of {} s, {} calls at once, one member\n", options.leases, options.ttl, options.workers);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ours = runtime.block_on(measure(Kind::Keelson, options)).context("keelson")?;
    let theirs = runtime.block_on(measure(Kind::Etcd, options)).context("etcd")?;
    println!("| | keelson | etcd |\n|---|---|---|");
    let row =
        |name: &str, value: &dyn Fn(&Found) -> String| println!("| {name} | {} | {} |", value(&ours), value(&theirs));
    row("grants, each with a key, a second", &|f| format!("{:.0}", f.grants_per_second));
    row("keep-alives a second", &|f| format!("{:.0}", f.keep_alives_per_second));
    row("keep-alive p99, ms", &|f| format!("{:.1}", f.keep_alive_p99_ms));
    row("kill -9 to serving again, s", &|f| format!("{:.1}", f.restart_s));
    row("put p50 / p99 / max before they end, ms", &|f| latency(f.idle));
    row("put p50 / p99 / max while they end, ms", &|f| latency(f.ending));
    row("first end to last, s", &|f| format!("{:.0}", f.ended_in_s));
    row("most ends in any second", &|f| f.most_in_a_second.to_string());
    row("the server's CPU while they end, s", &|f| format!("{:.1}", f.cpu_s));
    Ok(())
}

fn latency(of: Latency) -> String {
    format!("{:.1} / {:.1} / {:.0}", of.p50_ms, of.p99_ms, of.max_ms)
}

async fn measure(kind: Kind, options: Options) -> Result<Found> {
    let flags = ["--quota-backend-bytes=8589934592"];
    let mut cluster = Cluster::prepare(kind, 1, &flags).context("a server is missing (make peers)")?;
    cluster.members[0].pin(0);
    cluster.members[0].restart();
    let url = cluster.members[0].client_url();
    let mut found = Found::default();

    let begun = Instant::now();
    grant_all(&url, options).await?;
    found.grants_per_second = options.leases as f64 / begun.elapsed().as_secs_f64();
    let (rate, p99_ms) = keep_all_alive(&url, options).await?;
    (found.keep_alives_per_second, found.keep_alive_p99_ms) = (rate, p99_ms);

    let begun = Instant::now();
    cluster.members[0].kill();
    cluster.members[0].restart();
    found.restart_s = begun.elapsed().as_secs_f64();
    let mut rpc = Rpc::to(&url, Duration::from_secs(600));
    let list = rpc.lease.lease_leases(LeaseLeasesRequest {}).await?.into_inner();
    ensure!(list.leases.len() as i64 == options.leases, "{} leases after the restart", list.leases.len());

    let server = cluster.members[0].process().id();
    let (ends, puts, cpu_s) = watch_them_end(&url, server, options).await?;
    let (first, last) = (ends[0], ends[ends.len() - 1]);
    found.ended_in_s = (last - first).as_secs_f64();
    found.most_in_a_second = most_in_a_second(&ends);
    let took = |puts: &[&(Instant, Duration)]| summary(puts.iter().map(|(_, took)| *took).collect());
    let (before, during): (Vec<_>, Vec<_>) = puts.iter().filter(|(at, _)| *at <= last).partition(|(at, _)| *at < first);
    (found.idle, found.ending) = (took(&before), took(&during));
    found.cpu_s = cpu_s;
    let list = rpc.lease.lease_leases(LeaseLeasesRequest {}).await?.into_inner();
    ensure!(list.leases.is_empty(), "{} leases are left", list.leases.len());
    Ok(found)
}

async fn grant_all(url: &str, options: Options) -> Result<()> {
    let mut tasks = JoinSet::new();
    let rpc = Rpc::to(url, Duration::from_secs(600));
    for worker in 0..options.workers {
        let mut rpc = rpc.clone();
        tasks.spawn(async move {
            for id in (1..=options.leases).filter(|id| id % options.workers == worker) {
                rpc.lease.lease_grant(LeaseGrantRequest { id, ttl: options.ttl }).await?;
                let key = format!("l/{id}").into();
                rpc.kv_put(PutRequest { key, value: "v".into(), lease: id, ..Default::default() }).await?;
            }
            anyhow::Ok(())
        });
    }
    tasks.join_all().await.into_iter().collect()
}

/// Every lease once, on a stream a worker; the rate, and the 99th percentile of an answer.
async fn keep_all_alive(url: &str, options: Options) -> Result<(f64, f64)> {
    let mut tasks = JoinSet::new();
    let rpc = Rpc::to(url, Duration::from_secs(600));
    let begun = Instant::now();
    for worker in 0..options.workers {
        let mut rpc = rpc.clone();
        tasks.spawn(async move {
            let mut ids = (1..=options.leases).filter(move |id| id % options.workers == worker);
            let (requests, queue) = mpsc::channel(1);
            let Some(first) = ids.next() else { return Ok(Vec::new()) };
            // A server may answer the stream itself only with the first response.
            requests.send(LeaseKeepAliveRequest { id: first }).await?;
            let mut answers = rpc.lease.lease_keep_alive(ReceiverStream::new(queue)).await?.into_inner();
            answers.message().await?;
            let mut took = Vec::new();
            for id in ids {
                let begun = Instant::now();
                requests.send(LeaseKeepAliveRequest { id }).await?;
                let answer = answers.message().await?.context("the stream ended")?;
                ensure!(answer.ttl == options.ttl, "lease {id}: {answer:?}");
                took.push(begun.elapsed());
            }
            anyhow::Ok(took)
        });
    }
    let took: Vec<Vec<Duration>> = tasks.join_all().await.into_iter().collect::<Result<_>>()?;
    let rate = options.leases as f64 / begun.elapsed().as_secs_f64();
    Ok((rate, summary(took.concat()).p99_ms))
}

/// When each lease's key went, when each put was made and what it took, and the server's CPU meanwhile.
async fn watch_them_end(
    url: &str,
    server: u32,
    options: Options,
) -> Result<(Vec<Instant>, Vec<(Instant, Duration)>, f64)> {
    let mut rpc = Rpc::to(url, Duration::from_secs(3600));
    let create = WatchCreateRequest { key: "l/".into(), range_end: prefix_end("l/"), ..Default::default() };
    let (requests, queue) = mpsc::channel(1);
    requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await?;
    let mut watch = rpc.watch.watch(ReceiverStream::new(queue)).await?.into_inner();
    ensure!(watch.message().await?.is_some_and(|response| response.created), "the watch is not created");

    let mut putter = Rpc::to(url, Duration::from_secs(60));
    let every = Duration::from_millis(options.put_every_ms);
    let (going_on, over) = oneshot::channel::<()>();
    let puts = tokio::spawn(async move {
        let mut took = Vec::new();
        let mut beat = tokio::time::interval(every);
        while !going_on.is_closed() {
            beat.tick().await;
            let begun = Instant::now();
            putter.put("beat", "v").await?;
            took.push((begun, begun.elapsed()));
        }
        anyhow::Ok(took)
    });
    let mut ends: Vec<Instant> = Vec::new();
    let mut seen = vec![false; options.leases as usize];
    let mut cpu_before = Duration::ZERO;
    while (ends.len() as i64) < options.leases {
        let response = watch.message().await?.context("the watch ended")?;
        for event in response.events {
            let kv = event.kv.context("an event without a key")?;
            ensure!(event.r#type == 1, "a put of {:?}", kv.key);
            let id: usize = std::str::from_utf8(&kv.key)?.trim_start_matches("l/").parse()?;
            ensure!(!std::mem::replace(&mut seen[id - 1], true), "lease {id} ended twice");
            if ends.is_empty() {
                cpu_before = cpu(server)?;
            }
            ends.push(Instant::now());
        }
    }
    let cpu_s = (cpu(server)? - cpu_before).as_secs_f64();
    drop((watch, requests, over));
    Ok((ends, puts.await??, cpu_s))
}

fn summary(mut took: Vec<Duration>) -> Latency {
    if took.is_empty() {
        return Latency::default();
    }
    took.sort_unstable();
    let at = |share| percentile(&took, share).as_secs_f64() * 1e3;
    Latency { p50_ms: at(50), p99_ms: at(99), max_ms: at(100) }
}

fn most_in_a_second(ends: &[Instant]) -> usize {
    let mut most = 0;
    let mut from = 0;
    for (to, end) in ends.iter().enumerate() {
        while *end - ends[from] >= Duration::from_secs(1) {
            from += 1;
        }
        most = most.max(to - from + 1);
    }
    most
}

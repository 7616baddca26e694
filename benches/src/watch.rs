//! `bench watch`: crowds of watchers, ours beside etcd in one run.
//!
//! Four loads, each on a fresh server: many watchers of distinct keys and some of one key while writers write as fast as they
//! can; one key that all watch; the first again at a pace that both sustain, for the latency alone; and that once more while
//! a hundred streams do not read. Every event is counted and held against what its watcher was owed (`e2e::crowd`): a
//! sample of a run that lost one, or had one twice, is no sample but a failure. Then idle watchers, all on one stream and
//! one stream each, by what the server's memory grows.
//!
//! What it does not do: several members.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use clap::Args;
use e2e::crowd::{Crowd, Plan};
use e2e::rpc::{self, Rpc, prefix_end};
use e2e::{Cluster, Kind, Watcher};
use keelson_proto::etcdserverpb::WatchCreateRequest;

use crate::measure;
use crate::table::{self, median, ruled};

/// Measures watches on ours beside etcd.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Watchers of distinct keys.
    #[arg(long, default_value_t = 10_000)]
    watchers: usize,
    /// Watchers of one key.
    #[arg(long, default_value_t = 1000)]
    hot: usize,
    /// Streams that share them.
    #[arg(long, default_value_t = 10)]
    streams: usize,
    /// Writes of the first load; every hundredth goes to the one key.
    #[arg(long, default_value_t = 100_000)]
    writes: usize,
    /// Idle watchers.
    #[arg(long, default_value_t = 10_000)]
    idle: usize,
    /// Rounds, each on a fresh server of either kind.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only the rows whose name holds this.
    #[arg(long, default_value = "")]
    only: String,
}

/// A load.
struct Load {
    name: &'static str,
    plan: Plan,
    /// Streams beside the crowd that watch everything and read nothing.
    deaf: usize,
}

#[derive(Clone, Copy)]
struct Sample {
    events_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// The server's CPU for one delivered event, the writes' included.
    cpu_us: f64,
    events_per_response: f64,
    /// The share of the time in which the generator was busy, of one core.
    generator_busy: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    measure::pin_generator()?;
    println!(
        "Watches: one member, fsync on, data on disk, server pinned to core 0 and generator to core 1; {} alternating rounds, medians.\n\
         {} watchers of distinct keys and {} of one key on {} streams and connections; values of 256 bytes. Every watcher\n\
         heard exactly what was written for it, in order, in every run.\n",
        options.rounds, options.watchers, options.hot, options.streams
    );
    println!("{}", heading());
    for load in loads(options) {
        if load.name.contains(&options.only) {
            let (ours, theirs) = alternate(options.rounds, |kind| sample(kind, &load)).context(load.name)?;
            println!("{}", row(load.name, &middle(&ours), &middle(&theirs)));
        }
    }
    println!("\n{}", idle_heading(options.idle));
    for (name, streams) in [("idle, all on one stream", 1), ("idle, a stream each", options.idle)] {
        if name.contains(&options.only) {
            let (ours, theirs) = alternate(options.rounds, |kind| idle(kind, options.idle, streams)).context(name)?;
            println!("{}", idle_row(name, median(&ours), median(&theirs)));
        }
    }
    Ok(())
}

fn loads(options: &Options) -> [Load; 4] {
    let all = Plan {
        keys: options.watchers,
        hot: options.hot,
        streams: options.streams,
        writes: options.writes,
        hot_every: 100,
        writers: 100,
        writer_connections: 10,
        value_bytes: 256,
        rate: None,
    };
    let one_key = Plan { keys: 0, writes: options.writes / 50, hot_every: 1, writers: 8, ..all.clone() };
    let paced = Plan { writes: options.writes / 20, rate: Some(500.0), ..all.clone() };
    let beside = paced.clone();
    [
        Load { name: "distinct keys and one key", plan: all, deaf: 0 },
        Load { name: "one key", plan: one_key, deaf: 0 },
        Load { name: "500 writes/s", plan: paced, deaf: 0 },
        Load { name: "500 writes/s, 100 deaf streams", plan: beside, deaf: 100 },
    ]
}

/// One sample of each kind a round; who goes first alternates.
fn alternate<T>(rounds: usize, measure: impl Fn(Kind) -> Result<T>) -> Result<(Vec<T>, Vec<T>)> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let order = if round % 2 == 0 { [Kind::Keelson, Kind::Etcd] } else { [Kind::Etcd, Kind::Keelson] };
        for kind in order {
            let sample = measure(kind).with_context(|| format!("{kind:?}, round {}", round + 1))?;
            match kind {
                Kind::Keelson => ours.push(sample),
                Kind::Etcd => theirs.push(sample),
            }
        }
    }
    Ok((ours, theirs))
}

fn server(kind: Kind) -> Result<Cluster> {
    let mut cluster =
        Cluster::prepare(kind, 1, &["--quota-backend-bytes=8589934592"]).context("a server is missing (make peers)")?;
    cluster.members[0].pin(measure::SERVER_CORE);
    cluster.members[0].restart();
    Ok(cluster)
}

fn sample(kind: Kind, load: &Load) -> Result<Sample> {
    let cluster = server(kind)?;
    let member = &cluster.members[0];
    let (url, process) = (member.client_url(), member.process().id());
    rpc::run(async {
        let mut deaf = Vec::new();
        for _ in 0..load.deaf {
            let all = WatchCreateRequest { key: "/".into(), range_end: prefix_end("/"), ..Default::default() };
            deaf.push(Watcher::open(&mut Rpc::narrow(member), all).await);
        }
        let crowd = Crowd::gather(&url, load.plan.clone()).await.map_err(|why| anyhow!(why))?;
        let (server, own, begun) = (measure::cpu(process)?, measure::own()?, Instant::now());
        crowd.write(&url).await.map_err(|why| anyhow!(why))?;
        let heard = crowd.heard().await.map_err(|why| anyhow!(why))?;
        let (wall, own, server) = (begun.elapsed(), measure::own()? - own, measure::cpu(process)? - server);
        let events: usize = heard.iter().map(|stream| stream.events).sum();
        let responses: usize = heard.iter().map(|stream| stream.responses).sum();
        let mut latencies: Vec<u32> = heard.into_iter().flat_map(|stream| stream.latencies_us).collect();
        ensure!(events == latencies.len() && events > 0, "{events} events, {} latencies", latencies.len());
        latencies.sort_unstable();
        let percentile = |share| f64::from(table::percentile(&latencies, share)) / 1000.0;
        Ok(Sample {
            events_per_second: events as f64 / wall.as_secs_f64(),
            p50_ms: percentile(50),
            p99_ms: percentile(99),
            cpu_us: server.as_secs_f64() * 1e6 / events as f64,
            events_per_response: events as f64 / responses as f64,
            generator_busy: own.as_secs_f64() / wall.as_secs_f64(),
        })
    })
}

/// Bytes that the server grows by for each of so many idle watchers, dealt out over so many streams.
fn idle(kind: Kind, watchers: usize, streams: usize) -> Result<f64> {
    const CONNECTIONS: usize = 10;
    let cluster = server(kind)?;
    let member = &cluster.members[0];
    rpc::run(async {
        let mut clients: Vec<Rpc> = (0..CONNECTIONS.min(streams)).map(|_| Rpc::new(member)).collect();
        // What the first of everything costs is not a watcher's cost.
        for rpc in &mut clients {
            rpc.put("warm", "v").await?;
            let mut watcher = Watcher::open(rpc, watch("warm".into())).await;
            watcher.response().await;
        }
        let before = settled(&cluster).await?;
        let mut open = Vec::new();
        for number in 0..watchers {
            let key = Bytes::from(format!("/registry/pods/namespace-{number:06}"));
            if open.len() < streams {
                let rpc = &mut clients[number % CONNECTIONS.min(streams)];
                open.push(Watcher::open(rpc, watch(key)).await);
            } else {
                open[number % streams].create(watch(key)).await;
            }
            let created = open[number % streams].response().await;
            ensure!(created.created && !created.canceled, "watch {number} was not created");
        }
        let after = settled(&cluster).await?;
        // All of them are alive, the last one too.
        let last = watchers - 1;
        clients[0].put(&format!("/registry/pods/namespace-{last:06}"), "v").await?;
        ensure!(open[last % streams].response().await.events.len() == 1, "the last watcher is told");
        Ok((after as f64 - before as f64) / watchers as f64)
    })
}

fn watch(key: Bytes) -> WatchCreateRequest {
    WatchCreateRequest { key, ..Default::default() }
}

/// The server's memory, once it has not moved by more than 64 KiB for a second.
async fn settled(cluster: &Cluster) -> Result<u64> {
    let process = cluster.members[0].process();
    let deadline = Instant::now() + Duration::from_secs(20);
    let (mut last, mut since) = (process.resident(), Instant::now());
    while since.elapsed() < Duration::from_secs(1) {
        ensure!(Instant::now() < deadline, "the server's memory does not settle");
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = process.resident();
        if now.abs_diff(last) > 64 << 10 {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(process.resident())
}

fn middle(samples: &[Sample]) -> Sample {
    let of = |field: fn(&Sample) -> f64| median(&samples.iter().map(field).collect::<Vec<_>>());
    Sample {
        events_per_second: of(|sample| sample.events_per_second),
        p50_ms: of(|sample| sample.p50_ms),
        p99_ms: of(|sample| sample.p99_ms),
        cpu_us: of(|sample| sample.cpu_us),
        events_per_response: of(|sample| sample.events_per_response),
        generator_busy: of(|sample| sample.generator_busy),
    }
}

fn heading() -> String {
    let names = format!(
        "| {:<30} | {:>9} {:>9} {:>5} | {:>7} {:>7} {:>5} | {:>7} {:>7} {:>5} | {:>6} {:>6} {:>5} | {:>5} {:>5} | {:>5} {:>5} |",
        "",
        "events/s",
        "etcd",
        "ratio",
        "p50 ms",
        "etcd",
        "ratio",
        "p99 ms",
        "etcd",
        "ratio",
        "us/ev.",
        "etcd",
        "ratio",
        "ev/rp",
        "etcd",
        "gen.",
        "etcd"
    );
    ruled(&names)
}

fn row(name: &str, ours: &Sample, theirs: &Sample) -> String {
    format!(
        "| {name:<30} | {:>9.0} {:>9.0} {:>5.2} | {:>7.2} {:>7.2} {:>5.2} | {:>7.2} {:>7.2} {:>5.2} | {:>6.2} {:>6.2} {:>5.2} | {:>5.2} {:>5.2} | {:>3.0} % {:>3.0} % |",
        ours.events_per_second,
        theirs.events_per_second,
        ours.events_per_second / theirs.events_per_second,
        ours.p50_ms,
        theirs.p50_ms,
        ours.p50_ms / theirs.p50_ms,
        ours.p99_ms,
        theirs.p99_ms,
        ours.p99_ms / theirs.p99_ms,
        ours.cpu_us,
        theirs.cpu_us,
        ours.cpu_us / theirs.cpu_us,
        ours.events_per_response,
        theirs.events_per_response,
        ours.generator_busy * 100.0,
        theirs.generator_busy * 100.0,
    )
}

fn idle_heading(watchers: usize) -> String {
    let names =
        format!("| {:<30} | {:>9} {:>9} {:>5} |", format!("{watchers} watchers"), "bytes each", "etcd", "ratio");
    ruled(&names)
}

fn idle_row(name: &str, ours: f64, theirs: f64) -> String {
    format!("| {name:<30} | {ours:>10.0} {theirs:>9.0} {:>5.2} |", ours / theirs)
}

//! One measurement: a fresh server, a generator, and what both said and cost.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::kube::Apiserver;
use e2e::peers::{self, Program};
use e2e::rpc::{self, Rpc};
use e2e::{Cluster, Kind};
use keelson_proto::etcdserverpb::{PutRequest, RangeRequest};
use prost::Message;

use crate::table;

/// The server's core and the generator's.
pub(crate) const SERVER_CORE: usize = 0;
const GENERATOR_CORE: &str = "1";

/// The one key of h2load's rows.
const HOT_KEY: &str = "/registry/leases/kube-node-lease/node-0042";

pub(crate) const H2LOAD_CONNECTIONS: u32 = 100;
pub(crate) const H2LOAD_STREAMS: u32 = 10;

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    Put,
    Get,
    SerializableGet,
    /// etcd's benchmark, random keys.
    RandomPut,
}

impl Load {
    pub(crate) const ALL: [Load; 4] = [Load::Put, Load::Get, Load::SerializableGet, Load::RandomPut];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Load::Put => "put (one hot key)",
            Load::Get => "get (one hot key)",
            Load::SerializableGet => "serializable get (one hot key)",
            Load::RandomPut => "benchmark put (random keys)",
        }
    }

    fn writes(self) -> bool {
        matches!(self, Load::Put | Load::RandomPut)
    }
}

/// What one measurement gave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) operations_per_second: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// The server's CPU, user and system, for one operation.
    pub(crate) cpu_us: f64,
    /// The share of the measurement in which the generator's core was busy: near 1, the generator is the limit.
    pub(crate) generator_busy: f64,
}

/// What a generator said of its run.
#[derive(Clone, Copy, Debug)]
struct Report {
    operations_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
}

/// Starts a server, warms it up, measures, and checks that the work was done.
pub(crate) fn sample(kind: Kind, load: Load, requests: u64, value_size: usize) -> Result<Sample> {
    let quota = ["--quota-backend-bytes=8589934592"];
    let mut cluster = Cluster::prepare(kind, 1, &quota).context("a server is missing (make peers)")?;
    let member = &mut cluster.members[0];
    member.pin(SERVER_CORE);
    member.restart();
    let member = &cluster.members[0];
    let value = random(value_size)?;
    let url = member.client_url();
    let before = put_and_read(&url, &value)?;
    generate(load, &url, cluster.folder(), requests / 20 + 1, &value)?;
    let warm = revision(&url)?;
    let expected = if load.writes() { before + (requests / 20 + 1) as i64 } else { before };
    ensure!(warm == expected, "the warm-up left revision {warm}, not {expected}");

    let (server, begun, own) = (cpu(member.process().id())?, Instant::now(), children()?);
    let (report, seen) = watched(load, &url, &value, || generate(load, &url, cluster.folder(), requests, &value))?;
    let generator = children()? - own;
    let wall = begun.elapsed();
    let server = cpu(member.process().id())? - server;

    let after = revision(&url)?;
    let expected = if load.writes() { warm + requests as i64 } else { warm };
    ensure!(after == expected, "the revision went from {warm} to {after}, not to {expected}: not all puts were done");
    ensure!(load != Load::Get && load != Load::SerializableGet || seen > 0, "no answer was sampled");
    Ok(Sample {
        operations_per_second: report.operations_per_second,
        p50_ms: report.p50_ms,
        p99_ms: report.p99_ms,
        cpu_us: server.as_secs_f64() * 1e6 / requests as f64,
        generator_busy: generator.as_secs_f64() / wall.as_secs_f64(),
    })
}

/// Runs `work` while another client asks for the hot key now and then and holds the answer against the value.
fn watched<T>(load: Load, url: &str, value: &[u8], work: impl FnOnce() -> Result<T>) -> Result<(T, usize)> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| -> Result<usize> {
            let mut seen = 0;
            rpc::run(async {
                let mut rpc = Rpc::to(url, Duration::from_secs(20));
                let mut beat = tokio::time::interval(Duration::from_millis(250));
                while !done.load(Ordering::Relaxed) {
                    beat.tick().await;
                    let request = range(load == Load::SerializableGet);
                    let answer = rpc.range(request).await?;
                    ensure!(answer.kvs.len() == 1 && answer.kvs[0].value == value, "a sampled answer lacks the value");
                    seen += 1;
                }
                Ok(seen)
            })
        });
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        let seen = sampler.join().expect("the sampler does not panic")?;
        Ok((outcome?, seen))
    })
}

fn generate(load: Load, url: &str, folder: &Path, requests: u64, value: &[u8]) -> Result<Report> {
    match load {
        Load::Put => {
            let request = PutRequest { key: HOT_KEY.into(), value: value.to_vec().into(), ..Default::default() };
            h2load(url, "Put", &request, folder, requests, 0)
        }
        Load::Get => h2load(url, "Range", &range(false), folder, requests, value.len() as u64),
        Load::SerializableGet => h2load(url, "Range", &range(true), folder, requests, value.len() as u64),
        Load::RandomPut => benchmark_put(url, requests, value.len()),
    }
}

fn range(serializable: bool) -> RangeRequest {
    RangeRequest { key: HOT_KEY.into(), serializable, ..Default::default() }
}

/// `least` is what every response has to bring at least, in bytes: h2load itself takes a gRPC error for a success.
fn h2load(url: &str, method: &str, request: &impl Message, folder: &Path, requests: u64, least: u64) -> Result<Report> {
    let (body, log) = (folder.join("request"), folder.join("latencies"));
    fs::write(&body, frame(request))?;
    let program = peers::find(Program::H2load).context("h2load is missing")?;
    let output = Command::new("taskset")
        .args(["-c", GENERATOR_CORE])
        .arg(program)
        .args(["-n", &requests.to_string(), "-t", "1"])
        .args(["-c", &H2LOAD_CONNECTIONS.to_string(), "-m", &H2LOAD_STREAMS.to_string()])
        .arg("-d")
        .arg(&body)
        .arg(format!("--log-file={}", log.display()))
        .args(["-H", "content-type: application/grpc", "-H", "te: trailers"])
        .arg(format!("{url}/etcdserverpb.KV/{method}"))
        .output()
        .context("h2load starts")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let done = after(&text, "total, ", "errored").with_context(|| text.clone())?;
    ensure!(done.contains(&format!("{requests} succeeded, 0 failed, 0 ")), "not all requests succeeded: {done}");
    let data: u64 = between(&text, "space savings", ") data")
        .and_then(|rest| rest.rsplit('(').next()?.parse().ok())
        .with_context(|| format!("no traffic in: {text}"))?;
    ensure!(data / requests >= least, "a response has {} bytes, too few for the value", data / requests);
    let rate = after(&text, "finished in ", " req/s").and_then(|rest| rest.rsplit(' ').next()?.parse().ok());
    let mut latencies: Vec<u64> =
        fs::read_to_string(&log)?.lines().filter_map(|line| line.split('\t').nth(2)?.trim().parse().ok()).collect();
    fs::remove_file(&log)?;
    ensure!(latencies.len() as u64 == requests, "h2load logged {} of {requests} requests", latencies.len());
    latencies.sort_unstable();
    let percentile = |share| table::percentile(&latencies, share) as f64 / 1000.0;
    Ok(Report {
        operations_per_second: rate.with_context(|| format!("no rate in: {text}"))?,
        p50_ms: percentile(50),
        p99_ms: percentile(99),
    })
}

pub(crate) const BENCHMARK_CONNECTIONS: u32 = 10;
pub(crate) const BENCHMARK_CLIENTS: u32 = 1000;

fn benchmark_put(url: &str, requests: u64, value_size: usize) -> Result<Report> {
    let program = peers::find(Program::Benchmark).context("benchmark is missing (make peers)")?;
    let output = Command::new("taskset")
        .args(["-c", GENERATOR_CORE])
        .arg(program)
        .args(["--endpoints", url])
        .args(["--conns", &BENCHMARK_CONNECTIONS.to_string(), "--clients", &BENCHMARK_CLIENTS.to_string()])
        .args(["put", "--key-size", "32", "--key-space-size", "100000"])
        .args(["--val-size", &value_size.to_string(), "--total", &requests.to_string()])
        .output()
        .context("benchmark starts")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |before: &str| -> Result<f64> {
        let rest = text.split_once(before).with_context(|| format!("no {before:?} in: {text}"))?.1;
        let word = rest.split_whitespace().find(|word| *word != "in").context("a number")?;
        word.parse().with_context(|| word.to_owned())
    };
    if text.contains("Error distribution") {
        bail!("benchmark met errors: {text}");
    }
    Ok(Report {
        operations_per_second: number("Requests/sec:")?,
        p50_ms: number("50% in ")? * 1000.0,
        p99_ms: number("99% in ")? * 1000.0,
    })
}

/// A gRPC message: one byte for "not compressed", four for the length, the bytes.
fn frame(message: &impl Message) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    let mut frame = vec![0];
    frame.extend((bytes.len() as u32).to_be_bytes());
    frame.extend(bytes);
    frame
}

fn after<'a>(text: &'a str, from: &str, to: &str) -> Option<&'a str> {
    Some(text.split_once(from)?.1.split_once(to)?.0)
}

fn between<'a>(text: &'a str, from: &str, to: &str) -> Option<&'a str> {
    after(text, from, to)
}

/// Puts the hot key and reads it back; returns the revision.
fn put_and_read(url: &str, value: &[u8]) -> Result<i64> {
    rpc::run(async {
        let mut rpc = Rpc::to(url, Duration::from_secs(20));
        let request = PutRequest { key: HOT_KEY.into(), value: value.to_vec().into(), ..Default::default() };
        rpc.kv_put(request).await?;
        let answer = rpc.range(range(false)).await?;
        ensure!(answer.kvs.len() == 1 && answer.kvs[0].value == value, "the put value cannot be read");
        Ok(answer.header.context("a header")?.revision)
    })
}

fn revision(url: &str) -> Result<i64> {
    rpc::run(async {
        let answer = Rpc::to(url, Duration::from_secs(20)).range(range(false)).await?;
        Ok(answer.header.context("a header")?.revision)
    })
}

fn random(count: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Keeps this process on the generator's core; threads that it starts from here on stay there, too.
pub(crate) fn pin_generator() -> Result<()> {
    let process = std::process::id().to_string();
    let status = Command::new("taskset").args(["-cp", GENERATOR_CORE, &process]).output()?.status;
    ensure!(status.success(), "taskset can't pin the generator");
    Ok(())
}

/// User and system time of this process so far.
pub(crate) fn own() -> Result<Duration> {
    times("/proc/self/stat", 11)
}

/// User and system time of a process so far.
pub(crate) fn cpu(process: u32) -> Result<Duration> {
    times(&format!("/proc/{process}/stat"), 11)
}

/// The same of all children of ours that have ended.
fn children() -> Result<Duration> {
    times("/proc/self/stat", 13)
}

/// Two neighbouring fields of a stat file, counted after the name, which may hold spaces. Linux shows ticks of 10 ms on every
/// architecture that we build for.
fn times(path: &str, first: usize) -> Result<Duration> {
    let stat = fs::read_to_string(path)?;
    let fields = stat.rsplit_once(')').context("a stat file")?.1;
    let ticks = fields.split_whitespace().skip(first).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(Duration::from_millis(ticks * 10))
}

/// How long a kube-apiserver takes to be ready on a fresh store of either kind, alternating.
pub(crate) fn apiserver_starts(rounds: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let order = if round % 2 == 0 { [Kind::Keelson, Kind::Etcd] } else { [Kind::Etcd, Kind::Keelson] };
        for kind in order {
            let cluster = Cluster::start_with(kind, 1, &["--watch-progress-notify-interval=5s"]).context("a server")?;
            let server = Apiserver::start(&cluster.endpoints()).context("kube-apiserver is missing (make peers)")?;
            let seconds = server.ready_after.as_secs_f64();
            match kind {
                Kind::Keelson => ours.push(seconds),
                Kind::Etcd => theirs.push(seconds),
            }
        }
    }
    Ok((ours, theirs))
}

//! `bench data`: reads of a store that holds something, ours beside etcd on the same data.
//!
//! Both servers are loaded with the same keys in the same order, started again and changed a little, so that the revision
//! after the load is a page's pinned one. Each row is asked of both, one after the other: first one request at a time, for
//! its latency, then several at once, for requests a second and the server's CPU a request. Answers are bytes to the generator: it decodes
//! none while it measures. Before that, each row's answer is decoded once and must be the same of both.
//!
//! At the end pages are asked for while random keys are put, of more data than the cache holds at the larger size.
//!
//! What it does not do: data larger than memory.

mod ask;
mod load;
mod table;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use e2e::{Cluster, Kind};
use tonic::{Code, Status};

use ask::{Question, Sample};
use load::Loaded;

const SERVER_CORE: usize = 0;
const GENERATOR_CORE: &str = "1";

/// Page with count at many keys: at most so many times the same page at few.
const MOST_BY_SIZE: f64 = 2.0;

/// Measures ranges, pages and counts on ours beside etcd.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Keys of the smaller store.
    #[arg(long, default_value_t = 10_000)]
    few: u64,
    /// Keys of the larger one.
    #[arg(long, default_value_t = 1_000_000)]
    many: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 256)]
    value_size: usize,
    /// Only the rows whose name holds this.
    #[arg(long, default_value = "")]
    only: String,
}

/// A server with its data, and what it took to get there.
struct Served {
    cluster: Cluster,
    loaded: Loaded,
    load: Duration,
    open: Duration,
    rss_loaded: u64,
    rss_opened: u64,
    disk: u64,
}

/// One size, and its rows as ours answered them.
struct Measured {
    keys: u64,
    rows: Vec<(&'static str, Sample)>,
}

/// Measures both sizes and prints their tables. An `Err` if the page is too dear at `many` keys.
pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { few, many, value_size, only } = options;
    pin_this_process()?;
    println!("{}", table::setting(*value_size));
    let at_few = measure(*few, *value_size, only)?;
    let at_many = measure(*many, *value_size, only)?;
    let page = |measured: &Measured| {
        let row = measured.rows.iter().find(|(name, ..)| *name == Question::PAGE)?;
        Some(row.1.p50_ms)
    };
    if let (Some(small), Some(large)) = (page(&at_few), page(&at_many)) {
        let ratio = large / small;
        let verdict = if ratio <= MOST_BY_SIZE { "ok" } else { "NOT" };
        println!(
            "\n{verdict}: a page of 500 with its count takes {large:.3} ms at {} keys and {small:.3} ms at {}: {ratio:.2} times, at most {MOST_BY_SIZE}",
            at_many.keys, at_few.keys
        );
        ensure!(ratio <= MOST_BY_SIZE, "the page with its count depends on the size of the store");
    }
    Ok(())
}

fn measure(keys: u64, value_size: usize, only: &str) -> Result<Measured> {
    let ours = serve(Kind::Keelson, keys, value_size)?;
    let theirs = serve(Kind::Etcd, keys, value_size)?;
    ensure!(ours.loaded == theirs.loaded, "the stores differ: {:?} and {:?}", ours.loaded, theirs.loaded);
    println!("{}", table::heading(keys));
    let mut rows = Vec::new();
    for question in Question::all(&ours.loaded) {
        if !question.name.contains(only) {
            continue;
        }
        let (our_url, their_url) = (url(&ours), url(&theirs));
        let our_answer = match question.answer(&our_url) {
            Err(error) if error.downcast_ref::<Status>().is_some_and(|s| s.code() == Code::Unimplemented) => {
                println!("{}", table::missing(question.name));
                continue;
            }
            answer => answer.with_context(|| format!("ours: {}", question.name))?,
        };
        let their_answer = question.answer(&their_url).with_context(|| format!("etcd: {}", question.name))?;
        ensure!(our_answer == their_answer, "{}: {our_answer:?} and {their_answer:?}", question.name);
        let our_sample = question.sample(&our_url, pid(&ours))?;
        let their_sample = question.sample(&their_url, pid(&theirs))?;
        println!("{}", table::row(question.name, &our_sample, &their_sample));
        rows.push((question.name, our_sample));
    }
    println!("{}", table::costs(&costs(&ours), &costs(&theirs)));
    if "puts".contains(only) {
        let beside = |served: &Served| ask::beside_puts(&url(served), &served.loaded, value_size);
        println!("{}", table::beside(&beside(&ours)?, &beside(&theirs)?));
    }
    Ok(Measured { keys, rows })
}

fn url(served: &Served) -> String {
    served.cluster.members[0].client_url()
}

fn pid(served: &Served) -> u32 {
    served.cluster.members[0].process().id()
}

fn costs(served: &Served) -> [(&'static str, f64); 5] {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    [
        ("load, s", served.load.as_secs_f64()),
        ("time to open, s", served.open.as_secs_f64()),
        ("memory after the load, MiB", mib(served.rss_loaded)),
        ("memory after opening, MiB", mib(served.rss_opened)),
        ("disk after the load, MiB", mib(served.disk)),
    ]
}

/// Starts a server, loads it, starts it again, and changes some keys.
fn serve(kind: Kind, keys: u64, value_size: usize) -> Result<Served> {
    let quota = ["--quota-backend-bytes=17179869184"];
    let mut cluster = Cluster::prepare(kind, 1, &quota).context("a server is missing (make peers)")?;
    let member = &mut cluster.members[0];
    member.pin(SERVER_CORE);
    member.restart();
    let url = member.client_url();
    let begun = Instant::now();
    let pinned = load::load(&url, keys, value_size).with_context(|| format!("loading {kind:?}"))?;
    let load = begun.elapsed();
    let rss_loaded = member.process().resident();
    member.stop();
    let disk = size_of(&member.data_dir)?;
    let begun = Instant::now();
    member.restart();
    let open = begun.elapsed();
    let rss_opened = member.process().resident();
    let loaded = load::change(&url, keys, value_size, pinned).with_context(|| format!("changing {kind:?}"))?;
    Ok(Served { cluster, loaded, load, open, rss_loaded, rss_opened, disk })
}

/// This process, and the threads it starts from here on, share a core that the servers are not on.
fn pin_this_process() -> Result<()> {
    let output = std::process::Command::new("taskset")
        .args(["-c", "-p", GENERATOR_CORE, &std::process::id().to_string()])
        .output()
        .context("taskset starts")?;
    ensure!(output.status.success(), "taskset: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Bytes that the files of a directory take on disk.
fn size_of(directory: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { size_of(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(bytes)
}

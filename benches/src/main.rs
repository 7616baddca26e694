//! `make bench`: ours beside etcd 3.7, one table.
//!
//! Each row is measured in rounds that alternate between the two, every time on a fresh server with its data on a real disk and fsync on;
//! the server has core 0 to itself and the generator core 1. The generators are nobody's of ours: h2load (one request body a row, so
//! one hot key) and etcd's own `benchmark` (random keys). A row counts only if the work was done: puts have to raise the
//! revision by exactly their number, gets have to bring the value.
//!
//! Three other tables: `bench data` ([`data`]), ranges, pages and counts of a store that holds 1,000,000 keys; `bench watch`
//! ([`watch`]), crowds of watchers; `bench leases` ([`leases`]), a hundred thousand of them.
//!
//! What it does not do: clusters. They come with the suites that need them.

#![allow(clippy::print_stdout, reason = "a table is what this program is for")]

mod data;
mod leases;
mod measure;
mod table;
mod watch;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use e2e::Kind;
use measure::{Load, Sample};

/// Measures ours beside etcd and prints one table.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Options {
    #[command(subcommand)]
    table: Option<Table>,
    /// Rounds a row, each on a fresh server of either kind.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Requests a measurement.
    #[arg(long, default_value_t = 100_000)]
    requests: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 256)]
    value_size: usize,
    /// Alternating starts of a kube-apiserver on either store; 0 leaves them out.
    #[arg(long, default_value_t = 5)]
    apiservers: usize,
    /// Only the rows whose name holds this.
    #[arg(long, default_value = "")]
    only: String,
    /// Fail if a throughput ratio is below this.
    #[arg(long, default_value_t = 0.0)]
    at_least: f64,
}

/// The other tables.
#[derive(Debug, Subcommand)]
enum Table {
    Data(data::Options),
    Leases(leases::Options),
    Watch(watch::Options),
}

fn main() -> Result<()> {
    let options = Options::parse();
    match &options.table {
        Some(Table::Data(data)) => return data::run(data),
        Some(Table::Leases(leases)) => return leases::run(*leases),
        Some(Table::Watch(watch)) => return watch::run(watch),
        None => {}
    }
    ensure!(options.rounds > 0 && options.requests > 0, "a measurement needs rounds and requests");
    println!("{}", table::setting(&options.describe()));
    let mut worst = f64::INFINITY;
    println!("{}", table::heading());
    for load in Load::ALL {
        if !load.name().contains(&options.only) {
            continue;
        }
        let (ours, theirs) = measure_row(load, &options).with_context(|| format!("row {:?}", load.name()))?;
        let row = table::Row::new(load.name(), &ours, &theirs);
        worst = worst.min(row.ratio);
        println!("{row}");
    }
    if options.apiservers > 0 && "kube-apiserver".contains(&options.only) {
        let (ours, theirs) = measure::apiserver_starts(options.apiservers)?;
        println!("{}", table::apiserver(&ours, &theirs));
    }
    ensure!(worst >= options.at_least, "a throughput ratio is {worst:.2}, below {}", options.at_least);
    Ok(())
}

/// One sample of each kind a round; who goes first alternates, so that neither always meets the warmer machine.
fn measure_row(load: Load, options: &Options) -> Result<(Vec<Sample>, Vec<Sample>)> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..options.rounds {
        let order = if round % 2 == 0 { [Kind::Keelson, Kind::Etcd] } else { [Kind::Etcd, Kind::Keelson] };
        for kind in order {
            let sample = measure::sample(kind, load, options.requests, options.value_size)
                .with_context(|| format!("{kind:?}, round {}", round + 1))?;
            match kind {
                Kind::Keelson => ours.push(sample),
                Kind::Etcd => theirs.push(sample),
            }
        }
    }
    Ok((ours, theirs))
}

impl Options {
    fn describe(&self) -> String {
        format!("{} rounds of {} requests, values of {} random bytes", self.rounds, self.requests, self.value_size)
    }
}

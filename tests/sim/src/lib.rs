//! A whole cluster from one seed. The machines of `kvstore-core` run here inside a shell made of queues and chance: virtual
//! time, a network that loses, delays, repeats and cuts, disks that forget what was not synced, processes that stop and
//! come back. What clients saw is judged by crate `check`, what members did by [`model`].
//!
//! ```text
//! cargo run -p sim --release -- --seed 17 --trace      one run, told in full
//! cargo run -p sim --release -- --seeds 0..100         many; the first failure prints the command that repeats it
//! ```
//!
//! A run is a function of its seed and of the code. `seeds.txt` keeps the seeds that once found something.
//!
//! | module | |
//! |---|---|
//! | [`cluster`]  | the run: events, faults, both phases |
//! | [`member`]   | one member: its machines and what its threads have in hand |
//! | [`disk`], [`network`], [`clock`], [`rng`] | the world |
//! | [`workload`], [`watcher`], [`keeper`] | clients and what they wrote down |
//! | [`model`]    | what must hold at every moment |
//!
//! What it does not do: find bugs in the shell. `tests/e2e` runs the real one.

use std::panic::{AssertUnwindSafe, catch_unwind};

pub mod clock;
pub mod cluster;
pub mod disk;
pub mod keeper;
pub mod member;
pub mod model;
pub mod network;
pub mod rng;
pub mod watcher;
pub mod workload;

use cluster::Cluster;

/// Faults that are put into the shell on purpose, to see that they are found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Sabotage {
    /// The log thread reports writes as persisted before they are.
    SayPersistedEarly,
    /// Reads are served from the local view without asking the leader.
    ReadWithoutAsking,
    /// The transport sends some forwarded proposals twice (trap 7).
    ResendProposals,
    /// Whoever has a lease in its table keeps it alive, whether it leads or not.
    KeepWithoutLeading,
}

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub seed: u64,
    /// How long things are broken, in milliseconds of the simulation.
    pub faults_ms: u64,
    /// Keep what happened, to be shown.
    pub trace: bool,
    pub sabotage: Option<Sabotage>,
}

impl Options {
    pub fn new(seed: u64) -> Options {
        Options { seed, faults_ms: 20_000, trace: false, sabotage: None }
    }
}

/// What a run was like.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Report {
    pub seed: u64,
    pub virtual_ms: u64,
    pub events: u64,
    pub operations: usize,
    pub answered: usize,
    pub elections: usize,
    pub crashes: usize,
    pub snapshots: usize,
    pub installs: usize,
    pub discards: usize,
    pub fetches: usize,
    /// Events that watchers were told.
    pub watched: usize,
    /// Grants and keep-alives that were answered.
    pub kept: usize,
    /// Leases that ended because nobody kept them.
    pub ended: usize,
    /// Of everything that happened: equal for equal runs.
    pub digest: u64,
}

/// A run that went wrong.
#[derive(Debug)]
pub struct Failure {
    pub seed: u64,
    pub reason: String,
    pub trace: Vec<String>,
}

impl Failure {
    /// What to type to see it again.
    pub fn command(&self) -> String {
        format!("cargo run -p sim --release -- --seed {} --trace", self.seed)
    }
}

/// Runs one seed. A panic anywhere in the machines is a failure of that seed.
pub fn run(options: Options) -> Result<Report, Failure> {
    let failure = |reason, trace| Failure { seed: options.seed, reason, trace };
    let mut cluster = Cluster::new(options).map_err(|reason| failure(reason, Vec::new()))?;
    let result = catch_unwind(AssertUnwindSafe(|| cluster.run()));
    let reason = match result {
        Ok(Ok(report)) => return Ok(report),
        Ok(Err(reason)) => reason,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            format!("panic: {}", text.unwrap_or_else(|| "without words".into()))
        }
    };
    Err(failure(reason, cluster.trace().to_vec()))
}

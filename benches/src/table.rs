//! The table: medians over the rounds, ratios of ours to theirs.

use std::fmt;

use crate::measure::{BENCHMARK_CLIENTS, BENCHMARK_CONNECTIONS, H2LOAD_CONNECTIONS, H2LOAD_STREAMS, Sample};

/// One row: medians, and the median of the rounds' own ratios.
#[derive(Debug)]
pub(crate) struct Row {
    name: &'static str,
    ours: Sample,
    theirs: Sample,
    pub(crate) ratio: f64,
}

impl Row {
    pub(crate) fn new(name: &'static str, ours: &[Sample], theirs: &[Sample]) -> Row {
        let ratios: Vec<f64> = ours
            .iter()
            .zip(theirs)
            .map(|(ours, theirs)| ours.operations_per_second / theirs.operations_per_second)
            .collect();
        Row { name, ours: middle(ours), theirs: middle(theirs), ratio: median(&ratios) }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ours, theirs) = (&self.ours, &self.theirs);
        write!(
            f,
            "| {:<30} | {:>8.0} {:>8.0} {:>6.2} | {:>7.2} {:>7.2} | {:>7.2} {:>7.2} | {:>6.1} {:>6.1} {:>5.2} | {:>3.0} % {:>3.0} % |",
            self.name,
            ours.operations_per_second,
            theirs.operations_per_second,
            self.ratio,
            ours.p50_ms,
            theirs.p50_ms,
            ours.p99_ms,
            theirs.p99_ms,
            ours.cpu_us,
            theirs.cpu_us,
            ours.cpu_us / theirs.cpu_us,
            ours.generator_busy * 100.0,
            theirs.generator_busy * 100.0,
        )
    }
}

pub(crate) fn setting(numbers: &str) -> String {
    format!(
        "One member, fsync on, data on disk, server pinned to core 0 and generator to core 1; alternating rounds, medians.\n\
         {numbers}. put and get: h2load, {H2LOAD_CONNECTIONS} connections x {H2LOAD_STREAMS} streams, one request body, so one hot key.\n\
         benchmark put: etcd's benchmark, {BENCHMARK_CONNECTIONS} connections, {BENCHMARK_CLIENTS} clients, random keys of 100,000.\n\
         Every put row raised the revision by exactly its requests; every get row brought the value.\n"
    )
}

pub(crate) fn heading() -> String {
    let names = format!(
        "| {:<30} | {:>8} {:>8} {:>6} | {:>7} {:>7} | {:>7} {:>7} | {:>6} {:>6} {:>5} | {:>5} {:>5} |",
        "", "ops/s", "etcd", "ratio", "p50 ms", "etcd", "p99 ms", "etcd", "us/op", "etcd", "ratio", "gen.", "etcd"
    );
    ruled(&names)
}

/// A table's names with the line below them.
pub(crate) fn ruled(names: &str) -> String {
    let rule = names.chars().map(|letter| if letter == '|' { '|' } else { '-' }).collect::<String>();
    format!("{names}\n{rule}")
}

pub(crate) fn apiserver(ours: &[f64], theirs: &[f64]) -> String {
    let (ours, theirs) = (median(ours), median(theirs));
    format!("\nkube-apiserver ready after {ours:.2} s on ours, {theirs:.2} s on etcd, ratio {:.2}", ours / theirs)
}

fn middle(samples: &[Sample]) -> Sample {
    let of = |field: fn(&Sample) -> f64| median(&samples.iter().map(field).collect::<Vec<_>>());
    Sample {
        operations_per_second: of(|sample| sample.operations_per_second),
        p50_ms: of(|sample| sample.p50_ms),
        p99_ms: of(|sample| sample.p99_ms),
        cpu_us: of(|sample| sample.cpu_us),
        generator_busy: of(|sample| sample.generator_busy),
    }
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[half] } else { (sorted[half - 1] + sorted[half]) / 2.0 }
}

/// What `share` percent of the sorted values don't exceed.
pub(crate) fn percentile<V: Copy>(sorted: &[V], share: usize) -> V {
    sorted[(sorted.len() - 1) * share / 100]
}

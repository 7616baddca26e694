//! The printed form: ours, etcd's, and what ours is of etcd's.

use super::ask::{Beside, Sample};
use crate::table::ruled;

pub(crate) fn setting(value_size: usize) -> String {
    format!(
        "One member, fsync on, values of {value_size} random bytes, server pinned to core 0 and generator to core 1. Loaded by Txns of 100\n\
         puts, 32 at a time; then restarted; then 1,000 changes, so that the revision after the load is 1,000 behind.\n\
         p50 and p99: one request at a time. req/s and CPU: 8 at a time on 4 connections (RangeStream: one).\n\
         Every row's answers were the same on both: keys, count, more and bytes."
    )
}

pub(crate) fn heading(keys: u64) -> String {
    let names = format!(
        "| {:<30} | {:>9} {:>9} {:>5} | {:>9} {:>9} | {:>8} {:>8} {:>6} | {:>9} {:>9} {:>5} |",
        format!("{keys} keys"),
        "p50 ms",
        "etcd",
        "ratio",
        "p99 ms",
        "etcd",
        "req/s",
        "etcd",
        "ratio",
        "CPU us",
        "etcd",
        "ratio"
    );
    format!("\n{}", ruled(&names))
}

pub(crate) fn row(name: &str, ours: &Sample, theirs: &Sample) -> String {
    format!(
        "| {name:<30} | {:>9.3} {:>9.3} {:>5.2} | {:>9.3} {:>9.3} | {:>8.1} {:>8.1} {:>6.2} | {:>9.1} {:>9.1} {:>5.2} |",
        ours.p50_ms,
        theirs.p50_ms,
        ours.p50_ms / theirs.p50_ms,
        ours.p99_ms,
        theirs.p99_ms,
        ours.requests_per_second,
        theirs.requests_per_second,
        ours.requests_per_second / theirs.requests_per_second,
        ours.cpu_us,
        theirs.cpu_us,
        ours.cpu_us / theirs.cpu_us
    )
}

/// A row of a method that ours does not serve.
pub(crate) fn missing(name: &str) -> String {
    format!("| {name:<30} | not served by ours |")
}

/// Pages beside puts.
pub(crate) fn beside(ours: &Beside, theirs: &Beside) -> String {
    let rows = [
        ("random puts a second", ours.puts_per_second, theirs.puts_per_second),
        ("their p99, ms", ours.put_p99_ms, theirs.put_p99_ms),
        ("page of 500 beside them, p50 ms", ours.page_p50_ms, theirs.page_p50_ms),
        ("the same, p99 ms", ours.page_p99_ms, theirs.page_p99_ms),
    ];
    pairs(rows.into_iter())
}

/// What holding the data costs.
pub(crate) fn costs(ours: &[(&'static str, f64)], theirs: &[(&'static str, f64)]) -> String {
    pairs(ours.iter().zip(theirs).map(|((name, ours), (_, theirs))| (*name, *ours, *theirs)))
}

fn pairs(rows: impl Iterator<Item = (&'static str, f64, f64)>) -> String {
    let mut text = format!("\n| {:<32} | {:>9} {:>9} {:>5} |\n", "", "ours", "etcd", "ratio");
    text += "|----------------------------------|---------------------------|";
    for (name, ours, theirs) in rows {
        text += &format!("\n| {name:<32} | {ours:>9.2} {theirs:>9.2} {:>5.2} |", ours / theirs);
    }
    text
}

//! What the threads count, for whoever shows it: plain atomics, cheap enough for every put.
//!
//! What it does not do: names and text; those are `metrics.rs`.

use std::array;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A count that only rises.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Durations in etcd's buckets for the disk: fourteen, from a millisecond on, each twice the one before.
#[derive(Debug)]
pub struct Histogram {
    /// One for each bound, and one for what is longer than all.
    buckets: [Counter; Histogram::BOUNDS + 1],
    sum_us: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: array::from_fn(|_| Counter::default()), sum_us: Counter::default() }
    }
}

impl Histogram {
    pub const BOUNDS: usize = 14;

    /// A bucket's upper bound, in microseconds.
    pub const fn bound_us(bucket: usize) -> u64 {
        1_000 << bucket
    }

    pub fn observe(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = (0..Self::BOUNDS).find(|bucket| us <= Self::bound_us(*bucket)).unwrap_or(Self::BOUNDS);
        self.buckets[bucket].add(1);
        self.sum_us.add(us);
    }

    /// How many were observed up to each bound, and in all.
    pub fn cumulative(&self) -> [u64; Histogram::BOUNDS + 1] {
        let mut sum = 0;
        array::from_fn(|bucket| {
            sum += self.buckets[bucket].get();
            sum
        })
    }

    pub fn sum_s(&self) -> f64 {
        self.sum_us.get() as f64 / 1e6
    }
}

/// The machines' counts.
#[derive(Default, Debug)]
pub struct Counts {
    pub leader_changes: Counter,
    pub puts: Counter,
    pub deletes: Counter,
    pub log_fsync: Histogram,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_falls_into_the_first_bucket_that_holds_it() {
        let histogram = Histogram::default();
        for us in [1, 1_000, 1_001, 8_192_000, u64::MAX] {
            histogram.observe(Duration::from_micros(us));
        }
        let cumulative = histogram.cumulative();
        assert_eq!((cumulative[0], cumulative[1]), (2, 3));
        assert_eq!((cumulative[Histogram::BOUNDS - 1], cumulative[Histogram::BOUNDS]), (4, 5));
    }
}

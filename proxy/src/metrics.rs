//! What the proxy counts, under kube-proxy's names, and the text that Prometheus reads.
//!
//! One mutex over plain numbers: they are written a few times a sync and read when somebody scrapes. What has no counterpart in
//! kube-proxy begins with `keelson_proxy_`.
//!
//! What it does not have yet: `network_programming_duration_seconds` (needs the time a change was made at), and conntrack's
//! counters by family.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proxy_core::model::Family;

/// From 1 ms, doubled 15 times: kube-proxy's buckets for sync times.
const BUCKETS: usize = 15;
const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// Which of the two HTTP answers about health was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    Healthz,
    Livez,
}

/// How much a sync looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    Full,
    Partial,
}

/// What was changed and not yet synced, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    pub services: u64,
    pub endpoints: u64,
}

#[derive(Debug, Default)]
pub struct Metrics {
    values: Mutex<Values>,
}

#[derive(Debug, Default)]
struct Values {
    sync: Histogram,
    sync_full: Histogram,
    sync_partial: Histogram,
    last_sync_s: f64,
    last_queued_s: f64,
    pending: Pending,
    total: Pending,
    /// Service ports without an endpoint here, by `[internal, external][family]`.
    no_local_endpoints: [[u64; 2]; 2],
    sync_failures: u64,
    cleanup_failures: u64,
    healthz: BTreeMap<u16, u64>,
    livez: BTreeMap<u16, u64>,
    conntrack: Histogram,
    conntrack_deleted: u64,
    unreadable: BTreeMap<&'static str, u64>,
    service_ports: u64,
    elements_written: u64,
    transactions: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Histogram {
    buckets: [u64; BUCKETS],
    sum_s: f64,
    count: u64,
}

impl Histogram {
    fn observe(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        for (i, bucket) in self.buckets.iter_mut().enumerate() {
            *bucket += u64::from(seconds <= bound(i));
        }
        self.sum_s += seconds;
        self.count += 1;
    }
}

fn bound(bucket: usize) -> f64 {
    f64::from(1u32 << bucket) / 1000.0
}

fn since_epoch(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

impl Metrics {
    fn values(&self) -> MutexGuard<'_, Values> {
        // Numbers cannot be half written; a panic elsewhere does not spoil them.
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn queued(&self, pending: Pending, now: SystemTime) {
        let mut values = self.values();
        values.pending.services += pending.services;
        values.pending.endpoints += pending.endpoints;
        values.total.services += pending.services;
        values.total.endpoints += pending.endpoints;
        values.last_queued_s = since_epoch(now);
    }

    pub fn synced(&self, extent: Extent, took: Duration, now: SystemTime) {
        let mut values = self.values();
        values.sync.observe(took);
        match extent {
            Extent::Full => values.sync_full.observe(took),
            Extent::Partial => values.sync_partial.observe(took),
        }
        values.pending = Pending::default();
        values.last_sync_s = since_epoch(now);
    }

    pub fn written(&self, service_ports: usize, elements: usize, transactions: usize) {
        let mut values = self.values();
        values.service_ports = service_ports as u64;
        values.elements_written += elements as u64;
        values.transactions += transactions as u64;
    }

    pub fn sync_failed(&self) {
        self.values().sync_failures += 1;
    }

    pub fn cleanup_failed(&self) {
        self.values().cleanup_failures += 1;
    }

    /// How many Service ports have endpoints, but none here: `[internal, external][family]`.
    pub fn no_local_endpoints(&self, counts: [[u64; 2]; 2]) {
        self.values().no_local_endpoints = counts;
    }

    pub fn conntrack_swept(&self, took: Duration, deleted: usize) {
        let mut values = self.values();
        values.conntrack.observe(took);
        values.conntrack_deleted += deleted as u64;
    }

    pub fn checked(&self, check: Check, code: u16) {
        let mut values = self.values();
        let counts = match check {
            Check::Healthz => &mut values.healthz,
            Check::Livez => &mut values.livez,
        };
        *counts.entry(code).or_default() += 1;
    }

    pub fn unreadable_value(&self, kind: &'static str) {
        *self.values().unreadable.entry(kind).or_default() += 1;
    }

    /// All of them, in Prometheus' text format.
    pub fn render(&self) -> String {
        let mut text = Text::default();
        let values = self.values();
        // One sync writes both families, so each family's figures are the same.
        for (name, help, histogram) in [
            ("sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds", &values.sync),
            (
                "sync_full_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for full resyncs",
                &values.sync_full,
            ),
            (
                "sync_partial_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for partial resyncs",
                &values.sync_partial,
            ),
        ] {
            text.head(&format!("kubeproxy_{name}"), help, "histogram");
            FAMILIES.iter().for_each(|family| {
                text.histogram(&format!("kubeproxy_{name}"), &format!("ip_family=\"{family}\""), histogram);
            });
        }
        by_family(
            &mut text,
            "sync_proxy_rules_last_timestamp_seconds",
            "The last time proxy rules were successfully synced",
            "gauge",
            values.last_sync_s,
        );
        by_family(
            &mut text,
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "The last time a sync of proxy rules was queued",
            "gauge",
            values.last_queued_s,
        );
        by_family(
            &mut text,
            "sync_proxy_rules_nftables_sync_failures_total",
            "Cumulative proxy nftables sync failures",
            "counter",
            values.sync_failures as f64,
        );
        by_family(
            &mut text,
            "sync_proxy_rules_nftables_cleanup_failures_total",
            "Cumulative proxy nftables cleanup failures",
            "counter",
            values.cleanup_failures as f64,
        );
        changes(&mut text, &values);
        no_local_endpoints(&mut text, &values);
        checks(&mut text, &values);
        ours(&mut text, &values);
        process(&mut text);
        text.0
    }
}

fn by_family(text: &mut Text, name: &str, help: &str, kind: &str, value: f64) {
    let name = format!("kubeproxy_{name}");
    text.head(&name, help, kind);
    FAMILIES.iter().for_each(|family| text.sample(&name, &format!("ip_family=\"{family}\""), value));
}

fn changes(text: &mut Text, values: &Values) {
    for (object, help, pending, total) in [
        ("endpoint", "Endpoint", values.pending.endpoints, values.total.endpoints),
        ("service", "Service", values.pending.services, values.total.services),
    ] {
        let name = format!("kubeproxy_sync_proxy_rules_{object}_changes_pending");
        text.head(&name, &format!("Pending proxy rules {help} changes"), "gauge");
        text.sample(&name, "", pending as f64);
        let name = format!("kubeproxy_sync_proxy_rules_{object}_changes_total");
        text.head(&name, &format!("Cumulative proxy rules {help} changes"), "counter");
        text.sample(&name, "", total as f64);
    }
}

fn no_local_endpoints(text: &mut Text, values: &Values) {
    let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
    text.head(name, "Number of services with a Local traffic policy and no endpoints", "gauge");
    for (policy, counts) in ["internal", "external"].iter().zip(values.no_local_endpoints) {
        for (family, count) in FAMILIES.iter().zip(counts) {
            text.sample(name, &format!("ip_family=\"{family}\",traffic_policy=\"{policy}\""), count as f64);
        }
    }
}

fn checks(text: &mut Text, values: &Values) {
    for (check, counts) in [("healthz", &values.healthz), ("livez", &values.livez)] {
        let name = format!("kubeproxy_proxy_{check}_total");
        text.head(&name, &format!("Cumulative proxy {check} HTTP status"), "counter");
        for (code, count) in counts {
            text.sample(&name, &format!("code=\"{code}\""), *count as f64);
        }
    }
}

fn ours(text: &mut Text, values: &Values) {
    let name = "keelson_proxy_conntrack_sweep_duration_seconds";
    text.head(name, "Time to look for stale UDP flows and delete them", "histogram");
    text.histogram(name, "", &values.conntrack);
    let name = "keelson_proxy_source_unreadable_values_total";
    text.head(name, "Stored values that could not be read, by kind", "counter");
    for (kind, count) in &values.unreadable {
        text.sample(name, &format!("kind=\"{kind}\""), *count as f64);
    }
    for (name, help, kind, value) in [
        ("conntrack_deleted_entries_total", "Stale UDP flows deleted", "counter", values.conntrack_deleted),
        ("service_ports", "Service ports given to the kernel, by family counted apart", "gauge", values.service_ports),
        (
            "elements_written_total",
            "Set elements added to and deleted from the kernel",
            "counter",
            values.elements_written,
        ),
        ("transactions_total", "Batches committed by the kernel", "counter", values.transactions),
    ] {
        let name = format!("keelson_proxy_{name}");
        text.head(&name, help, kind);
        text.sample(&name, "", value as f64);
    }
    text.head("keelson_proxy_build_info", "The version of this program", "gauge");
    text.sample("keelson_proxy_build_info", &format!("version=\"{}\"", env!("CARGO_PKG_VERSION")), 1.0);
}

/// What every Prometheus client says of its process, as far as `/proc` tells.
fn process(text: &mut Text) {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else { return };
    // Behind the name, which may hold spaces: field 3 and on.
    let Some((_, rest)) = stat.rsplit_once(") ") else { return };
    let fields: Vec<f64> = rest.split(' ').map(|field| field.parse().unwrap_or_default()).collect();
    const TICKS_PER_SECOND: f64 = 100.0;
    const PAGE_BYTES: f64 = 4096.0;
    if let (Some(user), Some(system)) = (fields.get(11), fields.get(12)) {
        text.head("process_cpu_seconds_total", "Total user and system CPU time spent in seconds", "counter");
        text.sample("process_cpu_seconds_total", "", (user + system) / TICKS_PER_SECOND);
    }
    if let Some(pages) = fields.get(21) {
        text.head("process_resident_memory_bytes", "Resident memory size in bytes", "gauge");
        text.sample("process_resident_memory_bytes", "", pages * PAGE_BYTES);
    }
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let stability = if name.starts_with("kubeproxy_") { "[ALPHA] " } else { "" };
        let _ = writeln!(self.0, "# HELP {name} {stability}{help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: f64) {
        let _ = match labels {
            "" => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{labels}}} {value}"),
        };
    }

    fn histogram(&mut self, name: &str, labels: &str, histogram: &Histogram) {
        let comma = if labels.is_empty() { "" } else { "," };
        for (i, count) in histogram.buckets.iter().enumerate() {
            self.sample(&format!("{name}_bucket"), &format!("{labels}{comma}le=\"{}\"", bound(i)), *count as f64);
        }
        self.sample(&format!("{name}_bucket"), &format!("{labels}{comma}le=\"+Inf\""), histogram.count as f64);
        self.sample(&format!("{name}_sum"), labels, histogram.sum_s);
        self.sample(&format!("{name}_count"), labels, histogram.count as f64);
    }
}

/// The place of a family in counts by family.
pub fn family_index(family: Family) -> usize {
    family as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_kube_proxys_names() {
        let metrics = Metrics::default();
        let now = UNIX_EPOCH + Duration::from_secs(100);
        metrics.queued(Pending { services: 2, endpoints: 3 }, now);
        assert!(metrics.render().contains("\nkubeproxy_sync_proxy_rules_service_changes_pending 2\n"));
        metrics.synced(Extent::Full, Duration::from_millis(3), now);
        metrics.no_local_endpoints([[1, 0], [0, 2]]);
        metrics.checked(Check::Healthz, 200);
        metrics.unreadable_value("Service");
        let text = metrics.render();
        for line in [
            "# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family=\"IPv4\",le=\"0.002\"} 0",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family=\"IPv4\",le=\"0.004\"} 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family=\"IPv4\",le=\"16.384\"} 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"} 1",
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"} 100",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 3",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv6\",traffic_policy=\"external\"} 2",
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "keelson_proxy_source_unreadable_values_total{kind=\"Service\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.contains("process_resident_memory_bytes"));
    }
}

//! What `/metrics` says: facts of the machines, read when asked, and the counts of threads and edge, in Prometheus' text
//! form and under etcd's names (contract 3.5).
//!
//! There is no registry: the machines publish facts anyway, and a gauge is one line made from one of them. What it does
//! not do: the rest of etcd's list, which belongs to the operator's issue.

use std::array;
use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::{Mutex, PoisonError};

use kvstore_core::types::MemberId;

use crate::ETCD_VERSION;
use crate::counts::{Counter, Histogram};
use crate::inbox::Inbox;

/// gRPC's codes are numbered without a hole.
const CODES: usize = 17;

/// etcd's spelling of each code, by its number.
pub(crate) const CODE_NAMES: [&str; CODES] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// How often one RPC began, and how it ended.
#[derive(Default)]
pub struct RpcCounts {
    pub started: Counter,
    handled: [Counter; CODES],
}

impl RpcCounts {
    /// `code` is gRPC's number.
    pub fn handled(&self, code: usize) {
        self.handled[code].add(1);
    }
}

/// What the edge counts.
#[derive(Default)]
pub struct Metrics {
    /// The RPCs of the thin handler, by its own order of them.
    pub hot: [RpcCounts; Metrics::HOT.len()],
    /// All others, by path.
    routed: Mutex<BTreeMap<String, (u64, [u64; CODES])>>,
    pub health_success: Counter,
    pub health_failure: Counter,
}

impl Metrics {
    /// The paths of `hot`.
    pub const HOT: [&'static str; 4] =
        ["/etcdserverpb.KV/Range", "/etcdserverpb.KV/Put", "/etcdserverpb.KV/DeleteRange", "/etcdserverpb.KV/Txn"];

    pub fn routed_started(&self, path: &str) {
        self.routed(path, |counts| counts.0 += 1);
    }

    pub fn routed_handled(&self, path: &str, code: usize) {
        self.routed(path, |counts| counts.1[code] += 1);
    }

    fn routed(&self, path: &str, change: impl FnOnce(&mut (u64, [u64; CODES]))) {
        let mut routed = self.routed.lock().unwrap_or_else(PoisonError::into_inner);
        match routed.get_mut(path) {
            Some(counts) => change(counts),
            None => change(routed.entry(path.to_owned()).or_default()),
        }
    }

    /// Every RPC seen so far: path, begun, ended by code.
    fn rpcs(&self) -> Vec<(String, u64, [u64; CODES])> {
        let routed = self.routed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> =
            routed.iter().map(|(path, (started, handled))| (path.clone(), *started, *handled)).collect();
        for (path, counts) in Metrics::HOT.iter().zip(&self.hot) {
            let handled = array::from_fn(|code| counts.handled[code].get());
            let started = counts.started.get();
            match all.iter_mut().find(|(known, ..)| known == path) {
                Some((_, begun, ended)) => {
                    *begun += started;
                    ended.iter_mut().zip(handled).for_each(|(sum, more)| *sum += more);
                }
                None if started > 0 => all.push(((*path).to_owned(), started, handled)),
                None => {}
            }
        }
        all
    }
}

/// The page.
pub fn render(metrics: &Metrics, inbox: &Inbox) -> String {
    let mut page = Page::default();
    let (raft, identity, published, counts) = (inbox.raft(), inbox.identity(), inbox.published(), inbox.counts());
    let facts = &published.facts;
    let flag = u64::from;
    page.gauge("etcd_server_has_leader", "Whether a leader exists.", flag(raft.leader.is_some()));
    page.gauge("etcd_server_is_leader", "Whether this member is the leader.", flag(raft.is_leader));
    page.gauge("etcd_server_is_learner", "Whether this member is a learner.", 0);
    page.counter("etcd_server_leader_changes_seen_total", "Leaders seen here.", counts.leader_changes.get());
    page.gauge("etcd_server_proposals_committed_total", "Raft's commit index here.", raft.committed);
    page.gauge("etcd_server_proposals_applied_total", "Entries applied here.", raft.applied);
    page.gauge("etcd_server_quota_backend_bytes", "The quota, in bytes.", facts.quota);
    page.gauge("etcd_mvcc_db_total_size_in_bytes", "Bytes that the state takes on disk.", inbox.disk_size());
    page.gauge("etcd_mvcc_db_total_size_in_use_in_bytes", "Logical bytes in use.", facts.size_in_use);
    page.counter("etcd_mvcc_put_total", "Puts applied here.", counts.puts.get());
    page.counter("etcd_mvcc_delete_total", "Deletes applied here.", counts.deletes.get());
    page.gauge("etcd_debugging_mvcc_current_revision", "The current revision.", facts.revision);
    page.gauge("etcd_debugging_mvcc_compact_revision", "The compacted revision.", facts.compacted);
    page.counter("etcd_server_health_success", "Successful health checks.", metrics.health_success.get());
    page.counter("etcd_server_health_failures", "Failed health checks.", metrics.health_failure.get());
    page.histogram("etcd_disk_wal_fsync_duration_seconds", "Writing and syncing the Raft log.", &counts.log_fsync);
    page.rpcs(&metrics.rpcs());
    page.labelled("etcd_server_id", "This member's id.", "server_id", identity.member_id);
    page.labelled("etcd_server_version", "The version of etcd's API.", "server_version", ETCD_VERSION);
    page.labelled("keelson_version", "Keelson's own version.", "version", env!("CARGO_PKG_VERSION"));
    if let Some(version) = &facts.cluster_version {
        let minor: Vec<&str> = version.split('.').take(2).collect();
        page.labelled("etcd_cluster_version", "The cluster's version.", "cluster_version", minor.join("."));
    }
    for alarm in facts.alarms.iter() {
        let kind = keelson_proto::etcdserverpb::AlarmType::try_from(alarm.alarm).map_or("UNKNOWN", |k| k.as_str_name());
        let member = MemberId(alarm.member_id);
        page.line("etcd_debugging_server_alarms", format_args!("{{alarm_type=\"{kind}\",server_id=\"{member}\"}} 1"));
    }
    if let Some(bytes) = resident_bytes() {
        page.gauge("process_resident_memory_bytes", "Resident memory, in bytes.", bytes);
    }
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}").expect("a string takes any text");
    }

    fn line(&mut self, name: &str, rest: impl Display) {
        writeln!(self.text, "{name}{rest}").expect("a string takes any text");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, help, "gauge");
        self.line(name, format_args!(" {value}"));
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, help, "counter");
        self.line(name, format_args!(" {value}"));
    }

    fn labelled(&mut self, name: &str, help: &str, label: &str, value: impl Display) {
        self.head(name, help, "gauge");
        self.line(name, format_args!("{{{label}=\"{value}\"}} 1"));
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, help, "histogram");
        let cumulative = histogram.cumulative();
        for (bucket, count) in cumulative.iter().enumerate().take(Histogram::BOUNDS) {
            let bound = Histogram::bound_us(bucket) as f64 / 1e6;
            self.line(name, format_args!("_bucket{{le=\"{bound}\"}} {count}"));
        }
        let count = cumulative[Histogram::BOUNDS];
        self.line(name, format_args!("_bucket{{le=\"+Inf\"}} {count}"));
        self.line(name, format_args!("_sum {}", histogram.sum_s()));
        self.line(name, format_args!("_count {count}"));
    }

    fn rpcs(&mut self, rpcs: &[(String, u64, [u64; CODES])]) {
        let labels = |path: &str| {
            let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or((path, ""));
            format!("grpc_method=\"{method}\",grpc_service=\"{service}\",grpc_type=\"{}\"", rpc_type(path))
        };
        self.head("grpc_server_handled_total", "RPCs completed here, by code.", "counter");
        for (path, _, handled) in rpcs {
            for (code, count) in CODE_NAMES.iter().zip(handled).filter(|(_, count)| **count > 0) {
                let labels = labels(path);
                self.line("grpc_server_handled_total", format_args!("{{grpc_code=\"{code}\",{labels}}} {count}"));
            }
        }
        self.head("grpc_server_started_total", "RPCs begun here.", "counter");
        for (path, started, _) in rpcs {
            self.line("grpc_server_started_total", format_args!("{{{}}} {started}", labels(path)));
        }
    }
}

/// How etcd's metrics call the shape of an RPC.
fn rpc_type(path: &str) -> &'static str {
    match path {
        "/etcdserverpb.Watch/Watch" | "/etcdserverpb.Lease/LeaseKeepAlive" => "bidi_stream",
        "/etcdserverpb.Maintenance/Snapshot"
        | "/etcdserverpb.KV/RangeStream"
        | "/v3electionpb.Election/Observe"
        | "/grpc.health.v1.Health/Watch" => "server_stream",
        _ => "unary",
    }
}

/// Resident memory from `/proc`, in bytes.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_rpc_that_went_both_ways_is_one_line() {
        let metrics = Metrics::default();
        metrics.hot[1].started.add(2);
        metrics.hot[1].handled(0);
        metrics.routed_started(Metrics::HOT[1]);
        metrics.routed_handled(Metrics::HOT[1], 0);
        let mut page = Page::default();
        page.rpcs(&metrics.rpcs());
        let line = r#"grpc_server_handled_total{grpc_code="OK",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 2"#;
        assert!(page.text.contains(line), "{}", page.text);
    }
}

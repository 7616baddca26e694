//! What is left when it is over, in words that can be compared: the keys of a store, and what its clients complained about.
//!
//! What a run makes up is masked by the rules below, each with its reason. Values are not compared between two stores (uids and times
//! are in all of them), only between the members of one.

use std::collections::{BTreeMap, BTreeSet};

use e2e::rpc::{self, Rpc};
use e2e::{Cluster, Member, PATIENCE, eventually};
use keelson_proto::etcdserverpb::RangeRequest;
use keelson_proto::mvccpb::KeyValue;
use regex_lite::Regex;

/// Keys that no two runs on the same store share: what matches, what is written instead, and why. Nothing is left out unsaid.
const RANDOM: &[(&str, &str, &str)] = &[
    ("^(/registry/pods/.*)-[a-z0-9]{5}$", "$1-*", "a ReplicaSet ends its pods' names at random"),
    ("^(/registry/endpointslices/.*)-[a-z0-9]{5}$", "$1-*", "a slice's name ends at random"),
    ("^(/registry/ipaddresses/).*$", "$1*", "a Service gets an address at random"),
];

/// Events that programs tell, not we, with their reasons.
const TOLD: &[(&str, &str, &str)] = &[
    (
        r"^/registry/events/bulk/v-[0-9]{4}\.[0-9a-f]{16}$",
        "",
        "the apiserver tells of an address to repair if it hears of a Service before it hears of its address: left out",
    ),
    (
        r"^(/registry/events/.*)\.[0-9a-f]{16}$",
        "$1.*",
        "named after the moment; one that is refused while the store has no leader is not told again: whom they are about counts",
    ),
];

/// Written once, by us: here the number of writes is a part of the answer.
const WRITTEN_ONCE: &str = "/bulk/[cstl]-[0-9]{4}$";

/// What stands in a log because a store that is killed is away for a while. Who runs into it, and in which of these words of
/// etcd, gRPC and the kernel he is told, is chance on any store. Before the first kill there is none of it.
const AWAY: &[&str] = &[
    "etcdserver: request timed out",
    "etcdserver: leader changed",
    "etcdserver: no leader",
    "etcdserver: server stopped",
    "context deadline exceeded",
    "context canceled",
    "operation was canceled",
    "connection refused",
    "connection reset by peer",
    "broken pipe",
    "use of closed network connection",
    "error reading server preface",
    "error reading from server: EOF",
    "transport is closing",
    "closing transport due to",
    "Error from server (Timeout)",
];

/// Lines that a program logs or not by chance, on etcd as on ours: they tell of its own tasks, not of what the store did.
const CHANCE: &[(&str, &str)] = &[
    (r"^apiserver E repairip\.go: .* is not allocated; repairing", "two of its watches tell it in another order"),
    (r"^apiserver E controller\.go: .*namespaces \\?.kube-system\\?. not found", "at boot, a controller was faster"),
    (
        r"^apiserver E compact\.go: etcd: endpoint .*: etcdserver: mvcc: required revision has been compacted$",
        "its watch of compact_rev_key hears no progress: reconnected, it asks for the revision of the last change",
    ),
    (r"^controllers E replica_set\.go: .*is not as new as written version", "it hears of its own write late"),
    (
        r"^controllers [EW] .*(not found|the object has been modified)",
        "two controllers meet at one object, or one hears late of its deletion",
    ),
    (
        r"^apiserver [EW] (timeout|wrap|typeconverter)\.go: .*([Tt]imeout|openapi)",
        "a machine so busy that a call within the apiserver takes too long",
    ),
];

const MASKS: &[(&str, &str)] = &[
    ("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UID"),
    ("0x[0-9a-f]+", "POINTER"),
    ("(bulk|churn|doomed|fresh)/[a-z0-9.-]+", "$1/*"),
    (r"\d+", "#"),
];

/// Whether a text is one of a store, or of a server in front of it, that is away for a while.
pub(super) fn away(text: &str) -> bool {
    AWAY.iter().any(|words| text.contains(words))
}

/// What programs complained about.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    /// Each error and warning, what a run makes up put out of sight.
    pub(super) said: BTreeSet<String>,
    /// The errors (not warnings) that only say that the store was away.
    pub(super) away: Vec<String>,
}

fn compiled<'a>(rules: &[(&'a str, &'a str)]) -> Vec<(Regex, &'a str)> {
    rules.iter().map(|(rule, to)| (Regex::new(rule).expect("a rule of ours"), *to)).collect()
}

/// All keys below `/registry/`, the random ones by their rule, with how many there are of each.
pub(super) fn keys(member: &Member) -> BTreeMap<String, usize> {
    let pairs = |rules: &[(&'static str, &'static str, &str)]| -> Vec<(&'static str, &'static str)> {
        rules.iter().map(|(rule, to, _)| (*rule, *to)).collect()
    };
    let (random, told) = (compiled(&pairs(RANDOM)), compiled(&pairs(TOLD)));
    let once = Regex::new(WRITTEN_ONCE).expect("a rule of ours");
    let request = RangeRequest {
        key: "/registry/".into(),
        range_end: "/registry0".into(),
        keys_only: true,
        ..Default::default()
    };
    let found =
        eventually("the keys", PATIENCE, || rpc::run(async { Rpc::new(member).range(request.clone()).await.ok() }));
    assert_eq!(found.count, i64::try_from(found.kvs.len()).unwrap());
    let mut keys = BTreeMap::new();
    for kv in found.kvs {
        let mut key = String::from_utf8(kv.key.to_vec()).expect("Kubernetes' keys are text");
        if let Some((rule, to)) = told.iter().find(|(rule, _)| rule.is_match(&key)) {
            if !to.is_empty() {
                keys.insert(rule.replace(&key, *to).into_owned(), 1);
            }
            continue;
        }
        for (rule, to) in &random {
            key = rule.replace(&key, *to).into_owned();
        }
        if once.is_match(&key) {
            key += &format!(" written {} times", kv.version);
        }
        if kv.lease != 0 {
            key += " with a lease";
        }
        *keys.entry(key).or_insert(0) += 1;
    }
    keys
}

/// The errors and warnings in a program's log.
pub(super) fn complaints(program: &str, lines: &[String]) -> Complaints {
    let head = Regex::new(r"^([EWF])\d{4} [\d:.]+ +\d+ ([a-zA-Z0-9_]+\.go):\d+\] (.*)$").expect("a rule of ours");
    let (masks, chance) = (compiled(MASKS), compiled(CHANCE));
    let mut found = Complaints::default();
    for line in lines {
        let Some(parts) = head.captures(line) else { continue };
        if away(line) {
            if &parts[1] != "W" {
                found.away.push(line.clone());
            }
            continue;
        }
        let mut said = format!("{program} {} {}: {}", &parts[1], &parts[2], &parts[3]);
        if chance.iter().any(|(rule, _)| rule.is_match(&said)) {
            continue;
        }
        for (mask, to) in &masks {
            said = mask.replace_all(&said, *to).into_owned();
        }
        found.said.insert(said);
    }
    found
}

/// What `one` has and `other` has not, or not as often.
pub(super) fn beyond(one: &BTreeMap<String, usize>, other: &BTreeMap<String, usize>) -> Vec<String> {
    let more = one.iter().filter(|(what, count)| other.get(*what) != Some(count));
    more.map(|(what, count)| format!("{what} ({count})")).collect()
}

/// Holds all members against each other, at the revision of the last: the same keys, revisions, leases and bytes.
pub(super) fn members_agree(cluster: &Cluster) -> usize {
    let everything = |revision| RangeRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        serializable: true,
        revision,
        ..Default::default()
    };
    let newest = eventually("the newest revision", PATIENCE, || {
        rpc::run(async { Rpc::new(&cluster.members[0]).get("compact_rev_key").await.ok()?.header })
    })
    .revision;
    rpc::run(async {
        let mut first: Option<Vec<KeyValue>> = None;
        for member in &cluster.members {
            let mut rpc = Rpc::new(member);
            let deadline = std::time::Instant::now() + PATIENCE;
            let kvs = loop {
                // A member that has not applied that much yet says that this is the future.
                match rpc.range(everything(newest)).await {
                    Ok(answer) => break answer.kvs,
                    Err(status) => assert!(std::time::Instant::now() < deadline, "{}: {status}", member.name),
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            };
            let first = first.get_or_insert_with(|| kvs.clone());
            assert!(*first == kvs, "{} holds what {} does not", member.name, cluster.members[0].name);
        }
        first.map_or(0, |kvs| kvs.len())
    })
}

/// The term: as long as it is the same, the store had its leader all the time.
pub(super) fn term(cluster: &Cluster) -> u64 {
    let member = &cluster.members[leader(cluster)];
    eventually("a term", PATIENCE, || rpc::run(async { Some(Rpc::new(member).status().await.ok()?.raft_term) }))
}

/// The member that leads, once all that run agree.
pub(super) fn leader(cluster: &Cluster) -> usize {
    eventually("a leader", PATIENCE, || {
        rpc::run(async {
            let mut ids = BTreeMap::new();
            let mut leaders = BTreeSet::new();
            for (index, member) in cluster.members.iter().enumerate().filter(|(_, member)| member.runs()) {
                let status = Rpc::new(member).status().await.ok()?;
                leaders.insert(status.leader);
                ids.insert(status.header?.member_id, index);
            }
            let leader = leaders.pop_first().filter(|leader| *leader != 0 && leaders.is_empty())?;
            ids.get(&leader).copied()
        })
    })
}

//! The life of a cluster, from its first object to a full restart of its store, once on etcd and once on ours.
//!
//! Three members, a kube-apiserver, a kube-controller-manager, kubectl, a Rust client; some thousands of objects. What is left
//! afterwards is the same in both stores, the same on every member, and nobody complained on ours who did not on etcd.
//!
//! Secrets are kept out of the apiserver's cache: each of their lists and watches is one on the store, as all were before caches
//! learnt to answer them. Everything else goes the way it goes in production.
//!
//! How long each part took is printed for both, and judged by nobody: that is what `benches/` are for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use e2e::kube::Apiserver;
use e2e::kube::client::{Client, name, text, version};
use e2e::rpc::{self, Rpc};
use e2e::{Cluster, Kind, Member, PATIENCE, Process, eventually};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::calls::{
    compact_as_another_apiserver, create, create_all, in_pages, kubectl, page, sure, tried, watch_refused,
};
use super::churn::Churn;
use super::{judge, world};

/// What a cluster's life left behind.
struct Left {
    keys: BTreeMap<String, usize>,
    complaints: BTreeSet<String>,
    /// Errors that only said that the store was away.
    away: Vec<String>,
    phases: Vec<(&'static str, Duration)>,
}

/// A cluster, and how long each part of its life took.
struct Life {
    cluster: Cluster,
    server: Apiserver,
    controllers: Process,
    begun: Instant,
    /// The last revision that we compacted to, and not the apiserver.
    compacted: u64,
    /// The store's, once everything had booted.
    term: u64,
    phases: Vec<(&'static str, Duration)>,
}

#[test]
fn a_life_leaves_the_same_on_both_stores() {
    let Some(etcd) = live(Kind::Etcd) else { return };
    let Some(ours) = live(Kind::Keelson) else { return };
    for ((phase, theirs), (_, own)) in etcd.phases.iter().zip(&ours.phases) {
        eprintln!("{phase:<40} etcd {:6.2} s   keelson {:6.2} s", theirs.as_secs_f64(), own.as_secs_f64());
    }
    eprintln!("on etcd {} errors while the store was away: {:#?}", etcd.away.len(), etcd.complaints);
    eprintln!("on ours {} errors while the store was away: {:#?}", ours.away.len(), ours.complaints);
    eprintln!("{} keys on etcd, {} on ours", etcd.keys.values().sum::<usize>(), ours.keys.values().sum::<usize>());
    let (missing, more) = (judge::beyond(&etcd.keys, &ours.keys), judge::beyond(&ours.keys, &etcd.keys));
    assert!(missing.is_empty() && more.is_empty(), "only etcd has {missing:#?}\nonly ours has {more:#?}");
    let new: Vec<&String> = ours.complaints.difference(&etcd.complaints).collect();
    assert!(new.is_empty(), "logged on ours and not on etcd: {new:#?}");
}

/// All of it on one kind of store; `None` after a loud skip.
fn live(kind: Kind) -> Option<Left> {
    let mut life = Life::begin(kind)?;
    life.bulk();
    let churn = Churn::start(&life.server);
    life.mark("writers and watchers start");
    life.pages();
    life.conflicts();
    life.fresh_lists("lists right after writes");
    life.compaction(&churn);
    life.rollouts();
    life.member_restarts(&churn);
    life.leader_dies(&churn);
    life.everything_restarts(&churn);
    life.fresh_lists("lists right after a restart");
    let (written, retried, tally) = churn.end();
    life.mark("watchers have seen all");
    assert!(tally.bookmarks > 0, "{tally:?}");
    eprintln!("{kind:?}: {written} writes, {retried} tried again; watchers: {tally:?}");
    Some(life.end())
}

impl Life {
    fn begin(kind: Kind) -> Option<Life> {
        let begun = Instant::now();
        // As kubeadm starts it: the apiserver wants to be told how far its watches are.
        let cluster = Cluster::start_with(kind, 3, &["--watch-progress-notify-interval=5s"])?;
        let server = Apiserver::start_with(
            &cluster.endpoints(),
            // Not every five minutes: so that it happens in this life.
            &["--watch-cache-sizes=secrets#0", "--etcd-compaction-interval=20s"],
        )?;
        let controllers = server.controllers(world::CONTROLLERS)?;
        let mut life = Life { cluster, server, controllers, begun, compacted: 0, term: 0, phases: Vec::new() };
        life.term = judge::term(&life.cluster);
        life.mark("boot");
        Some(life)
    }

    fn mark(&mut self, phase: &'static str) {
        let taken = self.begun.elapsed();
        eprintln!("{:?}: {phase} {:.2} s", self.cluster.kind, taken.as_secs_f64());
        self.phases.push((phase, taken));
        self.begun = Instant::now();
    }

    /// kubectl applies what is complicated; meanwhile the Rust client creates what is much.
    fn bulk(&mut self) {
        let file = self.server.write("world.json", &world::manifest());
        kubectl(&self.server, &["apply", "-f", &file]);
        kubectl(&self.server, &["wait", "--for=condition=Established", "crd/things.keelson.dev", "--timeout=60s"]);
        let server = &self.server;
        let by_hand = || {
            for number in 0..10 {
                let name = format!("by-hand-{number}");
                kubectl(server, &["create", "configmap", &name, "-n", "bulk", "--from-literal=word=first"]);
            }
            kubectl(
                server,
                &["patch", "configmap", "by-hand-1", "-n", "bulk", "--type=merge", "-p", r#"{"data":{"word":"2"}}"#],
            );
            kubectl(server, &["label", "configmap", "by-hand-2", "by-hand-3", "-n", "bulk", "hand=yes"]);
            kubectl(server, &["delete", "configmap", "-n", "bulk", "-l", "hand=yes"]);
            kubectl(server, &["apply", "--server-side", "--force-conflicts", "-f", &file]);
        };
        std::thread::scope(|scope| {
            scope.spawn(by_hand);
            rpc::run(async {
                let client = Arc::new(server.client());
                let owner = sure(|| client.get("/api/v1/namespaces/bulk/configmaps/owner")).await;
                create_all(client, world::bulk(text(&owner, "/metadata/uid"))).await;
            });
        });
        self.mark("create thousands of objects");
    }

    /// Lists in pages, each at the revision of the first, while others write.
    fn pages(&mut self) {
        let client = self.server.client();
        rpc::run(async {
            for (collection, limit) in
                [("/api/v1/secrets", 100), ("/api/v1/configmaps", 500), ("/apis/keelson.dev/v1/things", 100)]
            {
                let (version, items) = in_pages(&client, collection, limit).await;
                let exact = format!("resourceVersion={version}&resourceVersionMatch=Exact");
                let whole = page(&client, collection, &exact).await;
                assert_eq!(identities(&items), identities(&whole.items), "{collection} in pages and in one");
                assert_eq!(whole.version, version);
            }
        });
        let listed = kubectl(&self.server, &["get", "secrets", "-n", "bulk", "--chunk-size=100", "-o", "name"]);
        assert_eq!(listed.lines().count(), world::SECRETS);
        self.mark("lists in pages");
    }

    /// Writers that get in each other's way lose no update.
    fn conflicts(&mut self) {
        let client = Arc::new(self.server.client());
        let conflicts = rpc::run(async {
            let path = "/api/v1/namespaces/bulk/configmaps/counter";
            let object = world::configmap("bulk", "counter", json!({"count": "0"}));
            create(&client, "/api/v1/namespaces/bulk/configmaps", &object).await;
            let mut tasks = JoinSet::new();
            for task in 0..6 {
                let client = Arc::clone(&client);
                tasks.spawn(async move { count_up(&client, path, task, 10).await });
            }
            for task in 0..4 {
                let client = Arc::clone(&client);
                tasks.spawn(async move {
                    let mut conflicts = 0;
                    for step in 1..=10 {
                        let object =
                            world::configmap("bulk", "counter", json!({format!("by-{task}"): step.to_string()}));
                        while let Err(refusal) = client.apply(path, &format!("owner-{task}"), &object).await {
                            assert!(refusal.passes() || refusal.reason == "Conflict", "{refusal:?}");
                            conflicts += 1;
                        }
                    }
                    conflicts
                });
            }
            let conflicts: u64 = tasks.join_all().await.into_iter().sum();
            let counter = sure(|| client.get(path)).await;
            assert_eq!(text(&counter, "/data/count"), "60");
            assert!((0..4).all(|task| text(&counter, &format!("/data/by-{task}")) == "10"), "{counter}");

            let object = world::configmap("bulk", "counter", json!({"by-0": "stolen"}));
            let refusal = tried(|| client.apply(path, "owner-1", &object)).await.0.unwrap_err();
            assert_eq!((refusal.status, refusal.reason.as_str()), (409, "Conflict"), "{refusal:?}");
            let options = json!({"preconditions": {"resourceVersion": "1"}});
            let refusal = tried(|| client.delete(path, &options)).await.0.unwrap_err();
            assert_eq!((refusal.status, refusal.reason.as_str()), (409, "Conflict"), "{refusal:?}");
            let options = json!({"preconditions": {"resourceVersion": version(&counter).to_string()}});
            let (deleted, again) = tried(|| client.delete(path, &options)).await;
            assert!(deleted.is_ok() || again, "{deleted:?}");
            conflicts
        });
        eprintln!("{:?}: {conflicts} conflicts", self.cluster.kind);
        self.mark("conflicting writers");
    }

    /// A list that follows a write shows it, though a cache answers: the store tells the cache how far it is when it is asked.
    fn fresh_lists(&mut self, phase: &'static str) {
        let client = self.server.client();
        let round = phase.replace(' ', "-");
        let term = judge::term(&self.cluster);
        let (before, after) = rpc::run(async {
            let collection = "/api/v1/namespaces/fresh/configmaps";
            let before = cache_answers(&client, collection).await;
            for number in 0..20 {
                let object = world::configmap("fresh", &format!("{round}-{number}"), json!({}));
                let wrote = create(&client, collection, &object).await;
                let list = page(&client, collection, "").await;
                assert!(list.version >= version(&wrote), "{} before {}", list.version, version(&wrote));
                assert!(list.items.iter().any(|item| name(item) == name(&wrote)), "{} is missing", name(&wrote));
            }
            (before, consistent_reads(&client).await)
        });
        assert!(after.0 >= before.0 + 20.0, "consistent reads of the cache: {before:?}, {after:?}");
        if judge::term(&self.cluster) == term {
            assert_eq!(after.1, before.1, "consistent reads that the cache could not serve in time");
        }
        self.mark(phase);
    }

    /// A continue token, a list of the past and a watch from the past end with 410 once the past is gone, and not before.
    fn compaction(&mut self, churn: &Churn) {
        let client = self.server.client();
        for collection in ["/api/v1/secrets", "/api/v1/configmaps"] {
            let first = rpc::run(page(&client, collection, "limit=50"));
            churn.advance(2);
            let now = rpc::run(page(&client, "/api/v1/namespaces/fresh/secrets", "")).version;
            let next = format!("limit=50&continue={}", first.token);
            assert_eq!(rpc::run(page(&client, collection, &next)).version, first.version, "not compacted yet");
            churn.passed(now);
            compact_as_another_apiserver(&self.cluster.members[0], now);
            self.compacted = now;
            let expired = eventually("the token expires", PATIENCE, || {
                rpc::run(tried(|| client.list(collection, &next))).0.err()
            });
            assert_eq!((expired.status, expired.reason.as_str()), (410, "Expired"), "{collection}: {expired:?}");
            assert!(expired.message.contains("continue parameter"), "{collection}: {expired:?}");
            rpc::run(async {
                let rest = page(&client, collection, &format!("limit=5000&continue={}", expired.token)).await;
                assert!(rest.version >= now, "{collection}: the rest is at {} and not of today ({now})", rest.version);
                let last = first.items.last().map(name).unwrap();
                assert!(rest.items.iter().all(|item| name(item) > last), "{collection} goes on after {last}");
                let exact = format!("resourceVersion={}&resourceVersionMatch=Exact", first.version);
                let refusal = tried(|| client.list(collection, &exact)).await.0.unwrap_err();
                assert_eq!((refusal.status, refusal.reason.as_str()), (410, "Expired"), "{collection}: {refusal:?}");
            });
            if collection.ends_with("secrets") {
                let from = format!("resourceVersion={}", first.version);
                let refusal = rpc::run(watch_refused(&client, collection, &from));
                assert_eq!((refusal.status, refusal.reason.as_str()), (410, "Expired"), "{refusal:?}");
            }
        }
        self.mark("compaction");
    }

    /// The controllers' share: rollouts, cascades, and a namespace that goes with all it holds (it is waited for at the end).
    fn rollouts(&mut self) {
        let server = &self.server;
        kubectl(server, &["delete", "namespace", "doomed", "--wait=false"]);
        kubectl(server, &["scale", "deployment", "web-0", "-n", "bulk", "--replicas=5"]);
        kubectl(server, &["set", "image", "deployment/web-1", "-n", "bulk", "main=example.invalid/main:2"]);
        kubectl(server, &["delete", "deployment", "web-2", "-n", "bulk", "--cascade=foreground", "--timeout=60s"]);
        kubectl(server, &["delete", "configmap", "owner", "-n", "bulk", "--cascade=background"]);
        self.settle();
        self.mark("rollouts and cascades");
    }

    /// What both programs complained about so far, and the errors that only said that the store was away.
    fn complaints(&self) -> (BTreeSet<String>, Vec<String>) {
        let server = judge::complaints("apiserver", &self.server.process().lines());
        let controllers = judge::complaints("controllers", &self.controllers.lines());
        let said = server.said.into_iter().chain(controllers.said).collect();
        (said, server.away.into_iter().chain(controllers.away).collect())
    }

    fn member_restarts(&mut self, churn: &Churn) {
        if judge::term(&self.cluster) == self.term {
            let away = self.complaints().1;
            assert!(away.is_empty(), "errors of a store that was never away: {away:#?}");
        } else {
            eprintln!("{:?}: the machine is so busy that the store lost its leader", self.cluster.kind);
        }
        let follower = (judge::leader(&self.cluster) + 1) % 3;
        self.cluster.members[follower].stop();
        churn.advance(3);
        self.cluster.members[follower].restart();
        churn.advance(3);
        self.mark("a member restarts");
    }

    fn leader_dies(&mut self, churn: &Churn) {
        kubectl(&self.server, &["scale", "deployment", "web-3", "-n", "bulk", "--replicas=6"]);
        let leader = judge::leader(&self.cluster);
        self.cluster.members[leader].kill();
        churn.advance(3);
        // Lists in pages go on with two members of three.
        let client = self.server.client();
        rpc::run(in_pages(&client, "/api/v1/secrets", 200));
        self.mark("the leader dies");
        self.cluster.members[leader].restart();
        churn.advance(3);
        self.mark("the leader comes back");
    }

    fn everything_restarts(&mut self, churn: &Churn) {
        kubectl(&self.server, &["scale", "deployment", "web-4", "-n", "bulk", "--replicas=1"]);
        self.cluster.members.iter_mut().for_each(Member::kill);
        self.cluster.members.iter_mut().for_each(Member::spawn);
        self.cluster.members.iter().for_each(Member::wait_ready);
        churn.advance(5);
        self.mark("all members restart");
    }

    /// Waits until the controllers have nothing left to do.
    fn settle(&self) {
        let client = self.server.client();
        let deadline = Instant::now() + 3 * PATIENCE;
        rpc::run(async {
            loop {
                let open = match world::unsettled(&client).await {
                    Ok(open) if open.is_empty() => return,
                    Ok(open) => format!("{open:#?}"),
                    Err(refusal) if refusal.passes() => format!("{refusal:?}"),
                    Err(refusal) => panic!("{refusal:?}"),
                };
                assert!(Instant::now() < deadline, "the controllers do not come to rest: {open}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }

    /// Comes to rest, reads what is left, and stops everything.
    fn end(mut self) -> Left {
        self.settle();
        self.mark("the controllers come to rest");
        eventually("the apiserver compacts after us", PATIENCE, || {
            let key = rpc::run(async { Rpc::new(&self.cluster.members[0]).get("compact_rev_key").await.ok() })?;
            let revision: u64 = std::str::from_utf8(&key.kvs[0].value).unwrap().parse().unwrap();
            (revision > self.compacted).then_some(())
        });
        let keys = judge::keys(&self.cluster.members[0]);
        let (complaints, away) = self.complaints();
        self.controllers.kill();
        self.server.stop();
        let held = judge::members_agree(&self.cluster);
        assert!(held > 3_000, "{held} keys on each member");
        self.mark("the members agree");
        Left { keys, complaints, away, phases: self.phases }
    }
}

fn identities(items: &[Value]) -> Vec<(String, u64)> {
    items.iter().map(|item| (name(item), version(item))).collect()
}

/// Waits until a cache that was cut off from its store answers again; the figures from then.
async fn cache_answers(client: &Client, collection: &str) -> (f64, f64) {
    let deadline = Instant::now() + PATIENCE;
    let mut before = consistent_reads(client).await;
    loop {
        page(client, collection, "").await;
        let after = consistent_reads(client).await;
        if after.0 > before.0 && after.1 == before.1 {
            return after;
        }
        assert!(Instant::now() < deadline, "the cache of {collection} does not answer: {before:?}, {after:?}");
        before = after;
    }
}

/// How many lists were to be as fresh as the store, and how many of them the cache had to leave to the store.
async fn consistent_reads(client: &Client) -> (f64, f64) {
    let metrics = sure(|| client.text("/metrics")).await;
    let lines = metrics.lines().filter(|line| line.starts_with("apiserver_watch_cache_consistent_read_total{"));
    lines.fold((0.0, 0.0), |(all, failed), line| {
        let count: f64 = line.rsplit(' ').next().and_then(|count| count.parse().ok()).unwrap_or(0.0);
        let well = line.contains(r#"fallback="false""#) && line.contains(r#"success="true""#);
        (all + count, if well { failed } else { failed + count })
    })
}

/// Reads, adds one, writes what was read: as often as it takes. Answers how often the write came too late.
async fn count_up(client: &Client, path: &str, task: usize, times: usize) -> u64 {
    let mut conflicts = 0;
    let own = format!("counted-by-{task}");
    for step in 1..=times {
        loop {
            let mut counter = sure(|| client.get(path)).await;
            // The answer to the last write was lost, and the write was not.
            if text(&counter, &format!("/data/{own}")) == step.to_string() {
                break;
            }
            let count: u64 = text(&counter, "/data/count").parse().unwrap();
            counter["data"]["count"] = json!((count + 1).to_string());
            counter["data"][&own] = json!(step.to_string());
            match client.replace(path, &counter).await {
                Ok(_) => break,
                Err(refusal) => assert!(refusal.passes() || refusal.reason == "Conflict", "{refusal:?}"),
            }
            conflicts += 1;
        }
    }
    conflicts
}

//! Watches of three members: who stays, who moves to another member, and who wants a leader.

use std::time::{Duration, Instant};

use e2e::rpc::{self, Rpc};
use e2e::{Cluster, Kind, PATIENCE, Watcher};
use tonic::{Code, Request};

use super::{from, open, watch};
use crate::three::{leader, others};

on_both!(across_a_leader_change, no_leader);

/// Whoever stays on its member, and whoever has to move to another one, sees every revision once and in order.
fn across_a_leader_change(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    let first = leader(&cluster);
    let [one, other] = others(first);
    rpc::run(async {
        let mut writer = Rpc::new(&cluster.members[other]);
        let mut stays = Seen::open(&mut Rpc::new(&cluster.members[one]), 1).await;
        let mut moves = Seen::open(&mut Rpc::new(&cluster.members[first]), 1).await;
        let mut moves_twice = Seen::open(&mut Rpc::new(&cluster.members[one]), 1).await;
        write(&mut writer, 100).await;
        moves_twice.up_to(50).await;
        drop(moves_twice.watcher.take());
        moves_twice.reopen(&mut Rpc::new(&cluster.members[first])).await;

        cluster.members[first].kill();
        moves.until_it_ends().await;
        moves_twice.until_it_ends().await;
        moves.reopen(&mut writer).await;
        let last = write(&mut writer, 100).await;
        moves_twice.reopen(&mut writer).await;

        let mut whole = Seen::open(&mut writer, 1).await;
        for seen in [&mut whole, &mut stays, &mut moves, &mut moves_twice] {
            seen.up_to(last).await;
        }
        let revisions: Vec<i64> = whole.events.iter().map(|(revision, _)| *revision).collect();
        assert_eq!(revisions, (2..=last).collect::<Vec<_>>(), "no gap, no duplicate");
        for seen in [stays, moves, moves_twice] {
            assert_eq!(seen.events, whole.events);
        }
    });
}

/// Puts `count` values, each as often as it takes; returns the revision of the last.
async fn write(rpc: &mut Rpc, count: usize) -> i64 {
    let mut last = 0;
    for number in 0..count {
        let deadline = Instant::now() + PATIENCE;
        last = loop {
            match rpc.put("k", &number.to_string()).await {
                Ok(answer) => break answer.header.unwrap().revision,
                Err(status) => assert!(Instant::now() < deadline, "no put for {PATIENCE:?}: {status}"),
            }
        };
    }
    last
}

/// A client that remembers what it saw.
struct Seen {
    watcher: Option<Watcher>,
    events: Vec<(i64, bytes::Bytes)>,
}

impl Seen {
    async fn open(rpc: &mut Rpc, start: i64) -> Seen {
        Seen { watcher: Some(open(rpc, from(start, watch("k"))).await), events: Vec::new() }
    }

    async fn reopen(&mut self, rpc: &mut Rpc) {
        let next = self.events.last().map_or(1, |(revision, _)| revision + 1);
        self.watcher = Some(open(rpc, from(next, watch("k"))).await);
    }

    async fn up_to(&mut self, revision: i64) {
        while self.events.last().is_none_or(|(last, _)| *last < revision) {
            self.next().await.expect("the stream goes on");
        }
    }

    async fn until_it_ends(&mut self) {
        while self.next().await.is_ok() {}
    }

    async fn next(&mut self) -> Result<(), tonic::Status> {
        for event in self.watcher.as_mut().unwrap().next().await?.events {
            let kv = event.kv.unwrap();
            self.events.push((kv.mod_revision, kv.value));
        }
        Ok(())
    }
}

/// Contract 2.7 and 2.4: a stream that asked for a leader ends once there was none for three election timeouts; one that did not
/// ask goes on, and is served again when there is one.
fn no_leader(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    let first = leader(&cluster);
    let [one, other] = others(first);
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[one]);
        let mut plain = open(&mut rpc, watch("k")).await;
        let mut strict = demanding(&mut rpc).await.unwrap();
        assert!(strict.response().await.created);
        cluster.members[first].kill();
        cluster.members[other].kill();
        let begun = Instant::now();
        let status = strict.next().await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: no leader"));
        assert!(begun.elapsed() >= Duration::from_secs(2), "three polls, an election timeout apart");
        let status = demanding(&mut rpc).await.expect_err("a new one is refused at once");
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: no leader"));
        let mut more = open(&mut rpc, watch("k")).await;

        cluster.members[other].restart();
        write(&mut rpc, 1).await;
        assert_eq!(plain.events(1).await, ["put k=0 @2"]);
        assert_eq!(more.events(1).await, ["put k=0 @2"]);
    });
}

async fn demanding(rpc: &mut Rpc) -> Result<Watcher, tonic::Status> {
    let prepare = |request: &mut Request<_>| {
        request.metadata_mut().insert("hasleader", "true".parse().expect("a word"));
    };
    Watcher::open_with(rpc, watch("k"), prepare).await
}

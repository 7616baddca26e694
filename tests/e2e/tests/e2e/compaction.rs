//! Compaction: by itself, until it is done on disk, and across a kill.

use e2e::rpc::{self, Rpc};
use e2e::{Cluster, Kind, PATIENCE};
use keelson_proto::etcdserverpb::{CompactionRequest, RangeRequest};
use tonic::Code;

on_both!(every_two_seconds, by_revision_waits_five_minutes, physical_waits_for_its_deletion, goes_on_after_a_kill);

const FINISHED: &str = "finished scheduled compaction";

async fn write(rpc: &Rpc, count: usize) -> i64 {
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..50 {
        let mut rpc = rpc.clone();
        tasks.spawn(async move {
            for number in 0..count / 50 {
                rpc.put(&format!("k{worker}/{}", number % 4), "v").await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    rpc.clone().get("k0/0").await.unwrap().header.unwrap().revision
}

async fn at(rpc: &mut Rpc, revision: i64) -> Result<i64, Code> {
    let request = RangeRequest { key: "k0/0".into(), revision, ..Default::default() };
    rpc.range(request).await.map(|answer| answer.count).map_err(|status| status.code())
}

fn every_two_seconds(kind: Kind) {
    let Some(cluster) = Cluster::start_with(kind, 1, &["--auto-compaction-retention=2s"]) else { return };
    rpc::run(async {
        let rpc = &mut Rpc::new(&cluster.members[0]);
        let revision = write(rpc, 200).await;
        // The first comes after a whole period, to what was newest a period before.
        rpc::until("what was written first is compacted", async || {
            (at(rpc, 2).await == Err(Code::OutOfRange)).then_some(())
        })
        .await;
        // Whoever writes nothing more is compacted to the newest in the end, and no further.
        rpc::until("all but the newest is compacted", async || {
            (at(rpc, revision - 1).await == Err(Code::OutOfRange)).then_some(())
        })
        .await;
        assert_eq!(at(rpc, revision).await, Ok(1));
        assert_eq!(rpc.get("k0/0").await.unwrap().header.unwrap().revision, revision, "it is no change");
    });
    for line in ["starting auto periodic compaction", "completed auto periodic compaction", FINISHED] {
        cluster.members[0].process().wait_for(line, PATIENCE);
    }
}

/// The first look is after five minutes: until then nothing may go.
fn by_revision_waits_five_minutes(kind: Kind) {
    let flags = ["--auto-compaction-mode=revision", "--auto-compaction-retention=10"];
    let Some(cluster) = Cluster::start_with(kind, 1, &flags) else { return };
    rpc::run(async {
        let rpc = &mut Rpc::new(&cluster.members[0]);
        let revision = write(rpc, 200).await;
        assert_eq!(at(rpc, 2).await.map(|_| ()), Ok(()));
        assert_eq!(at(rpc, revision).await, Ok(1));
    });
    assert!(!cluster.members[0].process().lines().iter().any(|line| line.contains("auto revision compaction")));
}

fn physical_waits_for_its_deletion(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async {
        let rpc = &mut Rpc::new(&cluster.members[0]);
        let revision = write(rpc, 20_000).await;
        let before = rpc.status().await.unwrap().db_size_in_use;
        let (mut writer, mut beside) = (rpc.clone(), 0);
        let compacting = rpc.compact(revision);
        tokio::pin!(compacting);
        // Clients go on beside it.
        let answer = loop {
            tokio::select! {
                biased;
                answer = &mut compacting => break answer,
                put = writer.put("beside", "v") => {
                    put.unwrap();
                    beside += 1;
                }
            }
        };
        answer.unwrap();
        let after = writer.status().await.unwrap().db_size_in_use;
        assert!(after < before / 2, "{before} bytes in use before, {after} after, {beside} puts beside it");
    });
    cluster.members[0].process().wait_for(FINISHED, PATIENCE);
}

fn goes_on_after_a_kill(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 1) else { return };
    let revision = rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[0]);
        let revision = write(&rpc, 20_000).await;
        rpc.kv.compact(CompactionRequest { revision, physical: false }).await.unwrap();
        revision
    });
    cluster.members[0].kill();
    cluster.members[0].restart();
    cluster.members[0].process().wait_for(FINISHED, PATIENCE);
    rpc::run(async {
        let rpc = &mut Rpc::new(&cluster.members[0]);
        assert_eq!(at(rpc, revision - 1).await, Err(Code::OutOfRange));
        assert_eq!(at(rpc, revision).await, Ok(1));
        let again = rpc.compact(revision).await.unwrap_err();
        assert_eq!(again.message(), "etcdserver: mvcc: required revision has been compacted");
    });
}

//! Clients that do not read: what they cost, whom they hold up, and what they get when they read again.

use std::time::Duration;

use e2e::rpc::{self, Rpc};
use e2e::{Cluster, Kind, Watcher};

use super::{open, revision, watch_prefix};

on_both!(a_hundred_who_do_not_read, compacted_while_it_did_not_read, stopped_while_it_did_not_read);

const VALUE: usize = 4096;

/// Puts `count` values of 4 KiB to some keys, a few at a time; returns the last revision.
async fn write(rpc: &Rpc, count: usize) -> i64 {
    let value = "x".repeat(VALUE);
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let (mut rpc, value) = (rpc.clone(), value.clone());
            tokio::spawn(async move {
                let mut last = 0;
                for number in (writer..count).step_by(8) {
                    let answer = rpc.put(&format!("slow/{}", number % 16), &value).await.unwrap();
                    last = answer.header.unwrap().revision;
                }
                last
            })
        })
        .collect();
    let mut last = 0;
    for writer in writers {
        last = writer.await.unwrap().max(last);
    }
    last
}

/// Reads events of `next` and later revisions, each once and in order, up to `last`; or up to where a compaction ended the
/// watch, which is returned.
async fn read(watcher: &mut Watcher, mut next: i64, last: i64) -> Option<(i64, i64)> {
    while next <= last {
        let response = watcher.response().await;
        if response.canceled {
            assert_eq!((revision(&response), response.cancel_reason.as_str()), (0, ""));
            return Some((next, response.compact_revision));
        }
        for event in response.events {
            assert_eq!(event.kv.unwrap().mod_revision, next);
            next += 1;
        }
    }
    None
}

/// Each holds a few hundred KiB at most, not what was written; who reads is told of everything meanwhile; and whoever of them
/// reads again misses nothing.
fn a_hundred_who_do_not_read(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let member = &cluster.members[0];
    let count = 3000;
    rpc::run(async {
        let writer = Rpc::new(member);
        let mut quick = open(&mut Rpc::new(member), watch_prefix("slow/")).await;
        // What the writes themselves cost is there before the slow ones come.
        let warm = write(&writer, count).await;
        assert_eq!(read(&mut quick, 2, warm).await, None);
        let before = member.process().resident();
        let mut slow = Vec::new();
        for _ in 0..100 {
            slow.push(open(&mut Rpc::narrow(member), watch_prefix("slow/")).await);
        }
        let last = write(&writer, count).await;
        assert_eq!(read(&mut quick, warm + 1, last).await, None, "who reads is served");
        let grown = member.process().resident().saturating_sub(before);
        let owed = (slow.len() * count * VALUE) as u64;
        assert!(grown < owed / 4, "{grown} bytes more for streams that are owed {owed}");
        for watcher in slow.iter_mut().step_by(10) {
            assert_eq!(read(watcher, warm + 1, last).await, None);
            watcher.ask_progress().await;
            assert_eq!(revision(&watcher.response().await), last, "it has caught up");
        }
    });
}

/// It gets what was on its way, in order, and is then told what it lost; others are left alone.
fn compacted_while_it_did_not_read(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let member = &cluster.members[0];
    rpc::run(async {
        let mut rpc = Rpc::new(member);
        let mut quick = open(&mut Rpc::new(member), watch_prefix("slow/")).await;
        let mut slow = open(&mut Rpc::narrow(member), watch_prefix("slow/")).await;
        let last = write(&rpc, 3000).await;
        assert_eq!(read(&mut quick, 2, last).await, None);
        rpc.compact(last).await.unwrap();
        let (next, compacted) = read(&mut slow, 2, last).await.expect("12 MB wait nowhere but in history");
        assert_eq!(compacted, last);
        assert!(next > 2 && next <= last, "it was told up to {next}");
        let more = write(&rpc, 10).await;
        assert_eq!(read(&mut quick, last + 1, more).await, None);
        assert!(slow.silent_for(Duration::from_millis(200)).await, "nothing comes after the end");
    });
}

fn stopped_while_it_did_not_read(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async {
        let writer = Rpc::new(&cluster.members[0]);
        let slow = open(&mut Rpc::narrow(&cluster.members[0]), watch_prefix("slow/")).await;
        write(&writer, 500).await;
        // Within its time: nobody waits for who does not read.
        cluster.members[0].stop();
        drop(slow);
    });
}

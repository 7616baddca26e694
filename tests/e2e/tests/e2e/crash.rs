//! `kill -9` in a loop under load: nothing that was acknowledged is lost, and no revision means two things.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use e2e::rpc::{self, Rpc};
use e2e::{Cluster, Kind, PATIENCE, Watcher, eventually};
use keelson_proto::etcdserverpb::{RangeRequest, WatchCreateRequest};

on_both!(one_member, three_members, all_three_at_once);

const WRITERS: usize = 8;
const ROUNDS: usize = 6;
/// Acknowledged puts between two kills.
const PROGRESS: usize = 150;

/// What was acknowledged: key to value and revision.
#[derive(Debug, Default)]
struct Recorder {
    acknowledged: Mutex<BTreeMap<String, (String, i64)>>,
    grew: Condvar,
    stop: AtomicBool,
    lost_answers: AtomicUsize,
}

impl Recorder {
    fn count(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits until `more` puts were acknowledged since now.
    fn wait_for(&self, more: usize) {
        let deadline = Instant::now() + PATIENCE;
        let mut acknowledged = self.acknowledged.lock().unwrap();
        let goal = acknowledged.len() + more;
        while acknowledged.len() < goal {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} of {goal} puts were acknowledged within {PATIENCE:?}", acknowledged.len());
            acknowledged = self.grew.wait_timeout(acknowledged, left).unwrap().0;
        }
    }

    /// Puts keys of its own, each once, asking another member after each failure.
    async fn write(&self, writer: usize, urls: &[String]) {
        let mut clients: Vec<Rpc> = urls.iter().map(|url| Rpc::to(url, Duration::from_secs(2))).collect();
        let mut turn = writer;
        for number in 0.. {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let (key, value) = (format!("w{writer}/{number:06}"), format!("{writer}-{number}"));
            let turns = clients.len();
            match clients[turn % turns].put(&key, &value).await {
                Ok(answer) => {
                    let revision = answer.header.unwrap().revision;
                    self.acknowledged.lock().unwrap().insert(key, (value, revision));
                    self.grew.notify_all();
                }
                Err(_) => {
                    // It may have happened or not: either is right.
                    self.lost_answers.fetch_add(1, Ordering::Relaxed);
                    turn += 1;
                    tokio::time::sleep(Duration::from_millis(10)).await; // not as fast as a refused connection
                }
            }
        }
    }
}

/// Runs `disturb` while writers write to all members, then checks every member against what was acknowledged.
fn under_load(kind: Kind, size: usize, disturb: impl FnOnce(&mut Cluster, &Recorder)) {
    let Some(mut cluster) = Cluster::start(kind, size) else { return };
    let recorder = Arc::new(Recorder::default());
    let urls: Vec<String> = cluster.members.iter().map(e2e::Member::client_url).collect();
    let load = {
        let recorder = Arc::clone(&recorder);
        std::thread::spawn(move || {
            rpc::run(async {
                let mut writers = tokio::task::JoinSet::new();
                for writer in 0..WRITERS {
                    let (recorder, urls) = (Arc::clone(&recorder), urls.clone());
                    writers.spawn(async move { recorder.write(writer, &urls).await });
                }
                writers.join_all().await;
            });
        })
    };
    recorder.wait_for(PROGRESS);
    disturb(&mut cluster, &recorder);
    recorder.wait_for(PROGRESS);
    recorder.stop.store(true, Ordering::Relaxed);
    load.join().expect("the writers");
    check(&cluster, &recorder);
}

fn check(cluster: &Cluster, recorder: &Recorder) {
    let acknowledged = recorder.acknowledged.lock().unwrap();
    let everything =
        |serializable| RangeRequest { key: "w".into(), range_end: "x".into(), serializable, ..Default::default() };
    let newest = rpc::run(async { Rpc::new(&cluster.members[0]).range(everything(false)).await.unwrap() });
    let revision = newest.header.as_ref().unwrap().revision;
    for member in &cluster.members {
        let own = eventually("the member has all revisions", PATIENCE, || {
            let own = rpc::run(async { Rpc::new(member).range(everything(true)).await.ok() })?;
            (own.header.as_ref()?.revision >= revision).then_some(own)
        });
        assert!(own.kvs == newest.kvs, "{} holds something else than {}", member.name, cluster.members[0].name);
    }
    let stored: BTreeMap<String, (String, i64)> = newest
        .kvs
        .iter()
        .map(|kv| {
            let text = |bytes: &bytes::Bytes| String::from_utf8_lossy(bytes).into_owned();
            (text(&kv.key), (text(&kv.value), kv.mod_revision))
        })
        .collect();
    for (key, put) in acknowledged.iter() {
        assert_eq!(stored.get(key), Some(put), "{key} was acknowledged");
    }
    let unanswered = recorder.lost_answers.load(Ordering::Relaxed);
    assert!(stored.len() <= acknowledged.len() + unanswered, "nothing was written that nobody asked for");

    // Each put was one revision, so history is gapless; and it is what the keys say.
    rpc::run(async {
        let create =
            WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), start_revision: 1, ..Default::default() };
        let mut watcher = Watcher::open(&mut Rpc::new(&cluster.members[0]), create).await;
        assert!(watcher.response().await.created);
        let mut next = 2;
        while next <= revision {
            for event in watcher.response().await.events {
                let kv = event.kv.unwrap();
                assert_eq!((kv.mod_revision, kv.version), (next, 1));
                next += 1;
            }
        }
    });
    eprintln!("{} acknowledged, {unanswered} unanswered, {} stored", acknowledged.len(), stored.len());
}

fn one_member(kind: Kind) {
    under_load(kind, 1, |cluster, recorder| {
        for _ in 0..ROUNDS {
            cluster.members[0].kill();
            cluster.members[0].restart();
            recorder.wait_for(PROGRESS);
        }
    });
}

fn three_members(kind: Kind) {
    under_load(kind, 3, |cluster, recorder| {
        for round in 0..ROUNDS {
            // Every other time the leader.
            let victim = if round % 2 == 0 { leader(cluster) } else { round % 3 };
            cluster.members[victim].kill();
            recorder.wait_for(PROGRESS);
            cluster.members[victim].restart();
            recorder.wait_for(PROGRESS);
        }
    });
}

fn leader(cluster: &Cluster) -> usize {
    eventually("a member leads", PATIENCE, || {
        let statuses = cluster.members.iter().map(|member| {
            rpc::run(async { Rpc::to(&member.client_url(), Duration::from_secs(2)).status().await.ok() })
        });
        statuses.enumerate().find_map(|(index, status)| {
            let status = status?;
            (status.leader == status.header?.member_id).then_some(index)
        })
    })
}

fn all_three_at_once(kind: Kind) {
    under_load(kind, 3, |cluster, recorder| {
        for _ in 0..ROUNDS / 2 {
            cluster.members.iter_mut().for_each(e2e::Member::kill);
            cluster.members.iter_mut().for_each(e2e::Member::spawn);
            cluster.members.iter().for_each(e2e::Member::wait_ready);
            recorder.wait_for(PROGRESS);
        }
        assert!(recorder.count() > PROGRESS);
    });
}

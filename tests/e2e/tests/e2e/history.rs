//! Random operations by several clients through all members, while members are killed and paused: what every client and every
//! watcher saw is written down and judged by the same code that judges the simulator's histories.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use check::history::{Action, Answer, Ended, Operation, Version};
use check::revision::Change;
use check::watch::Told;
use check::{linear, revision, watch};
use e2e::rpc::{self, Rpc, prefix_end};
use e2e::{Cluster, Kind, Member, PATIENCE, Watcher, eventually};
use keelson_proto::etcdserverpb::compare::{CompareTarget, TargetUnion};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::response_op::Response;
use keelson_proto::etcdserverpb::{
    Compare, DeleteRangeRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest, WatchCreateRequest,
};
use keelson_proto::mvccpb::event::EventType;
use tonic::Status;

on_both!(quiet, members_killed, members_paused);

const CLIENTS: u64 = 5;
const KEYS: u64 = 4;
const PREFIX: &str = "h/";
/// The last write of all: who has seen it has seen everything.
const END: &str = "h/end";
/// Operations between two faults.
const PROGRESS: usize = 120;

/// What all clients share.
#[derive(Debug, Default)]
struct Shared {
    clock: AtomicU64,
    history: Mutex<Vec<Operation>>,
    answered: AtomicUsize,
    stop: AtomicBool,
}

impl Shared {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn wait_for(&self, more: usize) {
        let goal = self.answered.load(Ordering::SeqCst) + more;
        eventually("operations are answered", PATIENCE, || {
            (self.answered.load(Ordering::SeqCst) >= goal).then_some(())
        });
    }
}

/// A sequence that looks random and is the same for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

async fn client(number: u64, urls: Vec<String>, shared: Arc<Shared>) {
    let mut dice = Dice(number * 7_919 + 1);
    let mut rpcs: Vec<Rpc> = urls.iter().map(|url| Rpc::to(url, Duration::from_millis(600))).collect();
    let mut seen: Vec<Option<String>> = vec![None; KEYS as usize];
    let mut turn = 0;
    while !shared.stop.load(Ordering::SeqCst) {
        turn += 1;
        let key_number = dice.roll(KEYS) as usize;
        let key = format!("{PREFIX}{key_number}");
        let value = format!("{number}-{turn}");
        let action = match dice.roll(10) {
            0..4 => Action::Get,
            4..7 => Action::Put { value },
            7 => Action::Delete,
            _ => Action::Swap { expected: seen[key_number].clone(), value },
        };
        let member = dice.roll(rpcs.len() as u64) as usize;
        let called = shared.now();
        let outcome = execute(&mut rpcs[member], &key, &action).await;
        let at = shared.now();
        let ended = match outcome {
            Ok((revision, answer)) => {
                if let Answer::Got(version) | Answer::NotSwapped(version) = &answer {
                    seen[key_number] = version.as_ref().map(|version| version.value.clone());
                }
                shared.answered.fetch_add(1, Ordering::SeqCst);
                Ended::Answered { at, revision, answer }
            }
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(20)).await; // not as fast as a refused connection
                Ended::Unknown
            }
        };
        shared.history.lock().unwrap().push(Operation { client: number, key, action, called, ended });
    }
}

async fn execute(rpc: &mut Rpc, key: &str, action: &Action) -> Result<(i64, Answer), Status> {
    let range = RangeRequest { key: key.to_owned().into(), ..Default::default() };
    Ok(match action {
        Action::Get => {
            let answer = rpc.range(range).await?;
            (answer.header.unwrap().revision, Answer::Got(version(&answer)))
        }
        Action::Put { value } => (rpc.put(key, value).await?.header.unwrap().revision, Answer::Put),
        Action::Delete => {
            let answer = rpc.delete(DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() }).await?;
            (answer.header.unwrap().revision, Answer::Deleted { count: answer.deleted })
        }
        Action::Swap { expected, value } => {
            let (target, union) = match expected {
                Some(value) => (CompareTarget::Value, TargetUnion::Value(value.clone().into())),
                None => (CompareTarget::Version, TargetUnion::Version(0)),
            };
            let compare = Compare {
                key: key.to_owned().into(),
                target: target.into(),
                target_union: Some(union),
                ..Default::default()
            };
            let op = |request| vec![RequestOp { request: Some(request) }];
            let answer = rpc
                .txn(TxnRequest {
                    compare: vec![compare],
                    success: op(Request::RequestPut(rpc::put(key, value))),
                    failure: op(Request::RequestRange(range)),
                })
                .await?;
            let found = match answer.responses[0].response.as_ref().unwrap() {
                Response::ResponseRange(found) => Answer::NotSwapped(version(found)),
                _ => Answer::Swapped,
            };
            (answer.header.unwrap().revision, found)
        }
    })
}

fn version(answer: &RangeResponse) -> Option<Version> {
    let kv = answer.kvs.first()?;
    let value = String::from_utf8_lossy(&kv.value).into_owned();
    Some(Version { value, mod_revision: kv.mod_revision, version: kv.version })
}

/// Watches at one member until the end is told, going on where it was whenever the stream breaks.
async fn watch_all(url: String) -> Vec<Told> {
    let mut told = Vec::new();
    let mut next = 1;
    loop {
        let mut rpc = Rpc::to(&url, Duration::from_secs(2));
        let create = WatchCreateRequest {
            key: PREFIX.into(),
            range_end: prefix_end(PREFIX),
            start_revision: next,
            ..Default::default()
        };
        let Ok(mut watcher) = Watcher::open_with(&mut rpc, create, |_| ()).await else {
            tokio::time::sleep(Duration::from_millis(50)).await; // not as fast as a refused connection
            continue;
        };
        while let Some(Ok(response)) = watcher.next_within(PATIENCE).await {
            let events: Vec<Change> = response.events.iter().map(change).collect();
            let Some(last) = events.last().cloned() else { continue };
            told.push(Told::Events(events));
            next = last.revision + 1;
            if last.key == END {
                return told;
            }
        }
    }
}

fn change(event: &keelson_proto::mvccpb::Event) -> Change {
    let kv = event.kv.as_ref().unwrap();
    let text = |bytes: &bytes::Bytes| String::from_utf8_lossy(bytes).into_owned();
    let value = (event.r#type() == EventType::Put).then(|| text(&kv.value));
    Change { revision: kv.mod_revision, key: text(&kv.key), value }
}

/// Runs clients and watchers, disturbs the cluster meanwhile, and has everything judged.
fn judged(kind: Kind, disturb: impl FnOnce(&mut Cluster, &Shared)) {
    let Some(mut cluster) = Cluster::start(kind, 3) else { return };
    let shared = Arc::new(Shared::default());
    let urls: Vec<String> = cluster.members.iter().map(Member::client_url).collect();
    let clients = {
        let (shared, urls) = (Arc::clone(&shared), urls.clone());
        std::thread::spawn(move || {
            rpc::run(async {
                let mut clients = tokio::task::JoinSet::new();
                for number in 1..=CLIENTS {
                    clients.spawn(client(number, urls.clone(), Arc::clone(&shared)));
                }
                clients.join_all().await;
            });
        })
    };
    let watchers: Vec<_> = urls
        .iter()
        .map(|url| {
            let url = url.clone();
            std::thread::spawn(|| rpc::run(watch_all(url)))
        })
        .collect();

    shared.wait_for(PROGRESS);
    disturb(&mut cluster, &shared);
    shared.wait_for(PROGRESS);
    shared.stop.store(true, Ordering::SeqCst);
    clients.join().expect("the clients");
    rpc::run(async { Rpc::new(&cluster.members[0]).put(END, "end").await.unwrap() });
    let told: Vec<Vec<Told>> = watchers.into_iter().map(|watcher| watcher.join().expect("a watcher")).collect();
    let all: Vec<Change> = rpc::run(watch_all(urls[0].clone()))
        .into_iter()
        .flat_map(|told| match told {
            Told::Events(events) => events,
            _ => Vec::new(),
        })
        .filter(|change| change.key != END)
        .collect();

    let history = std::mem::take(&mut *shared.history.lock().unwrap());
    let unknown = history.iter().filter(|operation| operation.ended == Ended::Unknown).count();
    eprintln!("{} operations, {unknown} unanswered, {} changes", history.len(), all.len());
    revision::judge_time(&history).unwrap_or_else(|why| panic!("{why}"));
    revision::judge_kept(&history, &all).unwrap_or_else(|why| panic!("{why}"));
    linear::judge(&revision::resolve(&history, &all)).unwrap_or_else(|why| panic!("{why}"));
    let newest = all.last().map(|change| change.revision);
    for (member, told) in cluster.members.iter().zip(&told) {
        let told: Vec<Told> = told.iter().map(without_end).collect();
        watch::judge(&all, 1, newest, |_| true, &told).unwrap_or_else(|why| panic!("watching {}: {why}", member.name));
    }
}

fn without_end(told: &Told) -> Told {
    match told {
        Told::Events(events) => Told::Events(events.iter().filter(|change| change.key != END).cloned().collect()),
        other => other.clone(),
    }
}

fn quiet(kind: Kind) {
    judged(kind, |_, shared| shared.wait_for(5 * PROGRESS));
}

fn members_killed(kind: Kind) {
    judged(kind, |cluster, shared| {
        for round in 0..6 {
            cluster.members[round % 3].kill();
            shared.wait_for(PROGRESS);
            cluster.members[round % 3].restart();
            shared.wait_for(PROGRESS / 2);
        }
    });
}

/// A member that stands still for longer than an election does not know, when it goes on, that it leads no more.
fn members_paused(kind: Kind) {
    judged(kind, |cluster, shared| {
        for round in 0..5 {
            let victim = cluster.members[round % 3].process();
            victim.signal("STOP");
            shared.wait_for(PROGRESS / 2);
            victim.signal("CONT");
            shared.wait_for(PROGRESS / 2);
        }
    });
}

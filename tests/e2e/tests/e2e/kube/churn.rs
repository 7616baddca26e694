//! Writers that never rest and watchers that may miss nothing, on a thread of their own while others break the store.
//!
//! A writer leads each of its objects through life after life: created, patched three times, deleted, created again. Each write but
//! the deletion carries the next number. So whoever watches knows what has to come next, whatever was restarted meanwhile, and
//! a write whose answer was lost can be tried again: it finds itself done, and tells nobody twice.
//!
//! Writers try again what failed for a reason that passes, as any client does. Watchers open again where they were: that the
//! revision they ask for is gone is a failure, for nobody compacts what they have not seen.
//!
//! Nothing here stops or starts a store, and what becomes of other objects is not watched.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use e2e::kube::Apiserver;
use e2e::kube::client::{Change, Client, Refusal, text, version};
use e2e::{PATIENCE, eventually};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

/// The namespace that all of it happens in.
pub(super) const NAMESPACE: &str = "churn";
/// Objects a writer has in hand.
const OBJECTS: usize = 4;
const WRITERS_PER_KIND: usize = 3;
/// Between two writes of a writer: clients limit themselves to leave others room.
const PACE: Duration = Duration::from_millis(40);
/// Before a call is tried again, or a watch opened again.
const BACKOFF: Duration = Duration::from_millis(100);
/// Writes in a life: the creation, three patches, the deletion.
const LIFE: u64 = 5;

/// Where a kind of object is found, and how one is spelled.
#[derive(Clone, Copy, Debug)]
struct Sort {
    kind: &'static str,
    api: &'static str,
    plural: &'static str,
    /// Whether the apiserver caches it; without a cache each of its watches is one on the store.
    cached: bool,
}

const SORTS: [Sort; 3] = [
    Sort { kind: "ConfigMap", api: "v1", plural: "configmaps", cached: true },
    Sort { kind: "Secret", api: "v1", plural: "secrets", cached: false },
    Sort { kind: "Thing", api: "keelson.dev/v1", plural: "things", cached: true },
];

impl Sort {
    fn collection(&self) -> String {
        let root = if self.api.contains('/') { "apis" } else { "api" };
        format!("/{root}/{}/namespaces/{NAMESPACE}/{}", self.api, self.plural)
    }

    fn object(&self, name: &str, number: u64) -> Value {
        json!({
            "apiVersion": self.api,
            "kind": self.kind,
            "metadata": {"name": name, "labels": {"churn": "yes"}, "annotations": {"number": number.to_string()}},
        })
    }
}

/// The number of an object's last write, and whether it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    number: u64,
    alive: bool,
}

/// What one watcher has seen.
#[derive(Debug, Default)]
struct Seen {
    objects: BTreeMap<String, Mark>,
    tally: Tally,
    problem: Option<String>,
}

/// How a watcher fared.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) events: u64,
    pub(super) bookmarks: u64,
    pub(super) reopened: u64,
}

#[derive(Debug)]
struct Follower {
    sort: Sort,
    /// Seconds after which the apiserver ends each of its watches; 0 leaves it to the apiserver.
    patience: u64,
    version: AtomicU64,
    seen: Mutex<Seen>,
}

/// What all tasks share.
#[derive(Debug)]
struct Shared {
    client: Client,
    ending: AtomicBool,
    written: Vec<AtomicU64>,
    retried: AtomicU64,
    followers: Vec<Follower>,
}

/// Writers and watchers at work.
#[derive(Debug)]
pub(super) struct Churn {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Churn {
    /// Starts three writers and two watchers for each kind of object: one that is there from the first write on and one that comes later.
    pub(super) fn start(server: &Apiserver) -> Churn {
        let follower = |sort: Sort, patience| Follower {
            sort,
            patience,
            version: AtomicU64::new(0),
            seen: Mutex::new(Seen::default()),
        };
        let shared = Arc::new(Shared {
            client: server.client(),
            ending: AtomicBool::new(false),
            written: (0..SORTS.len() * WRITERS_PER_KIND).map(|_| AtomicU64::new(0)).collect(),
            retried: AtomicU64::new(0),
            followers: SORTS.iter().flat_map(|&sort| [follower(sort, 0), follower(sort, 8)]).collect(),
        });
        let tasks = Arc::clone(&shared);
        let thread = std::thread::spawn(move || e2e::rpc::run(run(tasks)));
        let churn = Churn { shared, thread: Some(thread) };
        churn.advance(3);
        churn
    }

    /// Waits until every writer has written `more` times from now on.
    pub(super) fn advance(&self, more: u64) {
        let read = || -> Vec<u64> { self.shared.written.iter().map(|count| count.load(Ordering::Relaxed)).collect() };
        let before = read();
        eventually("every writer goes on", 2 * PATIENCE, || {
            self.check();
            read().iter().zip(&before).all(|(now, before)| *now >= before + more).then_some(())
        });
    }

    /// Waits until every watcher has been told of `revision` or of a later one.
    pub(super) fn passed(&self, revision: u64) {
        eventually("every watcher is told how far it is", 2 * PATIENCE, || {
            self.check();
            let direct = self.shared.followers.iter().filter(|follower| !follower.sort.cached);
            let mut versions = direct.map(|follower| follower.version.load(Ordering::Relaxed));
            versions.all(|version| version >= revision).then_some(())
        });
    }

    /// Lets the writers end their objects' lives, the same way each time, and waits until every watcher has seen all of it.
    pub(super) fn end(mut self) -> (u64, u64, Tally) {
        self.shared.ending.store(true, Ordering::Relaxed);
        self.thread.take().expect("ends once").join().expect("writers and watchers end well");
        let total = |counts: &[AtomicU64]| counts.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        let mut tally = Tally::default();
        for follower in &self.shared.followers {
            let one = follower.seen.lock().unwrap().tally;
            tally.events += one.events;
            tally.bookmarks += one.bookmarks;
            tally.reopened += one.reopened;
        }
        (total(&self.shared.written), self.shared.retried.load(Ordering::Relaxed), tally)
    }

    fn check(&self) {
        for follower in &self.shared.followers {
            let problem = follower.seen.lock().unwrap().problem.clone();
            assert!(problem.is_none(), "a watcher of {}: {}", follower.sort.plural, problem.unwrap());
        }
        let over = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        assert!(!over, "writers and watchers ended: see above");
    }
}

/// All of the thread: watchers and writers side by side, then the watchers alone until they have seen the end.
async fn run(shared: Arc<Shared>) {
    let mut watching = tokio::task::JoinSet::new();
    let watch = |index: usize, watching: &mut tokio::task::JoinSet<()>| {
        let shared = Arc::clone(&shared);
        watching.spawn(async move { follow(&shared.client, &shared.followers[index]).await });
    };
    for early in (0..shared.followers.len()).step_by(2) {
        watch(early, &mut watching);
    }
    let mut writing = tokio::task::JoinSet::new();
    for writer in 0..shared.written.len() {
        let shared = Arc::clone(&shared);
        writing.spawn(async move { write(&shared, writer).await });
    }
    for late in (1..shared.followers.len()).step_by(2) {
        watch(late, &mut watching);
    }
    let mut ends: BTreeMap<(&str, String), Mark> = BTreeMap::new();
    while let Some(end) = writing.join_next().await {
        ends.extend(end.expect("a writer ends well"));
    }
    let deadline = Instant::now() + PATIENCE;
    for follower in &shared.followers {
        while let Some(missing) = follower.missing(&ends) {
            assert!(Instant::now() < deadline, "a watcher of {} misses {missing}", follower.sort.plural);
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// One writer: its objects in turn, each a step further, until it is told to end.
async fn write(shared: &Shared, writer: usize) -> Vec<((&'static str, String), Mark)> {
    let sort = SORTS[writer % SORTS.len()];
    let names: Vec<String> = (0..OBJECTS).map(|object| format!("w{writer}-{object}")).collect();
    // Half of them are left behind patched, half deleted.
    let last = |object: usize| if object.is_multiple_of(2) { LIFE - 2 } else { LIFE - 1 };
    let mut steps = [0_u64; OBJECTS];
    let mut numbers = [0_u64; OBJECTS];
    loop {
        let ending = shared.ending.load(Ordering::Relaxed);
        let at_rest = |object: usize| steps[object] > 0 && (steps[object] - 1) % LIFE == last(object);
        if ending && (0..OBJECTS).all(at_rest) {
            break;
        }
        for object in 0..OBJECTS {
            if ending && steps[object] > 0 && (steps[object] - 1) % LIFE == last(object) {
                continue;
            }
            let step = steps[object] % LIFE;
            if step != LIFE - 1 {
                numbers[object] += 1;
            }
            take(shared, sort, &names[object], step, numbers[object]).await;
            steps[object] += 1;
            shared.written[writer].fetch_add(1, Ordering::Relaxed);
            sleep(PACE).await;
        }
    }
    let marks = (0..OBJECTS).map(|object| Mark { number: numbers[object], alive: object.is_multiple_of(2) });
    names.into_iter().map(|name| (sort.plural, name)).zip(marks).collect()
}

/// One step of a life, tried until it is done.
async fn take(shared: &Shared, sort: Sort, name: &str, step: u64, number: u64) {
    let (collection, client) = (sort.collection(), &shared.client);
    let path = format!("{collection}/{name}");
    let deadline = Instant::now() + 2 * PATIENCE;
    let mut again = false;
    loop {
        let answer = match step {
            0 => client.create(&collection, &sort.object(name, number)).await,
            4 => client.delete(&path, &Value::Null).await,
            _ => client.merge(&path, &json!({"metadata": {"annotations": {"number": number.to_string()}}})).await,
        };
        let refusal = match answer {
            Ok(_) => return,
            Err(refusal) => refusal,
        };
        // The first try was done after all, though its answer was lost.
        let done = again && matches!((step, refusal.reason.as_str()), (0, "AlreadyExists") | (4, "NotFound"));
        if done {
            return;
        }
        let own_try = again && refusal.reason == "Conflict";
        assert!(refusal.passes() || own_try, "{path}, step {step}, number {number}: {refusal:?}");
        assert!(Instant::now() < deadline, "{path}, step {step}: not within {:?}: {refusal:?}", 2 * PATIENCE);
        again = true;
        shared.retried.fetch_add(1, Ordering::Relaxed);
        sleep(BACKOFF).await;
    }
}

/// One watcher: starts with what is there, then is told of every change, over as many watches as it takes.
async fn follow(client: &Client, follower: &Follower) {
    if let Err(problem) = try_follow(client, follower).await {
        follower.seen.lock().unwrap().problem = Some(problem);
    }
}

async fn try_follow(client: &Client, follower: &Follower) -> Result<(), String> {
    let collection = follower.sort.collection();
    let mut fresh = true;
    if !follower.sort.cached {
        let list = client.list(&collection, "limit=500").await.map_err(|refusal| format!("{refusal:?}"))?;
        follower.seen.lock().unwrap().begin(&list.items);
        follower.version.store(list.version, Ordering::Relaxed);
        fresh = false;
    }
    loop {
        let from = if fresh {
            // The list comes as events, up to a bookmark: what informers do today.
            "sendInitialEvents=true&resourceVersionMatch=NotOlderThan".to_owned()
        } else {
            format!("resourceVersion={}", follower.version.load(Ordering::Relaxed))
        };
        let ends = if follower.patience > 0 { format!("&timeoutSeconds={}", follower.patience) } else { String::new() };
        match client.watch(&collection, &format!("allowWatchBookmarks=true&{from}{ends}")).await {
            Ok(mut changes) => {
                let mut initial = fresh.then(Vec::new);
                while let Some(change) = changes.next().await {
                    if let Err(refusal) = follower.hear(&change, &mut initial)? {
                        if !refusal.passes() {
                            return Err(format!("the watch ended: {refusal:?}"));
                        }
                        break;
                    }
                    fresh = initial.is_some();
                }
            }
            Err(refusal) if refusal.passes() => {}
            Err(refusal) => return Err(format!("no watch from {from}: {refusal:?}")),
        }
        follower.seen.lock().unwrap().tally.reopened += 1;
        sleep(BACKOFF).await;
    }
}

impl Follower {
    /// Takes one event; the inner answer is an error that the watch ended with.
    fn hear(&self, change: &Change, initial: &mut Option<Vec<Value>>) -> Result<Result<(), Refusal>, String> {
        if change.kind == "ERROR" {
            return Ok(Err(change.refusal()));
        }
        let mut seen = self.seen.lock().unwrap();
        let (now, before) = (version(&change.object), self.version.load(Ordering::Relaxed));
        if let Some(listed) = initial {
            if change.kind == "BOOKMARK" {
                let end = text(&change.object, "/metadata/annotations/k8s.io~1initial-events-end");
                if end != "true" {
                    return Err(format!("a bookmark before the end of the initial events: {}", change.object));
                }
                seen.begin(listed);
                *initial = None;
                self.version.store(now, Ordering::Relaxed);
            } else {
                listed.push(change.object.clone());
            }
            return Ok(Ok(()));
        }
        if change.kind == "BOOKMARK" {
            if now < before {
                return Err(format!("a bookmark at {now} after an event at {before}"));
            }
            seen.tally.bookmarks += 1;
        } else {
            if now <= before {
                return Err(format!("{} at {now} after {before}: {}", change.kind, change.object));
            }
            seen.apply(change)?;
        }
        self.version.store(now, Ordering::Relaxed);
        Ok(Ok(()))
    }

    /// The first object that is not as its writer left it.
    fn missing(&self, ends: &BTreeMap<(&str, String), Mark>) -> Option<String> {
        let seen = self.seen.lock().unwrap();
        if let Some(problem) = &seen.problem {
            return Some(problem.clone());
        }
        let own = ends.iter().filter(|((plural, _), _)| *plural == self.sort.plural);
        own.map(|((_, name), end)| (name, end, seen.objects.get(name)))
            .find(|(_, end, mark)| Some(*end) != *mark)
            .map(|(name, end, mark)| format!("{name}: {end:?}, seen {mark:?}"))
    }
}

impl Seen {
    /// What was there before the first event; the kinds' own objects only.
    fn begin(&mut self, objects: &[Value]) {
        for object in objects.iter().filter(|object| text(object, "/metadata/labels/churn") == "yes") {
            let mark = Mark { number: numbered(object), alive: true };
            self.objects.insert(text(object, "/metadata/name").to_owned(), mark);
        }
    }

    /// The one event that may come next for an object: not the one after, not the last one again.
    fn apply(&mut self, change: &Change) -> Result<(), String> {
        if text(&change.object, "/metadata/labels/churn") != "yes" {
            return Ok(());
        }
        let name = text(&change.object, "/metadata/name");
        let number = numbered(&change.object);
        let before = self.objects.get(name).copied();
        let fits = match (change.kind.as_str(), before) {
            // A watcher that came late knows nothing of an object that was away at that moment.
            ("ADDED", None) => number > 0,
            ("ADDED", Some(mark)) => !mark.alive && number == mark.number + 1,
            ("MODIFIED", Some(mark)) => mark.alive && number == mark.number + 1,
            ("DELETED", Some(mark)) => mark.alive && number == mark.number,
            _ => false,
        };
        if !fits {
            return Err(format!("{} of {name} with number {number} after {before:?}", change.kind));
        }
        self.objects.insert(name.to_owned(), Mark { number, alive: change.kind != "DELETED" });
        self.tally.events += 1;
        Ok(())
    }
}

fn numbered(object: &Value) -> u64 {
    e2e::kube::client::number(object, "/metadata/annotations/number")
}

//! Calls that are tried again while the reason for their failure is one that passes, as every client of Kubernetes does: a busy
//! machine may cost a store its leader at any time, and that is no failure of this test.
//!
//! Nothing here breaks anything, and what does not pass by itself is the caller's to judge.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use e2e::kube::Apiserver;
use e2e::kube::client::{Client, Page, Refusal, text};
use e2e::rpc::{Rpc, put};
use e2e::{Member, PATIENCE, eventually, rpc};
use keelson_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::response_op::Response;
use keelson_proto::etcdserverpb::{CompactionRequest, Compare, RangeRequest, RequestOp, TxnRequest};
use serde_json::Value;
use tokio::task::JoinSet;

use super::judge;

/// Before a call is tried again.
const BACKOFF: Duration = Duration::from_millis(100);
/// Who creates the bulk at the same time.
const CREATORS: usize = 16;

/// Tries until there is an answer that will not change by itself; says too whether it took more than one call.
pub(super) async fn tried<T, F>(mut attempt: impl FnMut() -> F) -> (Result<T, Refusal>, bool)
where
    F: Future<Output = Result<T, Refusal>>,
{
    let deadline = Instant::now() + 2 * PATIENCE;
    let mut again = false;
    loop {
        match attempt().await {
            Err(refusal) if refusal.passes() => assert!(Instant::now() < deadline, "it does not pass: {refusal:?}"),
            answer => return (answer, again),
        }
        again = true;
        tokio::time::sleep(BACKOFF).await;
    }
}

/// The same for a call that has to succeed.
pub(super) async fn sure<T, F>(attempt: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, Refusal>>,
{
    tried(attempt).await.0.unwrap_or_else(|refusal| panic!("{refusal:?}"))
}

/// Creates an object; one that is there after a first call that failed is the one.
pub(super) async fn create(client: &Client, collection: &str, object: &Value) -> Value {
    match tried(|| client.create(collection, object)).await {
        (Ok(made), _) => made,
        (Err(refusal), true) if refusal.reason == "AlreadyExists" => {
            let path = format!("{collection}/{}", text(object, "/metadata/name"));
            sure(|| client.get(&path)).await
        }
        (Err(refusal), _) => panic!("{object}: {refusal:?}"),
    }
}

/// Creates each object in its collection, many at a time.
pub(super) async fn create_all(client: Arc<Client>, jobs: Vec<(String, Value)>) {
    let queue = Arc::new(Mutex::new(jobs.into_iter()));
    let mut creators = JoinSet::new();
    for _ in 0..CREATORS {
        let (client, queue) = (Arc::clone(&client), Arc::clone(&queue));
        creators.spawn(async move {
            loop {
                let Some((collection, object)) = queue.lock().unwrap().next() else { break };
                create(&client, &collection, &object).await;
            }
        });
    }
    creators.join_all().await;
}

/// One page.
pub(super) async fn page(client: &Client, collection: &str, query: &str) -> Page {
    sure(|| client.list(collection, query)).await
}

/// A whole collection in pages: one revision, and a count that is exact on every page.
pub(super) async fn in_pages(client: &Client, collection: &str, limit: usize) -> (u64, Vec<Value>) {
    let first = page(client, collection, &format!("limit={limit}")).await;
    let total = first.items.len() as u64 + first.remaining;
    assert!(total > limit as u64, "{collection}: {total} items make no two pages");
    let (mut items, mut token) = (first.items, first.token);
    while !token.is_empty() {
        let page = page(client, collection, &format!("limit={limit}&continue={token}")).await;
        assert_eq!(page.version, first.version, "{collection}: a page at another revision");
        items.extend(page.items);
        assert_eq!(items.len() as u64 + page.remaining, total, "{collection}: remainingItemCount");
        token = page.token;
    }
    (first.version, items)
}

/// How a watch that has to fail fails.
pub(super) async fn watch_refused(client: &Client, collection: &str, query: &str) -> Refusal {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let refusal = match client.watch(collection, query).await {
            Err(refusal) => Some(refusal),
            Ok(mut changes) => changes.next().await.map(|change| change.refusal()),
        };
        if let Some(refusal) = refusal.filter(|refusal| !refusal.passes()) {
            return refusal;
        }
        assert!(Instant::now() < deadline, "the watch of {collection}?{query} does not fail");
        tokio::time::sleep(BACKOFF).await;
    }
}

/// The output of a kubectl that has to succeed.
pub(super) fn kubectl(server: &Apiserver, arguments: &[&str]) -> String {
    let mut again = false;
    eventually(&format!("kubectl {arguments:?}"), 2 * PATIENCE, || {
        let answer = server.kubectl(arguments);
        let done = again && ["(AlreadyExists)", "(NotFound)"].iter().any(|word| answer.stderr.contains(word));
        if answer.status == 0 || done {
            return Some(answer.stdout);
        }
        assert!(judge::away(&answer.stderr), "kubectl {arguments:?}: {answer:?}");
        again = true;
        None
    })
}

/// Takes the turn to compact from the apiserver, as a second one would, and compacts to `revision`.
pub(super) fn compact_as_another_apiserver(member: &Member, revision: u64) {
    let operation = |request| vec![RequestOp { request: Some(request) }];
    let get = RangeRequest { key: "compact_rev_key".into(), ..Default::default() };
    let mut turn = 0;
    eventually("a turn to compact", PATIENCE, || {
        let compare = Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Version.into(),
            key: "compact_rev_key".into(),
            target_union: Some(TargetUnion::Version(turn)),
            ..Default::default()
        };
        let request = TxnRequest {
            compare: vec![compare],
            success: operation(Request::RequestPut(put("compact_rev_key", &revision.to_string()))),
            failure: operation(Request::RequestRange(get.clone())),
        };
        let answer = rpc::run(async { Rpc::new(member).txn(request).await }).ok()?;
        if answer.succeeded {
            return Some(());
        }
        let Some(Response::ResponseRange(range)) = answer.responses.into_iter().next().and_then(|op| op.response)
        else {
            panic!("no range in the answer");
        };
        turn = range.kvs[0].version;
        None
    });
    let request = CompactionRequest { revision: i64::try_from(revision).unwrap(), physical: false };
    eventually("the compaction", PATIENCE, || {
        let answer = rpc::run(async { Rpc::new(member).kv.compact(request).await });
        let done =
            |status: &tonic::Status| status.message() == "etcdserver: mvcc: required revision has been compacted";
        answer.as_ref().map_or_else(done, |_| true).then_some(())
    });
}

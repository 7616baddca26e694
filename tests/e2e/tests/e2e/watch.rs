//! Watches: what is delivered, when, in which order, and how a watch ends.

mod cluster;
mod edges;
mod many;
mod slow;
mod stream;

use std::time::Duration;

use e2e::rpc::{self, Rpc, prefix_end};
use e2e::watcher::spell;
use e2e::{Cluster, Kind, Watcher};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::watch_create_request::FilterType;
use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{
    DeleteRangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchRequest, WatchResponse,
};

on_both!(
    from_now_on,
    from_a_revision,
    from_the_future,
    compacted_history,
    ranges,
    filtered,
    previous_values,
    many_on_one_stream,
    canceled,
    refused_at_creation,
    revisions_stay_whole,
    asked_for_progress,
    unasked_progress,
    fragments,
    after_a_compaction,
    closed_on_one_side,
    slow_readers,
    across_a_restart,
);

fn on_one(kind: Kind, extra: &[&str], body: impl AsyncFnOnce(&mut Rpc)) {
    let Some(cluster) = Cluster::start_with(kind, 1, extra) else { return };
    rpc::run(async { body(&mut Rpc::new(&cluster.members[0])).await });
}

fn watch(key: &str) -> WatchCreateRequest {
    WatchCreateRequest { key: key.to_owned().into(), ..Default::default() }
}

fn watch_prefix(prefix: &str) -> WatchCreateRequest {
    WatchCreateRequest { range_end: prefix_end(prefix), ..watch(prefix) }
}

fn from(start_revision: i64, create: WatchCreateRequest) -> WatchCreateRequest {
    WatchCreateRequest { start_revision, ..create }
}

/// Opens a stream and takes the answer that the first watch was created.
async fn open(rpc: &mut Rpc, create: WatchCreateRequest) -> Watcher {
    let mut watcher = Watcher::open(rpc, create).await;
    let created = watcher.response().await;
    assert!(created.created && !created.canceled && created.events.is_empty(), "{created:?}");
    watcher
}

async fn delete(rpc: &mut Rpc, key: &str) {
    rpc.delete(DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() }).await.unwrap();
}

fn revision(response: &WatchResponse) -> i64 {
    response.header.as_ref().unwrap().revision
}

fn from_now_on(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        rpc.put("k", "before").await.unwrap();
        let mut watcher = Watcher::open(rpc, watch("k")).await;
        let created = watcher.response().await;
        assert_eq!((created.watch_id, created.created, revision(&created)), (0, true, 2), "ids begin at 0");
        let header = created.header.unwrap();
        assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term != 0);
        rpc.put("other", "x").await.unwrap();
        rpc.put("k", "after").await.unwrap();
        let response = watcher.response().await;
        assert_eq!(spell(&response), ["put k=after @4"]);
        assert_eq!((response.watch_id, revision(&response)), (0, 4));
        let kv = response.events[0].kv.as_ref().unwrap();
        assert_eq!((kv.create_revision, kv.version), (2, 2), "a put carries all of its key");
        delete(rpc, "k").await;
        let gone = watcher.response().await.events.remove(0).kv.unwrap();
        assert_eq!((gone.mod_revision, gone.create_revision, gone.version, gone.value.len()), (5, 0, 0, 0));
    });
}

fn from_a_revision(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        rpc.put("k", "1").await.unwrap();
        rpc.put("k", "2").await.unwrap();
        delete(rpc, "k").await;
        rpc.put("k", "3").await.unwrap();
        let all = ["put k=1 @2", "put k=2 @3", "delete k @4", "put k=3 @5", "put k=4 @6"];
        let mut whole = open(rpc, from(1, watch("k"))).await;
        let mut later = open(rpc, from(3, watch("k"))).await;
        let mut last = open(rpc, from(5, watch("k"))).await;
        rpc.put("k", "4").await.unwrap();
        assert_eq!(whole.events(5).await, all);
        assert_eq!(later.events(4).await, all[1..]);
        assert_eq!(last.events(2).await, all[3..]);
    });
}

fn from_the_future(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut watcher = open(rpc, from(4, watch("k"))).await;
        for value in ["1", "2", "3", "4"] {
            rpc.put("k", value).await.unwrap();
        }
        assert_eq!(watcher.events(2).await, ["put k=3 @4", "put k=4 @5"], "nothing below its start");
    });
}

fn compacted_history(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        for value in ["1", "2", "3", "4"] {
            rpc.put("k", value).await.unwrap();
        }
        rpc.compact(4).await.unwrap();
        let mut behind = open(rpc, from(3, watch("k"))).await;
        let canceled = behind.response().await;
        assert!(canceled.canceled && !canceled.created);
        assert_eq!((canceled.compact_revision, canceled.cancel_reason.as_str()), (4, ""));
        assert_eq!(revision(&canceled), 0, "this one answer carries no revision");
        let mut just = open(rpc, from(4, watch("k"))).await;
        assert_eq!(just.events(2).await, ["put k=3 @4", "put k=4 @5"], "the compacted revision itself is there");
        // A watch that kept up does not notice a compaction.
        rpc.compact(5).await.unwrap();
        rpc.put("k", "5").await.unwrap();
        assert_eq!(just.events(1).await, ["put k=5 @6"]);
    });
}

fn ranges(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut prefix = open(rpc, watch_prefix("b/")).await;
        let mut onward = open(rpc, WatchCreateRequest { range_end: "\0".into(), ..watch("b") }).await;
        let mut all = open(rpc, WatchCreateRequest { range_end: "\0".into(), ..watch("") }).await;
        for key in ["a", "b", "b/1", "c"] {
            rpc.put(key, "v").await.unwrap();
        }
        assert_eq!(all.events(4).await, ["put a=v @2", "put b=v @3", "put b/1=v @4", "put c=v @5"]);
        assert_eq!(onward.events(3).await, ["put b=v @3", "put b/1=v @4", "put c=v @5"]);
        assert_eq!(prefix.events(1).await, ["put b/1=v @4"]);
    });
}

fn filtered(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let without =
            |filter: FilterType, start| WatchCreateRequest { filters: vec![filter.into()], ..from(start, watch("k")) };
        let mut deletes = open(rpc, without(FilterType::Noput, 0)).await;
        let mut puts = open(rpc, without(FilterType::Nodelete, 0)).await;
        for value in ["1", "2"] {
            rpc.put("k", value).await.unwrap();
            delete(rpc, "k").await;
        }
        assert_eq!(deletes.events(2).await, ["delete k @3", "delete k @5"]);
        assert_eq!(puts.events(2).await, ["put k=1 @2", "put k=2 @4"]);
        let mut past = open(rpc, without(FilterType::Noput, 1)).await;
        assert_eq!(past.events(2).await, ["delete k @3", "delete k @5"]);
    });
}

fn previous_values(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let with = |start| WatchCreateRequest { prev_kv: true, ..from(start, watch("k")) };
        let mut live = open(rpc, with(0)).await;
        rpc.put("k", "1").await.unwrap();
        rpc.put("k", "2").await.unwrap();
        delete(rpc, "k").await;
        rpc.put("k", "3").await.unwrap();
        let want = ["put k=1 @2", "put k=2 @3 was 1 @2", "delete k @4 was 2 @3", "put k=3 @5"];
        assert_eq!(live.events(4).await, want);
        let mut past = open(rpc, with(1)).await;
        assert_eq!(past.events(4).await, want);
        rpc.compact(3).await.unwrap();
        let mut compacted = open(rpc, with(3)).await;
        let got = compacted.events(3).await;
        assert_eq!(got[1..], want[2..]);
        assert_eq!(got[0], "put k=2 @3", "what it was is compacted away");
    });
}

fn many_on_one_stream(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut watcher = open(rpc, watch("a")).await;
        watcher.create(watch("b")).await;
        assert_eq!(watcher.response().await.watch_id, 1);
        watcher.create(WatchCreateRequest { watch_id: 3, ..watch("c") }).await;
        assert_eq!(watcher.response().await.watch_id, 3, "the client may choose");
        watcher.create(watch("d")).await;
        assert_eq!(watcher.response().await.watch_id, 2);
        watcher.create(watch("e")).await;
        assert_eq!(watcher.response().await.watch_id, 4, "an id in use is passed over");
        for (key, id) in [("a", 0), ("b", 1), ("c", 3), ("d", 2), ("e", 4)] {
            rpc.put(key, "v").await.unwrap();
            let response = watcher.response().await;
            assert_eq!((response.watch_id, response.events.len()), (id, 1), "{key}");
        }
    });
}

fn canceled(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut watcher = open(rpc, watch("k")).await;
        watcher.create(watch("other")).await;
        assert_eq!(watcher.response().await.watch_id, 1);
        watcher.cancel(99).await; // never answered
        watcher.cancel(0).await;
        let response = watcher.response().await;
        assert_eq!((response.watch_id, response.canceled, response.cancel_reason.as_str()), (0, true, ""));
        assert_eq!(response.compact_revision, 0);
        watcher.cancel(0).await; // gone already: never answered
        rpc.put("k", "v").await.unwrap();
        rpc.put("other", "v").await.unwrap();
        let response = watcher.response().await;
        assert_eq!((response.watch_id, spell(&response)), (1, vec!["put other=v @3".to_owned()]));
    });
}

fn refused_at_creation(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut watcher = open(rpc, WatchCreateRequest { watch_id: 5, ..watch("k") }).await;
        let refusals = [
            (WatchCreateRequest { watch_id: 5, ..watch("k") }, "mvcc: duplicate watch ID provided on the WatchStream"),
            (WatchCreateRequest { range_end: "a".into(), ..watch("b") }, "mvcc: watcher range is empty"),
            (WatchCreateRequest { range_end: "b".into(), ..watch("b") }, "mvcc: watcher range is empty"),
            (from(-1, watch("k")), "etcdserver: mvcc: required revision has been compacted"),
        ];
        for (create, reason) in refusals {
            watcher.create(create).await;
            let response = watcher.response().await;
            let got = (response.watch_id, response.created, response.canceled, response.cancel_reason.as_str());
            assert_eq!(got, (-1, true, true, reason));
            assert_eq!(response.compact_revision, 0);
        }
        rpc.put("k", "v").await.unwrap();
        assert_eq!(watcher.response().await.watch_id, 5, "the stream goes on");
    });
}

fn revisions_stay_whole(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let op = |request| RequestOp { request: Some(request) };
        let three = |round: i64| TxnRequest {
            success: (0..3)
                .map(|number| op(Request::RequestPut(rpc::put(&format!("k{number}"), &round.to_string()))))
                .collect(),
            ..Default::default()
        };
        let mut live = open(rpc, watch_prefix("k")).await;
        for round in 0..20 {
            rpc.txn(three(round)).await.unwrap();
        }
        let mut past = open(rpc, from(1, watch_prefix("k"))).await;
        for watcher in [&mut live, &mut past] {
            let mut next = 2;
            while next < 22 {
                let response = watcher.response().await;
                for events in response.events.chunks(3) {
                    let revisions: Vec<i64> =
                        events.iter().map(|event| event.kv.as_ref().unwrap().mod_revision).collect();
                    assert_eq!(revisions, [next; 3], "in order, none missing, none twice, whole");
                    next += 1;
                }
            }
        }
    });
}

fn asked_for_progress(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut watcher = open(rpc, watch("k")).await;
        rpc.put("k", "1").await.unwrap();
        assert_eq!(watcher.events(1).await.len(), 1);
        rpc.put("unwatched", "1").await.unwrap();
        watcher.ask_progress().await;
        let progress = watcher.response().await;
        assert_eq!(
            (progress.watch_id, progress.events.len(), progress.created, progress.canceled),
            (-1, 0, false, false)
        );
        assert_eq!(revision(&progress), 3, "up to here everything was delivered");

        // Not before a watch that starts in the future is reached; and never for a stream that watches nothing.
        let mut ahead = open(rpc, from(100, watch("k"))).await;
        ahead.ask_progress().await;
        assert!(ahead.silent_for(Duration::from_millis(300)).await);
        watcher.cancel(0).await;
        assert!(watcher.response().await.canceled);
        watcher.ask_progress().await;
        assert!(watcher.silent_for(Duration::from_millis(300)).await);
    });
}

fn unasked_progress(kind: Kind) {
    on_one(kind, &["--watch-progress-notify-interval=200ms"], async |rpc| {
        let mut watcher = open(rpc, WatchCreateRequest { progress_notify: true, watch_id: 7, ..watch("k") }).await;
        rpc.put("unwatched", "1").await.unwrap();
        // The first may have been on its way before the put.
        let mut progress = watcher.response().await;
        if revision(&progress) == 1 {
            progress = watcher.response().await;
        }
        assert_eq!((progress.watch_id, progress.events.len(), revision(&progress)), (7, 0, 2));
        let mut quiet = open(rpc, watch("k")).await;
        assert!(quiet.silent_for(Duration::from_millis(700)).await, "only who asked for it is told");
    });
}

fn fragments(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let value = "x".repeat(700_000);
        for number in 0..6 {
            rpc.put(&format!("k{number}"), &value).await.unwrap();
        }
        let mut watcher = open(rpc, WatchCreateRequest { fragment: true, ..from(1, watch_prefix("k")) }).await;
        let mut revisions = Vec::new();
        let mut pieces = 0;
        while revisions.len() < 6 {
            let response = watcher.response().await;
            pieces += usize::from(response.fragment);
            revisions.extend(response.events.iter().map(|event| event.kv.as_ref().unwrap().mod_revision));
            assert_eq!(response.fragment, revisions.len() < 6, "all but the last say that more follows");
        }
        assert!(pieces > 0, "4.2 MB do not fit one response");
        assert_eq!(revisions, [2, 3, 4, 5, 6, 7]);
        let mut whole = open(rpc, from(1, watch_prefix("k"))).await;
        assert_eq!(whole.response().await.events.len(), 6, "who did not ask for pieces gets one");
    });
}

/// What a stream says of a watch that ended because its history is gone.
fn after_a_compaction(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        for value in ["1", "2", "3"] {
            rpc.put("k", value).await.unwrap();
        }
        rpc.compact(4).await.unwrap();
        let mut watcher = open(rpc, from(2, WatchCreateRequest { watch_id: 7, ..watch("k") })).await;
        assert_eq!(watcher.response().await.compact_revision, 4);
        let again = WatchCreateRequest { watch_id: 7, ..watch("k") };
        watcher.create(again.clone()).await;
        assert_eq!(watcher.response().await.watch_id, -1, "its id is still taken");
        watcher.cancel(7).await;
        let canceled = watcher.response().await;
        assert_eq!((canceled.watch_id, canceled.canceled, canceled.compact_revision), (7, true, 0));
        watcher.create(again).await;
        let created = watcher.response().await;
        assert_eq!((created.watch_id, created.created, created.canceled), (7, true, false));
    });
}

fn closed_on_one_side(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(watch("k"))) };
        let mut responses = rpc.watch.watch(tokio_stream::once(create)).await.unwrap().into_inner();
        assert!(responses.message().await.unwrap().unwrap().created);
        rpc.put("k", "v").await.unwrap();
        let response = responses.message().await.unwrap().unwrap();
        assert_eq!(spell(&response), ["put k=v @2"], "a client that says no more goes on listening");
    });
}

/// Who does not read for a while misses nothing, and holds up nobody.
fn slow_readers(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut slow = open(rpc, watch("k")).await;
        let mut quick = open(rpc, watch("k")).await;
        let value = "x".repeat(100_000);
        for revision in 2..302 {
            rpc.put("k", &value).await.unwrap();
            assert_eq!(quick.response().await.events[0].kv.as_ref().unwrap().mod_revision, revision);
        }
        let mut next = 2;
        while next < 302 {
            for event in slow.response().await.events {
                assert_eq!(event.kv.unwrap().mod_revision, next);
                next += 1;
            }
        }
        slow.ask_progress().await;
        assert_eq!(revision(&slow.response().await), 301);
    });
}

fn across_a_restart(kind: Kind) {
    let Some(mut cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async {
        let mut rpc = Rpc::new(&cluster.members[0]);
        rpc.put("k", "1").await.unwrap();
        let mut watcher = open(&mut rpc, watch("k")).await;
        cluster.members[0].kill();
        assert!(watcher.next().await.is_err(), "the stream ends with its server");
        cluster.members[0].restart();
        let mut rpc = Rpc::new(&cluster.members[0]);
        rpc.put("k", "2").await.unwrap();
        let mut again = open(&mut rpc, from(1, watch("k"))).await;
        assert_eq!(again.events(2).await, ["put k=1 @2", "put k=2 @3"], "history outlives the process");
    });
}

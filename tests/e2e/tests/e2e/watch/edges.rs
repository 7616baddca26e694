//! Edges of the contract's Watch table that its other bodies do not reach.

use std::time::Duration;

use e2e::rpc::{self, prefix_end};
use e2e::watcher::spell;
use e2e::{Kind, Watcher};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::watch_create_request::FilterType;
use keelson_proto::etcdserverpb::{DeleteRangeRequest, RequestOp, TxnRequest, WatchCreateRequest};

use super::{delete, from, on_one, open, revision, watch, watch_prefix};

on_both!(
    ids_of_any_sign,
    empty_keys,
    transactions_filtered,
    previous_values_of_a_range,
    progress_waits_for_the_lost,
    fragments_of_two_mebibytes,
    created_at_the_present,
    a_response_a_revision,
);

fn ids_of_any_sign(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut watcher = open(rpc, WatchCreateRequest { watch_id: 2, ..watch("a") }).await;
        let mut ids = Vec::new();
        for watch_id in [0, 0, 0, -1, -9, i64::MAX] {
            watcher.create(WatchCreateRequest { watch_id, ..watch("k") }).await;
            let created = watcher.response().await;
            assert!(created.created && !created.canceled, "{created:?}");
            ids.push(created.watch_id);
        }
        assert_eq!(ids, [0, 1, 3, -1, -9, i64::MAX]);
        watcher.create(WatchCreateRequest { watch_id: -1, ..watch("k") }).await;
        assert!(watcher.response().await.canceled, "-1 is in use");
        rpc.put("k", "v").await.unwrap();
        let mut told = Vec::new();
        for _ in 0..ids.len() {
            let response = watcher.response().await;
            assert_eq!(spell(&response), ["put k=v @2"]);
            told.push(response.watch_id);
        }
        told.sort_unstable();
        assert_eq!(told, [-9, -1, 0, 1, 3, i64::MAX]);
        watcher.cancel(-1).await;
        let canceled = watcher.response().await;
        assert_eq!((canceled.watch_id, canceled.canceled), (-1, true));
        watcher.create(watch("k")).await;
        assert_eq!(watcher.response().await.watch_id, 4);
    });
}

fn empty_keys(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut one = open(rpc, watch("")).await;
        let mut below = open(rpc, WatchCreateRequest { range_end: "b".into(), ..watch("") }).await;
        for key in ["b", "a", "\0", "\0\0"] {
            rpc.put(key, "v").await.unwrap();
        }
        assert_eq!(one.events(1).await, ["put \0=v @4"], "an empty key is the smallest key, and no other");
        assert_eq!(below.events(3).await, ["put a=v @3", "put \0=v @4", "put \0\0=v @5"]);
        one.create(WatchCreateRequest { range_end: "\0".into(), ..watch("\0") }).await;
        assert!(!one.response().await.canceled, "one zero byte is an open end, and not an end before the key");
    });
}

fn transactions_filtered(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        rpc.put("k1", "1").await.unwrap();
        let mut all = open(rpc, watch_prefix("k")).await;
        let filters = vec![FilterType::Noput.into(), FilterType::Nodelete.into()];
        for filters in [filters[..1].to_vec(), filters[1..].to_vec(), filters, vec![7]] {
            all.create(WatchCreateRequest { filters, ..watch_prefix("k") }).await;
            assert!(all.response().await.created);
        }
        let delete = DeleteRangeRequest { key: "k1".into(), ..Default::default() };
        let requests = [
            Request::RequestPut(rpc::put("k2", "1")),
            Request::RequestDeleteRange(delete),
            Request::RequestPut(rpc::put("k3", "1")),
        ];
        let success = requests.map(|request| RequestOp { request: Some(request) }).to_vec();
        rpc.txn(TxnRequest { success, ..Default::default() }).await.unwrap();
        let mut told = Vec::new();
        for _ in 0..4 {
            let response = all.response().await;
            told.push((response.watch_id, spell(&response)));
        }
        told.sort();
        let (puts, gone) = (["put k2=1 @3", "put k3=1 @3"].map(str::to_owned), "delete k1 @3".to_owned());
        let whole = vec![puts[0].clone(), gone.clone(), puts[1].clone()];
        let expected = [(0, whole.clone()), (1, vec![gone]), (2, puts.to_vec()), (4, whole)];
        assert_eq!(told, expected, "what a filter empties is not sent, and a filter nobody knows drops nothing");
        all.ask_progress().await;
        assert_eq!(all.response().await.watch_id, -1, "who wants nothing is up to date, too");
    });
}

fn previous_values_of_a_range(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        rpc.put("k1", "1").await.unwrap();
        rpc.put("k2", "2").await.unwrap();
        let mut watcher = open(rpc, WatchCreateRequest { prev_kv: true, ..watch_prefix("k") }).await;
        let range = DeleteRangeRequest { key: "k".into(), range_end: prefix_end("k"), ..Default::default() };
        rpc.delete(range).await.unwrap();
        let response = watcher.response().await;
        assert_eq!(spell(&response), ["delete k1 @4 was 1 @2", "delete k2 @4 was 2 @3"], "one response");
        rpc.put("k1", "3").await.unwrap();
        assert_eq!(watcher.events(1).await, ["put k1=3 @5"], "a new life has no value before it");
    });
}

/// A watch that a compaction ended is one that lags, until its client has cancelled it as well.
fn progress_waits_for_the_lost(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        for value in ["1", "2", "3"] {
            rpc.put("k", value).await.unwrap();
        }
        rpc.compact(4).await.unwrap();
        let mut watcher = open(rpc, watch("k")).await;
        watcher.create(from(2, watch("k"))).await;
        assert!(watcher.response().await.created);
        assert_eq!(watcher.response().await.compact_revision, 4);
        watcher.ask_progress().await;
        assert!(watcher.silent_for(Duration::from_millis(300)).await);
        watcher.cancel(1).await;
        assert!(watcher.response().await.canceled);
        watcher.ask_progress().await;
        let progress = watcher.response().await;
        assert_eq!((progress.watch_id, revision(&progress)), (-1, 4));
    });
}

/// The bound is what a server reads at most: `--max-request-bytes` and half a mebibyte.
fn fragments_of_two_mebibytes(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let value = "x".repeat(600_000);
        for number in 0..7 {
            rpc.put(&format!("k{number}"), &value).await.unwrap();
        }
        let mut watcher = open(rpc, WatchCreateRequest { fragment: true, ..from(1, watch_prefix("k")) }).await;
        let mut parts = Vec::new();
        while parts.iter().map(|(events, _)| events).sum::<usize>() < 7 {
            let response = watcher.response().await;
            parts.push((response.events.len(), response.fragment));
        }
        assert_eq!(parts, [(3, true), (3, true), (1, false)]);
    });
}

fn created_at_the_present(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        rpc.put("k", "1").await.unwrap();
        let mut watcher = Watcher::open(rpc, from(2, watch("k"))).await;
        let created = watcher.response().await;
        assert_eq!((created.created, revision(&created), created.events.len()), (true, 2, 0));
        rpc.put("k", "2").await.unwrap();
        assert_eq!(watcher.events(2).await, ["put k=1 @2", "put k=2 @3"]);
        delete(rpc, "k").await;
        watcher.create(from(99, watch("k"))).await;
        let mut created = watcher.response().await;
        if !created.created {
            created = watcher.response().await;
        }
        assert_eq!(revision(&created), 4, "not where it begins, but where the store is");
        watcher.create(WatchCreateRequest { range_end: "a".into(), ..watch("b") }).await;
        let mut refused = watcher.response().await;
        if !refused.created {
            refused = watcher.response().await;
        }
        assert_eq!((refused.watch_id, revision(&refused)), (-1, 4), "a refusal says where the store is, too");
    });
}

/// However many write at once: a watch that keeps up gets each revision in a response of its own, which bears it.
fn a_response_a_revision(kind: Kind) {
    on_one(kind, &[], async |rpc| {
        let mut watcher = open(rpc, watch("k")).await;
        let writers: Vec<_> = (0..8)
            .map(|_| {
                let mut rpc = rpc.clone();
                tokio::spawn(async move {
                    for value in 0..25 {
                        rpc.put("k", &value.to_string()).await.unwrap();
                    }
                })
            })
            .collect();
        for next in 2..202 {
            let response = watcher.response().await;
            let revisions: Vec<i64> =
                response.events.iter().map(|event| event.kv.as_ref().unwrap().mod_revision).collect();
            assert_eq!((revisions, revision(&response)), (vec![next], next));
        }
        for writer in writers {
            writer.await.unwrap();
        }
    });
}

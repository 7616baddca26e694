//! RangeStream: what each chunk holds, to the key, and what only the last one says.

use e2e::rpc::{self, Rpc, prefix_end, put};
use e2e::{Cluster, Kind};
use keelson_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use keelson_proto::etcdserverpb::{RangeRequest, RangeResponse, ResponseHeader};
use prost::Message;
use tonic::{Code, Status, Streaming};

on_both!(
    refusals,
    small_answers,
    chunks_grow_and_shrink,
    chunks_at_the_boundary,
    limited,
    past_revisions,
    sorted_within_a_chunk,
    pinned_revision,
    compacted_on_the_way,
    by_etcdctl,
);

/// `--max-request-bytes`, the size that chunks come near to.
const TARGET: usize = 1_572_864;

fn on_one(kind: Kind, body: impl AsyncFnOnce(Rpc)) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    rpc::run(async { body(Rpc::new(&cluster.members[0])).await });
}

fn all(prefix: &str) -> RangeRequest {
    RangeRequest { key: prefix.to_owned().into(), range_end: prefix_end(prefix), ..Default::default() }
}

async fn chunks(rpc: &mut Rpc, request: RangeRequest) -> Result<Vec<RangeResponse>, Status> {
    let mut stream = rpc.kv.range_stream(request).await?.into_inner();
    let mut chunks = Vec::new();
    while let Some(message) = stream.message().await? {
        chunks.push(message.range_response.expect("a response in each message"));
    }
    Ok(chunks)
}

/// The chunks' sizes in keys, after the checks that hold for every stream: the last chunk alone has header, more and count,
/// and together they are what a Range answers.
async fn sizes(rpc: &mut Rpc, request: RangeRequest) -> Vec<usize> {
    let chunks = chunks(rpc, request.clone()).await.unwrap();
    let (last, before) = chunks.split_last().expect("one chunk at least");
    for chunk in before {
        assert_eq!(*chunk, RangeResponse { kvs: chunk.kvs.clone(), ..Default::default() });
        assert!(!chunk.kvs.is_empty());
    }
    let whole = rpc.range(request).await.unwrap();
    let kvs = chunks.iter().flat_map(|chunk| chunk.kvs.clone()).collect();
    assert_eq!(RangeResponse { kvs, ..last.clone() }, whole);
    chunks.iter().map(|chunk| chunk.kvs.len()).collect()
}

async fn fill(rpc: &mut Rpc, prefix: &str, keys: usize, bytes: usize) {
    for number in 0..keys {
        rpc.put(&format!("{prefix}{number:04}"), &"v".repeat(bytes)).await.unwrap();
    }
}

fn refusals(kind: Kind) {
    on_one(kind, async |mut rpc| {
        rpc.put("k", "v").await.unwrap();
        rpc.put("k", "w").await.unwrap();
        rpc.compact(3).await.unwrap();
        let sorts = "RangeStream does not support custom sort orders";
        let filters = "RangeStream does not support revision filters";
        let order = |order: SortOrder, target: SortTarget| RangeRequest {
            sort_order: order.into(),
            sort_target: target.into(),
            ..all("k")
        };
        let key = SortTarget::Key;
        for (request, code, text) in [
            (RangeRequest::default(), Code::InvalidArgument, "etcdserver: key is not provided"),
            (RangeRequest { sort_order: 3, ..all("k") }, Code::InvalidArgument, "etcdserver: invalid sort option"),
            (RangeRequest { sort_target: 5, ..all("k") }, Code::InvalidArgument, "etcdserver: invalid sort option"),
            (order(SortOrder::Descend, key), Code::Unimplemented, sorts),
            (order(SortOrder::Ascend, SortTarget::Mod), Code::Unimplemented, sorts),
            (RangeRequest { min_mod_revision: 1, ..all("k") }, Code::Unimplemented, filters),
            (RangeRequest { max_mod_revision: -1, ..all("k") }, Code::Unimplemented, filters),
            (RangeRequest { min_create_revision: 1, ..all("k") }, Code::Unimplemented, filters),
            (RangeRequest { max_create_revision: 1, ..all("k") }, Code::Unimplemented, filters),
            (RangeRequest { max_create_revision: 1, ..order(SortOrder::Descend, key) }, Code::Unimplemented, sorts),
            (
                RangeRequest { revision: 2, ..all("k") },
                Code::OutOfRange,
                "etcdserver: mvcc: required revision has been compacted",
            ),
            (
                RangeRequest { revision: 9, count_only: true, ..all("k") },
                Code::OutOfRange,
                "etcdserver: mvcc: required revision is a future revision",
            ),
        ] {
            for serializable in [false, true] {
                let status = chunks(&mut rpc, RangeRequest { serializable, ..request.clone() }).await.unwrap_err();
                assert_eq!((status.code(), status.message()), (code, text), "{request:?}");
            }
        }
        assert_eq!(sizes(&mut rpc, order(SortOrder::Ascend, key)).await, [1]);
    });
}

fn small_answers(kind: Kind) {
    on_one(kind, async |mut rpc| {
        assert_eq!(sizes(&mut rpc, all("k")).await, [0], "an empty store");
        fill(&mut rpc, "k", 7, 10).await;
        let one = |key: &str| RangeRequest { key: key.to_owned().into(), ..Default::default() };
        for (request, want) in [
            (all("k"), 7),
            (one("k0003"), 1),
            (one("none"), 0),
            (RangeRequest { range_end: "k".into(), ..one("z") }, 0),
            (RangeRequest { range_end: "\0".into(), ..one("k0002") }, 5),
            (RangeRequest { keys_only: true, ..all("k") }, 7),
            (RangeRequest { serializable: true, ..all("k") }, 7),
            (RangeRequest { limit: 7, ..all("k") }, 7),
            (RangeRequest { limit: -3, ..all("k") }, 7),
            (RangeRequest { count_only: true, ..all("k") }, 0),
            (RangeRequest { count_only: true, limit: 3, ..one("k0003") }, 0),
        ] {
            assert_eq!(sizes(&mut rpc, request.clone()).await, [want], "{request:?}");
        }
    });
}

fn chunks_grow_and_shrink(kind: Kind) {
    on_one(kind, async |mut rpc| {
        fill(&mut rpc, "small", 200, 20 * 1024).await;
        assert_eq!(sizes(&mut rpc, all("small")).await, [10, 20, 40, 40, 40, 40, 10]);
        assert_eq!(
            sizes(&mut rpc, RangeRequest { keys_only: true, ..all("small") }).await,
            [10, 20, 40, 80, 50],
            "keys alone are small"
        );
        fill(&mut rpc, "large", 20, 500 * 1024).await;
        assert_eq!(sizes(&mut rpc, all("large")).await, [10, 5, 5]);
        // From chunks that grew into keys that are large, and back.
        assert_eq!(
            sizes(&mut rpc, RangeRequest { range_end: "\0".into(), ..all("l") }).await,
            [10, 5, 5, 5, 10, 20, 40, 40, 40, 40, 5]
        );
    });
}

/// A first chunk of just less than half the target doubles the second; one of half does not.
fn chunks_at_the_boundary(kind: Kind) {
    on_one(kind, async |mut rpc| {
        fill(&mut rpc, "k", 40, 70_000).await;
        for missing in [1, 0] {
            let first = rpc.range(RangeRequest { limit: 10, ..all("k") }).await.unwrap();
            let revision = first.header.unwrap().revision + 1;
            // As etcd measures it: a header with the revision alone, and a count of one more than the limit.
            let header = Some(ResponseHeader { revision, ..Default::default() });
            let mut measured = RangeResponse { header, count: 11, ..first };
            measured.kvs[9].mod_revision = revision;
            measured.kvs[9].version += 1;
            let short = TARGET / 2 - missing - measured.encoded_len();
            let value = "v".repeat(measured.kvs[9].value.len() + short);
            measured.kvs[9].value = value.clone().into();
            assert_eq!(measured.encoded_len(), TARGET / 2 - missing);
            rpc.put("k0009", &value).await.unwrap();
            let want: &[usize] = if missing == 1 { &[10, 20, 10] } else { &[10, 10, 20] };
            assert_eq!(sizes(&mut rpc, all("k")).await, want);
        }
    });
}

fn limited(kind: Kind) {
    on_one(kind, async |mut rpc| {
        fill(&mut rpc, "k", 60, 10).await;
        for (limit, want) in
            [(5, vec![5]), (10, vec![10]), (11, vec![10, 1]), (25, vec![10, 15]), (59, vec![10, 20, 29])]
        {
            let request = RangeRequest { limit, ..all("k") };
            assert_eq!(sizes(&mut rpc, request.clone()).await, want);
            let last = chunks(&mut rpc, request).await.unwrap().pop().unwrap();
            assert_eq!((last.more, last.count), (true, 60), "{limit}");
        }
        for limit in [60, 61, i64::MAX] {
            assert_eq!(sizes(&mut rpc, RangeRequest { limit, ..all("k") }).await, [10, 20, 30]);
        }
    });
}

fn past_revisions(kind: Kind) {
    on_one(kind, async |mut rpc| {
        fill(&mut rpc, "k", 30, 10).await;
        for number in 0..15 {
            rpc.put(&format!("k{:04}", 2 * number), "new").await.unwrap();
        }
        rpc.delete(keelson_proto::etcdserverpb::DeleteRangeRequest {
            key: "k0000".into(),
            range_end: "k0012".into(),
            prev_kv: false,
        })
        .await
        .unwrap();
        for revision in [11, 20, 31, 40, 46, 47] {
            for limit in [0, 12] {
                let request = RangeRequest { revision, limit, ..all("k") };
                let _ = sizes(&mut rpc, request.clone()).await;
                let last = chunks(&mut rpc, request).await.unwrap().pop().unwrap();
                assert_eq!(last.header.unwrap().revision, 47, "the newest, not the one that is read at");
            }
        }
        let at = |revision| RangeRequest { revision, ..all("k") };
        assert_eq!(sizes(&mut rpc, at(20)).await, [10, 9]);
        assert_eq!(sizes(&mut rpc, at(46)).await, [10, 20]);
        assert_eq!(sizes(&mut rpc, at(47)).await, [10, 8]);
    });
}

/// An order of NONE with a target sorts each chunk by itself, and goes on behind its last key: etcd's own quirk.
fn sorted_within_a_chunk(kind: Kind) {
    on_one(kind, async |mut rpc| {
        for number in (0..25).rev() {
            rpc.put(&format!("k{number:02}"), "v").await.unwrap();
        }
        let request = RangeRequest { sort_target: SortTarget::Create.into(), ..all("k") };
        let chunks = chunks(&mut rpc, request).await.unwrap();
        let keys = |chunk: &RangeResponse| -> Vec<String> {
            chunk.kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect()
        };
        let down = |from: usize, to: usize| -> Vec<String> { (to..=from).rev().map(|n| format!("k{n:02}")).collect() };
        assert_eq!(chunks.iter().map(keys).collect::<Vec<_>>(), [down(10, 1), down(22, 3), down(24, 4)]);
        assert_eq!(chunks.last().unwrap().count, 51);
    });
}

/// A stream whose client has read its first chunk only.
async fn begun(rpc: &mut Rpc) -> (RangeResponse, Streaming<keelson_proto::etcdserverpb::RangeStreamResponse>) {
    let mut stream = rpc.kv.range_stream(all("k")).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap().range_response.unwrap();
    assert_eq!(first.kvs.len(), 10);
    (first, stream)
}

fn pinned_revision(kind: Kind) {
    on_one(kind, async |mut rpc| {
        fill(&mut rpc, "k", 200, 20 * 1024).await;
        let before = rpc.range(all("k")).await.unwrap();
        let (first, mut stream) = begun(&mut rpc).await;
        rpc.put("k0150", "changed").await.unwrap();
        rpc.put("k9999", "new").await.unwrap();
        rpc.kv_put(put("k0005x", "new")).await.unwrap();
        let mut got = first;
        while let Some(message) = stream.message().await.unwrap() {
            let chunk = message.range_response.unwrap();
            let kvs = [got.kvs, chunk.kvs.clone()].concat();
            got = RangeResponse { kvs, ..chunk };
        }
        assert_eq!(got, before, "one moment, header and all");
    });
}

fn compacted_on_the_way(kind: Kind) {
    on_one(kind, async |mut rpc| {
        fill(&mut rpc, "k", 200, 20 * 1024).await;
        let (_, mut stream) = begun(&mut rpc).await;
        let newest = rpc.put("other", "v").await.unwrap().header.unwrap().revision;
        rpc.compact(newest).await.unwrap();
        let refusal = loop {
            match stream.message().await {
                Ok(message) => assert!(message.unwrap().range_response.unwrap().header.is_none(), "not the last"),
                Err(status) => break status,
            }
        };
        let text = "etcdserver: mvcc: required revision has been compacted";
        assert_eq!((refusal.code(), refusal.message()), (Code::OutOfRange, text));
    });
}

fn by_etcdctl(kind: Kind) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let Some(ctl) = cluster.ctl() else { return };
    rpc::run(async { fill(&mut Rpc::new(&cluster.members[0]), "k", 60, 10).await });
    for more in
        [&[][..], &["--limit=25"], &["--keys-only"], &["--count-only", "-w=fields"], &["-w=json"], &["-w=fields"]]
    {
        let plain = [&["get", "--prefix", "k"], more].concat();
        let streamed = [&plain[..], &["--stream"]].concat();
        assert_eq!(ctl.ok(&streamed), ctl.ok(&plain), "{more:?}");
    }
    let answer = ctl.run(&["get", "--prefix", "k", "--stream", "--order=DESCEND"]);
    assert_ne!(answer.status, 0, "{answer:?}");
    assert!(answer.stderr.contains("RangeStream does not support custom sort orders"), "{answer:?}");
}

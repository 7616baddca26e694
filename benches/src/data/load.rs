//! What the stores are filled with: the keys of a cluster with many pods, in an order that is neither sorted nor random.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::rpc::{self, Rpc};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::{DeleteRangeRequest, PutRequest, RequestOp, TxnRequest};

/// Keys of other kinds, half of them before and half after the pods.
const OTHERS: u64 = 1_000;
/// Puts in one Txn; etcd takes 128 at most.
const PUTS_A_TXN: u64 = 100;
const TXNS_IN_FLIGHT: usize = 32;
/// Changes after the load: updates, creates and deletes, each a revision of its own.
const CHANGES: u64 = 1_000;

/// What is in a store now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Loaded {
    /// Keys that were loaded.
    pub(crate) keys: u64,
    /// The revision after the load.
    pub(crate) pinned: i64,
    /// The revision after the changes.
    pub(crate) revision: i64,
}

pub(crate) fn pod(n: u64) -> String {
    format!("/registry/pods/ns-{:03}/app{:02}-{n:08}", n % 100, n / 100 % 20)
}

fn key(n: u64, keys: u64) -> String {
    let pods = keys - OTHERS;
    match n {
        n if n < pods => pod(n),
        n if n % 2 == 0 => format!("/registry/nodes/node-{n:08}"),
        n => format!("/registry/secrets/secret-{n:08}"),
    }
}

/// The same bytes for the same key, and hardly compressible.
fn value(n: u64, size: usize) -> Vec<u8> {
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(&mut next).take(size.div_ceil(8)).flatten().collect();
    bytes.truncate(size);
    bytes
}

fn put(n: u64, keys: u64, value_size: usize) -> Request {
    let (key, value) = (key(n, keys), value(n, value_size));
    Request::RequestPut(PutRequest { key: key.into(), value: value.into(), ..Default::default() })
}

/// Updates of pods all over the keyspace, each of another.
pub(crate) fn random_puts(loaded: &Loaded, value_size: usize) -> Vec<PutRequest> {
    let pods = loaded.keys - OTHERS;
    let scattered = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % pods;
    let put = |n: u64| PutRequest {
        key: pod(scattered(n)).into(),
        value: value(n, value_size).into(),
        ..PutRequest::default()
    };
    (1..=20_000).map(put).collect()
}

fn txn(requests: impl Iterator<Item = Request>) -> TxnRequest {
    let success = requests.map(|request| RequestOp { request: Some(request) }).collect();
    TxnRequest { success, ..Default::default() }
}

/// Loads `keys` keys and returns the revision after them.
pub(crate) fn load(url: &str, keys: u64, value_size: usize) -> Result<i64> {
    ensure!(keys > 2 * OTHERS, "at least {} keys, please", 2 * OTHERS + 1);
    let (next, url) = (Arc::new(AtomicU64::new(0)), url.to_owned());
    rpc::run(async {
        let mut loaders = tokio::task::JoinSet::new();
        for _ in 0..TXNS_IN_FLIGHT {
            let (next, mut rpc) = (Arc::clone(&next), Rpc::to(&url, Duration::from_secs(60)));
            loaders.spawn(async move {
                loop {
                    let first = next.fetch_add(PUTS_A_TXN, Ordering::Relaxed);
                    if first >= keys {
                        return Ok(());
                    }
                    let numbers = first..(first + PUTS_A_TXN).min(keys);
                    rpc.txn(txn(numbers.map(|n| put(n, keys, value_size)))).await?;
                }
            });
        }
        while let Some(loader) = loaders.join_next().await {
            loader?.map_err(|status: tonic::Status| status)?;
        }
        let mut rpc = Rpc::to(&url, Duration::from_secs(60));
        let pinned = rpc.get("/").await?.header.context("a header")?.revision;
        ensure!(pinned as u64 == 1 + keys.div_ceil(PUTS_A_TXN), "the load ended at revision {pinned}");
        Ok(pinned)
    })
}

/// Changes some keys of a store that was loaded and is at revision `pinned`.
pub(crate) fn change(url: &str, keys: u64, value_size: usize, pinned: i64) -> Result<Loaded> {
    rpc::run(async {
        let mut rpc = Rpc::to(url, Duration::from_secs(60));
        let found = rpc.get("/").await?.header.context("a header")?.revision;
        ensure!(found == pinned, "it came back at revision {found}, not {pinned}");
        let pods = keys - OTHERS;
        for n in 0..CHANGES {
            // Spread over all pods; the same number is never taken twice.
            let old = n * (pods / CHANGES).max(1) % pods;
            let request = match n % 5 {
                0 => Request::RequestPut(PutRequest { key: pod(keys + n).into(), ..Default::default() }),
                1 => Request::RequestDeleteRange(DeleteRangeRequest { key: pod(old).into(), ..Default::default() }),
                _ => put(old, keys, value_size),
            };
            rpc.txn(txn([request].into_iter())).await?;
        }
        let revision = rpc.get("/").await?.header.context("a header")?.revision;
        ensure!(revision == pinned + CHANGES as i64, "the changes ended at revision {revision}");
        Ok(Loaded { keys, pinned, revision })
    })
}

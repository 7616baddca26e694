//! What a program that uses Rust's etcd-client sees of a store: printed line by line, so that two stores can be compared.
//!
//! Usage: `story PORT`. Nothing that a store may choose (ids, times) is printed. Locks and elections are the server's services here;
//! etcdctl, Python and Node make them of leases, keys and watches.

use std::time::Duration;

use etcd_client::{
    Client, CompactionOptions, Compare, CompareOp, ConnectOptions, DeleteOptions, Error, EventType, GetOptions,
    GetResponse, KeyValue, LeaseTimeToLiveOptions, LockOptions, ProclaimOptions, PutOptions, ResignOptions, SortOrder,
    SortTarget, Txn, TxnOp, TxnOpResponse, WatchFilterType, WatchOptions, WatchStream,
};

type Result<T> = std::result::Result<T, Error>;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let port = std::env::args().nth(1).expect("usage: story PORT");
    let options = ConnectOptions::new().with_require_leader(true).with_timeout(PATIENCE);
    let mut client = Client::connect([format!("http://127.0.0.1:{port}")], Some(options)).await?;
    // One without a limit for each call, for streams that stay open.
    let mut patient = Client::connect([format!("http://127.0.0.1:{port}")], None).await?;
    keys(&mut client).await?;
    transactions(&mut client).await?;
    leases(&mut patient).await?;
    watches(&mut patient).await?;
    locks(&mut patient).await?;
    elections(&mut patient).await?;
    cluster(&mut client).await
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn shown(kv: &KeyValue) -> String {
    let revisions = (kv.create_revision(), kv.mod_revision(), kv.version());
    format!("{}={} {revisions:?} {}", text(kv.key()), text(kv.value()), kv.lease() != 0)
}

fn all(answer: &GetResponse) -> String {
    let kvs: Vec<String> = answer.kvs().iter().map(shown).collect();
    let revision = answer.header().map(|header| header.revision());
    format!("{} {} {revision:?} {kvs:?}", answer.count(), answer.more())
}

/// Prints what a call that is to fail fails with.
fn refused<T>(what: &str, answer: Result<T>) {
    match answer {
        Ok(_) => println!("{what}: no error"),
        Err(Error::GRpcStatus(status)) => println!("{what}: {:?} {}", status.code(), status.message()),
        Err(error) => println!("{what}: {error}"),
    }
}

async fn keys(client: &mut Client) -> Result<()> {
    let put = client.put("k/1", "one", None).await?;
    println!("put: {:?}", put.header().map(|header| header.revision()));
    let put = client.put("k/1", "uno", Some(PutOptions::new().with_prev_key())).await?;
    println!("put with the old: {:?}", put.prev_key().map(shown));
    for (key, value) in [("k/2", "two"), ("k/3", "three"), ("k/4", "")] {
        client.put(key, value, None).await?;
    }
    client.put("k/2", "", Some(PutOptions::new().with_ignore_value())).await?;
    println!("get: {}", all(&client.get("k/1", None).await?));
    println!("get nothing: {}", all(&client.get("nothing", None).await?));
    for target in [SortTarget::Key, SortTarget::Create, SortTarget::Mod, SortTarget::Version, SortTarget::Value] {
        for order in [SortOrder::None, SortOrder::Ascend, SortOrder::Descend] {
            let options = GetOptions::new().with_prefix().with_sort(target, order).with_limit(3);
            println!("sorted {target:?} {order:?}: {}", all(&client.get("k/", Some(options)).await?));
        }
    }
    for (what, options) in [
        ("range", GetOptions::new().with_range("k/3")),
        ("from", GetOptions::new().with_from_key()),
        ("keys", GetOptions::new().with_prefix().with_keys_only()),
        ("count", GetOptions::new().with_prefix().with_count_only()),
        ("serializable", GetOptions::new().with_serializable()),
        ("past", GetOptions::new().with_revision(2)),
        ("changed", GetOptions::new().with_from_key().with_min_mod_revision(4).with_max_mod_revision(5)),
        ("created", GetOptions::new().with_from_key().with_min_create_revision(4).with_max_create_revision(5)),
    ] {
        println!("{what}: {}", all(&client.get("k/1", Some(options)).await?));
    }
    println!("everything: {}", all(&client.get("", Some(GetOptions::new().with_all_keys())).await?));
    let gone = client.delete("k/3", Some(DeleteOptions::new().with_prev_key())).await?;
    println!("delete: {} {:?}", gone.deleted(), gone.prev_kvs().iter().map(shown).collect::<Vec<_>>());
    println!("delete again: {}", client.delete("k/3", None).await?.deleted());
    println!("delete the rest: {}", client.delete("k/", Some(DeleteOptions::new().with_prefix())).await?.deleted());
    refused("empty key", client.put("", "value", None).await);
    refused("value of nothing", client.put("k", "", Some(PutOptions::new().with_ignore_value())).await);
    refused("the future", client.get("k", Some(GetOptions::new().with_revision(100_000))).await);
    refused("no lease", client.put("k", "v", Some(PutOptions::new().with_lease(77))).await);
    Ok(())
}

async fn transactions(client: &mut Client) -> Result<()> {
    client.put("t", "1", None).await?;
    for operator in [CompareOp::Equal, CompareOp::NotEqual, CompareOp::Less, CompareOp::Greater] {
        for (what, compare) in [
            ("value", Compare::value("t", operator, "1")),
            ("version", Compare::version("t", operator, 1)),
            ("create", Compare::create_revision("t", operator, 0)),
            ("mod", Compare::mod_revision("t", operator, 3)),
            ("lease", Compare::lease("t", operator, 0)),
            ("values", Compare::value("t", operator, "0").with_prefix()),
        ] {
            let inner =
                Txn::new().when([Compare::version("u", CompareOp::Equal, 0)]).and_then([TxnOp::put("u", "1", None)]);
            let txn = Txn::new()
                .when([compare])
                .and_then([TxnOp::get("t", None), TxnOp::txn(inner)])
                .or_else([TxnOp::delete("u", None), TxnOp::get("t", None)]);
            let answer = client.txn(txn).await?;
            println!("txn {operator:?} {what}: {} {}", answer.succeeded(), operations(&answer.op_responses()));
        }
    }
    let twice = Txn::new().and_then([TxnOp::put("t", "1", None), TxnOp::put("t", "2", None)]);
    refused("txn twice", client.txn(twice).await);
    Ok(())
}

fn operations(answers: &[TxnOpResponse]) -> String {
    let words = answers.iter().map(|answer| match answer {
        TxnOpResponse::Put(put) => format!("put {:?}", put.prev_key().map(shown)),
        TxnOpResponse::Get(get) => format!("get {:?}", get.kvs().iter().map(shown).collect::<Vec<_>>()),
        TxnOpResponse::Delete(delete) => format!("delete {}", delete.deleted()),
        TxnOpResponse::Txn(txn) => format!("txn {} {}", txn.succeeded(), txn.op_responses().len()),
    });
    words.collect::<Vec<_>>().join(", ")
}

async fn leases(client: &mut Client) -> Result<()> {
    let lease = client.lease_grant(60, None).await?;
    println!("granted: {} {}", lease.ttl(), lease.id() != 0);
    for key in ["l/1", "l/2"] {
        client.put(key, "leased", Some(PutOptions::new().with_lease(lease.id()))).await?;
    }
    let facts = client.lease_time_to_live(lease.id(), Some(LeaseTimeToLiveOptions::new().with_keys())).await?;
    let mut keys: Vec<String> = facts.keys().iter().map(|key| text(key)).collect();
    keys.sort();
    println!("facts: {} {} {keys:?}", facts.granted_ttl(), (0..=60).contains(&facts.ttl()));
    println!("leases: {}", client.leases().await?.leases().iter().any(|other| other.id() == lease.id()));
    let (mut keeper, mut answers) = client.lease_keep_alive(lease.id()).await?;
    for _ in 0..3 {
        keeper.keep_alive().await?;
        println!("kept alive: {:?}", answers.message().await?.map(|answer| answer.ttl()));
    }
    client.lease_revoke(lease.id()).await?;
    println!("revoked: {}", all(&client.get("l/", Some(GetOptions::new().with_prefix())).await?));
    keeper.keep_alive().await?;
    println!("kept alive when gone: {:?}", answers.message().await?.map(|answer| answer.ttl()));
    println!("facts when gone: {}", client.lease_time_to_live(lease.id(), None).await?.ttl());
    refused("revoke again", client.lease_revoke(lease.id()).await);
    refused("too long", client.lease_grant(9_000_000_001, None).await);
    refused("keep alive when gone", client.lease_keep_alive(lease.id()).await);

    let mut stream = client.watch("l/short", None).await?;
    let short = client.lease_grant(2, None).await?;
    client.put("l/short", "soon gone", Some(PutOptions::new().with_lease(short.id()))).await?;
    events("expiry", &mut stream, 2, 0).await
}

/// Prints the next `count` events, with what else the answers say; revisions from `start` on.
async fn events(what: &str, stream: &mut WatchStream, mut count: usize, start: i64) -> Result<()> {
    while count > 0 {
        let Some(answer) = stream.message().await? else {
            println!("{what}: the end");
            return Ok(());
        };
        if answer.created() || answer.canceled() {
            let revision = answer.compact_revision() != 0;
            println!("{what}: {} {} {:?} {revision}", answer.created(), answer.canceled(), answer.cancel_reason());
            if answer.canceled() {
                return Ok(());
            }
        }
        for event in answer.events() {
            let kind = if event.event_type() == EventType::Put { "put" } else { "delete" };
            let (kv, old) = (event.kv().expect("an event has one"), event.prev_kv().map(|kv| text(kv.value())));
            let revision = if start == 0 { 0 } else { kv.mod_revision() - start };
            println!("{what}: {kind} {}={} at {revision}, was {old:?}", text(kv.key()), text(kv.value()));
            count -= 1;
        }
    }
    Ok(())
}

async fn watches(client: &mut Client) -> Result<()> {
    let put = client.put("w/1", "one", None).await?;
    let start = put.header().expect("an answer has one").revision();
    client.put("w/1", "uno", None).await?;
    client.put("w/2", "two", None).await?;
    client.delete("w/1", None).await?;
    let past = WatchOptions::new().with_prefix().with_start_revision(start).with_prev_key();
    let mut stream = client.watch("w/", Some(past.clone())).await?;
    events("past", &mut stream, 4, start).await?;
    let txn =
        Txn::new().and_then([TxnOp::put("w/3", "a", None), TxnOp::put("w/4", "b", None), TxnOp::delete("w/2", None)]);
    client.txn(txn).await?;
    events("live", &mut stream, 3, start).await?;
    stream.request_progress().await?;
    let progress = stream.message().await?.expect("an answer");
    println!("progress: {} {:?}", progress.events().len(), progress.header().map(|header| header.revision() - start));

    // More watchers on one stream: one that hears deletes only, and one that is too late.
    let deletes = past.clone().with_filters([WatchFilterType::NoPut]).with_watch_id(7);
    stream.watch("w/", Some(deletes)).await?;
    events("deletes", &mut stream, 2, start).await?;
    stream.cancel(7).await?;
    events("cancel", &mut stream, 1, start).await?;
    client.compact(start + 2, Some(CompactionOptions::new().with_physical())).await?;
    stream.watch("w/", Some(past)).await?;
    events("too late", &mut stream, 1, start).await?;
    refused("compact again", client.compact(start + 2, None).await);
    refused("compact the future", client.compact(start + 1000, None).await);
    refused("compacted", client.get("w/1", Some(GetOptions::new().with_revision(start))).await);
    Ok(())
}

async fn locks(client: &mut Client) -> Result<()> {
    let lease = client.lease_grant(60, None).await?.id();
    let held = client.lock("lock", Some(LockOptions::new().with_lease(lease))).await?;
    println!("locked: {}", text(held.key()).starts_with("lock/"));
    // The same session has it already.
    let again = client.lock("lock", Some(LockOptions::new().with_lease(lease))).await?;
    println!("locked again: {}", again.key() == held.key());
    let mut other = client.clone();
    let waiting = tokio::spawn(async move { other.lock("lock", None).await.map(|held| held.key().to_vec()) });
    until_there_are(client, "lock/", 2).await?;
    println!("waits: {}", !waiting.is_finished());
    client.unlock(held.key()).await?;
    let theirs = waiting.await.expect("it does not panic")?;
    println!("handed over: {}", text(&theirs).starts_with("lock/"));
    client.unlock(theirs).await?;
    println!("left: {}", client.get("lock/", Some(GetOptions::new().with_prefix())).await?.count());
    refused("unlock nothing", client.unlock("lock/nothing").await);
    refused("lock with no lease", client.lock("lock", Some(LockOptions::new().with_lease(77))).await);
    Ok(())
}

/// Waits until `count` keys begin with `prefix`.
async fn until_there_are(client: &mut Client, prefix: &str, count: i64) -> Result<()> {
    let options = GetOptions::new().with_prefix().with_count_only();
    while client.get(prefix, Some(options.clone())).await?.count() != count {
        tokio::task::yield_now().await;
    }
    Ok(())
}

async fn elections(client: &mut Client) -> Result<()> {
    refused("no leader", client.leader("e").await);
    let (one, two) = (client.lease_grant(60, None).await?.id(), client.lease_grant(60, None).await?.id());
    let mut first = client.campaign("e", "one", one).await?;
    let leader = first.take_leader().expect("the answer names it");
    println!("elected: {} {}", text(leader.name()), leader.lease() == one);
    let mut other = client.clone();
    let waiting = tokio::spawn(async move { other.campaign("e", "two", two).await });
    until_there_are(client, "e/", 2).await?;
    let mut observed = client.observe("e").await?;
    let seen =
        |answer: Option<etcd_client::LeaderResponse>| answer.and_then(|answer| answer.kv().map(|kv| text(kv.value())));
    println!("observed: {:?}", seen(observed.message().await?));
    let options = ProclaimOptions::new().with_leader(leader.clone());
    client.proclaim("one, again", Some(options.clone())).await?;
    println!("observed: {:?}", seen(observed.message().await?));
    println!("leader: {:?}", client.leader("e").await?.kv().map(|kv| text(kv.value())));
    client.resign(Some(ResignOptions::new().with_leader(leader))).await?;
    let second = waiting.await.expect("it does not panic")?;
    println!("next: {}", second.leader().is_some_and(|leader| leader.lease() == two));
    println!("observed: {:?}", seen(observed.message().await?));
    refused("proclaim when it is over", client.proclaim("late", Some(options)).await);
    client.lease_revoke(two).await?;
    refused("no leader again", client.leader("e").await);
    client.lease_revoke(one).await?;
    Ok(())
}

async fn cluster(client: &mut Client) -> Result<()> {
    let status = client.status().await?;
    let version: Vec<&str> = status.version().split('.').take(2).collect();
    println!("status: {version:?} {} {}", status.leader() != 0, status.db_size() > 0);
    for member in client.member_list().await?.members() {
        println!("member: {} {} {}", member.name(), member.peer_urls().len(), member.client_urls().len());
    }
    Ok(())
}

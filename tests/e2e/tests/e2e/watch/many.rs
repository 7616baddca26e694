//! Many watchers. The same with 10,000 and 1,000 of them and 100,000 writes, and its speed, is `bench watch`.

use e2e::crowd::{Crowd, Plan};
use e2e::{Cluster, Kind, rpc};

on_both!(two_thousand_watchers, a_stream_each);

fn plan() -> Plan {
    Plan {
        keys: 2000,
        hot: 200,
        streams: 4,
        writes: 10_000,
        hot_every: 50,
        writers: 20,
        writer_connections: 4,
        value_bytes: 64,
        rate: None,
    }
}

fn two_thousand_watchers(kind: Kind) {
    crowd(kind, plan());
}

fn a_stream_each(kind: Kind) {
    crowd(kind, Plan { keys: 200, hot: 100, streams: 200, writes: 2000, ..plan() });
}

/// Every watcher hears exactly what was written for it, in order.
fn crowd(kind: Kind, plan: Plan) {
    let Some(cluster) = Cluster::start(kind, 1) else { return };
    let url = cluster.members[0].client_url();
    let (writes, hot) = (plan.writes, plan.hot);
    let hot_writes = writes.div_ceil(plan.hot_every);
    rpc::run(async {
        let crowd = Crowd::gather(&url, plan).await.unwrap();
        crowd.write(&url).await.unwrap();
        let events: usize = crowd.heard().await.unwrap().iter().map(|heard| heard.events).sum();
        assert_eq!(events, writes - hot_writes + hot * hot_writes);
    });
}

//! `--auto-compaction-retention` at work: the core says when and how far ([`Compactor`]), this proposes it and says what
//! became of it, in etcd's words.

use std::time::Duration;

use keelson_proto::etcdserverpb::{CompactionRequest, InternalRaftRequest};
use kvstore_core::Error;
use kvstore_core::compactor::{Compactor, Retention};

use crate::clock::{self, Clock};
use crate::inbox::Inbox;

/// Never returns; without a retention there is nothing to do.
pub(super) async fn run(inbox: &Inbox, retention: Option<Retention>, clock: Clock) {
    let Some(retention) = retention else { return std::future::pending().await };
    let revision = || inbox.published().facts.revision;
    let mut compactor = Compactor::new(retention, clock.now(), revision());
    loop {
        tokio::time::sleep(Duration::from_millis(compactor.next().since_ms(clock.now()))).await;
        let leads = inbox.raft().is_leader;
        if let Some(target) = compactor.look(clock.now(), revision(), leads) {
            let compacted = compact(inbox, retention, target, compactor.interval_ms()).await;
            compactor.done(clock.now(), revision(), target, compacted);
        }
    }
}

async fn compact(inbox: &Inbox, retention: Retention, revision: i64, retry_ms: u64) -> bool {
    let (mode, kept) = match retention {
        Retention::Time { ms } => ("periodic", format!("{:?}", Duration::from_millis(ms))),
        Retention::Revisions { count } => ("revision", count.to_string()),
    };
    tracing::info!(revision, kept, "starting auto {mode} compaction");
    let started = clock::now();
    let request = CompactionRequest { revision, physical: false };
    let request = InternalRaftRequest { compaction: Some(request), ..InternalRaftRequest::default() };
    match inbox.propose(request).await {
        Ok(_) | Err(Error::Compacted) => {
            tracing::info!(revision, kept, took = ?started.elapsed(), "completed auto {mode} compaction");
            true
        }
        Err(error) => {
            tracing::warn!(revision, kept, retry_ms, "failed auto {mode} compaction: {error}");
            false
        }
    }
}

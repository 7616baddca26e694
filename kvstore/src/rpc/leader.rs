//! Streams whose clients asked for a leader (`hasleader: true`, clientv3's `WithRequireLeader`): refused at once while this
//! member knows none, and ended once it has not known one for three election timeouts in a row (contract 2.4).
//!
//! One poll serves all streams of a runtime: reconnecting streams costs far more than refusing new ones, so they are ended late
//! and together.
//!
//! What it does not do: unary requests, which `intercept` refuses by the same [`requires_leader`].

use std::future;
use std::time::Duration;

use http::HeaderMap;
use kvstore_core::Error;
use tokio::sync::watch;

use crate::Inbox;

/// Polls without a leader after which streams are ended.
const POLLS: u32 = 3;

/// Whether the client wants an answer only from a member that knows a leader.
pub(super) fn requires_leader(metadata: &HeaderMap) -> bool {
    metadata.get("hasleader").is_some_and(|value| value.as_bytes() == b"true")
}

/// Watches for the loss of the leader on behalf of all streams.
#[derive(Clone)]
pub(super) struct LeaderMonitor {
    losses: watch::Receiver<u64>,
}

/// What a stream holds; `None` for one that does not care.
pub(super) struct LeaderGuard(Option<watch::Receiver<u64>>);

impl LeaderMonitor {
    /// Starts polling on the present runtime, once an election timeout, for as long as the monitor or a guard lives.
    pub(super) fn start(inbox: Inbox, election_timeout: Duration) -> LeaderMonitor {
        let (lost, losses) = watch::channel(0);
        tokio::spawn(poll(lost, election_timeout, move || inbox.raft().leader.is_some()));
        LeaderMonitor { losses }
    }

    /// Admits a new stream, or says why not.
    pub(super) fn admit(&self, inbox: &Inbox, metadata: &HeaderMap) -> Result<LeaderGuard, Error> {
        if !requires_leader(metadata) {
            return Ok(LeaderGuard(None));
        }
        if inbox.raft().leader.is_none() {
            return Err(Error::NoLeader);
        }
        let mut losses = self.losses.clone();
        losses.mark_unchanged();
        Ok(LeaderGuard(Some(losses)))
    }
}

impl LeaderGuard {
    /// Returns when the stream has to end for want of a leader; may be dropped and called again.
    pub(super) async fn lost(&mut self) {
        if let Some(losses) = &mut self.0
            && losses.changed().await.is_ok()
        {
            return;
        }
        future::pending().await
    }
}

async fn poll(lost: watch::Sender<u64>, every: Duration, has_leader: impl Fn() -> bool) {
    let mut without = 0;
    loop {
        tokio::select! {
            () = lost.closed() => return,
            () = tokio::time::sleep(every) => {}
        }
        without = if has_leader() { 0 } else { without + 1 };
        if without >= POLLS {
            lost.send_modify(|losses| *losses += 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn only_the_exact_word_requires_a_leader() {
        let mut metadata = HeaderMap::new();
        assert!(!requires_leader(&metadata));
        metadata.insert("hasleader", "True".parse().unwrap());
        assert!(!requires_leader(&metadata));
        metadata.insert("hasleader", "true".parse().unwrap());
        assert!(requires_leader(&metadata));
    }

    #[tokio::test(start_paused = true)]
    async fn three_polls_in_a_row_without_a_leader_end_the_streams() {
        let second = Duration::from_secs(1);
        let has_leader = Arc::new(AtomicBool::new(true));
        let seen = Arc::clone(&has_leader);
        let (lost, losses) = watch::channel(0);
        let polling = tokio::spawn(poll(lost, second, move || seen.load(Ordering::SeqCst)));
        let mut guard = LeaderGuard(Some(losses));
        let mut indifferent = LeaderGuard(None);
        // Two polls without, one with: not three in a row.
        has_leader.store(false, Ordering::SeqCst);
        assert!(tokio::time::timeout(second * 5 / 2, guard.lost()).await.is_err());
        has_leader.store(true, Ordering::SeqCst);
        assert!(tokio::time::timeout(second * 2, guard.lost()).await.is_err());
        has_leader.store(false, Ordering::SeqCst);
        let began = tokio::time::Instant::now();
        guard.lost().await;
        assert_eq!(began.elapsed().as_millis(), 2500);
        assert!(tokio::time::timeout(second * 9, indifferent.lost()).await.is_err());
        drop(guard);
        polling.await.unwrap();
    }
}

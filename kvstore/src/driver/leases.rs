//! The leader's leases on the raft thread: the clock, the keep-alives that wait, and what has to go through the log.
//!
//! The rules are `lease::expiry`'s and `lease::keepalive`'s; this file carries their wishes to Raft and back.

use keelson_proto::etcdserverpb::{InternalRaftRequest, LeaseCheckpoint, LeaseCheckpointRequest, LeaseRevokeRequest};
use kvstore_core::Error;
use kvstore_core::lease::expiry::{Expiry, ExpiryConfig};
use kvstore_core::lease::keepalive::{APPLY_TIMEOUT_MS, KeepAlives, Step};
use kvstore_core::lease::{LeaseChange, LeaseState};
use kvstore_core::replica::ReadId;
use kvstore_core::types::{Index, LeaseId, Term, Timestamp};
use tokio::sync::oneshot;

use super::DriverConfig;

/// What the leader's clock says of a lease, in seconds.
pub(crate) use kvstore_core::lease::expiry::Remaining;

type KeepAliveAnswer = oneshot::Sender<Result<i64, Error>>;
type ListAnswer = oneshot::Sender<Option<Vec<LeaseId>>>;
type RemainingAnswer = oneshot::Sender<Result<Option<Remaining>, Error>>;

/// A proposal of our own, that no caller waits for.
pub(super) enum Own {
    Revoke(LeaseId),
    Reset(LeaseId),
    Checkpoint,
    Alarm,
}

/// To be proposed as the leader of `term`, and never forwarded (trap 6).
pub(super) struct Bound {
    pub(super) term: Term,
    pub(super) request: InternalRaftRequest,
    pub(super) own: Own,
}

pub(super) struct Leases {
    expiry: Expiry,
    keep_alives: KeepAlives<KeepAliveAnswer>,
    questions: Vec<Question>,
    /// A ReadIndex that asks whether this member still leads, and when it was asked.
    round: Option<(ReadId, Timestamp)>,
    confirm: bool,
    timeout_ms: u64,
}

/// A time-to-live waits until what was committed when it came is applied: the lease may stand there.
struct Question {
    id: LeaseId,
    until: Index,
    deadline: Timestamp,
    answer: RemainingAnswer,
}

impl Leases {
    pub(super) fn new(config: &DriverConfig) -> Leases {
        let expiry = ExpiryConfig {
            checkpoint_interval_ms: config.lease_checkpoint_ms,
            ..ExpiryConfig::new(config.heartbeat_ms, config.election_ms)
        };
        Leases {
            expiry: Expiry::new(expiry),
            keep_alives: KeepAlives::default(),
            questions: Vec::new(),
            round: None,
            confirm: false,
            timeout_ms: config.request_timeout_ms,
        }
    }

    pub(super) fn ask(&mut self, now: Timestamp, id: LeaseId, answer: KeepAliveAnswer) {
        self.keep_alives.ask(id, answer, now.after_ms(self.timeout_ms));
    }

    pub(super) fn ask_remaining(&mut self, now: Timestamp, id: LeaseId, committed: Index, answer: RemainingAnswer) {
        let deadline = now.after_ms(APPLY_TIMEOUT_MS);
        self.questions.push(Question { id, until: committed, deadline, answer });
    }

    pub(super) fn list(&self, answer: ListAnswer) {
        // A caller that has gone no longer wants to know.
        let _ = answer.send(self.expiry.by_end());
    }

    pub(super) fn tick(&mut self, now: Timestamp) {
        self.expiry.tick(now);
    }

    pub(super) fn promote(&mut self, now: Timestamp, term: Term, leases: Vec<LeaseState>) {
        self.expiry.promote(now, term, leases);
    }

    pub(super) fn demote(&mut self) {
        self.expiry.demote();
    }

    pub(super) fn applied(&mut self, now: Timestamp, changes: &[LeaseChange]) {
        for change in changes {
            self.expiry.change(now, change);
            self.keep_alives.changed(change.id());
        }
    }

    pub(super) fn round_begun(&mut self, round: ReadId, now: Timestamp) {
        self.round = Some((round, now));
        self.confirm = false;
    }

    pub(super) fn round_ready(&mut self, round: ReadId, now: Timestamp) {
        if let Some((_, asked)) = self.round.take_if(|(ours, _)| *ours == round) {
            self.expiry.confirmed(asked, now);
        }
    }

    pub(super) fn round_failed(&mut self, round: ReadId) {
        self.round.take_if(|(ours, _)| *ours == round);
    }

    /// Whether leadership has to be confirmed and nobody has asked yet.
    pub(super) fn wants_round(&mut self, now: Timestamp) -> bool {
        self.round.is_none() && (self.confirm || self.expiry.in_doubt(now))
    }

    pub(super) fn not_proposed(&mut self, own: &Own) {
        match own {
            Own::Revoke(id) => self.expiry.revoke_failed(*id),
            Own::Reset(id) => self.keep_alives.reset_failed(*id),
            Own::Checkpoint | Own::Alarm => {}
        }
    }

    /// Answers what can be answered, and says what has to be proposed.
    pub(super) fn drive(&mut self, now: Timestamp, committed: Index, applied: Index) -> Vec<Bound> {
        let mut wanted = Vec::new();
        if !self.keep_alives.is_empty() {
            for step in self.keep_alives.drive(now, &mut self.expiry, committed, applied) {
                match step {
                    // A caller that has gone no longer wants to know.
                    Step::Answer(caller, answer) => drop(caller.send(answer)),
                    Step::Reset { term, id } => wanted.push(checkpoint(term, vec![(id, 0)], Own::Reset(id))),
                    Step::Confirm => self.confirm = true,
                }
            }
        }
        self.answer_questions(now, applied);
        if let Some(due) = self.expiry.due(now) {
            for id in due.items {
                let request = InternalRaftRequest {
                    lease_revoke: Some(LeaseRevokeRequest { id: id.0 }),
                    ..InternalRaftRequest::default()
                };
                wanted.push(Bound { term: due.term, request, own: Own::Revoke(id) });
            }
        }
        if let Some(due) = self.expiry.checkpoints(now) {
            let items = due.items.iter().map(|checkpoint| (checkpoint.id, checkpoint.remaining_ttl_s)).collect();
            wanted.push(checkpoint(due.term, items, Own::Checkpoint));
        }
        wanted
    }

    fn answer_questions(&mut self, now: Timestamp, applied: Index) {
        let primary = self.expiry.term().is_some();
        for question in std::mem::take(&mut self.questions) {
            let answer = if !primary {
                Err(Error::NotLeader)
            } else if applied >= question.until {
                Ok(self.expiry.remaining(now, question.id))
            } else if question.deadline <= now {
                Err(Error::TimeoutWaitAppliedIndex)
            } else {
                self.questions.push(question);
                continue;
            };
            let _ = question.answer.send(answer);
        }
    }

    pub(super) fn stop(&mut self) {
        for (caller, error) in self.keep_alives.drain(&Error::Stopped) {
            let _ = caller.send(Err(error));
        }
        for question in self.questions.drain(..) {
            let _ = question.answer.send(Err(Error::Stopped));
        }
    }
}

fn checkpoint(term: Term, items: Vec<(LeaseId, i64)>, own: Own) -> Bound {
    let checkpoints =
        items.into_iter().map(|(id, remaining_ttl)| LeaseCheckpoint { id: id.0, remaining_ttl }).collect();
    let request = InternalRaftRequest {
        lease_checkpoint: Some(LeaseCheckpointRequest { checkpoints }),
        ..InternalRaftRequest::default()
    };
    Bound { term, request, own }
}

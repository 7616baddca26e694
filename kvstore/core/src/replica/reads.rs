//! Linearizable reads. All reads that wait share one round: Raft confirms by a quorum of heartbeats that the leader still
//! leads, and answers with the commit index of the moment it was asked.
//!
//! raft-rs tells rounds apart by their context bytes alone, drops a repeated context silently, and drops a whole request
//! silently when there is no leader or the leader has not committed in its term yet. So a context is never used twice
//! (member, nonce of this start, counter), an unanswered round is asked again by ticks under a fresh one, and an answer
//! to a context that is not waited for any more is ignored (etcd's stale reads after a pause, 20418, were such answers).
//!
//! What it does not do: wait until the index is applied (`pending.rs`), or give up after a timeout.

use std::collections::VecDeque;

use super::{Leadership, ReadId};
use crate::types::{Index, MemberId, Ticks};

/// Rounds on their way at the same time. More than one, so that a read need not wait for the round before it to end.
const ROUNDS: usize = 4;

pub(super) struct Reads {
    member: MemberId,
    nonce: u64,
    counter: u64,
    retry_ticks: Ticks,
    waiting: Vec<ReadId>,
    rounds: VecDeque<Round>,
}

struct Round {
    context: [u8; 24],
    reads: Vec<ReadId>,
    asked_at: Ticks,
    under: Leadership,
}

impl Reads {
    pub(super) fn new(member: MemberId, nonce: u64, retry_ticks: Ticks) -> Reads {
        Reads { member, nonce, counter: 0, retry_ticks, waiting: Vec::new(), rounds: VecDeque::new() }
    }

    pub(super) fn add(&mut self, read: ReadId) {
        self.waiting.push(read);
    }

    /// Begins a round for all that wait, if one may begin now; returns its context.
    pub(super) fn begin(&mut self, now: Ticks, under: Leadership) -> Option<[u8; 24]> {
        if self.waiting.is_empty() || self.rounds.len() >= ROUNDS {
            return None;
        }
        self.counter += 1;
        let mut context = [0; 24];
        context[..8].copy_from_slice(&self.member.0.to_be_bytes());
        context[8..16].copy_from_slice(&self.nonce.to_be_bytes());
        context[16..].copy_from_slice(&self.counter.to_be_bytes());
        let reads = std::mem::take(&mut self.waiting);
        self.rounds.push_back(Round { context, reads, asked_at: now, under });
        Some(context)
    }

    /// A round was answered: its reads may be served once `index` is applied.
    pub(super) fn answered(&mut self, context: &[u8], index: Index) -> Vec<(ReadId, Index)> {
        let Some(at) = self.rounds.iter().position(|round| round.context == context) else { return Vec::new() };
        let round = self.rounds.remove(at).expect("its position was just found");
        round.reads.into_iter().map(|read| (read, index)).collect()
    }

    /// Reads of rounds that were not answered in time wait again, before those that came later.
    pub(super) fn retry(&mut self, now: Ticks) {
        let mut again = Vec::new();
        let retry_ticks = self.retry_ticks;
        self.rounds.retain_mut(|round| {
            let late = now.saturating_sub(round.asked_at) >= retry_ticks;
            if late {
                again.append(&mut round.reads);
            }
            !late
        });
        if !again.is_empty() {
            again.append(&mut self.waiting);
            self.waiting = again;
        }
    }

    /// Another leader, or the same in another term: what an earlier one was asked fails, as in etcd. Reads that nobody
    /// was asked about go on waiting.
    pub(super) fn leader_changed(&mut self, to: Leadership) -> Vec<ReadId> {
        let mut failed = Vec::new();
        self.rounds.retain_mut(|round| {
            let stale = (round.under.leader, round.under.term) != (to.leader, to.term);
            if stale {
                failed.append(&mut round.reads);
            }
            !stale
        });
        failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Leadership = Leadership { leader: Some(MemberId(1)), term: 2, is_leader: true };
    const B: Leadership = Leadership { leader: Some(MemberId(2)), term: 3, is_leader: false };

    fn reads() -> Reads {
        Reads::new(MemberId(1), 7, 5)
    }

    #[test]
    fn one_round_serves_all_that_wait() {
        let mut reads = reads();
        reads.add(ReadId(1));
        reads.add(ReadId(2));
        let context = reads.begin(0, A).unwrap();
        assert_eq!(reads.begin(0, A), None);
        assert_eq!(reads.answered(&context, 9), vec![(ReadId(1), 9), (ReadId(2), 9)]);
        assert!(reads.answered(&context, 9).is_empty());
    }

    #[test]
    fn a_read_that_came_later_needs_a_round_of_its_own() {
        let mut reads = reads();
        reads.add(ReadId(1));
        let first = reads.begin(0, A).unwrap();
        reads.add(ReadId(2));
        assert_eq!(reads.answered(&first, 3), vec![(ReadId(1), 3)]);
        let second = reads.begin(0, A).unwrap();
        assert_ne!(first, second);
        assert_eq!(reads.answered(&second, 4), vec![(ReadId(2), 4)]);
    }

    #[test]
    fn a_retry_has_a_fresh_context_and_the_old_answer_counts_no_more() {
        let mut reads = reads();
        reads.add(ReadId(1));
        let first = reads.begin(0, A).unwrap();
        reads.retry(4);
        assert_eq!(reads.begin(4, A), None);
        reads.retry(5);
        let second = reads.begin(5, A).unwrap();
        assert_ne!(first, second);
        assert!(reads.answered(&first, 3).is_empty());
        assert_eq!(reads.answered(&second, 4), vec![(ReadId(1), 4)]);
    }

    #[test]
    fn contexts_of_two_lives_differ() {
        let mut lives = [reads(), Reads::new(MemberId(1), 8, 5)];
        let contexts: Vec<_> = lives
            .iter_mut()
            .map(|reads| {
                reads.add(ReadId(1));
                reads.begin(0, A).unwrap()
            })
            .collect();
        assert_ne!(contexts[0], contexts[1]);
    }

    #[test]
    fn another_leader_fails_what_the_old_one_was_asked() {
        let mut reads = reads();
        reads.add(ReadId(1));
        let context = reads.begin(0, A).unwrap();
        reads.add(ReadId(2));
        assert_eq!(reads.leader_changed(B), vec![ReadId(1)]);
        assert!(reads.answered(&context, 3).is_empty());
        let context = reads.begin(1, B).unwrap();
        assert_eq!(reads.answered(&context, 5), vec![(ReadId(2), 5)]);
    }
}

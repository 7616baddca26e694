//! Who waits for what: proposals by request id, reads by their ReadIndex round and then by applied index.
//!
//! The raft thread owns one `Pending`. A waiter (a oneshot in the shell, a number in a test) is handed in once and comes
//! out exactly once: with its outcome, with an error, or at the end of the life of this member.
//!
//! ```text
//! propose(id, W) ──────────────▶ outcome(id) ─▶ W          expire(now) ─▶ (W, Timeout…)
//! ask(round, W) ─▶ ready(round, index) ─▶ applied(index) ─▶ [W]
//! ```
//!
//! A proposal that timed out is *unknown*, not failed: it may still commit, or may have been swallowed by a snapshot
//! (traps 4 and 7). What the client reads out of the error's text is why that happened: the leader was lost meanwhile, or the
//! connection to it, or neither (contract 2.4).
//!
//! What this module does not do: propose. Raft's proposals are not idempotent (trap 7), so nothing here ever hands a
//! request out a second time; it does not even keep one.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::Error;
use crate::types::{Index, RequestId, Ticks};

/// A ReadIndex round: all reads that were asked for with the same number become ready together.
pub type Round = u64;

/// How this member is connected to the leader (to a quorum, if it leads itself).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Link {
    /// Nobody leads, as far as this member knows: a loss of connection can't be told from a loss of the leader.
    NoLeader,
    /// Connected without interruption since this tick.
    Since(Ticks),
    /// Not connected.
    Lost,
}

/// Waiters of kind `W`. All times are ticks of the raft thread.
#[derive(Debug)]
pub struct Pending<W> {
    election_ticks: Ticks,
    /// When the present leader became known; a proposal made shortly before that may have died with the previous one.
    leader_elected: Option<Ticks>,
    proposals: BTreeMap<RequestId, Waiting<W>>,
    rounds: BTreeMap<Round, Vec<Waiting<W>>>,
    /// Reads that know their index: (index, arrival) → waiter.
    reads: BTreeMap<(Index, u64), Waiting<W>>,
    /// (deadline, arrival) → where the waiter stands, or once stood.
    deadlines: BTreeMap<(Ticks, u64), Place>,
    arrivals: u64,
}

#[derive(Debug)]
struct Waiting<W> {
    waiter: W,
    since: Ticks,
    deadline: Ticks,
    arrival: u64,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Proposal(RequestId),
    Round(Round),
    Read(Index),
}

impl<W> Pending<W> {
    /// `election_ticks` is the election timeout: how far back a leader's loss explains a proposal's.
    pub fn new(election_ticks: Ticks) -> Self {
        Pending {
            election_ticks,
            leader_elected: None,
            proposals: BTreeMap::new(),
            rounds: BTreeMap::new(),
            reads: BTreeMap::new(),
            deadlines: BTreeMap::new(),
            arrivals: 0,
        }
    }

    /// Proposals without an outcome yet.
    pub fn proposals(&self) -> usize {
        self.proposals.len()
    }

    /// Reads that were not released yet.
    pub fn reads(&self) -> usize {
        self.rounds.values().map(Vec::len).sum::<usize>() + self.reads.len()
    }

    /// `waiter` waits for the outcome of `id`, at most `timeout` ticks. Request ids are never used twice (trap 7).
    pub fn propose(&mut self, id: RequestId, waiter: W, now: Ticks, timeout: Ticks) {
        let waiting = self.admit(waiter, now, timeout, Place::Proposal(id));
        let earlier = self.proposals.insert(id, waiting);
        debug_assert!(earlier.is_none(), "request id {id} proposed twice");
    }

    /// The waiter of `id`, if it is ours and still waits: its outcome has come, or Raft refused the proposal.
    pub fn outcome(&mut self, id: RequestId) -> Option<W> {
        let waiting = self.proposals.remove(&id)?;
        self.deadlines.remove(&(waiting.deadline, waiting.arrival));
        Some(waiting.waiter)
    }

    /// `waiter` waits for the ReadIndex round `round`, and then for the applied index that it names, at most `timeout` ticks.
    pub fn ask(&mut self, round: Round, waiter: W, now: Ticks, timeout: Ticks) {
        let waiting = self.admit(waiter, now, timeout, Place::Round(round));
        self.rounds.entry(round).or_default().push(waiting);
    }

    /// The round was confirmed at `index`: its waiters now wait for that to be applied. They are released by the next
    /// [`applied`](Pending::applied), which the caller makes with what is applied already.
    pub fn ready(&mut self, round: Round, index: Index) {
        for waiting in self.rounds.remove(&round).unwrap_or_default() {
            self.deadlines.insert((waiting.deadline, waiting.arrival), Place::Read(index));
            self.reads.insert((index, waiting.arrival), waiting);
        }
    }

    /// The round will not be confirmed (its leader is gone): its waiters, to be told so.
    pub fn failed(&mut self, round: Round) -> Vec<W> {
        let waiting = self.rounds.remove(&round).unwrap_or_default();
        for waiting in &waiting {
            self.deadlines.remove(&(waiting.deadline, waiting.arrival));
        }
        waiting.into_iter().map(|waiting| waiting.waiter).collect()
    }

    /// `waiter` waits until `index` is applied, at most `timeout` ticks.
    pub fn read(&mut self, waiter: W, index: Index, now: Ticks, timeout: Ticks) {
        let waiting = self.admit(waiter, now, timeout, Place::Read(index));
        self.reads.insert((index, waiting.arrival), waiting);
    }

    /// Everything up to `index` is applied (or was installed with a snapshot): the reads that this releases, in order.
    pub fn applied(&mut self, index: Index) -> Vec<W> {
        let mut released = Vec::new();
        while let Some(first) = self.reads.first_entry() {
            if first.key().0 > index {
                break;
            }
            let waiting = first.remove();
            self.deadlines.remove(&(waiting.deadline, waiting.arrival));
            released.push(waiting.waiter);
        }
        released
    }

    /// This member was elected, after another or none.
    pub fn leader_elected(&mut self, now: Ticks) {
        self.leader_elected = Some(now);
    }

    /// Those whose time is up, oldest deadline first, each with what etcd would say about it.
    pub fn expire(&mut self, now: Ticks, link: Link) -> Vec<(W, Error)> {
        let mut expired = Vec::new();
        while let Some(first) = self.deadlines.first_entry() {
            if first.key().0 > now {
                break;
            }
            let ((_, arrival), place) = first.remove_entry();
            if let Some(waiting) = self.remove(place, arrival) {
                let error = match place {
                    Place::Proposal(_) => self.explain(waiting.since, link),
                    Place::Round(_) | Place::Read(_) => Error::Timeout,
                };
                expired.push((waiting.waiter, error));
            }
        }
        expired
    }

    /// The member stops, or lost what it needs to answer: everybody, with `error`. Proposals in the order of their arrival, then reads.
    pub fn drain(&mut self, error: &Error) -> Vec<(W, Error)> {
        self.deadlines.clear();
        let mut all: Vec<Waiting<W>> = std::mem::take(&mut self.proposals).into_values().collect();
        all.sort_by_key(|waiting| waiting.arrival);
        all.extend(std::mem::take(&mut self.rounds).into_values().flatten());
        all.extend(std::mem::take(&mut self.reads).into_values());
        all.into_iter().map(|waiting| (waiting.waiter, error.clone())).collect()
    }

    /// Why a proposal made at `since` may have gone unanswered (contract 2.4; the window is two election timeouts before
    /// this member was elected, if it was).
    fn explain(&self, since: Ticks, link: Link) -> Error {
        if let Some(elected) = self.leader_elected
            && since < elected
            && since.saturating_add(2 * self.election_ticks) > elected
        {
            return Error::TimeoutDueToLeaderFail;
        }
        match link {
            Link::NoLeader => Error::Timeout,
            Link::Since(connected) if connected <= since => Error::Timeout,
            Link::Since(_) | Link::Lost => Error::TimeoutDueToConnectionLost,
        }
    }

    fn admit(&mut self, waiter: W, now: Ticks, timeout: Ticks, place: Place) -> Waiting<W> {
        self.arrivals += 1;
        let waiting = Waiting { waiter, since: now, deadline: now.saturating_add(timeout), arrival: self.arrivals };
        self.deadlines.insert((waiting.deadline, waiting.arrival), place);
        waiting
    }

    fn remove(&mut self, place: Place, arrival: u64) -> Option<Waiting<W>> {
        match place {
            Place::Proposal(id) => self.proposals.remove(&id),
            Place::Read(index) => self.reads.remove(&(index, arrival)),
            Place::Round(round) => {
                let Entry::Occupied(mut entry) = self.rounds.entry(round) else { return None };
                let at = entry.get().iter().position(|waiting| waiting.arrival == arrival)?;
                let waiting = entry.get_mut().remove(at);
                if entry.get().is_empty() {
                    entry.remove();
                }
                Some(waiting)
            }
        }
    }
}

//! The leader's lease clock: which lease ends when, which are due, how much is left of each.
//!
//! The replicated table ([`crate::lease`]) says which leases exist; it knows no time. This machine exists beside it on every
//! member, but only the leader's is *primary*: it is promoted with all leases when leadership of a term begins, follows every
//! [`LeaseChange`] that is applied, and is demoted when leadership ends. The raft thread drives it and brings the time.
//!
//! ```text
//! promote ─▶ live ──expires──▶ ending ──due──▶ revoke in flight ──applied──▶ gone
//!             ▲ renew             (a keep-alive from here on waits: trap 6)
//! ```
//!
//! Rules that keep a client's lease from being broken (contract 2.8, trap 6):
//! - a new leader can't know when the old one last renewed, so it gives every lease its full (or checkpointed) time and an
//!   election timeout more; where thousands would then end at once, they are spread;
//! - once a lease has ended by this clock nothing renews it: it is on its way out, and the keep-alive waits for the revoke;
//! - what is handed out (revokes, checkpoints) is bound to the term of the promotion, and is never forwarded;
//! - a leader whose last tick is older than three ticks, or that has just seen such a gap, has slept and may have been
//!   replaced: it renews, revokes and checkpoints nothing until a ReadIndex that was asked for after the gap has answered.
//!
//! What this module does not do: revoke, replicate, or park a keep-alive that has to wait ([`super::keepalive`] does).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{LeaseChange, LeaseState};
use crate::types::{LeaseId, Term, Timestamp};

/// Bounds and intervals; [`ExpiryConfig::new`] has etcd's.
#[derive(Clone, Debug)]
pub struct ExpiryConfig {
    /// Between two [`Expiry::tick`]s.
    pub tick_ms: u64,
    /// Added to every lease at promotion.
    pub election_timeout_ms: u64,
    /// How often leases are looked through for ended ones.
    pub check_interval_ms: u64,
    /// Ended leases taken up by one check.
    pub revoke_batch: usize,
    /// Revokes that may be on their way through Raft at once.
    pub max_in_flight: usize,
    /// A revoke that was not applied after so long is handed out again.
    pub retry_ms: u64,
    /// How often what is left of a long lease is replicated; leases not longer than this are never checkpointed. `None`:
    /// nothing is checkpointed (etcd's gate LeaseCheckpoint is off).
    pub checkpoint_interval_ms: Option<u64>,
    /// Leases in one checkpoint proposal.
    pub checkpoint_batch: usize,
    /// From so many leases on, a promotion spreads their ends…
    pub spread_from: usize,
    /// …so that no more than this many fall into any one second.
    pub spread_per_second: usize,
}

impl ExpiryConfig {
    pub fn new(tick_ms: u64, election_timeout_ms: u64) -> Self {
        ExpiryConfig {
            tick_ms,
            election_timeout_ms,
            check_interval_ms: 500,
            revoke_batch: 500,
            max_in_flight: 16,
            retry_ms: 3_000,
            checkpoint_interval_ms: None,
            checkpoint_batch: 1_000,
            spread_from: 1_000,
            spread_per_second: 750,
        }
    }
}

/// What became of a keep-alive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Renewal {
    /// Lives for this many seconds from now.
    Renewed { ttl_s: i64 },
    /// No such lease here; it may stand in the log, committed and not yet applied: wait for that and ask again.
    Unknown,
    /// It has ended and its revoke is on the way: wait until it is gone, or until this member is no longer primary.
    Revoking,
    /// A checkpoint says that less is left. Propose one that says 0 (bound to the term), and ask again once that is applied.
    ResetFirst { term: Term },
    /// This member slept and may have been replaced: ask a ReadIndex, tell [`Expiry::confirmed`], and ask again.
    ConfirmFirst,
    /// Another member leads, or nobody does.
    NotPrimary,
}

/// What is left of a lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Remaining {
    /// Whole seconds, rounded towards 0. Of one that has ended and is not revoked yet: since when, negative, as etcd has it.
    pub remaining_s: i64,
    pub granted_s: i64,
}

/// Leases to be revoked, or checkpointed, by the leader of `term` alone. If another term has begun, this is void.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bound<T> {
    pub term: Term,
    pub items: Vec<T>,
}

/// What is left of a lease, for the replicated table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checkpoint {
    pub id: LeaseId,
    pub remaining_ttl_s: i64,
}

/// See the module.
#[derive(Debug)]
pub struct Expiry {
    config: ExpiryConfig,
    primary: Option<Primary>,
}

#[derive(Debug)]
struct Primary {
    term: Term,
    leases: BTreeMap<LeaseId, Deadline>,
    /// Live leases by their end.
    ends: BTreeSet<(Timestamp, LeaseId)>,
    /// Ended, and not yet handed out.
    ended: VecDeque<LeaseId>,
    /// Handed out at this time, and not yet applied.
    in_flight: BTreeMap<LeaseId, Timestamp>,
    /// Live leases by their next checkpoint.
    checkpoints: BTreeSet<(Timestamp, LeaseId)>,
    next_check: Timestamp,
    last_tick: Timestamp,
    /// This member slept until this moment; only an answer to a ReadIndex asked for since then ends the doubt.
    doubt: Option<Timestamp>,
}

#[derive(Debug)]
struct Deadline {
    ends: Timestamp,
    granted_s: i64,
    remaining_s: i64,
    checkpoint: Option<Timestamp>,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Live,
    Ended,
    InFlight,
}

impl Expiry {
    pub fn new(config: ExpiryConfig) -> Self {
        Expiry { config, primary: None }
    }

    /// The term this member is primary in.
    pub fn term(&self) -> Option<Term> {
        self.primary.as_ref().map(|primary| primary.term)
    }

    /// Leases known; 0 while not primary.
    pub fn len(&self) -> usize {
        self.primary.as_ref().map_or(0, |primary| primary.leases.len())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// This member leads `term`. `leases` is the table at least as new as the changes that were handed to
    /// [`change`](Expiry::change) so far; older changes may still come and do no harm.
    pub fn promote(&mut self, now: Timestamp, term: Term, leases: impl IntoIterator<Item = LeaseState>) {
        let mut order: Vec<(Timestamp, LeaseState)> = leases
            .into_iter()
            .map(|lease| {
                let left_s = if lease.remaining_ttl_s > 0 { lease.remaining_ttl_s } else { lease.ttl_s };
                (now.after_ms(ms(left_s)).after_ms(self.config.election_timeout_ms), lease)
            })
            .collect();
        order.sort_by_key(|(ends, lease)| (*ends, lease.id));
        if order.len() >= self.config.spread_from {
            spread(&mut order, self.config.spread_per_second);
        }
        self.primary = Some(Primary::new(&self.config, now, term, &order));
    }

    /// This member no longer leads: it forgets all deadlines.
    pub fn demote(&mut self) {
        self.primary = None;
    }

    /// A heartbeat interval has passed, by the same clock as everything else.
    pub fn tick(&mut self, now: Timestamp) {
        if let Some(primary) = &mut self.primary {
            primary.trusts(&self.config, now);
            primary.last_tick = now;
        }
    }

    /// Whether leadership is in doubt, so that a ReadIndex has to be asked for.
    pub fn in_doubt(&mut self, now: Timestamp) -> bool {
        self.primary.as_mut().is_some_and(|primary| !primary.trusts(&self.config, now))
    }

    /// A ReadIndex that was asked for at `asked` has answered: this member led then.
    pub fn confirmed(&mut self, asked: Timestamp, now: Timestamp) {
        if let Some(primary) = &mut self.primary
            && primary.doubt.is_none_or(|since| asked >= since)
        {
            primary.doubt = None;
            primary.last_tick = primary.last_tick.max(asked).min(now);
        }
    }

    /// A change of the table was applied.
    pub fn change(&mut self, now: Timestamp, change: &LeaseChange) {
        let Some(primary) = &mut self.primary else { return };
        match *change {
            LeaseChange::Granted { id, ttl_s } => {
                let lease = LeaseState { id, ttl_s, remaining_ttl_s: 0 };
                primary.remove(id);
                primary.insert(&self.config, now, now.after_ms(ms(ttl_s)), lease);
            }
            LeaseChange::Revoked { id } => primary.remove(id),
            LeaseChange::Checkpointed { id, remaining_ttl_s } => {
                if let Some(deadline) = primary.leases.get_mut(&id) {
                    deadline.remaining_s = remaining_ttl_s;
                    let left_ms = ms(deadline.left_s());
                    primary.schedule_checkpoint(&self.config, now, id, left_ms);
                }
            }
        }
    }

    /// A keep-alive for `id`.
    pub fn renew(&mut self, now: Timestamp, id: LeaseId) -> Renewal {
        let Some(primary) = &mut self.primary else { return Renewal::NotPrimary };
        if !primary.trusts(&self.config, now) {
            return Renewal::ConfirmFirst;
        }
        let Some(deadline) = primary.leases.get_mut(&id) else { return Renewal::Unknown };
        if deadline.phase != Phase::Live || deadline.ends <= now {
            return Renewal::Revoking;
        }
        if deadline.remaining_s > 0 {
            return Renewal::ResetFirst { term: primary.term };
        }
        let ends = now.after_ms(ms(deadline.granted_s));
        let before = std::mem::replace(&mut deadline.ends, ends);
        let ttl_s = deadline.granted_s;
        primary.ends.remove(&(before, id));
        primary.ends.insert((ends, id));
        primary.schedule_checkpoint(&self.config, now, id, ms(ttl_s));
        Renewal::Renewed { ttl_s }
    }

    /// What is left of `id`; `None` if this member is not primary or does not know it.
    pub fn remaining(&self, now: Timestamp, id: LeaseId) -> Option<Remaining> {
        let deadline = self.primary.as_ref()?.leases.get(&id)?;
        let (left_ms, over_ms) = (deadline.ends.since_ms(now), now.since_ms(deadline.ends));
        let remaining_s = (left_ms / 1000) as i64 - (over_ms / 1000) as i64;
        Some(Remaining { remaining_s, granted_s: deadline.granted_s })
    }

    /// All leases that this primary knows, those that end first coming first; `None` if it is none.
    pub fn by_end(&self) -> Option<Vec<LeaseId>> {
        let primary = self.primary.as_ref()?;
        let ended = primary.ended.iter().chain(primary.in_flight.keys());
        let mut over: Vec<(Timestamp, LeaseId)> =
            ended.filter_map(|id| Some((primary.leases.get(id)?.ends, *id))).collect();
        over.sort_unstable();
        // What was taken up by a check ended before all that was not.
        Some(over.iter().chain(&primary.ends).map(|(_, id)| *id).collect())
    }

    /// Leases to be revoked now: at most `revoke_batch` each `check_interval_ms`, at most `max_in_flight` at once. To be
    /// called at every tick, and whenever revokes were applied.
    pub fn due(&mut self, now: Timestamp) -> Option<Bound<LeaseId>> {
        let primary = self.primary.as_mut()?;
        if !primary.trusts(&self.config, now) {
            return None;
        }
        if now >= primary.next_check {
            primary.next_check = now.after_ms(self.config.check_interval_ms);
            primary.retry(&self.config, now);
            primary.collect_ended(&self.config, now);
        }
        let room = self.config.max_in_flight.saturating_sub(primary.in_flight.len()).min(primary.ended.len());
        let items: Vec<LeaseId> = primary.ended.drain(..room).collect();
        for id in &items {
            primary.in_flight.insert(*id, now);
            if let Some(deadline) = primary.leases.get_mut(id) {
                deadline.phase = Phase::InFlight;
            }
        }
        (!items.is_empty()).then_some(Bound { term: primary.term, items })
    }

    /// A revoke that was handed out did not get into the log: it will be handed out again.
    pub fn revoke_failed(&mut self, id: LeaseId) {
        if let Some(primary) = &mut self.primary {
            primary.hand_out_again(id);
        }
    }

    /// Checkpoints to be replicated now, at most `checkpoint_batch`. To be called at every tick.
    pub fn checkpoints(&mut self, now: Timestamp) -> Option<Bound<Checkpoint>> {
        let primary = self.primary.as_mut()?;
        if !primary.trusts(&self.config, now) {
            return None;
        }
        let mut items = Vec::new();
        while items.len() < self.config.checkpoint_batch
            && let Some((at, id)) = primary.checkpoints.first().copied()
            && at <= now
        {
            primary.checkpoints.pop_first();
            let Some(deadline) = primary.leases.get_mut(&id) else { continue };
            deadline.checkpoint = None;
            let left_ms = deadline.ends.since_ms(now);
            let remaining_ttl_s = left_ms.div_ceil(1000) as i64;
            if deadline.phase != Phase::Live || left_ms == 0 {
                continue;
            }
            if remaining_ttl_s < deadline.granted_s {
                // From here on it may be in the log: a keep-alive has to take it back, even if it is not applied yet.
                deadline.remaining_s = remaining_ttl_s;
                items.push(Checkpoint { id, remaining_ttl_s });
            }
            // Should the proposal be lost, the next one says it again.
            primary.schedule_checkpoint(&self.config, now, id, left_ms);
        }
        (!items.is_empty()).then_some(Bound { term: primary.term, items })
    }
}

impl Deadline {
    /// Seconds that a new leader would give this lease.
    fn left_s(&self) -> i64 {
        if self.remaining_s > 0 { self.remaining_s } else { self.granted_s }
    }
}

impl Primary {
    /// `order`: all leases by their ends. Built in bulk: a promotion may bring a hundred thousand of them.
    fn new(config: &ExpiryConfig, now: Timestamp, term: Term, order: &[(Timestamp, LeaseState)]) -> Primary {
        let checkpoint = |lease: &LeaseState| {
            let left_ms = ms(if lease.remaining_ttl_s > 0 { lease.remaining_ttl_s } else { lease.ttl_s });
            config.checkpoint_interval_ms.filter(|interval_ms| left_ms > *interval_ms).map(|ms| now.after_ms(ms))
        };
        let deadline = |ends, lease: &LeaseState| Deadline {
            ends,
            granted_s: lease.ttl_s,
            remaining_s: lease.remaining_ttl_s,
            checkpoint: checkpoint(lease),
            phase: Phase::Live,
        };
        Primary {
            term,
            leases: order.iter().map(|(ends, lease)| (lease.id, deadline(*ends, lease))).collect(),
            ends: order.iter().map(|(ends, lease)| (*ends, lease.id)).collect(),
            ended: VecDeque::new(),
            in_flight: BTreeMap::new(),
            checkpoints: order.iter().filter_map(|(_, lease)| Some((checkpoint(lease)?, lease.id))).collect(),
            next_check: now,
            last_tick: now,
            doubt: None,
        }
    }

    /// Whether this member has been awake without a gap, or has been confirmed since the last one. Remembers a gap.
    fn trusts(&mut self, config: &ExpiryConfig, now: Timestamp) -> bool {
        if now.since_ms(self.last_tick) > 3 * config.tick_ms && self.doubt.is_none() {
            self.doubt = Some(now);
        }
        self.doubt.is_none()
    }

    fn insert(&mut self, config: &ExpiryConfig, now: Timestamp, ends: Timestamp, lease: LeaseState) {
        let deadline = Deadline {
            ends,
            granted_s: lease.ttl_s,
            remaining_s: lease.remaining_ttl_s,
            checkpoint: None,
            phase: Phase::Live,
        };
        let left_ms = ms(deadline.left_s());
        self.leases.insert(lease.id, deadline);
        self.ends.insert((ends, lease.id));
        self.schedule_checkpoint(config, now, lease.id, left_ms);
    }

    fn remove(&mut self, id: LeaseId) {
        let Some(deadline) = self.leases.remove(&id) else { return };
        self.ends.remove(&(deadline.ends, id));
        self.in_flight.remove(&id);
        if deadline.phase == Phase::Ended {
            self.ended.retain(|other| *other != id);
        }
        if let Some(at) = deadline.checkpoint {
            self.checkpoints.remove(&(at, id));
        }
    }

    fn schedule_checkpoint(&mut self, config: &ExpiryConfig, now: Timestamp, id: LeaseId, left_ms: u64) {
        let Some(deadline) = self.leases.get_mut(&id) else { return };
        if let Some(at) = deadline.checkpoint.take() {
            self.checkpoints.remove(&(at, id));
        }
        if let Some(interval_ms) = config.checkpoint_interval_ms
            && left_ms > interval_ms
        {
            let at = now.after_ms(interval_ms);
            deadline.checkpoint = Some(at);
            self.checkpoints.insert((at, id));
        }
    }

    /// Moves leases that have ended to the queue, as far as one check may.
    fn collect_ended(&mut self, config: &ExpiryConfig, now: Timestamp) {
        while self.ended.len() < config.revoke_batch
            && let Some((ends, id)) = self.ends.first().copied()
            && ends <= now
        {
            self.ends.pop_first();
            if let Some(deadline) = self.leases.get_mut(&id) {
                deadline.phase = Phase::Ended;
                self.ended.push_back(id);
            }
        }
    }

    fn retry(&mut self, config: &ExpiryConfig, now: Timestamp) {
        let stuck = self.in_flight.iter().filter(|(_, since)| now.since_ms(**since) >= config.retry_ms);
        let stuck: Vec<LeaseId> = stuck.map(|(id, _)| *id).collect();
        for id in stuck {
            self.hand_out_again(id);
        }
    }

    fn hand_out_again(&mut self, id: LeaseId) {
        if self.in_flight.remove(&id).is_some()
            && let Some(deadline) = self.leases.get_mut(&id)
        {
            deadline.phase = Phase::Ended;
            self.ended.push_back(id);
        }
    }
}

/// Pushes ends back so that no more than `per_second` of them fall into any one second. Order and emptier times are kept.
fn spread(order: &mut [(Timestamp, LeaseState)], per_second: usize) {
    for i in per_second.max(1)..order.len() {
        let earliest = order[i - per_second.max(1)].0.after_ms(1000);
        // Never before the neighbour, so that the order by end stays the order of the slice.
        order[i].0 = order[i].0.max(earliest).max(order[i - 1].0);
    }
}

/// Seconds of a TTL in milliseconds; a TTL is never negative where it was checked, and nothing here trusts that.
fn ms(seconds: i64) -> u64 {
    u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)
}

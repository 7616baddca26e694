//! Keep-alives that can't be answered at once, until they can (trap 6).
//!
//! [`Expiry::renew`] says why one has to wait; this machine does the waiting, on the raft thread beside it:
//!
//! | it says | what is waited for | then |
//! |---|---|---|
//! | `ConfirmFirst` | a ReadIndex asked for after the gap | ask again |
//! | `Unknown` | applied ≥ the commit index of the moment it was asked | ask again; still unknown: TTL 0 |
//! | `Revoking` | the lease to be gone, or another leader | TTL 0; not leader |
//! | `ResetFirst` | a checkpoint of 0 to be *applied* | ask again |
//!
//! Each waits in the place of what it waits for, so that a hundred thousand that wait for their revokes cost nothing while
//! others are answered.
//!
//! What this module does not do: forward to the leader, or choose the error of the client: [`Error::NotLeader`] tells the shell
//! to look for the leader again as long as the client's time lasts.

use std::collections::BTreeMap;

use super::expiry::{Expiry, Renewal};
use crate::Error;
use crate::types::{Index, LeaseId, Term, Timestamp};

/// How long an unknown lease may wait for what is committed to be applied (etcd).
pub const APPLY_TIMEOUT_MS: u64 = 1_000;
/// Between two looks for those whose time is over.
const TIMEOUT_CHECK_MS: u64 = 100;

/// Parked keep-alives with waiters of kind `W`.
#[derive(Debug)]
pub struct KeepAlives<W> {
    /// To be asked at the next drive.
    ready: Vec<Parked<W>>,
    /// Their lease is being revoked or reset.
    by_lease: BTreeMap<LeaseId, Vec<Parked<W>>>,
    /// Their lease may stand in the log up to this index.
    by_index: BTreeMap<Index, Vec<Parked<W>>>,
    /// This member may have been replaced.
    in_doubt: Vec<Parked<W>>,
    /// Leases whose checkpoint is being reset, so that many keep-alives of one lease propose once.
    resetting: BTreeMap<LeaseId, Term>,
    /// What this member was primary in at the last drive.
    term: Option<Term>,
    next_check: Timestamp,
}

#[derive(Debug)]
struct Parked<W> {
    id: LeaseId,
    waiter: W,
    deadline: Timestamp,
    /// The commit index that has to be applied before "unknown" means unknown.
    unknown_until: Option<Index>,
}

/// What the shell has to do.
#[derive(PartialEq, Eq, Debug)]
pub enum Step<W> {
    /// The TTL in seconds, 0 for a lease that is not (or no longer) there.
    Answer(W, Result<i64, Error>),
    /// Propose a checkpoint that says 0, if this member still leads `term`; report a failure to [`KeepAlives::reset_failed`].
    Reset { term: Term, id: LeaseId },
    /// Ask a ReadIndex and report it to [`Expiry::confirmed`].
    Confirm,
}

impl<W> Default for KeepAlives<W> {
    fn default() -> Self {
        KeepAlives {
            ready: Vec::new(),
            by_lease: BTreeMap::new(),
            by_index: BTreeMap::new(),
            in_doubt: Vec::new(),
            resetting: BTreeMap::new(),
            term: None,
            next_check: Timestamp(0),
        }
    }
}

impl<W> KeepAlives<W> {
    pub fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.by_lease.is_empty() && self.by_index.is_empty() && self.in_doubt.is_empty()
    }

    /// A keep-alive has come; [`drive`](KeepAlives::drive) next. After `deadline` it is answered that it timed out.
    pub fn ask(&mut self, id: LeaseId, waiter: W, deadline: Timestamp) {
        self.ready.push(Parked { id, waiter, deadline, unknown_until: None });
    }

    /// A change of this lease was applied, and [`Expiry`] knows it.
    pub fn changed(&mut self, id: LeaseId) {
        self.resetting.remove(&id);
        self.ready.extend(self.by_lease.remove(&id).into_iter().flatten());
    }

    /// Goes on with all that can go on. To be called after anything that may help one: an ask, an apply, a confirmation, a
    /// change of leadership, a tick. `Confirm` comes at every call while leadership is in doubt; one ReadIndex at a time is
    /// enough.
    pub fn drive(&mut self, now: Timestamp, expiry: &mut Expiry, committed: Index, applied: Index) -> Vec<Step<W>> {
        if self.term != expiry.term() {
            self.term = expiry.term();
            self.resetting.clear();
            self.ready.extend(std::mem::take(&mut self.by_lease).into_values().flatten());
            self.ready.extend(std::mem::take(&mut self.by_index).into_values().flatten());
        }
        let later = self.by_index.split_off(&(applied + 1));
        self.ready.extend(std::mem::replace(&mut self.by_index, later).into_values().flatten());
        if !self.in_doubt.is_empty() && !expiry.in_doubt(now) {
            self.ready.append(&mut self.in_doubt);
        }
        let mut steps = Vec::new();
        for keepalive in std::mem::take(&mut self.ready) {
            steps.extend(self.renew(now, expiry, keepalive, committed, applied));
        }
        if now >= self.next_check {
            self.next_check = now.after_ms(TIMEOUT_CHECK_MS);
            self.expire(now, &mut steps);
        }
        if !self.in_doubt.is_empty() {
            steps.push(Step::Confirm);
        }
        steps
    }

    /// Asks the clock about one; it is answered, or put where it has to wait.
    fn renew(
        &mut self,
        now: Timestamp,
        expiry: &mut Expiry,
        mut keepalive: Parked<W>,
        committed: Index,
        applied: Index,
    ) -> Option<Step<W>> {
        let id = keepalive.id;
        match expiry.renew(now, id) {
            Renewal::Renewed { ttl_s } => return Some(Step::Answer(keepalive.waiter, Ok(ttl_s))),
            Renewal::NotPrimary => return Some(Step::Answer(keepalive.waiter, Err(Error::NotLeader))),
            Renewal::Unknown => {
                let until = *keepalive.unknown_until.get_or_insert(committed);
                if applied >= until {
                    return Some(Step::Answer(keepalive.waiter, Ok(0)));
                }
                keepalive.deadline = keepalive.deadline.min(now.after_ms(APPLY_TIMEOUT_MS));
                self.by_index.entry(until).or_default().push(keepalive);
            }
            Renewal::Revoking => self.by_lease.entry(id).or_default().push(keepalive),
            Renewal::ResetFirst { term } => {
                self.by_lease.entry(id).or_default().push(keepalive);
                return self.resetting.insert(id, term).is_none().then_some(Step::Reset { term, id });
            }
            Renewal::ConfirmFirst => self.in_doubt.push(keepalive),
        }
        None
    }

    /// Answers those whose time is over.
    fn expire(&mut self, now: Timestamp, steps: &mut Vec<Step<W>>) {
        let mut over = |parked: &mut Vec<Parked<W>>, error: &Error| {
            for keepalive in parked.extract_if(.., |keepalive| keepalive.deadline <= now) {
                steps.push(Step::Answer(keepalive.waiter, Err(error.clone())));
            }
            !parked.is_empty()
        };
        self.by_lease.retain(|_, parked| over(parked, &Error::Timeout));
        self.by_index.retain(|_, parked| over(parked, &Error::TimeoutWaitAppliedIndex));
        over(&mut self.in_doubt, &Error::Timeout);
    }

    /// The checkpoint of `id` did not get into the log; the next drive proposes it again if somebody still waits.
    pub fn reset_failed(&mut self, id: LeaseId) {
        self.changed(id);
    }

    /// The member stops: everybody.
    pub fn drain(&mut self, error: &Error) -> Vec<(W, Error)> {
        let all = std::mem::take(self);
        let waiting = all.by_lease.into_values().chain(all.by_index.into_values()).flatten();
        let everybody = all.ready.into_iter().chain(all.in_doubt).chain(waiting);
        everybody.map(|keepalive| (keepalive.waiter, error.clone())).collect()
    }
}

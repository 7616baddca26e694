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
//! What this module does not do: forward to the leader, or choose the error of the client: [`Error::NotLeader`] tells the shell
//! to look for the leader again as long as the client's time lasts.

use std::collections::BTreeSet;

use super::expiry::{Expiry, Renewal};
use crate::Error;
use crate::types::{Index, LeaseId, Term, Timestamp};

/// Parked keep-alives with waiters of kind `W`.
#[derive(Debug)]
pub struct KeepAlives<W> {
    parked: Vec<Parked<W>>,
    /// Leases whose checkpoint is being reset, so that many keep-alives of one lease propose once.
    resetting: BTreeSet<(Term, LeaseId)>,
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
        KeepAlives { parked: Vec::new(), resetting: BTreeSet::new() }
    }
}

impl<W> KeepAlives<W> {
    pub fn is_empty(&self) -> bool {
        self.parked.is_empty()
    }

    /// A keep-alive has come; [`drive`](KeepAlives::drive) next. After `deadline` it is answered that it timed out.
    pub fn ask(&mut self, id: LeaseId, waiter: W, deadline: Timestamp) {
        self.parked.push(Parked { id, waiter, deadline, unknown_until: None });
    }

    /// Goes on with all that can go on. To be called after anything that may help one: an ask, an apply, a confirmation, a
    /// change of leadership, a tick. `Confirm` comes at every call while leadership is in doubt; one ReadIndex at a time is
    /// enough.
    pub fn drive(&mut self, now: Timestamp, expiry: &mut Expiry, committed: Index, applied: Index) -> Vec<Step<W>> {
        let mut steps = Vec::new();
        let mut confirm = false;
        match expiry.term() {
            Some(term) => self.resetting.retain(|(of, _)| *of == term),
            None => self.resetting.clear(),
        }
        for mut keepalive in std::mem::take(&mut self.parked) {
            let answer = match expiry.renew(now, keepalive.id) {
                Renewal::Renewed { ttl_s } => {
                    self.resetting.retain(|(_, id)| *id != keepalive.id);
                    Some(Ok(ttl_s))
                }
                Renewal::NotPrimary => Some(Err(Error::NotLeader)),
                Renewal::Unknown => {
                    let until = *keepalive.unknown_until.get_or_insert(committed);
                    (applied >= until).then_some(Ok(0))
                }
                Renewal::Revoking => None,
                Renewal::ResetFirst { term } => {
                    if self.resetting.insert((term, keepalive.id)) {
                        steps.push(Step::Reset { term, id: keepalive.id });
                    }
                    None
                }
                Renewal::ConfirmFirst => {
                    confirm = true;
                    None
                }
            };
            match answer {
                Some(answer) => steps.push(Step::Answer(keepalive.waiter, answer)),
                None if keepalive.deadline <= now => {
                    steps.push(Step::Answer(keepalive.waiter, Err(Error::Timeout)));
                }
                None => self.parked.push(keepalive),
            }
        }
        if confirm {
            steps.push(Step::Confirm);
        }
        steps
    }

    /// The checkpoint of `id` did not get into the log; the next drive proposes it again if somebody still waits.
    pub fn reset_failed(&mut self, id: LeaseId) {
        self.resetting.retain(|(_, other)| *other != id);
    }

    /// The member stops: everybody.
    pub fn drain(&mut self, error: &Error) -> Vec<(W, Error)> {
        self.resetting.clear();
        std::mem::take(&mut self.parked).into_iter().map(|keepalive| (keepalive.waiter, error.clone())).collect()
    }
}

//! How far the log may be cut. Three things hold it:
//! - the state database: what is not on its disk yet must be replayed from here;
//! - followers that lag: the last entries stay, so that they need no snapshot;
//! - a snapshot on its way: the receiver will ask for what follows it, and at some thousand writes a second that is soon
//!   older than the catch-up entries. So a transfer holds the log from the moment it was asked for until a while after
//!   it ended (trap 4), or there would be snapshots for ever.
//!
//! What it does not do: cut. It only says how far.

use std::collections::BTreeMap;

use crate::types::{Index, MemberId, Ticks};

/// A transfer that ended holds the log for this many election timeouts more, for its receiver to catch up.
const ELECTIONS_AFTER_TRANSFER: Ticks = 30;

pub(super) struct Retention {
    catch_up_entries: u64,
    step: u64,
    hold_ticks: Ticks,
    holds: BTreeMap<MemberId, Hold>,
}

struct Hold {
    index: Index,
    /// The transfer is over, and the hold ends then.
    until: Option<Ticks>,
}

impl Retention {
    pub(super) fn new(catch_up_entries: u64, step: u64, election_ticks: Ticks) -> Retention {
        Retention {
            catch_up_entries,
            step: step.max(1),
            hold_ticks: election_ticks.saturating_mul(ELECTIONS_AFTER_TRANSFER),
            holds: BTreeMap::new(),
        }
    }

    /// A snapshot that holds at least `index` goes to `to`.
    pub(super) fn transfer_began(&mut self, to: MemberId, index: Index) {
        self.holds.insert(to, Hold { index, until: None });
    }

    pub(super) fn transfer_ended(&mut self, to: MemberId, now: Ticks) {
        if let Some(hold) = self.holds.get_mut(&to) {
            hold.until.get_or_insert(now + self.hold_ticks);
        }
    }

    pub(super) fn transfers(&self) -> usize {
        self.holds.values().filter(|hold| hold.until.is_none()).count()
    }

    pub(super) fn tick(&mut self, now: Ticks) {
        self.holds.retain(|_, hold| hold.until.is_none_or(|until| now < until));
    }

    /// The last index that may go, if it is worth it. `start` is where the log begins now (the index before its first).
    pub(super) fn cut_to(&self, start: Index, applied: Index, durable: Index) -> Option<Index> {
        let held = self.holds.values().map(|hold| hold.index).min().unwrap_or(Index::MAX);
        let cut = applied.saturating_sub(self.catch_up_entries).min(durable).min(held);
        (cut >= start.saturating_add(self.step)).then_some(cut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: MemberId = MemberId(2);
    const C: MemberId = MemberId(3);

    fn retention() -> Retention {
        Retention::new(100, 10, 10)
    }

    #[test]
    fn the_catch_up_entries_stay() {
        assert_eq!(retention().cut_to(1, 1_000, 1_000), Some(900));
        assert_eq!(retention().cut_to(1, 50, 50), None);
    }

    #[test]
    fn nothing_goes_that_is_not_on_the_state_databases_disk() {
        assert_eq!(retention().cut_to(1, 1_000, 500), Some(500));
        assert_eq!(retention().cut_to(1, 1_000, 1), None);
    }

    #[test]
    fn the_log_is_cut_in_steps() {
        assert_eq!(retention().cut_to(891, 1_000, 1_000), None);
        assert_eq!(retention().cut_to(890, 1_000, 1_000), Some(900));
    }

    #[test]
    fn a_snapshot_on_its_way_holds_the_log_and_for_a_while_after() {
        let mut retention = retention();
        retention.transfer_began(B, 300);
        retention.transfer_began(C, 400);
        assert_eq!(retention.transfers(), 2);
        assert_eq!(retention.cut_to(1, 9_000, 9_000), Some(300));
        retention.transfer_ended(B, 50);
        retention.tick(349);
        assert_eq!(retention.cut_to(1, 9_000, 9_000), Some(300));
        retention.tick(350);
        assert_eq!(retention.cut_to(1, 9_000, 9_000), Some(400));
        assert_eq!(retention.transfers(), 1);
    }

    #[test]
    fn a_second_transfer_to_the_same_member_holds_anew() {
        let mut retention = retention();
        retention.transfer_began(B, 300);
        retention.transfer_ended(B, 0);
        retention.transfer_began(B, 500);
        retention.tick(100_000);
        assert_eq!(retention.cut_to(1, 9_000, 9_000), Some(500));
    }
}

//! The network between members: late, lossy, out of order, repeating, and cut in pieces, one direction at a time.
//!
//! A forwarded proposal is never repeated: the transports do not (trap 7), and Raft would take it twice.
//!
//! What it does not do: break a message in parts or change it.

use std::collections::BTreeSet;

use kvstore_core::replica::wire::Kind;
use kvstore_core::types::MemberId;

use crate::clock::{MS, Micros};
use crate::rng::Rng;

#[derive(Debug, Default)]
pub struct Network {
    /// (from, to): nothing gets through.
    cut: BTreeSet<(MemberId, MemberId)>,
    pub loss_per_mille: u64,
    pub repeat_per_mille: u64,
    pub late_per_mille: u64,
}

impl Network {
    /// The delays after which copies of a message arrive; none if it is lost.
    pub fn carry(&self, rng: &mut Rng, from: MemberId, to: MemberId, kind: Kind, size: usize) -> Vec<Micros> {
        let mut copies = Vec::new();
        let times = if kind != Kind::Propose && rng.chance(self.repeat_per_mille) { 2 } else { 1 };
        for _ in 0..times {
            if self.cut.contains(&(from, to)) || rng.chance(self.loss_per_mille) {
                continue;
            }
            let late = if rng.chance(self.late_per_mille) { rng.between(20 * MS, 1_500 * MS) } else { 0 };
            copies.push(rng.between(200, 3 * MS) + late + size as u64 / 100);
        }
        copies
    }

    pub fn reaches(&self, from: MemberId, to: MemberId) -> bool {
        !self.cut.contains(&(from, to))
    }

    pub fn cut(&mut self, from: MemberId, to: MemberId) {
        self.cut.insert((from, to));
    }

    pub fn heal(&mut self) {
        self.cut.clear();
    }

    pub fn make_perfect(&mut self) {
        *self = Network::default();
    }
}

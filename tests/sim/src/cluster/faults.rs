//! What breaks, when, and how it is mended.
//!
//! What it does not do: break the same thing in a way that no real cluster could: a crash keeps what was synced.

use kvstore_core::replica::Input;
use kvstore_core::types::MemberId;

use super::{Cluster, Event, Phase, TICK};
use crate::clock::MS;
use crate::rng::Rng;

impl Cluster {
    pub(super) fn restart(&mut self, id: MemberId) -> Result<(), String> {
        let seed = self.options.seed;
        let mut rng = Rng::new(self.rng.draw());
        let member = self.member(id);
        if member.running.is_some() {
            return Ok(());
        }
        member.start(&mut rng, seed).map_err(|error| format!("{id} does not start: {error}"))?;
        let life = member.life;
        self.clock.after(self.rng.clone().between(1, TICK), Event::Tick(id, life));
        self.clock.after(TICK, Event::CatchUp(id, life));
        self.effects(id)
    }

    pub(super) fn crash(&mut self, id: MemberId) -> Result<(), String> {
        let mut rng = Rng::new(self.rng.draw());
        let member = self.member(id);
        let Some(mut running) = member.running.take() else { return Ok(()) };
        self.note(|| format!("          {id} crashes"));
        self.report.crashes += 1;
        let lost = running.pending.drain(&kvstore_core::Error::Stopped);
        self.member(id).disk.crash(&mut rng)?;
        for (call, _) in lost {
            self.lose(call);
        }
        Ok(())
    }

    pub(super) fn fault(&mut self) -> Result<(), String> {
        if self.phase != Phase::Faults {
            return Ok(());
        }
        let id = MemberId(1 + self.rng.below(3));
        let other = MemberId(1 + (id.0 + self.rng.below(2)) % 3);
        match self.rng.below(11) {
            0..3 => {
                self.crash(id)?;
                let down = self.rng.between(10 * MS, 4_000 * MS);
                self.clock.after(down, Event::Restart(id));
            }
            3..5 => {
                for peer in (1..=3).map(MemberId).filter(|peer| *peer != id) {
                    self.network.cut(id, peer);
                    self.network.cut(peer, id);
                }
                self.note(|| format!("          {id} is cut off"));
            }
            5 => {
                self.network.cut(id, other);
                self.note(|| format!("          nothing gets from {id} to {other}"));
            }
            6..8 => {
                self.network.heal();
                self.note(|| "          the network is whole".into());
            }
            8 => {
                self.member(id).slow_disk = true;
                let takes = self.rng.between(100 * MS, 4_000 * MS);
                self.note(|| format!("          {id} has a slow disk"));
                self.clock.after(takes, Event::SlowDiskEnds(id));
            }
            9 => {
                let until = self.clock.now() + self.rng.between(50 * MS, 3_000 * MS);
                self.note(|| format!("          {id} is paused"));
                self.member(id).paused_until = until;
            }
            _ => self.step(id, Input::TransferLeader(other))?,
        }
        let next = self.rng.between(50 * MS, 1_500 * MS);
        self.clock.after(next, Event::Fault);
        Ok(())
    }

    pub(super) fn mend(&mut self) -> Result<(), String> {
        self.phase = Phase::Mended;
        self.mended_at = self.clock.now();
        self.network.make_perfect();
        for id in (1..=3).map(MemberId) {
            self.member(id).slow_disk = false;
            self.member(id).paused_until = 0;
            self.restart(id)?;
        }
        Ok(())
    }
}

//! The leader's leases and those who keep them: the simulator's twin of the shell's `driver/leases.rs`.
//!
//! Every member has a clock of its own origin, and a paused one finds that time has gone on without it.

use std::collections::BTreeMap;

use keelson_proto::etcdserverpb::{
    InternalRaftRequest, LeaseCheckpoint, LeaseCheckpointRequest, LeaseGrantRequest, LeaseRevokeRequest, RequestHeader,
};
use kvstore_core::lease::LeaseChange;
use kvstore_core::lease::expiry::{Expiry, ExpiryConfig};
use kvstore_core::lease::keepalive::{KeepAlives, Step};
use kvstore_core::replica::{Input, Leadership, Proposal, ReadId};
use kvstore_core::types::{LeaseId, MemberId, RequestId, Term, Timestamp};
use prost::Message;

use super::{Cluster, Event, Life, Phase};
use crate::Sabotage;
use crate::clock::MS;
use crate::keeper::{Beat, FIRST, Kept};

/// How long a keep-alive waits at a member.
const KEEP_ALIVE_TIMEOUT_MS: u64 = 7_000;

/// A proposal that no client of the workload waits for.
#[derive(Debug)]
pub enum Own {
    Grant {
        id: LeaseId,
        called_ms: u64,
    },
    Revoke(LeaseId),
    Reset(LeaseId),
    Checkpoint,
    /// A keeper's own, whose answer it does not wait for.
    Asked,
}

#[derive(Debug)]
pub struct Leases {
    expiry: Expiry,
    keep_alives: KeepAlives<Kept>,
    round: Option<(ReadId, Timestamp)>,
    confirm: bool,
    leadership: Leadership,
    /// The term whose leader this member is, until its table is read.
    awaited: Option<Term>,
    pub own: BTreeMap<RequestId, Own>,
}

impl Default for Leases {
    fn default() -> Self {
        let config = ExpiryConfig { checkpoint_interval_ms: Some(1_000), ..ExpiryConfig::new(100, 1_000) };
        Leases {
            expiry: Expiry::new(config),
            keep_alives: KeepAlives::default(),
            round: None,
            confirm: false,
            leadership: Leadership::default(),
            awaited: None,
            own: BTreeMap::new(),
        }
    }
}

impl Leases {
    pub fn tick(&mut self, now: Timestamp) {
        self.expiry.tick(now);
    }

    /// Whether it was ours.
    pub fn round_ready(&mut self, read: ReadId, now: Timestamp) -> bool {
        match self.round.take_if(|(ours, _)| *ours == read) {
            Some((_, asked)) => self.expiry.confirmed(asked, now),
            None => return false,
        }
        true
    }

    pub fn round_failed(&mut self, read: ReadId) -> bool {
        self.round.take_if(|(ours, _)| *ours == read).is_some()
    }

    pub fn not_proposed(&mut self, own: &Own) {
        match own {
            Own::Revoke(id) => self.expiry.revoke_failed(*id),
            Own::Reset(id) => self.keep_alives.reset_failed(*id),
            Own::Grant { .. } | Own::Checkpoint | Own::Asked => {}
        }
    }
}

impl Cluster {
    pub(super) fn now_ms(&self) -> u64 {
        self.clock.now() / MS
    }

    /// The member's own clock.
    pub(super) fn time_of(&self, id: MemberId) -> Timestamp {
        Timestamp(self.now_ms() + id.0 * 10_000)
    }

    pub(super) fn lease_leadership(&mut self, id: MemberId, new: Leadership) {
        let leases = &mut self.member(id).running.as_mut().expect("it has effects").leases;
        let before = std::mem::replace(&mut leases.leadership, new);
        if !new.is_leader {
            leases.expiry.demote();
        } else if !before.is_leader || before.term != new.term {
            leases.expiry.demote();
            leases.awaited = Some(new.term);
        }
    }

    /// Once something of the term is applied, the table holds everything that was committed before.
    pub(super) fn promote_leases(&mut self, id: MemberId) {
        let now = self.time_of(id);
        let running = self.member(id).running.as_mut().expect("its apply thread runs");
        let applied_term = running.published.facts.applied_term;
        let Some(term) = running.leases.awaited.take_if(|term| *term <= applied_term) else { return };
        if running.leases.leadership.is_leader && running.leases.leadership.term == term {
            running.leases.expiry.promote(now, term, running.store.leases());
        }
    }

    pub(super) fn leases_applied(&mut self, id: MemberId, changes: &[LeaseChange]) {
        let (now, now_ms) = (self.time_of(id), self.now_ms());
        for change in changes {
            if let LeaseChange::Revoked { id } = change {
                self.keepers.gone(*id, now_ms);
            }
            let leases = &mut self.member(id).running.as_mut().expect("it applies").leases;
            leases.expiry.change(now, change);
            leases.keep_alives.changed(change.id());
        }
    }

    /// Answers what can be answered and proposes what is due, bound to the term.
    pub(super) fn drive_leases(&mut self, id: MemberId) -> Result<(), String> {
        let (now, now_ms) = (self.time_of(id), self.now_ms());
        let Some(running) = &mut self.member(id).running else { return Ok(()) };
        let (committed, applied) = (running.replica.status().committed, running.published.facts.applied_index);
        let leases = &mut running.leases;
        let (mut answers, mut wanted) = (Vec::new(), Vec::new());
        for step in leases.keep_alives.drive(now, &mut leases.expiry, committed, applied) {
            match step {
                Step::Answer(kept, answer) => answers.push((kept, answer)),
                Step::Reset { term, id } => wanted.push((term, checkpoint(vec![(id, 0)]), Own::Reset(id))),
                Step::Confirm => leases.confirm = true,
            }
        }
        if let Some(due) = leases.expiry.due(now) {
            wanted.extend(due.items.into_iter().map(|id| (due.term, revoke(id), Own::Revoke(id))));
        }
        if let Some(due) = leases.expiry.checkpoints(now) {
            let items = due.items.iter().map(|checkpoint| (checkpoint.id, checkpoint.remaining_ttl_s)).collect();
            wanted.push((due.term, checkpoint(items), Own::Checkpoint));
        }
        let asks = leases.round.is_none() && (leases.confirm || leases.expiry.in_doubt(now));
        for (kept, answer) in answers {
            self.keepers.kept(kept, &answer, now_ms);
        }
        for (term, request, own) in wanted {
            let proposals = vec![self.own_proposal(id, request, own)];
            self.step(id, Input::ProposeAsLeader { term, proposals })?;
        }
        if asks && let Some(running) = &mut self.member(id).running {
            running.rounds += 1;
            let round = ReadId(running.rounds);
            (running.leases.round, running.leases.confirm) = (Some((round, now)), false);
            self.step(id, Input::Read(round))?;
        }
        Ok(())
    }

    fn own_proposal(&mut self, id: MemberId, mut request: InternalRaftRequest, own: Own) -> Proposal {
        let member = self.member(id);
        let number = member.next_request();
        request.header = Some(RequestHeader { id: number.0, ..RequestHeader::default() });
        member.running.as_mut().expect("it was asked").leases.own.insert(number, own);
        Proposal { id: number, data: request.encode_to_vec().into() }
    }

    /// The outcome of a proposal of our own.
    pub(super) fn own_done(&mut self, id: MemberId, request: RequestId, done: bool) {
        let leases = &mut self.member(id).running.as_mut().expect("it applies").leases;
        if let Some(Own::Grant { id, called_ms }) = leases.own.remove(&request)
            && done
        {
            self.keepers.promised(id, called_ms);
        }
    }

    /// A keeper does its next thing.
    pub(super) fn keep(&mut self, keeper: u64) -> Result<(), String> {
        if self.phase == Phase::Quiet {
            return Ok(());
        }
        let pause = self.rng.between(100 * MS, 1_200 * MS);
        self.clock.after(pause, Event::Keeper(keeper));
        let id = self.who_leads();
        let (now_ms, delay) = (self.now_ms(), self.rng.between(MS, 20 * MS));
        let life = self.member(id).life;
        if self.member(id).running.is_none() {
            return Ok(());
        }
        match self.keepers.beat(keeper) {
            Beat::Wait => Ok(()),
            Beat::Keep(lease) if self.rng.chance(40) => {
                self.keepers.revoked(lease, now_ms);
                let proposal = self.own_proposal(id, revoke(lease), Own::Asked);
                self.step(id, Input::Propose(vec![proposal]))
            }
            Beat::Keep(lease) => {
                let kept = Kept { id: lease, called_ms: now_ms };
                self.clock.after(delay, Event::KeepAlive { to: id, life, kept });
                Ok(())
            }
            Beat::Grant => {
                let (ttl, beats) = (2 + self.rng.below(5) as i64, self.rng.below(12));
                let lease = self.keepers.draw(keeper, ttl, beats);
                let grant = LeaseGrantRequest { id: lease.0, ttl };
                let request = InternalRaftRequest { lease_grant: Some(grant), ..InternalRaftRequest::default() };
                let proposal = self.own_proposal(id, request, Own::Grant { id: lease, called_ms: now_ms });
                self.step(id, Input::Propose(vec![proposal]))
            }
        }
    }

    pub(super) fn keep_alive(&mut self, to: MemberId, life: Life, kept: Kept) -> Result<(), String> {
        let now = self.time_of(to);
        let lies = self.options.sabotage == Some(Sabotage::KeepWithoutLeading);
        let Some(member) = self.alive(to, life) else { return Ok(()) };
        let running = member.running.as_mut().expect("it is alive");
        if lies && running.store.leases().iter().any(|lease| lease.id == kept.id) {
            let now_ms = self.now_ms();
            self.keepers.kept(kept, &Ok(1), now_ms);
            return Ok(());
        }
        running.leases.keep_alives.ask(kept.id, kept, now.after_ms(KEEP_ALIVE_TIMEOUT_MS));
        self.drive_leases(to)
    }

    /// Mostly one that believes to lead, of which there may be two.
    fn who_leads(&mut self) -> MemberId {
        let any = MemberId(1 + self.rng.below(3));
        let leads = |member: &&crate::member::Member| {
            member.running.as_ref().is_some_and(|running| running.leases.leadership.is_leader)
        };
        let leaders: Vec<MemberId> = self.members.iter().filter(leads).map(|member| member.id).collect();
        if leaders.is_empty() || self.rng.chance(150) { any } else { *self.rng.pick(&leaders) }
    }

    /// Nobody keeps any lease any more, and all have ended.
    pub(super) fn leases_ended(&self) -> bool {
        let ended = |member: &crate::member::Member| {
            member.running.as_ref().is_some_and(|running| running.store.leases().iter().all(|l| l.id.0 < FIRST))
        };
        self.members.iter().all(ended)
    }
}

fn revoke(id: LeaseId) -> InternalRaftRequest {
    InternalRaftRequest { lease_revoke: Some(LeaseRevokeRequest { id: id.0 }), ..InternalRaftRequest::default() }
}

fn checkpoint(items: Vec<(LeaseId, i64)>) -> InternalRaftRequest {
    let checkpoints =
        items.into_iter().map(|(id, remaining_ttl)| LeaseCheckpoint { id: id.0, remaining_ttl }).collect();
    InternalRaftRequest {
        lease_checkpoint: Some(LeaseCheckpointRequest { checkpoints }),
        ..InternalRaftRequest::default()
    }
}

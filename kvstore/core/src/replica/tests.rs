//! Replicas on a desk: every write, message and apply is moved by hand, so that a schedule can be laid out exactly.

mod script;

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::*;
use crate::types::{Entry, RequestId};

const A: MemberId = MemberId(1);
const B: MemberId = MemberId(2);
const C: MemberId = MemberId(3);
const FOUNDED: Position = Position { index: 1, term: 1 };

/// What is on one member's disks.
#[derive(Clone)]
struct Disk {
    hard_state: Option<Bytes>,
    start: Position,
    log: BTreeMap<Index, LogEntry>,
    applied: Position,
    installed: Option<Position>,
    voters: Vec<MemberId>,
}

impl Disk {
    fn founded(voters: &[MemberId]) -> Disk {
        Disk {
            hard_state: None,
            start: Position::default(),
            log: BTreeMap::new(),
            applied: FOUNDED,
            installed: Some(FOUNDED),
            voters: voters.to_vec(),
        }
    }

    fn write(&mut self, write: &LogWrite) {
        if let Some(at) = write.reset {
            self.start = at;
            self.log.clear();
        }
        if let Some(from) = write.truncate_from {
            self.log.split_off(&from);
        }
        for entry in &write.entries {
            self.log.insert(entry.index, entry.clone());
        }
        if let Some(hard_state) = &write.hard_state {
            self.hard_state = Some(hard_state.clone());
        }
        if let Some(at) = write.cut_to {
            self.start = at;
            self.log = self.log.split_off(&(at.index + 1));
        }
    }

    fn boot(&self) -> Boot {
        self.boot_with_tail(Index::MAX)
    }

    /// Only so many entries below what is applied are handed over; of the others only their terms.
    fn boot_with_tail(&self, below: Index) -> Boot {
        let first = (self.applied.index + 1).saturating_sub(below);
        let mut terms: Vec<(Index, Term)> = Vec::new();
        for entry in self.log.values().take_while(|entry| entry.index < first) {
            if terms.last().is_none_or(|(_, term)| *term != entry.term) {
                terms.push((entry.index, entry.term));
            }
        }
        Boot {
            nonce: 7,
            hard_state: self.hard_state.clone(),
            log_start: self.start,
            terms,
            entries: self.log.range(first..).map(|(_, entry)| entry.clone()).collect(),
            applied: self.applied,
            installed: self.installed,
            conf_state: wire::conf_state(&self.voters, &[]),
        }
    }
}

struct Member {
    id: MemberId,
    replica: Replica,
    disk: Disk,
    /// Writes not on disk yet; they go there at once unless `slow_disk`.
    writes: VecDeque<LogWrite>,
    slow_disk: bool,
    /// Entries not applied yet; applied at once unless `slow_apply`.
    to_apply: VecDeque<Entry>,
    slow_apply: bool,
    applied: Vec<(Index, String)>,
    reads: Vec<(ReadId, Index)>,
    reads_failed: Vec<(ReadId, Error)>,
    failed: Vec<(RequestId, Error)>,
    builds: Vec<SnapshotBuild>,
    installs: Vec<Install>,
    discards: Vec<SnapshotTicket>,
    fetches: usize,
    leadership: Leadership,
}

struct Desk {
    members: BTreeMap<MemberId, Member>,
    wires: VecDeque<Outgoing>,
    cut_off: Vec<MemberId>,
}

fn config(id: MemberId) -> ReplicaConfig {
    ReplicaConfig { catch_up_entries: 5, cut_step: 2, ..ReplicaConfig::new(id, 100, 1_000) }
}

fn proposal(id: u64, data: &str) -> Proposal {
    Proposal { id: RequestId(id), data: Bytes::copy_from_slice(data.as_bytes()) }
}

impl Member {
    fn start(id: MemberId, disk: Disk, config: ReplicaConfig) -> Member {
        let replica = Replica::new(config, disk.boot(), 42).unwrap();
        Member {
            id,
            replica,
            disk,
            writes: VecDeque::new(),
            slow_disk: false,
            to_apply: VecDeque::new(),
            slow_apply: false,
            applied: Vec::new(),
            reads: Vec::new(),
            reads_failed: Vec::new(),
            failed: Vec::new(),
            builds: Vec::new(),
            installs: Vec::new(),
            discards: Vec::new(),
            fetches: 0,
            leadership: Leadership::default(),
        }
    }

    fn step(&mut self, input: Input) {
        self.replica.step(input).unwrap();
    }

    /// Takes all effects; does the disk's and the applier's work unless they are slow. Returns what is to be sent.
    fn run(&mut self) -> Vec<Outgoing> {
        let mut out = Vec::new();
        while let Some(effects) = self.replica.effects() {
            out.extend(effects.send);
            self.writes.extend(effects.log_writes);
            self.to_apply.extend(effects.committed);
            self.reads.extend(effects.reads_ready);
            self.reads_failed.extend(effects.reads_failed);
            self.failed.extend(effects.failed);
            self.builds.extend(effects.build_snapshots);
            self.installs.extend(effects.install_snapshot);
            self.discards.extend(effects.discard_snapshots);
            if let Some(leadership) = effects.leadership {
                self.leadership = leadership;
            }
            for fetch in effects.fetch {
                self.fetches += 1;
                let entries =
                    self.disk.log.range(fetch.from..fetch.to).map(|(_, entry)| entry.clone()).take(2).collect();
                self.step(Input::EntriesFetched { id: fetch.id, entries });
            }
            if !self.slow_disk {
                self.flush();
            }
            if !self.slow_apply {
                self.apply();
            }
        }
        out
    }

    /// Makes every waiting write durable, and says so once.
    fn flush(&mut self) {
        let mut last = None;
        while let Some(write) = self.writes.pop_front() {
            self.disk.write(&write);
            last = Some(write.number);
        }
        if let Some(number) = last {
            self.step(Input::Persisted { number });
        }
    }

    fn apply(&mut self) {
        let mut last = None;
        while let Some(entry) = self.to_apply.pop_front() {
            assert_eq!(entry.index, self.applied_to() + 1, "applied in order, without a gap");
            if !entry.data.is_empty() {
                self.applied.push((entry.index, String::from_utf8(entry.data.to_vec()).unwrap()));
            }
            self.disk.applied = Position { index: entry.index, term: entry.term };
            last = Some(entry.index);
        }
        if let Some(index) = last {
            self.step(Input::Applied { index, durable: index });
        }
    }

    fn applied_to(&self) -> Index {
        self.disk.applied.index
    }

    fn texts(&self) -> Vec<&str> {
        self.applied.iter().map(|(_, text)| text.as_str()).collect()
    }
}

impl Desk {
    fn new(ids: &[MemberId]) -> Desk {
        Desk::with(ids, config)
    }

    fn with(ids: &[MemberId], config: impl Fn(MemberId) -> ReplicaConfig) -> Desk {
        let members = ids.iter().map(|id| (*id, Member::start(*id, Disk::founded(ids), config(*id)))).collect();
        Desk { members, wires: VecDeque::new(), cut_off: Vec::new() }
    }

    fn at(&mut self, id: MemberId) -> &mut Member {
        self.members.get_mut(&id).unwrap()
    }

    /// Until nothing moves any more.
    fn settle(&mut self) {
        loop {
            let mut moved = false;
            for (id, member) in &mut self.members {
                let out = member.run();
                moved |= !out.is_empty();
                if !self.cut_off.contains(id) {
                    self.wires.extend(out);
                }
            }
            while let Some(message) = self.wires.pop_front() {
                if !self.cut_off.contains(&message.to)
                    && let Some(member) = self.members.get_mut(&message.to)
                {
                    member.step(Input::Message(message.message));
                }
            }
            if !moved {
                return;
            }
        }
    }

    fn tick(&mut self, times: usize) {
        for _ in 0..times {
            for member in self.members.values_mut() {
                member.step(Input::Tick);
            }
            self.settle();
        }
    }

    /// Waits for any leader among those that are not cut off, then has it hand over to this one.
    fn elect(&mut self, id: MemberId) {
        for _ in 0..200 {
            let leader = self
                .members
                .values()
                .find(|member| !self.cut_off.contains(&member.id) && member.replica.status().leadership.is_leader);
            match leader.map(|member| member.id) {
                Some(leader) if leader == id => return,
                Some(leader) => self.at(leader).step(Input::TransferLeader(id)),
                None => {}
            }
            self.settle();
            if !self.at(id).leadership.is_leader {
                self.tick(1);
            }
        }
        panic!("{id} was not elected");
    }

    fn propose(&mut self, at: MemberId, id: u64, data: &str) {
        self.at(at).step(Input::Propose(vec![proposal(id, data)]));
        self.settle();
    }

    fn restart(&mut self, id: MemberId) {
        let disk = self.at(id).disk.clone();
        let applied = self.at(id).applied.clone();
        let mut member = Member::start(id, disk, config(id));
        member.applied = applied;
        self.members.insert(id, member);
    }
}

#[test]
fn a_single_voter_leads_writes_and_reads() {
    let mut desk = Desk::new(&[A]);
    desk.elect(A);
    desk.propose(A, 1, "x");
    desk.at(A).step(Input::Read(ReadId(9)));
    desk.settle();
    let last = desk.at(A).replica.status().last_index;
    assert_eq!(desk.at(A).texts(), ["x"]);
    assert_eq!(desk.at(A).reads, vec![(ReadId(9), last)]);
}

#[test]
fn trap_2_founders_begin_at_index_1_of_term_1() {
    let mut desk = Desk::new(&[A, B, C]);
    let write = desk.at(A).replica.effects().unwrap().log_writes.remove(0);
    assert_eq!(write.reset, Some(FOUNDED));
    assert!(write.must_sync);
    assert_eq!(wire::hard_state(&write.hard_state.unwrap()).unwrap(), (1, MemberId(0), 1));
    let status = desk.at(A).replica.status();
    assert_eq!((status.first_index, status.last_index, status.applied, status.committed), (2, 1, 1, 1));
}

#[test]
fn three_members_replicate_from_the_leader_and_through_a_follower() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(B);
    desk.propose(B, 1, "from the leader");
    desk.propose(C, 2, "through a follower");
    desk.tick(2);
    for id in [A, B, C] {
        assert_eq!(desk.at(id).texts(), ["from the leader", "through a follower"]);
    }
    assert_eq!(desk.at(C).leadership.leader, Some(B));
}

#[test]
fn a_batch_of_proposals_is_one_write() {
    let mut desk = Desk::new(&[A]);
    desk.elect(A);
    desk.at(A).slow_disk = true;
    desk.at(A).step(Input::Propose(vec![proposal(1, "a"), proposal(2, "b")]));
    desk.at(A).step(Input::Propose(vec![proposal(3, "c")]));
    desk.settle();
    let writes = &desk.at(A).writes;
    assert_eq!(writes.len(), 1);
    assert_eq!(writes[0].entries.len(), 3);
    assert!(writes[0].must_sync);
    assert!(desk.at(A).texts().is_empty());
    desk.at(A).flush();
    desk.settle();
    assert_eq!(desk.at(A).texts(), ["a", "b", "c"]);
}

#[test]
fn a_follower_acknowledges_only_what_is_on_its_disk() {
    let mut desk = Desk::new(&[A, B]);
    desk.elect(A);
    desk.at(B).slow_disk = true;
    desk.propose(A, 1, "x");
    desk.tick(3);
    assert!(desk.at(A).texts().is_empty(), "committed without B's disk");
    // Heartbeats go on all the while: they promise nothing.
    desk.tick(30);
    assert!(desk.at(A).leadership.is_leader);
    desk.at(B).flush();
    desk.settle();
    assert_eq!(desk.at(A).texts(), ["x"]);
}

#[test]
fn a_vote_is_given_only_when_it_is_on_disk() {
    let mut desk = Desk::new(&[A, B]);
    desk.at(B).run();
    desk.at(B).slow_disk = true;
    while desk.at(B).writes.is_empty() {
        desk.at(A).step(Input::Tick);
        desk.settle();
    }
    assert!(!desk.at(A).leadership.is_leader);
    desk.at(B).flush();
    desk.settle();
    assert!(desk.at(A).leadership.is_leader);
}

#[test]
fn a_candidate_asks_for_votes_only_when_its_own_is_on_disk() {
    let mut desk = Desk::new(&[A, B]);
    desk.at(A).run();
    desk.at(A).slow_disk = true;
    while desk.at(A).writes.is_empty() {
        desk.at(A).step(Input::Tick);
        desk.settle();
    }
    desk.settle();
    assert!(!desk.at(A).leadership.is_leader);
    assert!(desk.at(B).writes.is_empty(), "nobody was asked yet");
    desk.at(A).flush();
    desk.settle();
    assert!(desk.at(A).leadership.is_leader);
}

#[test]
fn elections_are_the_same_in_every_run() {
    let run = || {
        let mut desk = Desk::new(&[A, B, C]);
        for tick in 0.. {
            desk.tick(1);
            if let Some(leader) = desk.at(A).leadership.leader {
                return (tick, leader);
            }
        }
        unreachable!()
    };
    assert_eq!(run(), run());
}

#[test]
fn a_leader_without_a_quorum_steps_down() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    desk.cut_off = vec![A];
    desk.tick(60);
    assert_eq!(desk.at(A).leadership.leader, None);
    assert!(desk.at(B).leadership.is_leader || desk.at(C).leadership.is_leader);
    desk.cut_off.clear();
    desk.tick(5);
    let leader = desk.at(B).leadership.leader;
    assert_eq!(desk.at(A).leadership.leader, leader);
}

#[test]
fn reads_that_come_together_share_a_round_and_followers_forward() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    desk.propose(A, 1, "x");
    desk.tick(2);
    let committed = desk.at(A).replica.status().committed;
    for id in [A, B] {
        desk.at(id).step(Input::Read(ReadId(1)));
        desk.at(id).step(Input::Read(ReadId(2)));
        desk.settle();
        assert_eq!(desk.at(id).reads, vec![(ReadId(1), committed), (ReadId(2), committed)]);
    }
}

#[test]
fn a_read_on_a_cut_off_leader_is_never_answered() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    desk.cut_off = vec![A];
    desk.at(A).step(Input::Read(ReadId(1)));
    desk.tick(80);
    assert!(desk.at(A).reads.is_empty());
    // It hears of the new leader: as in etcd, the client is told.
    desk.at(A).step(Input::Read(ReadId(2)));
    desk.cut_off.clear();
    desk.tick(10);
    assert!(desk.at(A).reads.iter().any(|(read, _)| *read == ReadId(2)));
}

#[test]
fn a_lost_read_is_asked_again() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    desk.at(B).step(Input::Read(ReadId(1)));
    let lost = desk.at(B).run();
    assert_eq!(lost.iter().filter(|message| message.kind == wire::Kind::Read).count(), 1);
    desk.tick(4);
    assert!(desk.at(B).reads.is_empty());
    desk.tick(1);
    assert_eq!(desk.at(B).reads.len(), 1);
}

#[test]
fn reads_wait_for_the_leaders_first_commit_in_its_term() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    desk.propose(A, 1, "x");
    desk.at(B).slow_disk = true;
    desk.at(C).slow_disk = true;
    desk.cut_off = vec![A];
    for _ in 0..60 {
        for id in [B, C] {
            desk.at(id).step(Input::Tick);
        }
        desk.settle();
        // Votes reach the disk; of the leader's first entry, only its own copy may.
        let leader = [B, C].into_iter().find(|id| desk.at(*id).leadership.is_leader);
        if let Some(leader) = leader {
            desk.at(leader).step(Input::Read(ReadId(1)));
            desk.settle();
            assert!(desk.at(leader).reads.is_empty());
            for id in [B, C] {
                desk.at(id).slow_disk = false;
                desk.at(id).flush();
            }
            desk.settle();
            let committed = desk.at(leader).replica.status().committed;
            assert_eq!(desk.at(leader).reads, vec![(ReadId(1), committed)]);
            return;
        }
        for id in [B, C] {
            desk.at(id).flush();
        }
        desk.settle();
    }
    panic!("no leader");
}

#[test]
fn trap_6_a_bound_proposal_is_never_forwarded() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    let term = desk.at(A).leadership.term;
    desk.at(B).step(Input::ProposeAsLeader { term, proposals: vec![proposal(1, "revoke")] });
    desk.at(A).step(Input::ProposeAsLeader { term: term - 1, proposals: vec![proposal(2, "revoke")] });
    desk.at(A).step(Input::ProposeAsLeader { term, proposals: vec![proposal(3, "revoke")] });
    desk.settle();
    assert_eq!(desk.at(B).failed, vec![(RequestId(1), Error::NotLeader)]);
    assert_eq!(desk.at(A).failed, vec![(RequestId(2), Error::NotLeader)]);
    assert_eq!(desk.at(A).texts(), ["revoke"]);
}

#[test]
fn trap_7_a_proposal_waits_for_a_leader_and_is_handed_over_once() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.propose(A, 1, "early");
    assert!(desk.at(A).failed.is_empty());
    desk.elect(B);
    desk.tick(3);
    assert_eq!(desk.at(A).texts(), ["early"]);
    // Forwarded and lost: it is not sent again, whatever happens.
    desk.at(A).step(Input::Propose(vec![proposal(2, "lost")]));
    assert!(desk.at(A).run().iter().any(|message| message.kind == wire::Kind::Propose));
    desk.tick(100);
    desk.elect(C);
    desk.tick(5);
    assert_eq!(desk.at(A).texts(), ["early"]);
}

#[test]
fn a_proposal_that_finds_no_leader_fails_in_the_end() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.cut_off = vec![A, B, C];
    desk.propose(A, 1, "x");
    let ticks = config(A).hold_ticks as usize;
    desk.tick(ticks - 1);
    assert!(desk.at(A).failed.is_empty());
    desk.tick(1);
    assert_eq!(desk.at(A).failed, vec![(RequestId(1), Error::ContextDeadlineExceeded)]);
}

#[test]
fn leadership_can_be_handed_over() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    desk.at(A).step(Input::TransferLeader(C));
    desk.settle();
    desk.tick(1);
    assert!(desk.at(C).leadership.is_leader);
    assert_eq!(desk.at(A).leadership.leader, Some(C));
}

#[test]
fn a_restart_goes_on_from_the_log() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    for n in 1..=3 {
        desk.propose(A, n, &n.to_string());
    }
    desk.tick(2);
    desk.restart(A);
    desk.restart(B);
    desk.elect(C);
    desk.propose(C, 9, "after");
    desk.tick(3);
    for id in [A, B, C] {
        assert_eq!(desk.at(id).texts(), ["1", "2", "3", "after"], "{id}");
    }
}

#[test]
fn a_restart_with_applied_ahead_of_the_commit_raises_the_commit() {
    let mut desk = Desk::new(&[A]);
    desk.elect(A);
    desk.propose(A, 1, "x");
    let disk = &mut desk.at(A).disk;
    // The commit was written without a sync, and the crash took it.
    let raw = wire::RawHardState { commit: 1, ..wire::decode_hard_state(disk.hard_state.as_ref().unwrap()).unwrap() };
    disk.hard_state = Some(wire::encode_hard_state(&raw));
    let replica = Replica::new(config(A), disk.boot(), 42).unwrap();
    assert_eq!(replica.status().committed, disk.applied.index);
}

#[test]
fn trap_3_a_log_behind_the_state_is_refused_unless_installed_there() {
    let mut desk = Desk::new(&[A]);
    desk.elect(A);
    for n in 1..=5 {
        desk.propose(A, n, "x");
    }
    let mut disk = desk.at(A).disk.clone();
    let last = disk.applied.index;
    disk.log.remove(&last);
    let raw = wire::RawHardState { commit: 1, ..wire::decode_hard_state(disk.hard_state.as_ref().unwrap()).unwrap() };
    disk.hard_state = Some(wire::encode_hard_state(&raw));
    let refused = Replica::new(config(A), disk.boot(), 42);
    assert!(matches!(refused, Err(Fatal::Damaged { table: "log", .. })));
    // Installed at another index does not count either.
    disk.installed = Some(Position { index: last - 1, ..disk.applied });
    assert!(Replica::new(config(A), disk.boot(), 42).is_err());
    disk.installed = Some(disk.applied);
    let replica = Replica::new(config(A), disk.boot(), 42).unwrap();
    assert_eq!(replica.status().last_index, last);
}

#[test]
fn trap_4_a_crash_between_install_and_log_reset_drops_the_foreign_tail() {
    let mut disk = Disk::founded(&[A, B, C]);
    disk.start = FOUNDED;
    for index in 2..=9 {
        disk.log.insert(index, wire::log_entry(index, 2, b"old"));
    }
    let raw = wire::RawHardState { term: 2, vote: 3, commit: 3 };
    disk.hard_state = Some(wire::encode_hard_state(&raw));
    disk.applied = Position { index: 5, term: 4 };
    disk.installed = Some(disk.applied);
    let mut replica = Replica::new(config(A), disk.boot(), 42).unwrap();
    let write = replica.effects().unwrap().log_writes.remove(0);
    assert_eq!(write.reset, Some(disk.applied));
    assert_eq!(wire::hard_state(&write.hard_state.unwrap()).unwrap(), (4, MemberId(0), 5));
    assert_eq!(replica.status().last_index, 5);
    // The same log where the state was not installed there is damage.
    disk.installed = Some(FOUNDED);
    assert!(Replica::new(config(A), disk.boot(), 42).is_err());
}

#[test]
fn trap_4_a_log_that_agrees_with_the_install_keeps_its_tail() {
    let mut disk = Disk::founded(&[A, B, C]);
    disk.start = FOUNDED;
    for index in 2..=9 {
        disk.log.insert(index, wire::log_entry(index, 2, b"same"));
    }
    disk.hard_state = Some(wire::encode_hard_state(&wire::RawHardState { term: 2, vote: 3, commit: 3 }));
    disk.applied = Position { index: 5, term: 2 };
    disk.installed = Some(disk.applied);
    let mut replica = Replica::new(config(A), disk.boot(), 42).unwrap();
    assert_eq!(replica.status().last_index, 9);
    assert_eq!(replica.status().committed, 5);
    assert!(replica.effects().is_none_or(|effects| effects.log_writes.iter().all(|write| write.reset.is_none())));
}

/// A and B go on without C until A's log no longer holds what C needs.
fn lagging() -> Desk {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    desk.propose(A, 1, "first");
    desk.tick(2);
    desk.cut_off = vec![C];
    for n in 2..30 {
        desk.propose(A, n, &n.to_string());
    }
    assert!(desk.at(A).disk.start.index > desk.at(C).applied_to(), "the log was cut");
    desk.cut_off.clear();
    for _ in 0..200 {
        desk.tick(1);
        if !desk.at(A).builds.is_empty() {
            return desk;
        }
    }
    panic!("no snapshot was asked for");
}

fn received(build: &SnapshotBuild, voters: &[MemberId]) -> Input {
    let message = wire::with_snapshot(&build.message, build.at, &wire::conf_state(voters, &[])).unwrap();
    Input::SnapshotReceived { ticket: SnapshotTicket(1), message }
}

/// What the shell does for an install, up to the rename; then the replica is told.
fn install(member: &mut Member) {
    let install = member.installs.pop().unwrap();
    member.to_apply.clear();
    member.disk.applied = install.at;
    member.disk.installed = Some(install.at);
    member.step(Input::SnapshotInstalled { ticket: install.ticket });
}

#[test]
fn a_snapshot_brings_a_lagging_member_back() {
    let mut desk = lagging();
    let build = desk.at(A).builds.remove(0);
    assert_eq!(build.to, C);
    let held = desk.at(A).disk.start;
    // While it is on its way the log stays.
    for n in 30..60 {
        desk.propose(A, n, "more");
    }
    assert!(desk.at(A).disk.start.index <= build.at.index);
    assert!(desk.at(A).disk.start >= held);

    desk.at(C).step(received(&build, &[A, B, C]));
    desk.settle();
    assert_eq!(desk.at(C).installs, vec![Install { ticket: SnapshotTicket(1), at: build.at }]);
    assert!(desk.at(C).writes.is_empty());
    assert_eq!(
        desk.at(C).disk.log.len() as u64,
        desk.at(C).disk.applied.index - 1,
        "the log is not touched before the rename"
    );
    install(desk.at(C));
    desk.settle();
    assert!(desk.at(C).disk.start >= build.at);
    desk.at(A).step(Input::SnapshotSent { to: C, ok: true });
    desk.tick(5);
    let last = desk.at(A).replica.status().last_index;
    assert_eq!(desk.at(C).applied_to(), last);
    assert!(desk.at(A).builds.is_empty(), "one snapshot was enough");
}

#[test]
fn a_failed_snapshot_is_tried_again() {
    let mut desk = lagging();
    desk.at(A).builds.clear();
    desk.tick(50);
    assert!(desk.at(A).builds.is_empty(), "one transfer at a time");
    desk.at(A).step(Input::SnapshotSent { to: C, ok: false });
    desk.tick(5);
    assert_eq!(desk.at(A).builds.len(), 1);
}

#[test]
fn trap_4_a_finished_snapshot_that_raft_refuses_is_discarded() {
    let mut desk = lagging();
    let build = desk.at(A).builds.remove(0);
    let input = received(&build, &[A, B, C]);
    desk.at(C).step(input.clone());
    desk.settle();
    install(desk.at(C));
    desk.settle();
    desk.at(A).step(Input::SnapshotSent { to: C, ok: true });
    desk.tick(5);
    let applied = desk.at(C).applied_to();
    assert!(applied >= build.at.index);
    // It comes a second time, late.
    desk.at(C).step(input);
    desk.settle();
    assert_eq!(desk.at(C).discards, vec![SnapshotTicket(1)]);
    assert!(desk.at(C).installs.is_empty());
    assert_eq!(desk.at(C).applied_to(), applied);
}

#[test]
fn a_second_snapshot_during_an_install_is_discarded() {
    let mut desk = lagging();
    let build = desk.at(A).builds.remove(0);
    desk.at(C).step(received(&build, &[A, B, C]));
    desk.settle();
    let Input::SnapshotReceived { message, .. } = received(&build, &[A, B, C]) else { unreachable!() };
    desk.at(C).step(Input::SnapshotReceived { ticket: SnapshotTicket(2), message });
    desk.settle();
    assert_eq!(desk.at(C).discards, vec![SnapshotTicket(2)]);
    install(desk.at(C));
    desk.settle();
    assert_eq!(desk.at(C).disk.start, build.at);
}

#[test]
fn a_member_that_installs_does_not_campaign() {
    let mut desk = lagging();
    let build = desk.at(A).builds.remove(0);
    desk.at(C).step(received(&build, &[A, B, C]));
    desk.settle();
    // raft-rs would look for entries that the snapshot replaced, and panic.
    desk.cut_off = vec![C];
    desk.tick(100);
    install(desk.at(C));
    desk.at(C).slow_disk = true;
    desk.tick(100);
    desk.at(C).flush();
    desk.cut_off.clear();
    desk.tick(60);
    let leader = desk.at(A).leadership.leader;
    assert_eq!(desk.at(C).leadership.leader, leader);
}

/// Found by the simulator: a flush that ends just then reports the snapshot's index, and raft-rs panicked.
#[test]
fn applied_may_be_reported_between_an_install_and_the_logs_reset() {
    let mut desk = lagging();
    let build = desk.at(A).builds.remove(0);
    desk.at(C).step(received(&build, &[A, B, C]));
    desk.settle();
    desk.at(C).slow_disk = true;
    install(desk.at(C));
    desk.at(C).step(Input::Applied { index: build.at.index, durable: build.at.index });
    desk.settle();
    desk.at(C).flush();
    desk.settle();
    assert_eq!(desk.at(C).replica.status().applied, build.at.index);
}

#[test]
fn entries_after_a_snapshot_wait_for_the_install() {
    let mut desk = lagging();
    let build = desk.at(A).builds.remove(0);
    desk.at(C).step(received(&build, &[A, B, C]));
    desk.at(A).step(Input::SnapshotSent { to: C, ok: true });
    desk.settle();
    desk.propose(A, 100, "later");
    desk.tick(3);
    assert!(desk.at(C).writes.is_empty());
    install(desk.at(C));
    desk.settle();
    desk.tick(3);
    assert_eq!(desk.at(C).disk.start, build.at);
    assert_eq!(desk.at(C).texts().last(), Some(&"later"));
}

#[test]
fn old_entries_are_fetched_from_the_log() {
    let mut desk = Desk::with(&[A, B, C], |id| ReplicaConfig {
        tail_bytes: 64,
        catch_up_entries: 1_000,
        max_size_per_msg: 50,
        ..config(id)
    });
    desk.elect(A);
    desk.cut_off = vec![C];
    for n in 1..=40 {
        desk.propose(A, n, &format!("entry number {n}"));
    }
    assert_eq!(desk.at(A).fetches, 0);
    desk.cut_off.clear();
    desk.tick(60);
    assert!(desk.at(A).fetches > 5, "{} fetches", desk.at(A).fetches);
    assert!(desk.at(A).builds.is_empty());
    assert_eq!(desk.at(C).texts().len(), 40);
}

#[test]
fn a_start_with_a_short_tail_knows_all_terms() {
    let mut desk = Desk::with(&[A, B, C], |id| ReplicaConfig { catch_up_entries: 1_000, ..config(id) });
    desk.elect(A);
    desk.cut_off = vec![C];
    for n in 1..=5 {
        desk.propose(A, n, "of the first term");
    }
    desk.elect(B);
    for n in 6..=9 {
        desk.propose(B, n, "of the second term");
    }
    desk.tick(2);
    let disk = desk.at(B).disk.clone();
    let boot = disk.boot_with_tail(2);
    assert!(boot.terms.len() >= 2 && boot.entries.len() < 5);
    let mut member = Member::start(B, disk, config(B));
    member.replica = Replica::new(ReplicaConfig { catch_up_entries: 1_000, ..config(B) }, boot, 42).unwrap();
    desk.members.insert(B, member);
    desk.cut_off.clear();
    desk.cut_off = vec![A];
    for _ in 0..100 {
        desk.tick(1);
    }
    assert!(desk.at(B).leadership.is_leader);
    assert_eq!(desk.at(C).texts().len(), 9);
}

#[test]
fn a_divergent_tail_is_replaced_and_the_write_says_so() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    desk.propose(A, 1, "kept");
    desk.tick(2);
    desk.cut_off = vec![A];
    desk.propose(A, 2, "never committed");
    assert_eq!(desk.at(A).disk.log.len(), 3);
    desk.elect(B);
    desk.propose(B, 3, "instead");
    desk.at(A).slow_disk = true;
    desk.cut_off.clear();
    while !desk.at(A).writes.iter().any(|write| write.truncate_from.is_some()) {
        desk.at(A).flush();
        desk.tick(1);
    }
    assert_eq!(desk.at(A).writes.back().unwrap().truncate_from, Some(4));
    desk.at(A).slow_disk = false;
    desk.at(A).flush();
    desk.tick(3);
    assert_eq!(desk.at(A).texts(), ["kept", "instead"]);
}

#[test]
fn a_hole_at_start_is_refused() {
    let mut disk = Disk::founded(&[A]);
    disk.start = FOUNDED;
    for index in [2, 3, 5] {
        disk.log.insert(index, wire::log_entry(index, 2, b"x"));
    }
    disk.hard_state = Some(wire::encode_hard_state(&wire::RawHardState { term: 2, vote: 1, commit: 3 }));
    assert!(matches!(Replica::new(config(A), disk.boot(), 42), Err(Fatal::Damaged { .. })));
    disk.log.remove(&2);
    disk.log.remove(&5);
    assert!(matches!(Replica::new(config(A), disk.boot(), 42), Err(Fatal::Damaged { .. })));
}

/// Found by the simulator: without its last entry, a log that is applied to its end looks empty.
#[test]
fn a_start_without_the_last_entry_is_refused() {
    let mut disk = Disk::founded(&[A]);
    disk.start = FOUNDED;
    disk.log.insert(2, wire::log_entry(2, 2, b"x"));
    disk.hard_state = Some(wire::encode_hard_state(&wire::RawHardState { term: 2, vote: 1, commit: 2 }));
    disk.applied = Position { index: 2, term: 2 };
    assert!(Replica::new(config(A), disk.boot(), 42).is_ok());
    assert!(matches!(Replica::new(config(A), disk.boot_with_tail(0), 42), Err(Fatal::Invariant(_))));
}

#[test]
fn a_commit_beyond_the_log_is_refused() {
    let mut disk = Disk::founded(&[A]);
    disk.start = FOUNDED;
    disk.log.insert(2, wire::log_entry(2, 2, b"x"));
    disk.hard_state = Some(wire::encode_hard_state(&wire::RawHardState { term: 2, vote: 1, commit: 3 }));
    assert!(matches!(Replica::new(config(A), disk.boot(), 42), Err(Fatal::Damaged { .. })));
}

#[test]
fn rubbish_from_a_peer_is_dropped() {
    let mut desk = Desk::new(&[A, B, C]);
    desk.elect(A);
    desk.at(A).step(Input::Message(Bytes::from_static(b"\xff\xff\xff")));
    desk.at(A).step(Input::SnapshotReceived { ticket: SnapshotTicket(5), message: Bytes::from_static(b"\xff") });
    desk.settle();
    assert_eq!(desk.at(A).discards, vec![SnapshotTicket(5)]);
    assert!(desk.at(A).leadership.is_leader);
}

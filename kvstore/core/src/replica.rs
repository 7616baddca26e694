//! Replication: [`Replica`] takes what happened as an [`Input`] and says what to do as [`Effects`]. Raft itself is
//! raft-rs; this module makes it a value: deterministic, without a clock, a file or a socket, and never waiting.
//!
//! The shell's loop is: step every input that is there, then take effects until there are none, then wait.
//!
//! ```text
//!  Tick, Message, Propose, Read ──▶ step ──▶ effects ──▶ send           at once, never blocking
//!                                    ▲                 ├─▶ log_writes ──▶ log thread, fsync ──▶ Persisted{number}
//!                                    │                 ├─▶ committed  ──▶ apply thread      ──▶ Applied{index, durable}
//!                                    │                 ├─▶ fetch      ──▶ log thread, reads ──▶ EntriesFetched
//!                                    │                 ├─▶ build_snapshots ▶ a checkpoint, streamed ▶ SnapshotSent
//!                                    └─────────────────┴─▶ install_snapshot ▶ rename, reopen ──▶ SnapshotInstalled
//! ```
//!
//! Rules that the types carry:
//! - A message that promises something about the log or the vote appears in `send` only after the `Persisted` of the
//!   write it speaks of was stepped. The shell sends what it sees, when it sees it.
//! - A proposal is handed to Raft at most once (trap 7), and so is a forwarded one. What comes back in
//!   [`Effects::failed`] was certainly not proposed.
//! - A snapshot that came is stepped only when its files are complete, and is installed only if Raft took it (trap 4).
//! - The log is never cut past what the state database has on disk, nor past what a snapshot on its way will need.
//!
//! | file | |
//! |---|---|
//! | `replica/border.rs`    | the inputs, the effects and what is told at start |
//! | `replica/boot.rs`      | what a crash may have left, and what is refused |
//! | `replica/log.rs`       | Raft's view of the log: a tail in memory, terms for all of it, the rest by fetch |
//! | `replica/reads.rs`     | linearizable reads: rounds, contexts, retries |
//! | `replica/retention.rs` | how far the log may be cut |
//! | `replica/wire.rs`      | the only file that knows raft's own protobuf types |
//!
//! What it does not do: know what an entry means, keep waiters (`pending.rs` does), change the membership (the entries
//! are carried through; proposing them is a later issue), or encrypt, frame and send.

use std::collections::VecDeque;

use raft::{RawNode, SnapshotStatus, StateRole};

use self::log::Log;
use self::reads::Reads;
use self::retention::Retention;
use self::wire::RawMessage;
use crate::types::{Index, MemberId, Term, Ticks};
use crate::{Error, Fatal};

mod boot;
mod border;
mod log;
mod reads;
mod retention;
mod trace;
pub mod wire;

#[cfg(test)]
mod tests;

pub use border::{
    Boot, Effects, Fetch, Input, Install, Leadership, LogEntry, LogWrite, Outgoing, Position, Proposal, ReadId,
    ReplicaConfig, SnapshotBuild, SnapshotTicket, Status,
};

/// One member's part in Raft.
pub struct Replica {
    config: ReplicaConfig,
    seed: u64,
    raw: RawNode<Log>,
    reads: Reads,
    retention: Retention,
    ticks: Ticks,
    /// Of the effects handed out.
    number: u64,
    /// Of the newest Ready.
    ready_number: u64,
    leadership: Leadership,
    durable: Index,
    /// Writes that must reach the disk and have not been reported, oldest first.
    in_flight: VecDeque<InFlight>,
    /// Messages that wait for the write of this number, oldest first.
    held_messages: VecDeque<(u64, Vec<RawMessage>)>,
    held_proposals: HeldProposals,
    snapshot: Incoming,
    /// Configuration changes that were handed out and not applied yet.
    conf_changes: VecDeque<wire::RawEntry>,
    /// What the next effects will carry.
    next: Effects,
}

struct InFlight {
    number: u64,
    /// It replaces entries that an earlier write may have put on the disk.
    replaces: bool,
}

/// Proposals that wait for a leader, as in etcd. They were not handed to Raft, so waiting breaks no rule.
#[derive(Default)]
struct HeldProposals {
    queue: VecDeque<(Ticks, Proposal)>,
    bytes: usize,
}

/// Where a snapshot from the leader is on its way in.
#[derive(Default)]
enum Incoming {
    #[default]
    None,
    /// Raft took it; the next Ready will carry it.
    Taken(SnapshotTicket),
    /// The shell was told to install it. Writes to the log wait: they must not overtake the install.
    Installing { ticket: SnapshotTicket, at: Position, number: u64, writes: Vec<LogWrite> },
    /// Installed; the log's reset (the write of this number) is not on disk yet.
    Resetting { at: Position, number: u64 },
}

impl Replica {
    /// Starts from what the disk holds. Refused (traps 2, 3, 4): a log that is behind the state, unless the state was
    /// founded or installed at exactly its applied position; a log that contradicts the state; a log with a hole.
    pub fn new(config: ReplicaConfig, boot: Boot, seed: u64) -> Result<Replica, Fatal> {
        let nonce = boot.nonce;
        let applied = boot.applied;
        let (log, write) = boot::recover(boot, config.tail_bytes)?;
        let raft_config = raft::Config {
            id: config.id.0,
            election_tick: config.election_ticks,
            heartbeat_tick: config.heartbeat_ticks,
            applied: applied.index,
            max_size_per_msg: config.max_size_per_msg,
            max_inflight_msgs: config.max_inflight_msgs,
            check_quorum: true,
            pre_vote: true,
            max_committed_size_per_ready: config.max_committed_size,
            ..raft::Config::default()
        };
        let raw = RawNode::new(&raft_config, log, &trace::logger())
            .map_err(|error| Fatal::Invariant(format!("raft does not start: {error}")))?;
        let mut replica = Replica {
            seed,
            reads: Reads::new(config.id, nonce, config.read_retry_ticks),
            retention: Retention::new(config.catch_up_entries, config.cut_step, config.election_ticks as Ticks),
            config,
            raw,
            ticks: 0,
            number: 0,
            ready_number: 0,
            leadership: Leadership::default(),
            durable: applied.index,
            in_flight: VecDeque::new(),
            held_messages: VecDeque::new(),
            held_proposals: HeldProposals::default(),
            snapshot: Incoming::None,
            conf_changes: VecDeque::new(),
            next: Effects::default(),
        };
        if let Some(write) = write {
            replica.in_flight.push_back(InFlight { number: write.number, replaces: true });
            replica.next.log_writes.push(write);
        }
        replica.fix_election_timeout();
        Ok(replica)
    }

    /// Takes in what happened. Never waits. An error means that this member's own disk is broken.
    pub fn step(&mut self, input: Input) -> Result<(), Fatal> {
        match input {
            Input::Tick => self.tick(),
            Input::Message(message) => self.message(&message),
            Input::Propose(proposals) => self.propose(proposals),
            Input::ProposeAsLeader { term, proposals } => self.propose_as_leader(term, proposals),
            Input::Read(read) => self.reads.add(read),
            Input::Persisted { number } => self.persisted(number),
            Input::EntriesFetched { id, entries } => self.entries_fetched(id, entries)?,
            Input::Applied { index, durable } => self.applied(index, durable)?,
            Input::SnapshotSent { to, ok } => {
                self.retention.transfer_ended(to, self.ticks);
                let status = if ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
                self.raw.report_snapshot(to.0, status);
            }
            Input::SnapshotReceived { ticket, message } => self.snapshot_received(ticket, &message),
            Input::SnapshotInstalled { ticket } => self.snapshot_installed(ticket)?,
            Input::Unreachable(peer) => self.raw.report_unreachable(peer.0),
            Input::TransferLeader(to) => {
                if self.is_leader() {
                    self.raw.transfer_leader(to.0);
                }
            }
        }
        self.fix_election_timeout();
        Ok(())
    }

    /// What to do now; `None` when there is nothing. To be called until then, after all inputs at hand were stepped.
    pub fn effects(&mut self) -> Option<Effects> {
        self.note_leadership();
        self.propose_held();
        self.begin_reads();
        if self.raw.has_ready() {
            self.take_ready();
        }
        self.note_leadership();
        self.cut_log();
        self.next.fetch.append(&mut self.raw.mut_store().take_fetches());
        self.fix_election_timeout();
        if self.next.is_empty() {
            return None;
        }
        self.number += 1;
        self.next.number = self.number;
        Some(std::mem::take(&mut self.next))
    }

    pub fn status(&self) -> Status {
        let raft = &self.raw.raft;
        let is_leader = self.is_leader();
        Status {
            leadership: self.current_leadership(),
            committed: raft.raft_log.committed,
            applied: raft.raft_log.applied,
            durable: self.durable,
            first_index: self.raw.store().start().index + 1,
            last_index: raft.raft_log.last_index(),
            persisted: raft.raft_log.persisted,
            committed_in_term: is_leader && raft.commit_to_current_term(),
            snapshots_in_flight: self.retention.transfers(),
        }
    }

    // ---- inputs --------------------------------------------------------------------------------------

    fn tick(&mut self) {
        self.ticks += 1;
        if !self.must_not_campaign() {
            self.raw.tick();
        }
        self.reads.retry(self.ticks);
        self.retention.tick(self.ticks);
        while let Some((since, _)) = self.held_proposals.queue.front()
            && self.ticks - since >= self.config.hold_ticks
        {
            let proposal = self.held_proposals.pop().expect("its front was just seen");
            self.next.failed.push((proposal.id, Error::ContextDeadlineExceeded));
        }
    }

    /// raft-rs panics if it campaigns then: it would look for entries that the snapshot being installed replaces, or, as
    /// the only voter, lead with a log that is not on disk.
    fn must_not_campaign(&self) -> bool {
        match self.snapshot {
            Incoming::Installing { .. } | Incoming::Resetting { .. } => true,
            Incoming::None | Incoming::Taken(_) => {
                !self.is_leader() && !self.in_flight.is_empty() && self.raw.raft.prs().is_singleton()
            }
        }
    }

    fn message(&mut self, message: &[u8]) {
        let message = match wire::decode_message(message) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!("a peer sent what is no message: {error}");
                return;
            }
        };
        let foreign = message.to != self.config.id.0;
        let snapshot = wire::kind(&message) == wire::Kind::Snapshot;
        let malformed = !wire::is_well_formed(&message);
        if foreign || malformed || snapshot || (wire::is_timeout_now(&message) && self.must_not_campaign()) {
            tracing::debug!(message.from, message.to, "dropped a message of kind {:?}", wire::kind(&message));
            return;
        }
        // Errors are: a peer that is not (or no more) a member, a proposal that found no leader. Both mean "lost".
        let _ = self.raw.step(message);
    }

    fn propose(&mut self, proposals: Vec<Proposal>) {
        if self.held_proposals.queue.is_empty() && self.can_propose() {
            self.hand_over(proposals);
        } else {
            self.hold(proposals);
        }
    }

    fn propose_as_leader(&mut self, term: Term, proposals: Vec<Proposal>) {
        if self.is_leader() && self.raw.raft.term == term && self.can_propose() {
            self.hand_over(proposals);
        } else {
            self.next.failed.extend(proposals.into_iter().map(|proposal| (proposal.id, Error::NotLeader)));
        }
    }

    /// Whether Raft would take a proposal now, or forward it.
    fn can_propose(&self) -> bool {
        let raft = &self.raw.raft;
        raft.leader_id != raft::INVALID_ID && raft.lead_transferee.is_none()
    }

    /// Gives proposals to Raft, as few messages as their size allows. From here on they may commit at any time.
    fn hand_over(&mut self, proposals: Vec<Proposal>) {
        let mut batch: Vec<Proposal> = Vec::new();
        let mut bytes = 0;
        for proposal in proposals {
            let size = proposal.data.len() as u64;
            if !batch.is_empty() && bytes + size > self.config.max_size_per_msg {
                self.hand_over_batch(std::mem::take(&mut batch));
                bytes = 0;
            }
            bytes += size;
            batch.push(proposal);
        }
        if !batch.is_empty() {
            self.hand_over_batch(batch);
        }
    }

    fn hand_over_batch(&mut self, batch: Vec<Proposal>) {
        let entries = batch.iter().map(|proposal| wire::normal_entry(&proposal.data)).collect();
        if self.raw.step(wire::proposal(self.config.id, entries)).is_err() {
            // Certainly not taken, not even in part.
            self.next.failed.extend(batch.into_iter().map(|proposal| (proposal.id, Error::NoLeader)));
        }
    }

    fn hold(&mut self, proposals: Vec<Proposal>) {
        for proposal in proposals {
            if self.held_proposals.bytes + proposal.data.len() > self.config.hold_bytes {
                self.next.failed.push((proposal.id, Error::TooManyRequests));
            } else {
                self.held_proposals.push(self.ticks, proposal);
            }
        }
    }

    fn persisted(&mut self, number: u64) {
        // A later write on its way replaces what this one wrote: "persisted" would be true only until then, and Raft,
        // which compares terms alone, can be misled by it. It becomes true for good with that later write.
        if self.in_flight.iter().any(|write| write.number > number && write.replaces) {
            return;
        }
        while self.in_flight.front().is_some_and(|write| write.number <= number) {
            self.in_flight.pop_front();
        }
        // First Raft, then the messages: it asserts that it counts nothing it was not told of.
        let reached = if self.in_flight.is_empty() { self.ready_number } else { number };
        self.raw.on_persist_ready(reached);
        while self.held_messages.front().is_some_and(|(after, _)| *after <= reached) {
            if let Some((_, messages)) = self.held_messages.pop_front() {
                self.send(messages);
            }
        }
        if let Incoming::Resetting { at, number: reset } = self.snapshot
            && reset <= reached
        {
            self.snapshot = Incoming::None;
            self.raw.advance_apply_to(at.index);
            self.raw.mut_store().set_applied(at.index);
            self.durable = self.durable.max(at.index);
        }
    }

    fn entries_fetched(&mut self, id: u64, entries: Vec<LogEntry>) -> Result<(), Fatal> {
        let mut fetched = Vec::with_capacity(entries.len());
        for stored in &entries {
            fetched.push(wire::decode_entry(&stored.bytes)?);
        }
        let first = fetched.first().map(|entry| entry.index);
        let log = self.raw.mut_store();
        let Some((from, waiting)) = log.fetched(id, fetched) else { return Ok(()) };
        if first != Some(from) && from > log.start().index {
            return Err(Fatal::Damaged { table: "log", message: format!("entry {from} is missing; found {first:?}") });
        }
        for context in waiting {
            self.raw.on_entries_fetched(context);
        }
        self.raw.mut_store().drop_fetched();
        Ok(())
    }

    fn applied(&mut self, index: Index, durable: Index) -> Result<(), Fatal> {
        // Before advance_apply_to: a campaign looks for unapplied changes above it only (trap 7).
        while self.conf_changes.front().is_some_and(|change| change.index <= index) {
            if let Some(change) = self.conf_changes.pop_front() {
                let conf_state = wire::apply_conf_change(&mut self.raw, &change)?;
                self.raw.mut_store().set_conf_state(conf_state);
            }
        }
        // The state may be a snapshot already whose log is not on disk yet: Raft is told when that is.
        let installed = match self.snapshot {
            Incoming::Installing { at, .. } | Incoming::Resetting { at, .. } => index >= at.index,
            Incoming::None | Incoming::Taken(_) => false,
        };
        if index > self.raw.raft.raft_log.applied && !installed {
            self.raw.advance_apply_to(index);
            self.raw.mut_store().set_applied(index);
        }
        self.durable = self.durable.max(durable);
        Ok(())
    }

    fn snapshot_received(&mut self, ticket: SnapshotTicket, message: &[u8]) {
        if matches!(self.snapshot, Incoming::None)
            && let Ok(message) = wire::decode_message(message)
            && message.to == self.config.id.0
            && wire::kind(&message) == wire::Kind::Snapshot
        {
            let _ = self.raw.step(message);
            if self.raw.snap().is_some() {
                self.snapshot = Incoming::Taken(ticket);
                return;
            }
        }
        // Refused: older than what is committed, from a leader of the past, or only a hint to commit.
        self.next.discard_snapshots.push(ticket);
    }

    fn snapshot_installed(&mut self, installed: SnapshotTicket) -> Result<(), Fatal> {
        match std::mem::take(&mut self.snapshot) {
            Incoming::Installing { ticket, at, number, mut writes } if ticket == installed => {
                self.next.log_writes.append(&mut writes);
                self.snapshot = Incoming::Resetting { at, number };
                Ok(())
            }
            _ => Err(Fatal::Invariant(format!("{installed:?} was installed, but not asked for"))),
        }
    }

    // ---- effects -------------------------------------------------------------------------------------

    fn propose_held(&mut self) {
        if self.held_proposals.queue.is_empty() || !self.can_propose() {
            return;
        }
        let mut proposals = Vec::with_capacity(self.held_proposals.queue.len());
        while let Some(proposal) = self.held_proposals.pop() {
            proposals.push(proposal);
        }
        self.hand_over(proposals);
    }

    /// Asks the leader for a read index where an answer can be hoped for; else the reads go on waiting.
    fn begin_reads(&mut self) {
        let leadership = self.current_leadership();
        if leadership.leader.is_none() || (leadership.is_leader && !self.raw.raft.commit_to_current_term()) {
            return;
        }
        if let Some(context) = self.reads.begin(self.ticks, leadership) {
            self.raw.read_index(context.to_vec());
        }
    }

    fn take_ready(&mut self) {
        let mut ready = self.raw.ready();
        let number = ready.number();
        self.ready_number = number;
        let at_once = ready.take_messages();
        let after_write = ready.take_persisted_messages();
        let entries = ready.take_entries();
        let committed = ready.take_committed_entries();
        for state in ready.take_read_states() {
            self.next.reads_ready.append(&mut self.reads.answered(&state.request_ctx, state.index));
        }
        let mut write = LogWrite {
            number,
            hard_state: ready.hs().map(wire::encode_hard_state),
            must_sync: ready.must_sync(),
            ..LogWrite::default()
        };
        let snapshot = ready.snapshot();
        if !snapshot.is_empty() {
            let (at, conf_state) = wire::snapshot_parts(snapshot);
            write.reset = Some(at);
            self.begin_install(at, conf_state, number);
        }
        if self.raw.mut_store().append(&entries) {
            write.truncate_from = entries.first().map(|entry| entry.index);
        }
        let replaces = write.truncate_from.is_some() || write.reset.is_some();
        write.entries = entries.iter().map(wire::stored).collect();
        self.raw.advance_append_async(ready);
        self.hand_out(committed);
        self.send(at_once);
        if write.must_sync {
            self.in_flight.push_back(InFlight { number, replaces });
        }
        if write.must_sync || write.hard_state.is_some() {
            self.write(write);
        }
        self.send_after_write(number, after_write);
    }

    fn begin_install(&mut self, at: Position, conf_state: wire::RawConfState, number: u64) {
        let log = self.raw.mut_store();
        log.reset(at);
        log.set_conf_state(conf_state);
        self.conf_changes.clear();
        if let Incoming::Taken(ticket) = self.snapshot {
            self.next.install_snapshot = Some(Install { ticket, at });
            self.snapshot = Incoming::Installing { ticket, at, number, writes: Vec::new() };
        }
    }

    /// The log may not run ahead of an install: until it is done, its writes are kept back.
    fn write(&mut self, write: LogWrite) {
        match &mut self.snapshot {
            Incoming::Installing { writes, .. } => writes.push(write),
            _ => self.next.log_writes.push(write),
        }
    }

    fn hand_out(&mut self, committed: Vec<wire::RawEntry>) {
        for raw in committed {
            if wire::is_conf_change(&raw) {
                self.conf_changes.push_back(raw.clone());
            }
            self.next.committed.push(wire::committed(raw));
        }
    }

    /// Messages of a follower or candidate wait for every write before them, except those that promise nothing.
    fn send_after_write(&mut self, number: u64, messages: Vec<RawMessage>) {
        if self.in_flight.is_empty() {
            self.raw.on_persist_ready(number);
            self.send(messages);
            return;
        }
        let (at_once, wait): (Vec<_>, Vec<_>) = messages.into_iter().partition(wire::promises_nothing);
        self.send(at_once);
        let after = self.in_flight.back().map_or(number, |write| write.number);
        if !wait.is_empty() {
            self.held_messages.push_back((after, wait));
        }
    }

    fn send(&mut self, messages: Vec<RawMessage>) {
        for raw in messages {
            let to = MemberId(raw.to);
            let kind = wire::kind(&raw);
            let message = wire::encode_message(&raw);
            match wire::snapshot_position(&raw) {
                Some(at) if kind == wire::Kind::Snapshot => {
                    self.retention.transfer_began(to, at.index);
                    self.next.build_snapshots.push(SnapshotBuild { to, at, message });
                }
                _ => self.next.send.push(Outgoing { to, message, kind }),
            }
        }
    }

    fn cut_log(&mut self) {
        if !matches!(self.snapshot, Incoming::None) {
            return;
        }
        let start = self.raw.store().start().index;
        let applied = self.raw.raft.raft_log.applied;
        if let Some(index) = self.retention.cut_to(start, applied, self.durable)
            && let Some(at) = self.raw.mut_store().cut(index)
        {
            match self.next.log_writes.last_mut() {
                Some(write) => write.cut_to = Some(at),
                None => {
                    let write = LogWrite { number: self.ready_number, cut_to: Some(at), ..LogWrite::default() };
                    self.next.log_writes.push(write);
                }
            }
        }
    }

    fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    fn current_leadership(&self) -> Leadership {
        let raft = &self.raw.raft;
        Leadership {
            leader: (raft.leader_id != raft::INVALID_ID).then_some(MemberId(raft.leader_id)),
            term: raft.term,
            is_leader: raft.state == StateRole::Leader,
        }
    }

    fn note_leadership(&mut self) {
        let now = self.current_leadership();
        if now == self.leadership {
            return;
        }
        self.leadership = now;
        self.next.leadership = Some(now);
        if now.leader.is_some() {
            let failed = self.reads.leader_changed(now);
            self.next.reads_failed.extend(failed.into_iter().map(|read| (read, Error::LeaderChanged)));
        }
    }

    /// raft-rs draws election timeouts from a global generator; this overwrites whatever it drew.
    fn fix_election_timeout(&mut self) {
        let drawn = mix(self.seed ^ mix(self.config.id.0) ^ mix(self.raw.raft.term.wrapping_add(1)));
        let election = self.config.election_ticks as u64;
        let timeout = election + drawn % election;
        self.raw.raft.set_randomized_election_timeout(timeout as usize);
    }
}

impl HeldProposals {
    fn push(&mut self, now: Ticks, proposal: Proposal) {
        self.bytes += proposal.data.len();
        self.queue.push_back((now, proposal));
    }

    fn pop(&mut self) -> Option<Proposal> {
        let (_, proposal) = self.queue.pop_front()?;
        self.bytes -= proposal.data.len();
        Some(proposal)
    }
}

/// SplitMix64's finish: neighbouring numbers come out unrelated.
fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

//! The raft thread: it never blocks, and everything that decides about replication happens on it.
//!
//! It takes all inputs that wait at once, steps them, and executes the effects: messages to the peers' queues, writes to
//! the log thread, committed entries to the apply thread. Beside the replica it drives the machines that need the same
//! clock and the same order: who waits for what (`Pending`), and the leader's leases (`driver/leases.rs`).
//!
//! What it does not do: touch a disk or a socket, or look inside an entry.

mod leases;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use keelson_proto::etcdserverpb::alarm_request::AlarmAction;
use keelson_proto::etcdserverpb::{AlarmRequest, AlarmType, InternalRaftRequest};
use kvstore_core::lease::LeaseState;
use kvstore_core::pending::{Link, Pending};
use kvstore_core::replica::{
    self, Effects, Leadership, LogEntry, Proposal, ReadId, Replica, ReplicaConfig, SnapshotTicket,
};
use kvstore_core::types::{Index, LeaseId, MemberId, RequestId, Term, Ticks};
use kvstore_core::{Error, Fatal};
use prost::Message;
use tokio::sync::oneshot;

use crate::applier::{self, Done};
use crate::clock::{self, Clock};
use crate::disk::NewState;
use crate::inbox::{Answers, Shared, Waiter};
use crate::logger;
use crate::mailbox::{Mailbox, Receiver};
use crate::peer::Peers;

pub(crate) use leases::Remaining;
use leases::{Leases, Own};

/// What the raft thread is told.
pub(crate) enum Input {
    // From the edge.
    /// One request, encoded; proposed once.
    Propose {
        id: RequestId,
        data: Bytes,
        waiter: Waiter,
    },
    /// A linearizable read; all that come in one batch share a round.
    Read {
        waiter: Waiter,
    },
    /// A keep-alive, answered by the leader's clock; `NotLeader` elsewhere.
    KeepAlive {
        id: LeaseId,
        answer: oneshot::Sender<Result<i64, Error>>,
    },
    /// What is left of a lease, by the leader's clock; `NotLeader` elsewhere. `None`: there is no such lease.
    Remaining {
        id: LeaseId,
        answer: oneshot::Sender<Result<Option<Remaining>, Error>>,
    },
    /// All leases, those that end first coming first, by the leader's clock; `None` elsewhere.
    Leases {
        answer: oneshot::Sender<Option<Vec<LeaseId>>>,
    },
    // From the log thread.
    Persisted {
        number: u64,
    },
    Fetched {
        id: u64,
        entries: Vec<LogEntry>,
    },
    // From the apply thread.
    Applied(Done),
    /// All leases after everything that was told to be applied before, as the leader of `term` asked.
    LeaseTable {
        term: Term,
        leases: Vec<LeaseState>,
    },
    Installed {
        ticket: SnapshotTicket,
        index: Index,
    },
    // From the peers.
    Messages(Vec<Bytes>),
    /// A snapshot is complete on disk; `new` is dropped, and its files with it, if Raft refuses it.
    SnapshotReceived {
        message: Bytes,
        new: NewState,
    },
    SnapshotSent {
        to: MemberId,
        ok: bool,
    },
    Unreachable(MemberId),
    // From the server.
    TransferLeader(MemberId),
    /// Everybody who waits is told that the server stopped; the thread ends.
    Stop,
}

/// Members that start together reach each other within this time (etcd waits as long for its transport).
const FIRST_CONNECTION_MS: u64 = 5_000;

/// What the raft thread is told once.
pub(crate) struct DriverConfig {
    pub(crate) replica: ReplicaConfig,
    pub(crate) heartbeat_ms: u64,
    pub(crate) election_ms: u64,
    /// How long a proposal or a read may wait: 5 s and two election timeouts, as etcd has it.
    pub(crate) request_timeout_ms: u64,
    /// How often what is left of long leases is replicated; `None`: never.
    pub(crate) lease_checkpoint_ms: Option<u64>,
    /// This member alone is a majority: it need not wait for an election timeout.
    pub(crate) alone: bool,
    /// Whether the first election timeout is shortened once others are there (`--initial-election-tick-advance`).
    pub(crate) shorten_first_election: bool,
}

/// Where the effects go.
pub(crate) struct Outlets {
    pub(crate) logger: Mailbox<logger::Job>,
    pub(crate) applier: Mailbox<applier::Job>,
    pub(crate) peers: Peers,
}

pub(crate) struct Driver {
    config: DriverConfig,
    replica: Replica,
    shared: Arc<Shared>,
    outlets: Outlets,
    clock: Clock,
    pending: Pending<Waiter>,
    answers: Answers,
    leases: Leases,
    leadership: Leadership,
    ticks: Ticks,
    timeout_ticks: Ticks,
    next_tick: Instant,
    next_read: u64,
    applied: Index,
    tickets: u64,
    /// Complete snapshots that Raft has not decided on, or that wait to be installed.
    received: HashMap<SnapshotTicket, NewState>,
    /// Until this tick the first election may still be shortened; 0 once it was.
    first_election_until: Ticks,
    /// Proposals that wait because the leader can't be reached, and until when.
    held: VecDeque<(Ticks, Proposal)>,
    held_bytes: usize,
    /// Those whose write went over the quota, until the alarm that it raised stands.
    out_of_space: Vec<Waiter>,
    /// Our own proposals, which no caller waits for, and when they were made.
    own: HashMap<RequestId, (Own, Ticks)>,
}

impl Driver {
    pub(crate) fn new(
        config: DriverConfig,
        replica: Replica,
        shared: Arc<Shared>,
        outlets: Outlets,
        clock: Clock,
    ) -> Driver {
        let election_ticks = config.replica.election_ticks as Ticks;
        let hurry_ticks = FIRST_CONNECTION_MS / config.heartbeat_ms;
        Driver {
            first_election_until: if config.shorten_first_election { hurry_ticks } else { 0 },
            timeout_ticks: config.request_timeout_ms.div_ceil(config.heartbeat_ms),
            leases: Leases::new(&config),
            applied: replica.status().applied,
            config,
            replica,
            shared,
            outlets,
            clock,
            pending: Pending::new(election_ticks),
            answers: Answers::default(),
            leadership: Leadership::default(),
            ticks: 0,
            next_tick: clock::now(),
            next_read: 0,
            tickets: 0,
            received: HashMap::new(),
            held: VecDeque::new(),
            held_bytes: 0,
            out_of_space: Vec::new(),
            own: HashMap::new(),
        }
    }

    pub(crate) fn run(mut self, inputs: &Receiver<Input>) -> Result<(), Fatal> {
        let mut batch = Vec::new();
        let mut stop = false;
        while !stop {
            self.execute()?;
            inputs.take(&mut batch, Some(self.next_tick));
            stop = self.take_in(&mut batch)?;
            self.tick()?;
            self.execute()?;
            self.drive_leases()?;
        }
        self.stop();
        Ok(())
    }

    /// Steps one batch of inputs. Proposals of one batch go to Raft together, and its reads share a round.
    fn take_in(&mut self, batch: &mut Vec<Input>) -> Result<bool, Fatal> {
        let (mut proposals, mut reads, mut stop) = (Vec::new(), Vec::new(), false);
        for input in batch.drain(..) {
            match input {
                Input::Propose { id, data, waiter } => {
                    // A tick longer than Raft holds it for want of a leader: then what is known for certain is said first.
                    self.pending.propose(id, waiter, self.ticks, self.timeout_ticks + 1);
                    proposals.push(Proposal { id, data });
                }
                Input::Read { waiter } => reads.push(waiter),
                Input::KeepAlive { id, answer } => self.leases.ask(self.clock.now(), id, answer),
                Input::Remaining { id, answer } => {
                    let committed = self.replica.status().committed;
                    self.leases.ask_remaining(self.clock.now(), id, committed, answer);
                }
                Input::Leases { answer } => self.leases.list(answer),
                Input::LeaseTable { term, leases } => self.promote_leases(term, leases),
                Input::Persisted { number } => self.replica.step(replica::Input::Persisted { number })?,
                Input::Fetched { id, entries } => self.replica.step(replica::Input::EntriesFetched { id, entries })?,
                Input::Applied(done) => self.applied(done)?,
                Input::Installed { ticket, index } => self.installed(ticket, index)?,
                Input::Messages(messages) => {
                    for message in messages {
                        self.replica.step(replica::Input::Message(message))?;
                    }
                }
                Input::SnapshotReceived { message, new } => self.snapshot_received(message, new)?,
                Input::SnapshotSent { to, ok } => self.replica.step(replica::Input::SnapshotSent { to, ok })?,
                Input::Unreachable(peer) => self.replica.step(replica::Input::Unreachable(peer))?,
                Input::TransferLeader(to) => self.replica.step(replica::Input::TransferLeader(to))?,
                Input::Stop => stop = true,
            }
        }
        self.propose(proposals)?;
        if !reads.is_empty() {
            let round = self.begin_round()?;
            for waiter in reads {
                self.pending.ask(round.0, waiter, self.ticks, self.timeout_ticks);
            }
        }
        Ok(stop)
    }

    /// Hands proposals to Raft, unless it would send them to a leader that can't be reached: there they would be lost, and
    /// may not be sent again (trap 7). Held here, they have certainly not been proposed, and go to the next leader.
    fn propose(&mut self, proposals: Vec<Proposal>) -> Result<(), Fatal> {
        if proposals.is_empty() && self.held.is_empty() {
            return Ok(());
        }
        let leader = self.leadership.leader.filter(|_| !self.leadership.is_leader);
        if leader.is_some_and(|leader| self.outlets.peers.active_since(leader).is_none()) {
            let until = self.ticks + self.timeout_ticks;
            for proposal in proposals {
                if self.held_bytes + proposal.data.len() > self.config.replica.hold_bytes {
                    self.not_proposed(proposal.id, Error::TooManyRequests);
                } else {
                    self.held_bytes += proposal.data.len();
                    self.held.push_back((until, proposal));
                }
            }
            return Ok(());
        }
        self.held_bytes = 0;
        let mut all: Vec<Proposal> = self.held.drain(..).map(|(_, proposal)| proposal).collect();
        all.extend(proposals);
        self.replica.step(replica::Input::Propose(all))
    }

    fn begin_round(&mut self) -> Result<ReadId, Fatal> {
        self.next_read += 1;
        let round = ReadId(self.next_read);
        self.replica.step(replica::Input::Read(round))?;
        Ok(round)
    }

    /// One tick for each interval, but only one after a pause: a process that was stopped has not seen the time pass, and
    /// must not think that its leader has been silent for it.
    fn tick(&mut self) -> Result<(), Fatal> {
        let now = clock::now();
        if now >= self.next_tick {
            let interval = Duration::from_millis(self.config.heartbeat_ms);
            self.next_tick = (self.next_tick + interval).max(now + interval / 2);
            self.ticks += 1;
            self.replica.step(replica::Input::Tick)?;
            self.leases.tick(self.clock.now());
            // What no leader ever took did not happen, and etcd has an error of its own for that.
            while let Some((_, proposal)) = self.held.pop_front_if(|(until, _)| *until <= self.ticks) {
                self.held_bytes -= proposal.data.len();
                self.not_proposed(proposal.id, Error::ContextDeadlineExceeded);
            }
            let link = self.link();
            for (waiter, error) in self.pending.expire(self.ticks, link) {
                self.answers.fail(waiter, error);
            }
            // One that was lost on the way may be made again.
            let (now, timeout) = (self.ticks, self.timeout_ticks);
            let lost: Vec<Own> =
                self.own.extract_if(|_, (_, made)| now - *made >= timeout).map(|(_, (own, _))| own).collect();
            for own in lost {
                self.not_made(&own);
            }
        }
        self.hurry()
    }

    /// A member that is a majority by itself has nobody to wait for. One of several that has just started waits for a leader
    /// to show itself, but, once it reaches two others, no longer than it takes to hear of one: as in etcd, two ticks and what
    /// is drawn beside the timeout.
    fn hurry(&mut self) -> Result<(), Fatal> {
        if self.leadership.leader.is_some() {
            return Ok(());
        }
        let election = self.config.replica.election_ticks;
        let mut ticks = 0;
        if self.config.alone {
            ticks = 2 * election;
        } else if self.ticks < self.first_election_until && self.outlets.peers.active() > 1 {
            self.first_election_until = 0;
            ticks = election.saturating_sub(2);
        }
        while ticks > 0 && self.replica.status().leadership.leader.is_none() {
            self.replica.step(replica::Input::Tick)?;
            ticks -= 1;
        }
        Ok(())
    }

    /// What to tell those whose proposal timed out.
    fn link(&self) -> Link {
        let since = match self.leadership.leader {
            None => return Link::NoLeader,
            Some(_) if self.leadership.is_leader => self.outlets.peers.quorum_since(),
            Some(leader) => self.outlets.peers.active_since(leader),
        };
        let Some(since) = since else { return Link::Lost };
        let ago = self.clock.now().since_ms(since) / self.config.heartbeat_ms;
        Link::Since(self.ticks.saturating_sub(ago))
    }

    fn execute(&mut self) -> Result<(), Fatal> {
        while let Some(effects) = self.replica.effects() {
            self.execute_one(effects)?;
        }
        for waiter in self.pending.applied(self.applied) {
            self.answers.release(waiter);
        }
        self.answers.send();
        let status = self.replica.status();
        self.shared.raft.set_position(self.leadership, status.committed, status.first_index);
        Ok(())
    }

    fn execute_one(&mut self, effects: Effects) -> Result<(), Fatal> {
        if let Some(leadership) = effects.leadership {
            self.leadership_changed(leadership)?;
        }
        self.outlets.peers.send(effects.send);
        for write in effects.log_writes {
            to_thread(&self.outlets.logger, logger::Job::Write(write))?;
        }
        if !effects.committed.is_empty() {
            to_thread(&self.outlets.applier, applier::Job::Committed(effects.committed))?;
        }
        for (read, index) in effects.reads_ready {
            self.leases.round_ready(read, self.clock.now());
            self.pending.ready(read.0, index);
        }
        for (read, error) in effects.reads_failed {
            self.leases.round_failed(read);
            for waiter in self.pending.failed(read.0) {
                self.answers.fail(waiter, error.clone());
            }
        }
        for (id, error) in effects.failed {
            self.not_proposed(id, error);
        }
        for fetch in effects.fetch {
            to_thread(&self.outlets.logger, logger::Job::Fetch(fetch))?;
        }
        for build in effects.build_snapshots {
            self.outlets.peers.send_snapshot(build, self.shared.published.get());
        }
        if let Some(install) = effects.install_snapshot {
            let new = self.received.remove(&install.ticket);
            let new = new.ok_or_else(|| Fatal::Invariant(format!("{:?} is not there to install", install.ticket)))?;
            to_thread(&self.outlets.applier, applier::Job::Install { ticket: install.ticket, new })?;
        }
        for ticket in effects.discard_snapshots {
            self.received.remove(&ticket);
        }
        Ok(())
    }

    fn leadership_changed(&mut self, new: Leadership) -> Result<(), Fatal> {
        let id = self.shared.identity.member_id;
        match new.leader {
            Some(leader) => {
                self.shared.counts.leader_changes.add(1);
                tracing::info!("raft.node: {id} elected leader {leader} at term {}", new.term);
            }
            None if self.leadership.leader.is_some() => {
                tracing::info!("raft.node: {id} lost its leader at term {}", new.term);
            }
            None => {}
        }
        // etcd notes it on the member that was elected only: others call the same timeout a timeout.
        if new.is_leader && new.leader != self.leadership.leader {
            self.pending.leader_elected(self.ticks);
        }
        if !new.is_leader {
            self.leases.demote();
        } else if !self.leadership.is_leader || new.term != self.leadership.term {
            // The table may be long: the apply thread has it at hand, and knows what it has told us of already.
            self.leases.demote();
            to_thread(&self.outlets.applier, applier::Job::ReadLeases { term: new.term })?;
        }
        self.leadership = new;
        Ok(())
    }

    /// Void if leadership has moved on meanwhile.
    fn promote_leases(&mut self, term: Term, leases: Vec<LeaseState>) {
        if self.leadership.is_leader && self.leadership.term == term {
            self.leases.promote(self.clock.now(), term, leases);
        }
    }

    fn applied(&mut self, done: Done) -> Result<(), Fatal> {
        self.applied = done.index;
        self.replica.step(replica::Input::Applied { index: done.index, durable: done.durable })?;
        self.leases.applied(self.clock.now(), &done.leases);
        if done.over_quota {
            self.raise_no_space()?;
        }
        for (id, outcome) in done.outcomes {
            if let Some(waiter) = self.pending.outcome(id) {
                // Who is told that there is no space finds the alarm raised, as in etcd.
                if done.over_quota && matches!(outcome, Err(Error::NoSpace)) {
                    self.out_of_space.push(waiter);
                } else {
                    self.answers.finish(waiter, outcome);
                }
            } else if let Some((own, _)) = self.own.remove(&id) {
                self.settled(&own);
            }
        }
        Ok(())
    }

    /// A proposal of our own has come to its end, whichever.
    fn settled(&mut self, own: &Own) {
        if matches!(own, Own::Alarm) {
            for waiter in self.out_of_space.drain(..) {
                self.answers.finish(waiter, Err(Error::NoSpace));
            }
        }
    }

    /// A write went over this member's quota: everybody must stop writing, so it goes through the log.
    fn raise_no_space(&mut self) -> Result<(), Fatal> {
        if self.own.values().any(|(own, _)| matches!(own, Own::Alarm)) {
            return Ok(());
        }
        let alarm = AlarmRequest {
            action: AlarmAction::Activate.into(),
            member_id: self.shared.identity.member_id.0,
            alarm: AlarmType::Nospace.into(),
        };
        let request = InternalRaftRequest { alarm: Some(alarm), ..InternalRaftRequest::default() };
        let proposal = self.own_proposal(request, Own::Alarm);
        self.replica.step(replica::Input::Propose(vec![proposal]))
    }

    fn own_proposal(&mut self, mut request: InternalRaftRequest, own: Own) -> Proposal {
        let id = self.shared.ids.next();
        request.header.get_or_insert_default().id = id.0;
        self.own.insert(id, (own, self.ticks));
        Proposal { id, data: request.encode_to_vec().into() }
    }

    /// Raft did not take it, so it has certainly not happened.
    fn not_proposed(&mut self, id: RequestId, error: Error) {
        if let Some(waiter) = self.pending.outcome(id) {
            self.answers.fail(waiter, error);
        } else if let Some((own, _)) = self.own.remove(&id) {
            self.not_made(&own);
        }
    }

    fn not_made(&mut self, own: &Own) {
        self.leases.not_proposed(own);
        self.settled(own);
    }

    fn installed(&mut self, ticket: SnapshotTicket, index: Index) -> Result<(), Fatal> {
        self.applied = index;
        // What the snapshot swallowed of ours has no outcome here: its callers time out, not knowing (trap 4).
        let swallowed: Vec<Own> = self.own.drain().map(|(_, (own, _))| own).collect();
        for own in swallowed {
            self.not_made(&own);
        }
        self.replica.step(replica::Input::SnapshotInstalled { ticket })
    }

    fn snapshot_received(&mut self, message: Bytes, new: NewState) -> Result<(), Fatal> {
        self.tickets += 1;
        let ticket = SnapshotTicket(self.tickets);
        self.received.insert(ticket, new);
        self.replica.step(replica::Input::SnapshotReceived { ticket, message })
    }

    fn drive_leases(&mut self) -> Result<(), Fatal> {
        let now = self.clock.now();
        let committed = self.replica.status().committed;
        for request in self.leases.drive(now, committed, self.applied) {
            let proposals = vec![self.own_proposal(request.request, request.own)];
            self.replica.step(replica::Input::ProposeAsLeader { term: request.term, proposals })?;
        }
        if self.leases.wants_round(now) {
            let round = self.begin_round()?;
            self.leases.round_begun(round, now);
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.settled(&Own::Alarm);
        for (waiter, error) in self.pending.drain(&Error::Stopped) {
            self.answers.fail(waiter, error);
        }
        self.answers.send();
        self.leases.stop();
    }
}

/// Our own threads outlive the raft thread; one that has gone has failed, and so has the member.
fn to_thread<T>(mailbox: &Mailbox<T>, job: T) -> Result<(), Fatal> {
    mailbox.push(job).map_err(|_| Fatal::Invariant("a thread of this member has ended early".into()))
}

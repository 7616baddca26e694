//! Three members, their network, disks and clients, and somebody who breaks things: a whole run from one seed.
//!
//! First phase: crashes, pauses, partitions, loss, delay, repetition, slow disks, failing snapshots. Second phase: everything
//! is mended, every client must get answers, and the members must become equal. Then the histories are judged.
//!
//! What it does not do: change the machines. It is a second shell around them, beside the real one.

use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::Hash;

use bytes::Bytes;
use keelson_proto::etcdserverpb::{RangeRequest, RequestHeader};
use kvstore_core::backend::Backend;
use kvstore_core::backend::memory::MemoryView;
use kvstore_core::mvcc;
use kvstore_core::pending::Link;
use kvstore_core::replica::{
    Effects, Fetch, Input, LogWrite, Outgoing, Position, Proposal, ReadId, SnapshotBuild, SnapshotTicket, wire,
};
use kvstore_core::store::view;
use kvstore_core::types::{Entry, MemberId};
use prost::Message;

use crate::clock::{Clock, MS, Micros};
use crate::keeper::{Keepers, Kept};
use crate::member::{Job, Member, TIMEOUT_TICKS};
use crate::model::Model;
use crate::network::Network;
use crate::rng::Rng;
use crate::watcher::Watcher;
use crate::workload::{Call, CallId, Workload};
use crate::{Options, Report, Sabotage};

mod end;
mod faults;
pub(crate) mod leases;

const TICK: Micros = 100 * MS;
const CLIENTS: u64 = 5;
const KEEPERS: u64 = 3;
/// How long the second phase may take: a handful of elections, and a snapshot for everyone.
const PATIENCE: Micros = 60_000 * MS;
/// Answers that every client must get once all is well.
const ANSWERS_AT_END: u32 = 4;

type Life = u64;

#[derive(Clone)]
enum Event {
    Tick(MemberId, Life),
    Deliver { to: MemberId, message: Bytes },
    Unreachable { at: MemberId, life: Life, peer: MemberId },
    Synced(MemberId, Life),
    Applied(MemberId, Life),
    Flushed(MemberId, Life),
    Fetched(MemberId, Life),
    SnapshotArrives { from: MemberId, life: Life, to: MemberId, message: Bytes, rows: Box<MemoryView> },
    SnapshotSent { from: MemberId, life: Life, to: MemberId, ok: bool },
    Client(u64),
    Keeper(u64),
    KeepAlive { to: MemberId, life: Life, kept: Kept },
    Watcher(usize),
    CatchUp(MemberId, Life),
    Restart(MemberId),
    Fault,
    Mend,
    SlowDiskEnds(MemberId),
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Tick(member, _) => write!(f, "{member} tick"),
            Event::Deliver { to, message } => match wire::facts(message) {
                Ok(facts) => write!(f, "{} → {to} {:?} of term {}", facts.from, facts.kind, facts.term),
                Err(_) => write!(f, "→ {to} rubbish"),
            },
            Event::Unreachable { at, peer, .. } => write!(f, "{at} cannot reach {peer}"),
            Event::Synced(member, _) => write!(f, "{member} log synced"),
            Event::Applied(member, _) => write!(f, "{member} apply thread"),
            Event::Flushed(member, _) => write!(f, "{member} state flushed"),
            Event::Fetched(member, _) => write!(f, "{member} entries fetched"),
            Event::SnapshotArrives { from, to, .. } => write!(f, "{from} → {to} snapshot arrives"),
            Event::SnapshotSent { from, to, ok, .. } => write!(f, "{from} → {to} snapshot sent: {ok}"),
            Event::Client(client) => write!(f, "client {client}"),
            Event::Keeper(keeper) => write!(f, "keeper {keeper}"),
            Event::KeepAlive { to, kept, .. } => write!(f, "{to} is asked to keep {} alive", kept.id),
            Event::Watcher(watcher) => write!(f, "watcher {watcher}"),
            Event::CatchUp(member, _) => write!(f, "{member} watchers catch up"),
            Event::Restart(member) => write!(f, "{member} restarts"),
            Event::Fault => write!(f, "fault"),
            Event::Mend => write!(f, "mend"),
            Event::SlowDiskEnds(member) => write!(f, "{member} disk is fast again"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Faults,
    Mended,
    /// Clients are done; the members become equal.
    Quiet,
}

pub(crate) struct Cluster {
    options: Options,
    rng: Rng,
    clock: Clock<Event>,
    network: Network,
    members: Vec<Member>,
    model: Model,
    workload: Workload,
    keepers: Keepers,
    watchers: Vec<Watcher>,
    phase: Phase,
    /// Of each client: the answers it still has to get before it may stop.
    owed: Vec<u32>,
    mended_at: Micros,
    digest: DefaultHasher,
    report: Report,
    trace: Vec<String>,
}

impl Cluster {
    pub(crate) fn new(options: Options) -> Result<Cluster, String> {
        let ids: Vec<MemberId> = (1..=3).map(MemberId).collect();
        let members = ids.iter().map(|id| Member::founded(*id, &ids)).collect::<Result<_, _>>().map_err(fatal)?;
        let mut cluster = Cluster {
            rng: Rng::new(options.seed),
            clock: Clock::new(),
            network: Network::default(),
            members,
            model: Model::default(),
            workload: Workload::default(),
            keepers: Keepers::default(),
            watchers: Watcher::all(),
            phase: Phase::Faults,
            owed: vec![ANSWERS_AT_END; CLIENTS as usize],
            mended_at: 0,
            digest: DefaultHasher::new(),
            report: Report { seed: options.seed, ..Report::default() },
            trace: Vec::new(),
            options,
        };
        cluster.network.loss_per_mille = cluster.rng.below(60);
        cluster.network.repeat_per_mille = cluster.rng.below(40);
        cluster.network.late_per_mille = cluster.rng.below(40);
        for id in ids {
            cluster.restart(id)?;
        }
        for client in 0..CLIENTS {
            cluster.clock.after(client * 7 * MS, Event::Client(client));
        }
        for keeper in 0..KEEPERS {
            cluster.clock.after((50 + keeper * 11) * MS, Event::Keeper(keeper));
        }
        for watcher in 0..cluster.watchers.len() {
            cluster.clock.after(100 * MS, Event::Watcher(watcher));
        }
        cluster.clock.after(1_500 * MS, Event::Fault);
        cluster.clock.after(cluster.options.faults_ms * MS, Event::Mend);
        Ok(cluster)
    }

    pub(crate) fn run(&mut self) -> Result<Report, String> {
        while let Some(event) = self.clock.advance() {
            self.report.events += 1;
            let line = format!("{:>9.3} {event:?}", self.clock.now() as f64 / 1_000.0);
            line.hash(&mut self.digest);
            self.note(|| line);
            self.happen(event)?;
            if self.phase == Phase::Quiet && self.all_equal() {
                return self.judge();
            }
            if self.phase != Phase::Faults && self.clock.now() > self.mended_at + PATIENCE {
                return Err(format!("no progress {} ms after all was mended: {}", PATIENCE / MS, self.stand()));
            }
        }
        Err("nothing is left to happen".into())
    }

    /// The last things that happened, for whoever looks for the bug.
    pub(crate) fn trace(&self) -> &[String] {
        &self.trace
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if self.options.trace {
            self.trace.push(line());
        }
    }

    fn stand(&self) -> String {
        let mut text = String::new();
        for member in &self.members {
            let status = member.running.as_ref().map(|running| running.replica.status());
            text.push_str(&format!("\n    {}: {status:?}", member.id));
        }
        text
    }

    fn member(&mut self, id: MemberId) -> &mut Member {
        self.members.iter_mut().find(|member| member.id == id).expect("there are three")
    }

    /// The member, if it still runs the life that the event was planned for.
    fn alive(&mut self, id: MemberId, life: Life) -> Option<&mut Member> {
        let member = self.member(id);
        (member.life == life && member.running.is_some()).then_some(member)
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        // A paused process does nothing until it goes on; then everything happens at once.
        if let Event::Tick(id, _)
        | Event::Deliver { to: id, .. }
        | Event::Unreachable { at: id, .. }
        | Event::Synced(id, _)
        | Event::Applied(id, _)
        | Event::Flushed(id, _)
        | Event::Fetched(id, _)
        | Event::CatchUp(id, _)
        | Event::KeepAlive { to: id, .. }
        | Event::SnapshotArrives { to: id, .. }
        | Event::SnapshotSent { from: id, .. } = event
        {
            let (now, until) = (self.clock.now(), self.member(id).paused_until);
            if until > now {
                self.clock.after(until - now, event);
                return Ok(());
            }
        }
        match event {
            Event::Tick(id, life) => self.tick(id, life),
            Event::Deliver { to, message } => self.deliver(to, message),
            Event::Unreachable { at, life, peer } => self.step_alive(at, life, Input::Unreachable(peer)),
            Event::Synced(id, life) => self.synced(id, life),
            Event::Applied(id, life) => self.apply(id, life),
            Event::Flushed(id, life) => self.flushed(id, life),
            Event::Fetched(id, life) => self.fetched(id, life),
            Event::SnapshotArrives { from, life, to, message, rows } => {
                self.snapshot_arrives(from, life, to, message, &rows)
            }
            Event::SnapshotSent { from, life, to, ok } => self.step_alive(from, life, Input::SnapshotSent { to, ok }),
            Event::Client(client) => self.client(client),
            Event::Keeper(keeper) => self.keep(keeper),
            Event::KeepAlive { to, life, kept } => self.keep_alive(to, life, kept),
            Event::Watcher(watcher) => self.watch(watcher),
            Event::CatchUp(id, life) => self.catch_up(id, life),
            Event::Restart(id) => self.restart(id),
            Event::Fault => self.fault(),
            Event::Mend => self.mend(),
            Event::SlowDiskEnds(id) => {
                self.member(id).slow_disk = false;
                Ok(())
            }
        }
    }

    // ---- the raft thread -------------------------------------------------------------------------------

    fn step_alive(&mut self, id: MemberId, life: Life, input: Input) -> Result<(), String> {
        if self.alive(id, life).is_some() { self.step(id, input) } else { Ok(()) }
    }

    fn step(&mut self, id: MemberId, input: Input) -> Result<(), String> {
        let Some(running) = &mut self.member(id).running else { return Ok(()) };
        running.replica.step(input).map_err(fatal)?;
        // Sometimes more comes before the effects are asked for, as in a busy shell.
        if self.phase == Phase::Faults && self.rng.chance(100) {
            return Ok(());
        }
        self.effects(id)
    }

    fn effects(&mut self, id: MemberId) -> Result<(), String> {
        while let Some(running) = &mut self.member(id).running
            && let Some(effects) = running.replica.effects()
        {
            self.carry_out(id, effects)?;
        }
        Ok(())
    }

    fn carry_out(&mut self, id: MemberId, effects: Effects) -> Result<(), String> {
        let life = self.member(id).life;
        if let Some(leadership) = effects.leadership {
            self.note(|| format!("          {id} {leadership:?}"));
            self.model.leads(id, leadership)?;
            self.lease_leadership(id, leadership);
            let running = self.member(id).running.as_mut().expect("it has effects");
            if leadership.leader.is_some() {
                let now = running.ticks;
                running.pending.leader_elected(now);
            }
        }
        for message in effects.send {
            self.send(id, life, message);
        }
        self.write_log(id, effects.log_writes)?;
        if !effects.committed.is_empty() {
            self.model.committed(&effects.committed)?;
            self.queue_job(id, Job::Apply(effects.committed));
        }
        if let Some(install) = effects.install_snapshot {
            self.queue_job(id, Job::Install(install));
        }
        for ticket in effects.discard_snapshots {
            self.discard(id, ticket);
        }
        for build in effects.build_snapshots {
            self.build_snapshot(id, life, build)?;
        }
        for fetch in effects.fetch {
            self.fetch(id, life, fetch);
        }
        let now = self.time_of(id);
        for (read, index) in effects.reads_ready {
            let running = self.member(id).running.as_mut().expect("it has effects");
            if !running.leases.round_ready(read, now) {
                running.pending.ready(read.0, index);
            }
        }
        for (read, _) in effects.reads_failed {
            let running = self.member(id).running.as_mut().expect("it has effects");
            running.leases.round_failed(read);
            for call in running.pending.failed(read.0) {
                self.lose(call);
            }
        }
        for (request, _) in effects.failed {
            let running = self.member(id).running.as_mut().expect("it has effects");
            if let Some(call) = running.pending.outcome(request) {
                let client = self.workload.refused(call);
                self.go_on(client, call);
            } else if let Some(own) = running.leases.own.remove(&request) {
                running.leases.not_proposed(&own);
            }
        }
        self.release_reads(id)
    }

    fn tick(&mut self, id: MemberId, life: Life) -> Result<(), String> {
        let skew = self.rng.below(4 * MS);
        let time = self.time_of(id);
        let Some(member) = self.alive(id, life) else { return Ok(()) };
        member.compact().map_err(fatal)?;
        let running = member.running.as_mut().expect("it is alive");
        running.ticks += 1;
        running.leases.tick(time);
        let (now, link) = (running.ticks, Link::NoLeader);
        let expired = running.pending.expire(now, link);
        for (call, _) in expired {
            self.lose(call);
        }
        self.clock.after(TICK - 2 * MS + skew, Event::Tick(id, life));
        self.step(id, Input::Tick)?;
        self.effects(id)?;
        self.drive_leases(id)
    }

    fn deliver(&mut self, to: MemberId, message: Bytes) -> Result<(), String> {
        self.step(to, Input::Message(message))
    }

    fn send(&mut self, from: MemberId, life: Life, message: Outgoing) {
        let Outgoing { to, message, kind } = message;
        if self.member(to).running.is_none() {
            if self.rng.chance(200) {
                self.clock.after(MS, Event::Unreachable { at: from, life, peer: to });
            }
            return;
        }
        let copies = self.network.carry(&mut self.rng, from, to, kind, message.len());
        let again = self.options.sabotage == Some(Sabotage::ResendProposals) && kind == wire::Kind::Propose;
        for delay in copies {
            if again && self.rng.chance(100) {
                self.clock.after(delay + MS, Event::Deliver { to, message: message.clone() });
            }
            self.clock.after(delay, Event::Deliver { to, message: message.clone() });
        }
    }

    // ---- the log thread ----------------------------------------------------------------------------------

    fn write_log(&mut self, id: MemberId, writes: Vec<LogWrite>) -> Result<(), String> {
        if writes.is_empty() {
            return Ok(());
        }
        let lying = self.options.sabotage == Some(Sabotage::SayPersistedEarly);
        let last = writes.last().map_or(0, |write| write.number);
        let member = self.member(id);
        member.disk.log.queue.extend(writes);
        self.begin_sync(id);
        if lying {
            let running = self.member(id).running.as_mut().expect("it writes");
            running.replica.step(Input::Persisted { number: last }).map_err(fatal)?;
        }
        Ok(())
    }

    /// One sync covers everything that is queued; the next begins when it is done.
    fn begin_sync(&mut self, id: MemberId) {
        let delay = self.rng.between(300, 4 * MS);
        let slow = self.rng.between(300 * MS, 2_500 * MS);
        let member = self.member(id);
        let log = &mut member.disk.log;
        if log.syncing == 0 && log.queue.iter().any(|write| write.must_sync) {
            log.syncing = log.queue.len();
            let (life, delay) = (member.life, if member.slow_disk { slow } else { delay });
            self.clock.after(delay, Event::Synced(id, life));
        }
    }

    fn synced(&mut self, id: MemberId, life: Life) -> Result<(), String> {
        let Some(member) = self.alive(id, life) else { return Ok(()) };
        let log = &mut member.disk.log;
        let mut number = 0;
        for _ in 0..std::mem::take(&mut log.syncing) {
            if let Some(write) = log.queue.pop_front() {
                log.image.write(&write).map_err(|error| format!("{id}: {error}"))?;
                number = write.number;
            }
        }
        self.begin_sync(id);
        self.step(id, Input::Persisted { number })
    }

    fn fetch(&mut self, id: MemberId, life: Life, fetch: Fetch) {
        self.report.fetches += 1;
        let delay = self.rng.between(100, 5 * MS);
        self.member(id).running.as_mut().expect("it has effects").fetches.push_back(fetch);
        self.clock.after(delay, Event::Fetched(id, life));
    }

    fn fetched(&mut self, id: MemberId, life: Life) -> Result<(), String> {
        let Some(member) = self.alive(id, life) else { return Ok(()) };
        let running = member.running.as_mut().expect("it is alive");
        let Some(fetch) = running.fetches.pop_front() else { return Ok(()) };
        let entries = member.disk.log.image.read(fetch.from, fetch.to, fetch.max_bytes);
        self.step(id, Input::EntriesFetched { id: fetch.id, entries })
    }

    // ---- the apply thread ----------------------------------------------------------------------------------

    fn queue_job(&mut self, id: MemberId, job: Job) {
        let running = self.member(id).running.as_mut().expect("it has effects");
        running.jobs.push_back(job);
        self.begin_job(id);
    }

    fn begin_job(&mut self, id: MemberId) {
        let delay = self.rng.between(50, 3 * MS);
        let member = self.member(id);
        let life = member.life;
        let running = member.running.as_mut().expect("it has jobs");
        if !running.applying && !running.jobs.is_empty() {
            running.applying = true;
            self.clock.after(delay, Event::Applied(id, life));
        }
    }

    fn apply(&mut self, id: MemberId, life: Life) -> Result<(), String> {
        let Some(member) = self.alive(id, life) else { return Ok(()) };
        let running = member.running.as_mut().expect("it is alive");
        running.applying = false;
        match running.jobs.pop_front() {
            Some(Job::Apply(entries)) => self.apply_entries(id, &entries)?,
            Some(Job::Install(install)) => {
                member.install(install).map_err(fatal)?;
                self.report.installs += 1;
                self.note(|| format!("          {id} installed {install:?}"));
                self.step(id, Input::SnapshotInstalled { ticket: install.ticket })?;
                self.release_reads(id)?;
            }
            None => {}
        }
        if self.alive(id, life).is_some() {
            self.begin_job(id);
        }
        Ok(())
    }

    fn apply_entries(&mut self, id: MemberId, entries: &[Entry]) -> Result<(), String> {
        let flush_at = self.rng.between(5, 60);
        let flush_takes = self.rng.between(5 * MS, 800 * MS);
        let member = self.member(id);
        let (applied, facts) = member.apply(entries).map_err(fatal)?;
        let durable = member.disk.state.durable_applied().map_err(fatal)?;
        let life = member.life;
        let running = member.running.as_mut().expect("it applies");
        running.since_flush += entries.len() as u64;
        if running.since_flush >= flush_at {
            running.since_flush = 0;
            member.disk.state.start_flush().map_err(fatal)?;
            self.clock.after(flush_takes, Event::Flushed(id, life));
        }
        self.model.applied(&applied, &facts)?;
        self.leases_applied(id, &applied.leases);
        self.promote_leases(id);
        for (request, outcome) in applied.outcomes {
            let running = self.member(id).running.as_mut().expect("it applies");
            if let Some(call) = running.pending.outcome(request) {
                let client = self.workload.answered(call, outcome);
                self.go_on(client, call);
            } else {
                self.own_done(id, request, outcome.is_ok());
            }
        }
        self.step(id, Input::Applied { index: applied.index, durable })?;
        self.release_reads(id)?;
        self.drive_leases(id)
    }

    fn flushed(&mut self, id: MemberId, life: Life) -> Result<(), String> {
        let Some(member) = self.alive(id, life) else { return Ok(()) };
        member.disk.state.complete_flush();
        let durable = member.disk.state.durable_applied().map_err(fatal)?;
        let index = member.running.as_ref().expect("it is alive").published.facts.applied_index;
        self.step(id, Input::Applied { index, durable })
    }

    fn release_reads(&mut self, id: MemberId) -> Result<(), String> {
        let Some(running) = &mut self.member(id).running else { return Ok(()) };
        let released = running.pending.applied(running.published.facts.applied_index);
        for call in released {
            self.serve(id, call)?;
        }
        Ok(())
    }

    fn serve(&mut self, id: MemberId, call: CallId) -> Result<(), String> {
        let running = self.member(id).running.as_mut().expect("it serves");
        let Some(request) = running.reads.remove(&call) else { return Ok(()) };
        let bounds = running.published.facts.bounds();
        let found = mvcc::range(running.published.moment(), &request).map_err(|error| format!("{id}: {error}"))?;
        let response = found.into_response(bounds.revision).map_err(fatal)?;
        let client = self.workload.read(call, bounds.revision, &response);
        self.go_on(client, call);
        Ok(())
    }

    // ---- snapshots -------------------------------------------------------------------------------------------

    fn build_snapshot(&mut self, from: MemberId, life: Life, build: SnapshotBuild) -> Result<(), String> {
        self.report.snapshots += 1;
        let rows = self.member(from).disk.state.view();
        let applied = view::applied(&rows).map_err(fatal)?;
        let conf_state = view::conf_state_bytes(&rows).map_err(fatal)?.unwrap_or_default();
        let at = Position { index: applied.index, term: applied.term };
        let message = wire::with_snapshot(&build.message, at, &conf_state).map_err(fatal)?;
        let takes = self.rng.between(5 * MS, 1_200 * MS);
        let fails = self.phase == Phase::Faults && self.rng.chance(250);
        let event = if fails {
            Event::SnapshotSent { from, life, to: build.to, ok: false }
        } else {
            Event::SnapshotArrives { from, life, to: build.to, message, rows: Box::new(rows) }
        };
        self.clock.after(takes, event);
        Ok(())
    }

    fn snapshot_arrives(
        &mut self,
        from: MemberId,
        life: Life,
        to: MemberId,
        message: Bytes,
        rows: &MemoryView,
    ) -> Result<(), String> {
        let mut ok = self.network.reaches(from, to) && self.member(to).running.is_some();
        if ok {
            let ticket = self.member(to).receive(rows).map_err(fatal)?;
            self.step(to, Input::SnapshotReceived { ticket, message: message.clone() })?;
            if self.phase == Phase::Faults && self.rng.chance(250) {
                // The answer is lost, and the sender sends it all again; or the network does.
                ok = false;
                let again = self.rng.between(MS, 400 * MS);
                if self.rng.chance(500) {
                    let rows = Box::new(rows.clone());
                    self.clock.after(again, Event::SnapshotArrives { from, life, to, message, rows });
                    return Ok(());
                }
            }
        }
        self.clock.after(MS, Event::SnapshotSent { from, life, to, ok });
        Ok(())
    }

    fn discard(&mut self, id: MemberId, ticket: SnapshotTicket) {
        self.report.discards += 1;
        self.member(id).running.as_mut().expect("it has effects").received.remove(&ticket);
    }

    // ---- clients -----------------------------------------------------------------------------------------------

    fn client(&mut self, client: u64) -> Result<(), String> {
        if self.owed[client as usize] == 0 || self.phase == Phase::Quiet {
            return Ok(());
        }
        let id = MemberId(1 + self.rng.below(3));
        if self.member(id).running.is_none() || self.member(id).paused_until > self.clock.now() {
            self.clock.after(20 * MS, Event::Client(client));
            return Ok(());
        }
        let (call, what) = self.workload.call(&mut self.rng, client);
        match what {
            Call::Read(request) => self.ask(id, call, request)?,
            Call::Write(mut request) => {
                let request_id = self.member(id).next_request();
                request.header = Some(RequestHeader { id: request_id.0, ..RequestHeader::default() });
                let running = self.member(id).running.as_mut().expect("checked above");
                let now = running.ticks;
                running.pending.propose(request_id, call, now, TIMEOUT_TICKS);
                let proposal = Proposal { id: request_id, data: request.encode_to_vec().into() };
                self.step(id, Input::Propose(vec![proposal]))?;
            }
        }
        Ok(())
    }

    fn ask(&mut self, id: MemberId, call: CallId, request: RangeRequest) -> Result<(), String> {
        let stale = self.options.sabotage == Some(Sabotage::ReadWithoutAsking);
        let running = self.member(id).running.as_mut().expect("checked by the caller");
        running.reads.insert(call, request);
        if stale {
            return self.serve(id, call);
        }
        running.rounds += 1;
        let (round, now) = (running.rounds, running.ticks);
        running.pending.ask(round, call, now, TIMEOUT_TICKS);
        self.step(id, Input::Read(ReadId(round)))
    }

    fn catch_up(&mut self, id: MemberId, life: Life) -> Result<(), String> {
        let next = self.rng.between(5 * MS, 80 * MS);
        let Some(member) = self.alive(id, life) else { return Ok(()) };
        member.catch_up().map_err(fatal)?;
        self.clock.after(next, Event::CatchUp(id, life));
        Ok(())
    }

    /// A watcher takes what there is, or connects; now and then it is cut off.
    fn watch(&mut self, watcher: usize) -> Result<(), String> {
        let next = self.rng.between(MS, 60 * MS);
        self.clock.after(next, Event::Watcher(watcher));
        let (cut, ask) = (self.phase == Phase::Faults && self.rng.chance(10), self.rng.chance(100));
        let elsewhere = MemberId(1 + self.rng.below(3));
        let at = self.watchers[watcher].at;
        let id = at.map_or(elsewhere, |at| at.member);
        let now = self.clock.now();
        let member = self.members.iter_mut().find(|member| member.id == id).expect("there are three");
        let watcher = &mut self.watchers[watcher];
        if member.paused_until > now {
            return Ok(());
        }
        let (Some(running), life) = (&mut member.running, member.life) else {
            watcher.at = None;
            return Ok(());
        };
        match at {
            Some(at) if at.life != life => watcher.at = None,
            Some(at) if cut => {
                running.hub.close(at.stream);
                watcher.at = None;
            }
            Some(at) => {
                if ask {
                    running.hub.request_progress(at.stream);
                }
                for frame in running.hub.take(at.stream, 2) {
                    watcher.hear(&frame).map_err(|error| format!("{id}: {error}"))?;
                }
                if watcher.at.is_none() {
                    running.hub.close(at.stream);
                }
            }
            None => watcher.connect(id, life, &mut running.hub),
        }
        Ok(())
    }

    fn lose(&mut self, call: CallId) {
        let client = self.workload.lost(call);
        self.go_on(client, call);
    }

    /// The client that had this call makes the next one.
    fn go_on(&mut self, client: Option<u64>, call: CallId) {
        let Some(client) = client else { return };
        if self.phase == Phase::Mended && self.workload.was_answered(call) {
            let owed = &mut self.owed[client as usize];
            *owed = owed.saturating_sub(1);
            if self.owed.iter().all(|owed| *owed == 0) {
                self.note(|| "          all clients are content".into());
                self.phase = Phase::Quiet;
            }
        }
        let pause = self.rng.between(MS, 60 * MS);
        self.clock.after(pause, Event::Client(client));
    }
}

fn fatal(error: kvstore_core::Fatal) -> String {
    format!("fatal: {error}")
}

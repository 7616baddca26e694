//! The words that a [`Replica`](super::Replica) and its shell exchange: what it is told at start, what goes in, what
//! comes out. All values; everything of raft's own is bytes.
//!
//! What it does not do: anything. The rules are in `replica.rs`.

use bytes::Bytes;

use super::wire;
use crate::Error;
use crate::types::{Entry, Index, MemberId, RequestId, Term, Ticks};

/// What a replica is told once, the same for all its life. Sizes in bytes, times in ticks of one heartbeat interval.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    pub id: MemberId,
    /// Ticks between two heartbeats of a leader; 1 unless a test wants otherwise.
    pub heartbeat_ticks: usize,
    /// The shortest election timeout; the longest is one less than twice as long.
    pub election_ticks: usize,
    /// Entries in one append, in bytes (a single larger entry still travels).
    pub max_size_per_msg: u64,
    /// Appends on their way to one peer.
    pub max_inflight_msgs: usize,
    /// Entries in one `Effects::committed`, in bytes.
    pub max_committed_size: u64,
    /// What the tail of the log may take in memory beyond the entries that are not applied yet.
    pub tail_bytes: usize,
    /// Applied entries that stay in the log for a follower that lags.
    pub catch_up_entries: u64,
    /// The log is cut in steps of at least this many entries.
    pub cut_step: u64,
    /// A read whose round brought no answer is asked again after so long (etcd: 500 ms).
    pub read_retry_ticks: Ticks,
    /// A proposal waits so long for a leader before it fails.
    pub hold_ticks: Ticks,
    /// Proposals that wait for a leader, in bytes; beyond it they fail at once.
    pub hold_bytes: usize,
}

impl ReplicaConfig {
    /// etcd's proportions for a heartbeat of `heartbeat_ms` and an election timeout of `election_ms`.
    pub fn new(id: MemberId, heartbeat_ms: u64, election_ms: u64) -> Self {
        let ticks = |ms: u64| ms.div_ceil(heartbeat_ms.max(1)).max(1);
        let election = ticks(election_ms).max(2);
        ReplicaConfig {
            id,
            heartbeat_ticks: 1,
            election_ticks: usize::try_from(election).unwrap_or(usize::MAX / 4),
            max_size_per_msg: 1 << 20,
            max_inflight_msgs: 256,
            max_committed_size: 4 << 20,
            tail_bytes: 32 << 20,
            catch_up_entries: 5_000,
            cut_step: 1_000,
            read_retry_ticks: ticks(500),
            hold_ticks: ticks(5_000 + 2 * election_ms),
            hold_bytes: 16 << 20,
        }
    }
}

/// A place in the log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Position {
    pub index: Index,
    pub term: Term,
}

/// What the disk holds when a member starts. See [`Replica::new`] for what is accepted.
#[derive(Clone, Default, Debug)]
pub struct Boot {
    /// Different at each start: read contexts carry it, so that an answer to an earlier life is not taken for one to this.
    pub nonce: u64,
    /// As last written ([`LogWrite::hard_state`]); `None` in a new log.
    pub hard_state: Option<Bytes>,
    /// What stands before the log's first entry; (0, 0) in a new log.
    pub log_start: Position,
    /// Where each term begins in the part of the log that `entries` leaves out: (first index with it, term), ascending.
    pub terms: Vec<(Index, Term)>,
    /// The log's end: at least everything above `applied`, and always the last entry if there is any; below that as much
    /// as the tail may hold.
    pub entries: Vec<LogEntry>,
    /// What the state database has on disk.
    pub applied: Position,
    /// What the state database was last founded or installed at; `None`: it never was.
    pub installed: Option<Position>,
    /// The configuration that the state database knows ([`wire::conf_state`]).
    pub conf_state: Bytes,
}

/// An entry as the log stores it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogEntry {
    pub index: Index,
    pub term: Term,
    /// The whole entry, opaque ([`wire::entry`] reads one back).
    pub bytes: Bytes,
}

/// A read that waits for its index; the shell's number, meaning nothing here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ReadId(pub u64);

/// A snapshot that came and is complete on disk; the shell's number, meaning nothing here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SnapshotTicket(pub u64);

/// One request to be replicated.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proposal {
    pub id: RequestId,
    /// An encoded `InternalRaftRequest`.
    pub data: Bytes,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// One heartbeat interval has passed.
    Tick,
    /// From a peer, any kind but a snapshot (those come as [`Input::SnapshotReceived`]).
    Message(Bytes),
    /// To be replicated in this order; forwarded to the leader where that is another member.
    Propose(Vec<Proposal>),
    /// Likewise, but only as leader of `term`: never forwarded, refused with `NotLeader` otherwise (trap 6).
    ProposeAsLeader { term: Term, proposals: Vec<Proposal> },
    /// Answered in `reads_ready` or `reads_failed`. Several that come before one `effects` share a round.
    Read(ReadId),
    /// The log writes up to this number are on disk (synced where they had to be).
    Persisted { number: u64 },
    /// What a [`Fetch`] asked for: a prefix of it, at least one entry unless the log was cut meanwhile.
    EntriesFetched { id: u64, entries: Vec<LogEntry> },
    /// The state machine has applied everything up to `index`, and its database has everything up to `durable` on disk.
    Applied { index: Index, durable: Index },
    /// The transfer begun by a [`SnapshotBuild`] ended. Must come for each one, however it ended (trap 4).
    SnapshotSent { to: MemberId, ok: bool },
    /// A snapshot is complete and verified on disk, but not current: `message` is the `MsgSnapshot` that came with it.
    SnapshotReceived { ticket: SnapshotTicket, message: Bytes },
    /// The [`Install`] is done: the new state is the only one, durably. The log is reset after this, never before.
    SnapshotInstalled { ticket: SnapshotTicket },
    /// Messages to that peer were lost or could not be sent.
    Unreachable(MemberId),
    /// Give leadership to that member, if this one has it.
    TransferLeader(MemberId),
}

/// What to do. The order within is the order to do it in, but nothing has to be waited for.
#[derive(Default, Debug)]
pub struct Effects {
    /// Counts the effects of this replica.
    pub number: u64,
    pub leadership: Option<Leadership>,
    /// To be sent now. A message that cannot be sent at once is dropped; Raft repeats what matters.
    pub send: Vec<Outgoing>,
    /// To be written in order. Several may share one sync; one `Persisted` with the last number covers those before it.
    pub log_writes: Vec<LogWrite>,
    /// To be applied in order, after everything handed out before.
    pub committed: Vec<Entry>,
    /// These reads may be served once the index is applied.
    pub reads_ready: Vec<(ReadId, Index)>,
    pub reads_failed: Vec<(ReadId, Error)>,
    /// Proposals that were not handed to Raft and never will be.
    pub failed: Vec<(RequestId, Error)>,
    /// Entries to be read from the log.
    pub fetch: Vec<Fetch>,
    pub build_snapshots: Vec<SnapshotBuild>,
    /// Make that received snapshot current (behind what was handed out to be applied), then step `SnapshotInstalled`.
    pub install_snapshot: Option<Install>,
    /// Raft refused these: delete their files.
    pub discard_snapshots: Vec<SnapshotTicket>,
}

/// Who leads, as this member knows it. Emitted when any part of it changes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Leadership {
    pub leader: Option<MemberId>,
    pub term: Term,
    pub is_leader: bool,
}

/// A message to a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outgoing {
    pub to: MemberId,
    pub message: Bytes,
    pub kind: wire::Kind,
}

/// One atomic write to the log, in this order: `reset`, `truncate_from`, `entries`, `hard_state`, `cut_to`.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct LogWrite {
    pub number: u64,
    /// Throw the whole log away; it begins anew behind this position.
    pub reset: Option<Position>,
    /// Delete the entries from this index on; `entries` begins there.
    pub truncate_from: Option<Index>,
    pub entries: Vec<LogEntry>,
    pub hard_state: Option<Bytes>,
    /// The entries up to and including this position are not needed any more; `log_start` becomes it. May be done late.
    pub cut_to: Option<Position>,
    /// False: the write may reach the disk with a later one.
    pub must_sync: bool,
}

/// Entries `from..to` (`to` excluded) are wanted from the log, at most about `max_bytes` of them, but at least one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fetch {
    pub id: u64,
    pub from: Index,
    pub to: Index,
    pub max_bytes: u64,
}

/// Take a checkpoint of the state (it holds `at` or later), write its own position and configuration into the message
/// ([`wire::with_snapshot`]), stream both, and step [`Input::SnapshotSent`] when it is over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotBuild {
    pub to: MemberId,
    pub at: Position,
    pub message: Bytes,
}

/// A received snapshot that Raft took.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Install {
    pub ticket: SnapshotTicket,
    pub at: Position,
}

/// A copy of what is known, for status answers and metrics.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Status {
    pub leadership: Leadership,
    pub committed: Index,
    /// As stepped by `Applied` or an install.
    pub applied: Index,
    pub durable: Index,
    pub first_index: Index,
    pub last_index: Index,
    /// Everything up to it is on this member's disk.
    pub persisted: Index,
    /// This leader has committed an entry of its own term (reads are answered only then).
    pub committed_in_term: bool,
    pub snapshots_in_flight: usize,
}

impl Effects {
    pub(super) fn is_empty(&self) -> bool {
        let Effects {
            number: _,
            leadership,
            send,
            log_writes,
            committed,
            reads_ready,
            reads_failed,
            failed,
            fetch,
            build_snapshots,
            install_snapshot,
            discard_snapshots,
        } = self;
        leadership.is_none()
            && send.is_empty()
            && log_writes.is_empty()
            && committed.is_empty()
            && reads_ready.is_empty()
            && reads_failed.is_empty()
            && failed.is_empty()
            && fetch.is_empty()
            && build_snapshots.is_empty()
            && install_snapshot.is_none()
            && discard_snapshots.is_empty()
    }
}

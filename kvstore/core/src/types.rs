//! The words that every machine of the core shares: identities, positions, and the two kinds of time.

use std::fmt;

/// A member of the cluster, as etcd computes it (first 8 bytes of a SHA-1). Printed in hex, as etcd prints it. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct MemberId(pub u64);

/// The cluster, as etcd computes it from its first members. Printed in hex.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ClusterId(pub u64);

/// A lease. 0 means "no lease" on the wire and never names one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LeaseId(pub i64);

/// One proposal of one member's one life: unique across restarts (trap 7), because it carries a boot nonce.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RequestId(pub u64);

macro_rules! hex_fmt {
    ($($t:ty),*) => {$(
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{:x}", self.0) }
        }
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{:x}", self.0) }
        }
    )*};
}
hex_fmt!(MemberId, ClusterId, LeaseId, RequestId);

/// Where a change stands in history: `main` counts write requests, `sub` the changes inside one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Revision {
    pub main: i64,
    pub sub: i64,
}

impl Revision {
    pub const fn new(main: i64, sub: i64) -> Self {
        Revision { main, sub }
    }
}

/// Milliseconds on the shell's monotonic clock, from an origin of the shell's choosing. Only differences mean anything,
/// and it is never replicated: what enters the log carries durations.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct Timestamp(pub u64);

impl Timestamp {
    pub const fn after_ms(self, ms: u64) -> Self {
        Timestamp(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` to `self`; 0 if `earlier` is later.
    pub const fn since_ms(self, earlier: Timestamp) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A count of heartbeat intervals, Raft's only clock.
pub type Ticks = u64;

/// Raft's log position.
pub type Index = u64;

/// Raft's term.
pub type Term = u64;

/// What a committed entry is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryKind {
    /// An encoded `InternalRaftRequest`, or empty (a new leader's first entry).
    Normal,
    /// A change of membership; its data is the encoded raft `ConfChange` or `ConfChangeV2`, opaque here.
    ConfChange,
}

/// A committed entry on its way to the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub index: Index,
    pub term: Term,
    pub kind: EntryKind,
    pub data: bytes::Bytes,
}

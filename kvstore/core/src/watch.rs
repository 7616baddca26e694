//! Watches: who is told what, in which order, and how much may wait for whom.
//!
//! One [`WatchHub`] a member. The applier publishes revisions into it; each gRPC stream has a *session* in it, an ordered and
//! bounded queue of [`Frame`]s that the stream takes from. A stream carries many *watchers*, each over one key or range:
//!
//! ```text
//!               start > hub's revision, or 0                  publish: found by key in the range index
//!   create ──────────────────────────────────▶ synced ───────────────────────────────▶ Frame ─▶ session ─▶ stream
//!      │                                        │   ▲
//!      │ start ≤ hub's revision    queue full:  │   │ cursor > hub's revision
//!      ▼                           keeps cursor ▼   │
//!   unsynced, with a cursor ◀──────────────── blocked        catch-up: slices of history, read outside the lock,
//!      └──────────────────────────────────────────────────▶ never beyond the hub's revision (trap 5)
//! ```
//!
//! What a watcher can rely on (contract 2.7): every event of its range from its start revision on, in order, once; all events of
//! a revision in one response (or in its fragments), and of no other revision unless it catches up; a progress answer with revision R comes after every event up to R,
//! because it travels in the same queue; and whoever asks for what is compacted is told so.
//!
//! What nobody has to pay for: a slow stream holds at most its bound in memory (and ten thousand of them no more than all may
//! hold together), and catches up from history when it drains;
//! an event is encoded once, whoever watches it; ten thousand watchers of other keys cost an event nothing.
//!
//! What this module does not do: gRPC, header ids and terms, permissions, timers (the shell calls [`WatchHub::progress_tick`]),
//! or locking: the shell keeps the hub under one short mutex.

mod catch_up;
mod encode;
mod hub;
mod ranges;
mod recent;
mod session;

use bytes::Bytes;

pub use catch_up::CatchUp;
pub use hub::WatchHub;

/// One gRPC stream's place in the hub. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StreamId(pub u64);

/// Bounds; [`WatchLimits::default`] has what we run with.
#[derive(Clone, Debug)]
pub struct WatchLimits {
    /// A session with so many frames is full: event frames wait outside, as a cursor.
    pub queue_frames: usize,
    /// The same, in bytes of memory.
    pub queue_bytes: usize,
    /// The same for all sessions together: each may hold an even share of it, if that is less.
    pub total_bytes: usize,
    /// A stream takes no more frames at once than those that reach this size.
    pub take_bytes: usize,
    /// Watchers that asked for fragments get responses below this size (but at least one event): the largest request that etcd
    /// would read, `--max-request-bytes` and 512 KiB.
    pub fragment_bytes: usize,
    /// A frame of history, or a slice of it, that has reached this size ends with its revision. It may be larger than a queue:
    /// the frame that fills one goes in whole.
    pub frame_bytes: usize,
    /// The hub remembers so many of the newest revisions, so that who lags a little needs no history.
    pub recent_revisions: usize,
    /// The same, in bytes of events.
    pub recent_bytes: usize,
    /// Rows of history in one slice of catching up.
    pub catch_up_rows: usize,
    /// Watchers served by one slice.
    pub catch_up_watchers: usize,
    /// A watcher that lags by no more than this joins the synced ones under the lock; others take another slice.
    pub join_revisions: usize,
}

impl Default for WatchLimits {
    fn default() -> Self {
        WatchLimits {
            queue_frames: 8192,
            queue_bytes: 2 << 20,
            total_bytes: 256 << 20,
            take_bytes: 64 << 10,
            fragment_bytes: 2 << 20,
            frame_bytes: 4 << 20,
            recent_revisions: 1024,
            recent_bytes: 16 << 20,
            catch_up_rows: 1000,
            catch_up_watchers: 256,
            join_revisions: 64,
        }
    }
}

/// One `WatchResponse`, but for the ids and the term of its header.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Frame {
    /// -1: of no watcher (refused creations, progress of the whole stream).
    pub watch_id: i64,
    /// Of the header: the events' own, if they were published just now, else the hub's when this was queued; 0 in a cancellation
    /// by compaction.
    pub revision: i64,
    pub created: bool,
    pub canceled: bool,
    /// Not 0: the watch was cancelled because this revision is the oldest there is.
    pub compact_revision: i64,
    pub cancel_reason: String,
    /// More of the same revision follows.
    pub fragment: bool,
    /// Each an encoded `mvccpb.Event`, shared by all watchers that get it.
    pub events: Vec<Bytes>,
}

/// What the stream is told; etcd's texts (contract 2.7).
pub mod reason {
    pub const DUPLICATE_ID: &str = "mvcc: duplicate watch ID provided on the WatchStream";
    pub const EMPTY_RANGE: &str = "mvcc: watcher range is empty";
    pub const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
}

/// `watch_id` of a frame that belongs to no watcher.
pub const NO_WATCH: i64 = -1;

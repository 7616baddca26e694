//! One stream's queue and the watchers it carries.
//!
//! The queue is ordered, and bounded in frames and bytes for whatever history could give again: event frames are refused when it
//! is full. Answers to the stream's own requests, and cancellations, always go in: they can't be made again, and the shell
//! takes no further request from a stream whose queue is full.
//!
//! What this module does not do: it does not know which watchers are synced; the hub does.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;

use super::ranges::WatcherKey;
use super::{Frame, WatchLimits};

/// What a frame costs beside its events, and an event beside its bytes.
const FRAME_BYTES: usize = size_of::<Frame>();
const EVENT_BYTES: usize = size_of::<Bytes>();

/// A queue that has run empty keeps room for so many frames: most streams are quiet most of the time.
const KEPT_FRAMES: usize = 16;

/// What one session may hold: the fewer there are, the more.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    frames: usize,
    bytes: usize,
}

impl Room {
    pub(super) fn new(limits: &WatchLimits, sessions: usize) -> Room {
        // A queue that is empty is never full: one frame goes in whole.
        let share = (limits.total_bytes / sessions.max(1)).max(1);
        Room { frames: limits.queue_frames, bytes: limits.queue_bytes.min(share) }
    }
}

#[derive(Default, Debug)]
pub(super) struct Session {
    queue: VecDeque<Frame>,
    bytes: usize,
    /// By the id on the wire. Those that a compaction ended are here, and no longer in the hub.
    pub(super) watchers: BTreeMap<i64, WatcherKey>,
    /// Where the search for the next automatic id begins.
    next_id: i64,
    /// Watchers that wait for room.
    pub(super) blocked: BTreeSet<WatcherKey>,
}

impl Session {
    /// Whether event frames have to wait outside.
    pub(super) fn is_full(&self, room: Room) -> bool {
        self.queue.len() >= room.frames || self.bytes >= room.bytes
    }

    /// Whether so much was taken that it is worth catching up again.
    pub(super) fn has_drained(&self, room: Room) -> bool {
        self.queue.len() <= room.frames / 2 && self.bytes <= room.bytes / 2
    }

    /// The id for a watch that asked for none: from 0 upwards, skipping those in use.
    pub(super) fn automatic_id(&mut self) -> i64 {
        while self.watchers.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }

    pub(super) fn push(&mut self, frame: Frame) {
        self.bytes += cost(&frame);
        self.queue.push_back(frame);
    }

    /// The next frames: at most `max_frames`, and none after those that reach `max_bytes`.
    pub(super) fn take(&mut self, max_frames: usize, max_bytes: usize) -> Vec<Frame> {
        let mut bytes = 0;
        let wanted = self.queue.iter().take(max_frames).take_while(|frame| {
            let before = bytes;
            bytes += cost(frame);
            before < max_bytes
        });
        let taken: Vec<Frame> = self.queue.drain(..wanted.count()).collect();
        self.bytes -= taken.iter().map(cost).sum::<usize>();
        if self.queue.is_empty() && self.queue.capacity() > KEPT_FRAMES {
            self.queue = VecDeque::new();
        }
        taken
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

fn cost(frame: &Frame) -> usize {
    FRAME_BYTES + frame.cancel_reason.len() + frame.events.iter().map(|event| EVENT_BYTES + event.len()).sum::<usize>()
}

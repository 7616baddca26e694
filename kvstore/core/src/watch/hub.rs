//! The hub: every watcher of this member, where it stands, and what is delivered to it.
//!
//! A watcher's *cursor* is the first revision it has not been given. While it is synced the cursor is implied: everything up
//! to the hub's revision has been delivered. It leaves that state only with a cursor that points at the first thing it
//! misses, and returns to it only when the cursor is beyond the hub's revision, both under the lock; so there is never a gap
//! and never a duplicate.
//!
//! What this module does not do: read history ([`super::catch_up`]), encode, or wake anybody: it returns whom to wake.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use keelson_proto::etcdserverpb::watch_create_request::FilterType;
use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{WatchCreateRequest, WatchRequest};

use super::catch_up::{CatchUp, Interest, Source, Want};
use super::encode::{self, Encoded};
use super::ranges::{Ranges, Span, WatcherKey};
use super::recent::Recent;
use super::session::{Room, Session};
use super::{Frame, NO_WATCH, StreamId, WatchLimits, reason};
use crate::mvcc::RevisionEvents;

/// See the module.
#[derive(Debug)]
pub struct WatchHub {
    limits: WatchLimits,
    /// Everything up to here has been published.
    revision: i64,
    compacted: i64,
    sessions: BTreeMap<StreamId, Session>,
    /// Boxed: a map's nodes stand half empty.
    watchers: BTreeMap<WatcherKey, Box<Watcher>>,
    /// The synced watchers, and they alone.
    synced: Ranges,
    /// Unsynced watchers whose turn to catch up will come; may name some that are gone.
    queue: VecDeque<WatcherKey>,
    recent: Recent,
    last_stream: u64,
    last_watcher: WatcherKey,
    delivered_events: u64,
}

#[derive(Debug)]
struct Watcher {
    stream: StreamId,
    id: i64,
    /// As asked for; progress is not reported before it is reached.
    start: i64,
    cursor: i64,
    interest: Interest,
    fragment: bool,
    progress_notify: bool,
    /// No events since the last tick of the progress timer.
    quiet: bool,
    place: Place,
    /// Where its batch is, while a revision is published.
    batch: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// In the range index.
    Synced,
    /// In the catch-up queue.
    Queued,
    /// A slice is being read for it.
    CatchingUp,
    /// Its session is full.
    Blocked,
}

/// Events of one revision, or of one slice, on their way into the session.
#[derive(Default, Debug)]
struct Batch {
    events: Vec<Bytes>,
    bytes: usize,
    /// The first revision in it.
    from: i64,
}

impl Batch {
    fn add(&mut self, revision: i64, event: Bytes) {
        if self.events.is_empty() {
            self.from = revision;
            // Most have one; a vector that grows by itself begins with four.
            self.events.reserve_exact(1);
        }
        self.bytes += event.len();
        self.events.push(event);
    }
}

/// What the metrics want to know.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct WatchCounts {
    pub streams: usize,
    pub watchers: usize,
    /// Watchers that are not synced.
    pub slow_watchers: usize,
    /// Events handed to sessions since the start.
    pub events: u64,
}

impl WatchHub {
    /// `revision` and `compacted` are the store's at the start; what is published later begins above `revision`.
    pub fn new(limits: WatchLimits, revision: i64, compacted: i64) -> Self {
        WatchHub {
            limits,
            revision,
            compacted,
            sessions: BTreeMap::new(),
            watchers: BTreeMap::new(),
            synced: Ranges::default(),
            queue: VecDeque::new(),
            recent: Recent::new(revision),
            last_stream: 0,
            last_watcher: 0,
            delivered_events: 0,
        }
    }

    pub fn revision(&self) -> i64 {
        self.revision
    }

    pub fn counts(&self) -> WatchCounts {
        WatchCounts {
            streams: self.sessions.len(),
            watchers: self.watchers.len(),
            slow_watchers: self.watchers.values().filter(|watcher| watcher.place != Place::Synced).count(),
            events: self.delivered_events,
        }
    }

    // ---- The stream's side -------------------------------------------------------------------------

    pub fn open(&mut self) -> StreamId {
        self.last_stream += 1;
        let stream = StreamId(self.last_stream);
        self.sessions.insert(stream, Session::default());
        stream
    }

    /// Forgets the stream, its watchers and what it had not taken yet.
    pub fn close(&mut self, stream: StreamId) {
        if let Some(session) = self.sessions.remove(&stream) {
            session.watchers.into_values().for_each(|key| drop(self.forget(key)));
        }
    }

    /// Does what the stream's client asks. A request that is none of those we know is no reason to end the other watches: it is
    /// ignored.
    pub fn request(&mut self, stream: StreamId, request: &WatchRequest) {
        match &request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(stream, create),
            Some(RequestUnion::CancelRequest(cancel)) => self.cancel(stream, cancel.watch_id),
            Some(RequestUnion::ProgressRequest(_)) => self.request_progress(stream),
            None => {}
        }
    }

    /// Creates a watcher, or refuses to; the answer is in the queue. Permission is the caller's to check
    /// ([`refuse`](WatchHub::refuse)).
    pub fn create(&mut self, stream: StreamId, request: &WatchCreateRequest) {
        let Some(session) = self.sessions.get_mut(&stream) else { return };
        if request.start_revision < 0 {
            return self.refuse(stream, reason::COMPACTED.to_owned());
        }
        let Some(span) = Span::of_request(&request.key, &request.range_end) else {
            return self.refuse(stream, reason::EMPTY_RANGE.to_owned());
        };
        if request.watch_id != 0 && session.watchers.contains_key(&request.watch_id) {
            return self.refuse(stream, reason::DUPLICATE_ID.to_owned());
        }
        let id = if request.watch_id == 0 { session.automatic_id() } else { request.watch_id };
        self.last_watcher += 1;
        let key = self.last_watcher;
        session.watchers.insert(id, key);
        session.push(Frame { watch_id: id, revision: self.revision, created: true, ..Frame::default() });
        let start = request.start_revision;
        let watcher = Watcher {
            stream,
            id,
            start,
            cursor: if start == 0 { self.revision + 1 } else { start },
            interest: Interest {
                span,
                no_put: request.filters.contains(&(FilterType::Noput as i32)),
                no_delete: request.filters.contains(&(FilterType::Nodelete as i32)),
                prev_kv: request.prev_kv,
            },
            fragment: request.fragment,
            progress_notify: request.progress_notify,
            quiet: true,
            place: Place::CatchingUp,
            batch: None,
        };
        self.watchers.insert(key, Box::new(watcher));
        self.settle(key);
    }

    /// Answers a creation with `cancel_reason`, and creates nothing.
    pub fn refuse(&mut self, stream: StreamId, cancel_reason: String) {
        let frame = Frame {
            watch_id: NO_WATCH,
            revision: self.revision,
            created: true,
            canceled: true,
            cancel_reason,
            ..Frame::default()
        };
        if let Some(session) = self.sessions.get_mut(&stream) {
            session.push(frame);
        }
    }

    /// Cancels a watcher and says so; an unknown id gets no answer. One that a compaction ended keeps its id until then.
    pub fn cancel(&mut self, stream: StreamId, watch_id: i64) {
        let Some(session) = self.sessions.get_mut(&stream) else { return };
        let Some(key) = session.watchers.remove(&watch_id) else { return };
        session.blocked.remove(&key);
        session.push(Frame { watch_id, revision: self.revision, canceled: true, ..Frame::default() });
        self.forget(key);
    }

    /// Reports the progress of the whole stream, if all its watchers are synced and have reached their start; else the client
    /// has to ask again. One that a compaction ended is not synced until the client has cancelled it too, as in etcd.
    pub fn request_progress(&mut self, stream: StreamId) {
        let room = self.room();
        let Some(session) = self.sessions.get_mut(&stream) else { return };
        let reached = |key| self.watchers.get(key).is_some_and(|watcher| watcher.has_progress(self.revision));
        let all_reached = !session.watchers.is_empty() && session.watchers.values().all(reached);
        if all_reached && !session.is_full(room) {
            session.push(Frame { watch_id: NO_WATCH, revision: self.revision, ..Frame::default() });
        }
    }

    /// The stream's progress timer has fired: its watchers that asked for it, and got nothing since the last time, are told how
    /// far they are.
    pub fn progress_tick(&mut self, stream: StreamId) {
        let room = self.room();
        let Some(session) = self.sessions.get_mut(&stream) else { return };
        let keys: Vec<(i64, WatcherKey)> = session.watchers.iter().map(|(id, key)| (*id, *key)).collect();
        for (watch_id, key) in keys {
            let Some(watcher) = self.watchers.get_mut(&key) else { continue };
            let was_quiet = std::mem::replace(&mut watcher.quiet, true);
            if watcher.progress_notify && was_quiet && watcher.has_progress(self.revision) && !session.is_full(room) {
                session.push(Frame { watch_id, revision: self.revision, ..Frame::default() });
            }
        }
    }

    /// Whether the stream may send another request: its answers would find room.
    pub fn has_room(&self, stream: StreamId) -> bool {
        let room = self.room();
        self.sessions.get(&stream).is_some_and(|session| !session.is_full(room))
    }

    /// Whether there is something to take.
    pub fn has_frames(&self, stream: StreamId) -> bool {
        self.sessions.get(&stream).is_some_and(|session| !session.is_empty())
    }

    /// The next frames of the stream, at most `max`. Watchers that waited for room catch up from here
    /// ([`has_catch_up`](WatchHub::has_catch_up)).
    pub fn take(&mut self, stream: StreamId, max: usize) -> Vec<Frame> {
        let room = self.room();
        let Some(session) = self.sessions.get_mut(&stream) else { return Vec::new() };
        let frames = session.take(max, self.limits.take_bytes);
        if session.has_drained(room) {
            for key in std::mem::take(&mut session.blocked) {
                if let Some(watcher) = self.watchers.get_mut(&key) {
                    watcher.place = Place::Queued;
                    self.queue.push_back(key);
                }
            }
        }
        frames
    }

    // ---- The applier's side ------------------------------------------------------------------------

    /// `events` were applied, and with them the store stands at `revision`. The view they can be read from is published
    /// already. Returns the streams that have something to take.
    pub fn publish(&mut self, revision: i64, events: Vec<RevisionEvents>) -> Vec<StreamId> {
        let before = self.revision;
        self.revision = before.max(revision);
        if self.watchers.is_empty() {
            self.recent = Recent::new(self.revision);
            return Vec::new();
        }
        let mut wakes = Vec::new();
        let mut batches: Vec<(WatcherKey, Batch)> = Vec::new();
        let mut found = Vec::new();
        for changes in events {
            if changes.revision <= before {
                debug_assert!(false, "revision {} published twice", changes.revision);
                continue;
            }
            let encoded = Encoded::new(changes);
            for event in &encoded.events {
                found.clear();
                self.synced.find(event.key(), &mut found);
                for key in &found {
                    let watcher = self.watchers.get_mut(key).expect("the range index holds live watchers only");
                    if encoded.revision < watcher.cursor {
                        continue;
                    }
                    let picked = watcher.interest.pick(encoded.revision, event, self.compacted);
                    let Some(bytes) = picked else { continue };
                    let at = *watcher.batch.get_or_insert(batches.len());
                    if at == batches.len() {
                        batches.push((*key, Batch::default()));
                    }
                    batches[at].1.add(encoded.revision, bytes.clone());
                }
            }
            for (key, batch) in batches.drain(..) {
                if let Some(watcher) = self.watchers.get_mut(&key) {
                    watcher.batch = None;
                }
                self.flush(key, batch, encoded.revision, &mut wakes);
            }
            self.recent.push(encoded, &self.limits);
        }
        wakes.sort_unstable();
        wakes.dedup();
        wakes
    }

    /// The store was compacted to `revision`: whoever still needs something older is told so.
    pub fn compacted(&mut self, revision: i64) -> Vec<StreamId> {
        self.compacted = self.compacted.max(revision);
        let lost: Vec<WatcherKey> = self
            .watchers
            .iter()
            .filter(|(_, watcher)| matches!(watcher.place, Place::Queued | Place::Blocked))
            .filter(|(_, watcher)| watcher.cursor < self.compacted)
            .map(|(key, _)| *key)
            .collect();
        lost.into_iter().filter_map(|key| self.cancel_compacted(key, self.compacted)).collect()
    }

    /// A snapshot was installed: the store went from the hub's revision to `revision` without publishing what lies between.
    /// Every watcher keeps its cursor, and reads what it missed from the new history, or is told that it is compacted (trap 4).
    pub fn installed(&mut self, revision: i64, compacted: i64) -> Vec<StreamId> {
        let synced: Vec<WatcherKey> =
            self.watchers.iter().filter(|(_, watcher)| watcher.place == Place::Synced).map(|(key, _)| *key).collect();
        for key in &synced {
            let watcher = self.watchers.get_mut(key).expect("collected above");
            watcher.cursor = watcher.cursor.max(self.revision + 1);
            watcher.place = Place::CatchingUp;
        }
        self.synced.clear();
        self.revision = self.revision.max(revision);
        self.recent = Recent::new(self.revision);
        let mut wakes = self.compacted(compacted);
        for key in synced {
            wakes.extend(self.settle(key));
        }
        wakes
    }

    // ---- Catching up -------------------------------------------------------------------------------

    /// Whether [`next_catch_up`](WatchHub::next_catch_up) has something to do.
    pub fn has_catch_up(&self) -> bool {
        !self.queue.is_empty()
    }

    /// A slice for those whose turn it is; `None`: nobody is left. The caller reads it outside the lock, and hands it to
    /// [`finish`](WatchHub::finish); if reading fails the member is broken, and nothing has to be finished.
    pub fn next_catch_up(&mut self) -> Option<CatchUp> {
        let room = self.room();
        let mut slice: Option<CatchUp> = None;
        // Once there is a slice, so many are looked at that might share it; until then, as many as it takes.
        let mut looks = self.queue.len().min(4 * self.limits.catch_up_watchers);
        while slice.is_none() || looks > 0 {
            let Some(key) = self.queue.pop_front() else { break };
            looks = looks.saturating_sub(1);
            let Some(watcher) = self.watchers.get_mut(&key) else { continue };
            if watcher.place != Place::Queued {
                continue;
            }
            let session = self.sessions.get_mut(&watcher.stream).expect("a watcher's stream is open");
            if session.is_full(room) {
                watcher.place = Place::Blocked;
                session.blocked.insert(key);
                continue;
            }
            let recent = self.recent.covers(watcher.cursor);
            let joins = slice.as_ref().is_none_or(|slice| {
                let near = watcher.cursor - slice.from;
                let same_source = recent == matches!(slice.source, Source::Recent(_));
                same_source && near >= 0 && near <= slice.max_rows as i64
            });
            if !joins {
                self.queue.push_back(key);
                continue;
            }
            let (cursor, interest) = (watcher.cursor, watcher.interest.clone());
            watcher.place = Place::CatchingUp;
            let slice =
                slice.get_or_insert_with(|| self.limits.slice(&self.recent, cursor, self.revision, self.compacted));
            slice.wants.push(Want { watcher: key, cursor, interest, found: Vec::new() });
            if slice.wants.len() >= self.limits.catch_up_watchers {
                break;
            }
        }
        slice
    }

    /// Delivers what a slice found. Returns the streams that have something to take.
    pub fn finish(&mut self, slice: CatchUp) -> Vec<StreamId> {
        let mut wakes = Vec::new();
        for want in slice.wants {
            let Some(watcher) = self.watchers.get_mut(&want.watcher) else { continue };
            debug_assert_eq!((watcher.place, watcher.cursor), (Place::CatchingUp, want.cursor));
            if watcher.cursor < slice.compacted {
                let compacted = self.compacted.max(slice.compacted);
                wakes.extend(self.cancel_compacted(want.watcher, compacted));
                continue;
            }
            if self.deliver(want.watcher, want.found, slice.next, &mut wakes) {
                wakes.extend(self.settle(want.watcher));
            }
        }
        wakes
    }

    /// Puts revisions into the watcher's session, in frames of a bounded size. False if the session is full before the end;
    /// the watcher is blocked then, at the first revision that it missed.
    fn deliver(
        &mut self,
        key: WatcherKey,
        found: Vec<(i64, Vec<Bytes>)>,
        next: i64,
        wakes: &mut Vec<StreamId>,
    ) -> bool {
        let mut batch = Batch::default();
        for (revision, events) in found {
            for event in events {
                batch.add(revision, event);
            }
            if batch.bytes >= self.limits.frame_bytes
                && !self.flush(key, std::mem::take(&mut batch), self.revision, wakes)
            {
                return false;
            }
        }
        if !self.flush(key, batch, self.revision, wakes) {
            return false;
        }
        if let Some(watcher) = self.watchers.get_mut(&key) {
            watcher.cursor = watcher.cursor.max(next);
        }
        true
    }

    fn room(&self) -> Room {
        Room::new(&self.limits, self.sessions.len())
    }

    /// Moves a batch into its watcher's session; false if that is full: the watcher is blocked then, at the batch's beginning.
    fn flush(&mut self, key: WatcherKey, batch: Batch, revision: i64, wakes: &mut Vec<StreamId>) -> bool {
        let room = self.room();
        let Some(watcher) = self.watchers.get_mut(&key) else { return false };
        if batch.events.is_empty() {
            return true;
        }
        let session = self.sessions.get_mut(&watcher.stream).expect("a watcher's stream is open");
        if session.is_full(room) {
            if watcher.place == Place::Synced {
                self.synced.remove(&watcher.interest.span, key);
            }
            watcher.cursor = batch.from;
            watcher.place = Place::Blocked;
            session.blocked.insert(key);
            return false;
        }
        self.delivered_events += batch.events.len() as u64;
        watcher.quiet = false;
        if wakes.last() != Some(&watcher.stream) {
            wakes.push(watcher.stream);
        }
        for frame in encode::frames(watcher.id, revision, batch.events, watcher.fragment, &self.limits) {
            session.push(frame);
        }
        true
    }

    /// Puts a watcher that is in no set where its cursor says it belongs. Returns its stream if that has to be woken.
    fn settle(&mut self, key: WatcherKey) -> Option<StreamId> {
        let watcher = self.watchers.get_mut(&key)?;
        if watcher.cursor <= self.revision && watcher.cursor < self.compacted {
            return self.cancel_compacted(key, self.compacted);
        }
        let lag = (self.revision + 1).saturating_sub(watcher.cursor);
        let mut wakes = Vec::new();
        if lag > 0 {
            if lag > self.limits.join_revisions as i64 || !self.recent.covers(watcher.cursor) {
                watcher.place = Place::Queued;
                self.queue.push_back(key);
                return None;
            }
            let found = self.recent.pick(watcher.cursor, &watcher.interest, self.compacted);
            if !self.deliver(key, found, self.revision + 1, &mut wakes) {
                return wakes.pop();
            }
        }
        let watcher = self.watchers.get_mut(&key)?;
        watcher.place = Place::Synced;
        self.synced.insert(&watcher.interest.span, key);
        wakes.pop()
    }

    /// Ends a watcher that needs what is gone. Its id stays taken until the client cancels it, as in etcd.
    fn cancel_compacted(&mut self, key: WatcherKey, compact_revision: i64) -> Option<StreamId> {
        let watcher = self.forget(key)?;
        let session = self.sessions.get_mut(&watcher.stream)?;
        session.blocked.remove(&key);
        session.push(Frame { watch_id: watcher.id, canceled: true, compact_revision, ..Frame::default() });
        Some(watcher.stream)
    }

    /// Takes a watcher out of the hub, but for its session.
    fn forget(&mut self, key: WatcherKey) -> Option<Box<Watcher>> {
        let watcher = self.watchers.remove(&key)?;
        if watcher.place == Place::Synced {
            self.synced.remove(&watcher.interest.span, key);
        }
        Some(watcher)
    }
}

impl Watcher {
    fn has_progress(&self, revision: i64) -> bool {
        self.place == Place::Synced && revision >= self.start
    }
}

impl WatchLimits {
    /// An empty slice from `cursor` on.
    fn slice(&self, recent: &Recent, cursor: i64, revision: i64, compacted: i64) -> CatchUp {
        let mut slice = CatchUp {
            from: cursor,
            to: revision,
            max_rows: self.catch_up_rows,
            max_bytes: self.frame_bytes,
            source: Source::History,
            wants: Vec::new(),
            next: revision + 1,
            compacted,
        };
        if recent.covers(cursor) {
            let revisions: Vec<Arc<Encoded>> = recent.from(cursor).take(self.catch_up_rows).cloned().collect();
            if revisions.len() == self.catch_up_rows
                && let Some(last) = revisions.last()
            {
                slice.next = last.revision + 1;
            }
            slice.source = Source::Recent(revisions);
        }
        slice
    }
}

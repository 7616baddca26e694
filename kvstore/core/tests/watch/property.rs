//! Random schedules against a naive model: whatever is published, created, canceled, taken slowly, compacted or installed in
//! whatever order, each watcher sees exactly the events of its range from its start on, in order, whole revisions at a time, no
//! gap, no duplicate; and progress never claims what was not delivered. Beside the hub stands the real store on the memory
//! backend: what it says of each revision is held against the model, and watchers catch up from its history.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use keelson_proto::etcdserverpb::WatchCreateRequest;
use keelson_proto::mvccpb;
use kvstore_core::mvcc::{EventKind, RevisionEvents};
use kvstore_core::watch::{CatchUp, Frame, StreamId, WatchHub, WatchLimits};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use prost::Message;

use crate::history::{Change, History};
use crate::real::RealStore;

const STREAMS: u64 = 3;
const KEYS: u8 = 6;

#[derive(Clone, Debug)]
enum Op {
    /// Applied; not yet published.
    Apply(Vec<(u8, bool)>),
    Publish,
    Create {
        stream: u64,
        keys: Range<u8>,
        single: bool,
        back: i64,
        options: u8,
    },
    Cancel {
        stream: u64,
        id: i64,
    },
    Take {
        stream: u64,
        max: usize,
    },
    Slice,
    Read,
    Finish,
    Compact {
        back: i64,
    },
    /// Everything applied becomes visible without being published.
    Install,
    Progress {
        stream: u64,
    },
    Tick {
        stream: u64,
    },
    Close {
        stream: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let stream = 1..=STREAMS;
    prop_oneof![
        8 => prop::collection::vec((0..KEYS, any::<bool>()), 1..4).prop_map(Op::Apply),
        6 => Just(Op::Publish),
        4 => (stream.clone(), 0..KEYS, 1..KEYS, any::<bool>(), -2..20_i64, any::<u8>()).prop_map(
            |(stream, from, len, single, back, options)| Op::Create {
                stream, keys: from..from + len, single, back, options
            }
        ),
        1 => (stream.clone(), 0..4_i64).prop_map(|(stream, id)| Op::Cancel { stream, id }),
        5 => (stream.clone(), 0..6_usize).prop_map(|(stream, max)| Op::Take { stream, max }),
        5 => Just(Op::Slice),
        5 => Just(Op::Read),
        5 => Just(Op::Finish),
        2 => (0..8_i64).prop_map(|back| Op::Compact { back }),
        1 => Just(Op::Install),
        3 => stream.clone().prop_map(|stream| Op::Progress { stream }),
        2 => stream.clone().prop_map(|stream| Op::Tick { stream }),
        1 => stream.prop_map(|stream| Op::Close { stream }),
    ]
}

/// What a stream's client knows of one of its watches.
#[derive(Debug)]
struct Seen {
    request: WatchCreateRequest,
    /// When it was created.
    compacted: i64,
    /// The first revision that it is owed.
    start: i64,
    events: Vec<mvccpb::Event>,
    in_fragments: bool,
}

#[derive(Default)]
struct Client {
    stream: Option<StreamId>,
    /// Creations without an answer yet, in order, and what was compacted when they were asked for.
    asked: Vec<(WatchCreateRequest, i64)>,
    watches: BTreeMap<i64, Seen>,
    /// Watches that a compaction ended, until the client cancels them as well.
    lost: BTreeMap<i64, Seen>,
    /// Watches that were canceled at the client's wish, which may still be owed what came before: only a prefix is checked.
    ended: Vec<Seen>,
}

struct World {
    hub: WatchHub,
    history: History,
    store: RealStore,
    /// Applied, not yet published.
    unpublished: Vec<RevisionEvents>,
    clients: Vec<Client>,
    slices: Vec<(CatchUp, bool)>,
}

impl World {
    fn new(limits: WatchLimits) -> World {
        let mut hub = WatchHub::new(limits, 1, -1);
        let clients = (0..STREAMS).map(|_| Client { stream: Some(hub.open()), ..Client::default() }).collect();
        World {
            hub,
            history: History::default(),
            store: RealStore::default(),
            unpublished: Vec::new(),
            clients,
            slices: Vec::new(),
        }
    }

    fn play(&mut self, op: Op) {
        match op {
            Op::Apply(changes) => self.apply(changes),
            Op::Publish => {
                let new = std::mem::take(&mut self.unpublished);
                self.hub.publish(self.history.revision, new);
            }
            Op::Create { stream, keys, single, back, options } => self.create(stream, keys, single, back, options),
            Op::Cancel { stream, id } => {
                if let Some(stream) = self.client(stream).stream {
                    self.hub.cancel(stream, id);
                }
            }
            Op::Take { stream, max } => self.take(stream, max),
            Op::Slice => match self.hub.next_catch_up() {
                Some(slice) => self.slices.push((slice, false)),
                None => assert!(!self.hub.has_catch_up(), "the pump would go to sleep with work left"),
            },
            Op::Read => {
                for (slice, read) in self.slices.iter_mut().filter(|(_, read)| !*read) {
                    slice.read(&self.store.view(), self.store.bounds()).unwrap();
                    *read = true;
                }
            }
            Op::Finish => {
                if let Some(at) = self.slices.iter().position(|(_, read)| *read) {
                    let (slice, _) = self.slices.remove(at);
                    self.hub.finish(slice);
                }
            }
            Op::Compact { back } => {
                let revision = self.hub.revision() - back;
                if revision > self.history.compacted.max(0) {
                    self.history.compacted = revision;
                    let compacted = self.store.compact(revision);
                    self.hub.compacted(compacted);
                }
            }
            Op::Install => {
                self.unpublished.clear();
                self.hub.installed(self.history.revision, self.history.compacted);
            }
            Op::Progress { stream } => {
                if let Some(stream) = self.client(stream).stream {
                    self.hub.request_progress(stream);
                }
            }
            Op::Tick { stream } => {
                if let Some(stream) = self.client(stream).stream {
                    self.hub.progress_tick(stream);
                }
            }
            Op::Close { stream } => {
                if let Some(open) = self.client(stream).stream.take() {
                    self.hub.close(open);
                }
                let stream_id = self.hub.open();
                *self.client(stream) = Client { stream: Some(stream_id), ..Client::default() };
            }
        }
    }

    fn client(&mut self, stream: u64) -> &mut Client {
        &mut self.clients[stream as usize - 1]
    }

    fn apply(&mut self, changes: Vec<(u8, bool)>) {
        let revision = self.history.revision + 1;
        let mut keys = Vec::new();
        let mut distinct = Vec::new();
        for (key, put) in changes {
            if !keys.contains(&key) {
                keys.push(key);
                let key = name(key);
                distinct.push(if put { Change::Put(key, format!("v{revision}")) } else { Change::Delete(key) });
            }
        }
        let before = self.history.revisions.len();
        self.history.apply(&distinct);
        let events = self.store.apply(&distinct);
        assert_eq!(events, self.history.revisions[before..], "the store and the model differ");
        self.unpublished.extend(events);
    }

    fn create(&mut self, stream: u64, keys: Range<u8>, single: bool, back: i64, options: u8) {
        let start = match back {
            19 => 0,
            // The oldest there is.
            15..19 => self.history.compacted.max(1),
            back => (self.hub.revision() - back).max(1),
        };
        let request = WatchCreateRequest {
            key: Bytes::from(name(keys.start)),
            range_end: Bytes::from(match (single, keys.end > KEYS) {
                (true, _) => String::new(),
                (false, true) => "\0".to_owned(),
                (false, false) => name(keys.end),
            }),
            start_revision: start,
            progress_notify: options & 1 != 0,
            filters: [(2, 0), (4, 1)].iter().filter(|(bit, _)| options & bit == *bit).map(|(_, f)| *f).collect(),
            prev_kv: options & 8 != 0,
            watch_id: 0,
            fragment: options & 16 != 0,
        };
        let compacted = self.history.compacted;
        let client = self.client(stream);
        client.asked.push((request.clone(), compacted));
        let stream = client.stream.unwrap();
        self.hub.create(stream, &request);
    }

    fn take(&mut self, stream: u64, max: usize) {
        let open = self.client(stream).stream.unwrap();
        let (revision, compacted) = (self.hub.revision(), self.history.compacted);
        for frame in self.hub.take(open, max) {
            let World { history, clients, .. } = self;
            clients[stream as usize - 1].see(&frame, history, revision, compacted);
        }
    }

    /// Lets everything come to rest, and holds every watch against what it is owed.
    fn settle(&mut self) {
        self.play(Op::Publish);
        for _ in 0..10_000 {
            self.play(Op::Slice);
            self.play(Op::Read);
            while !self.slices.is_empty() {
                self.play(Op::Finish);
            }
            (1..=STREAMS).for_each(|stream| self.take(stream, usize::MAX));
            if !self.hub.has_catch_up() && (1..=STREAMS).all(|stream| !self.has_frames(stream)) {
                break;
            }
        }
        assert!(!self.hub.has_catch_up(), "catching up never ends");
        for stream in 1..=STREAMS {
            self.play(Op::Progress { stream });
            self.take(stream, usize::MAX);
        }
        for client in &self.clients {
            assert!(client.asked.is_empty(), "a creation without an answer");
            for seen in client.watches.values() {
                seen.check_prefix(&self.history);
                assert_eq!(seen.events.len(), seen.owed(&self.history, i64::MAX).len(), "{seen:?}");
            }
            client.ended.iter().chain(client.lost.values()).for_each(|seen| seen.check_prefix(&self.history));
        }
    }

    fn has_frames(&mut self, stream: u64) -> bool {
        let stream = self.client(stream).stream.unwrap();
        self.hub.has_frames(stream)
    }
}

impl Client {
    fn see(&mut self, frame: &Frame, history: &History, revision: i64, compacted: i64) {
        assert!(frame.revision <= revision);
        if frame.created {
            let (request, compacted) = self.asked.remove(0);
            assert!(!frame.canceled, "nothing asked for here is refused");
            let start = if request.start_revision == 0 { frame.revision + 1 } else { request.start_revision };
            let seen = Seen { request, compacted, start, events: Vec::new(), in_fragments: false };
            assert!(self.watches.insert(frame.watch_id, seen).is_none());
        } else if frame.canceled {
            let live = self.watches.remove(&frame.watch_id);
            if frame.compact_revision == 0 {
                let seen = live.or_else(|| self.lost.remove(&frame.watch_id));
                self.ended.push(seen.expect("canceled once, after it was created"));
                return;
            }
            assert_eq!((frame.revision, frame.cancel_reason.as_str()), (0, ""));
            assert!(frame.compact_revision <= compacted);
            let seen = live.expect("lost once, after it was created");
            // All that was owed up to its last event was delivered; it must really need something that is gone.
            let cursor = seen.events.last().map_or(seen.start, |event| event.kv.as_ref().unwrap().mod_revision + 1);
            assert!(cursor < frame.compact_revision, "cancelled without need: {seen:?}");
            assert!(self.lost.insert(frame.watch_id, seen).is_none());
        } else if frame.events.is_empty() {
            // Progress: everything up to there must have come already.
            for (id, seen) in &self.watches {
                if frame.watch_id == -1 || frame.watch_id == *id {
                    assert!(frame.revision >= seen.request.start_revision, "progress before the start");
                    assert_eq!(seen.events.len(), seen.owed(history, frame.revision).len(), "progress lies: {seen:?}");
                }
            }
        } else {
            let seen = self.watches.get_mut(&frame.watch_id).expect("created before, and not canceled");
            seen.see(frame, compacted);
            seen.check_prefix(history);
        }
    }
}

impl Seen {
    fn see(&mut self, frame: &Frame, compacted: i64) {
        assert!(!frame.fragment || self.request.fragment, "a fragment nobody asked for");
        for event in &frame.events {
            let event = mvccpb::Event::decode(event.clone()).unwrap();
            let kv = event.kv.as_ref().unwrap();
            let needs_prev = self.request.prev_kv && (event.r#type == 1 || kv.create_revision != kv.mod_revision);
            assert!(needs_prev || event.prev_kv.is_none());
            assert!(event.prev_kv.is_none() || kv.mod_revision > self.compacted, "a previous value that is compacted");
            assert!(!needs_prev || event.prev_kv.is_some() || kv.mod_revision - 1 < compacted, "no previous value");
            self.events.push(event);
        }
        self.in_fragments = frame.fragment;
    }

    fn wants(&self, key: &[u8]) -> bool {
        let (start, end) = (self.request.key.as_ref(), self.request.range_end.as_ref());
        match end {
            [] => key == start,
            [0] => key >= start,
            end => key >= start && key < end,
        }
    }

    /// (revision, key, previous value) of all events up to `to`.
    fn owed(&self, history: &History, to: i64) -> Vec<(i64, Bytes)> {
        let range = history.revisions.iter().filter(|r| r.revision >= self.start && r.revision <= to);
        range
            .flat_map(|revision| revision.events.iter().map(move |event| (revision.revision, event)))
            .filter(|(_, event)| self.wants(&event.key))
            .filter(|(_, event)| !self.request.filters.contains(&i32::from(event.kind == EventKind::Delete)))
            .map(|(revision, event)| (revision, event.kv.clone()))
            .collect()
    }

    /// What came is the beginning of what is owed, and stops at the end of a revision.
    fn check_prefix(&self, history: &History) {
        let owed = self.owed(history, i64::MAX);
        assert!(self.events.len() <= owed.len(), "too many: {self:?}");
        for (event, (revision, kv)) in self.events.iter().zip(&owed) {
            let got = event.kv.as_ref().unwrap();
            assert_eq!(got.mod_revision, *revision);
            assert_eq!(&Bytes::from(got.encode_to_vec()), kv);
        }
        if let (Some((next, _)), Some(last)) = (owed.get(self.events.len()), self.events.last())
            && !self.in_fragments
        {
            assert_ne!(*next, last.kv.as_ref().unwrap().mod_revision, "half a revision: {self:?}");
        }
    }
}

fn name(key: u8) -> String {
    char::from(b'a' + key).to_string()
}

fn limits() -> impl Strategy<Value = WatchLimits> {
    (1..6_usize, 1..6_usize, 0..6_usize, 1..6_usize, 0..4_usize, 1..200_usize, 1..4_usize).prop_map(
        |(queue_frames, rows, recent, watchers, join, frame_bytes, size)| WatchLimits {
            queue_frames,
            queue_bytes: 300 * size,
            total_bytes: 400 * size,
            take_bytes: 150 * size,
            fragment_bytes: 100 * size,
            frame_bytes,
            recent_revisions: recent,
            recent_bytes: 2000,
            catch_up_rows: rows,
            catch_up_watchers: watchers,
            join_revisions: join,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        rng_seed: RngSeed::Fixed(5),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_watcher_sees_exactly_its_events(limits in limits(), ops in prop::collection::vec(op(), 1..200)) {
        let mut world = World::new(limits);
        ops.into_iter().for_each(|op| world.play(op));
        world.settle();
    }
}

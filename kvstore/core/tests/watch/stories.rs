//! The commands of `testscripts/watch`.
//!
//! | command | |
//! |---|---|
//! | `hub revision=N queue-frames=N queue-bytes=N total-bytes=N fragment-bytes=N frame-bytes=N recent=N rows=N join=N` | begins anew |
//! | `open`, `close S` | a stream |
//! | `create S key=K end=K start=N id=N noput nodelete prev progress fragment` | `\0` is the zero byte, nothing is nothing |
//! | `ask S nothing` | a request that is none of those we know |
//! | `refuse S text`, `cancel S id=N`, `progress S`, `tick S`, `take S N` | |
//! | `put K V`, `del K`, `txn put K V, del K; put …` | applied and published; `;` begins another revision |
//! | `ahead put …`, `publish` | applied first, published later |
//! | `compact N`, `install put …; …` | |
//! | `slice`, `read`, `finish`, `catch-up` | one slice in three steps; all of them |

use std::fmt::Write as _;

use bytes::Bytes;
use keelson_proto::etcdserverpb::watch_request::RequestUnion;
use keelson_proto::etcdserverpb::{WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest};
use keelson_proto::mvccpb;
use kvstore_core::watch::{CatchUp, Frame, StreamId, WatchHub, WatchLimits};
use prost::Message;

use crate::history::{Change, History};
use crate::story::{Command, Teller, play_all};

#[test]
fn stories() {
    play_all::<Story>("watch");
}

struct Story {
    hub: WatchHub,
    history: History,
    slice: Option<CatchUp>,
}

impl Default for Story {
    fn default() -> Self {
        Story { hub: WatchHub::new(WatchLimits::default(), 1, -1), history: History::default(), slice: None }
    }
}

impl Teller for Story {
    fn tell(&mut self, command: &Command, out: &mut String) {
        let stream = || StreamId(command.word(0));
        match command.name.as_str() {
            "hub" => self.begin(command),
            "open" => writeln!(out, "stream {}", self.hub.open().0).unwrap(),
            "close" => self.hub.close(stream()),
            "create" => self.ask(stream(), Some(RequestUnion::CreateRequest(create(command)))),
            "ask" => self.ask(stream(), None),
            "refuse" => self.hub.refuse(stream(), command.rest.split_once(' ').unwrap().1.to_owned()),
            "cancel" => {
                let watch_id = command.option("id").unwrap();
                self.ask(stream(), Some(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })));
            }
            "progress" => self.ask(stream(), Some(RequestUnion::ProgressRequest(WatchProgressRequest {}))),
            "tick" => self.hub.progress_tick(stream()),
            "take" => {
                let max = command.words.get(1).map_or(usize::MAX, |max| max.parse().unwrap());
                let frames = self.hub.take(stream(), max);
                frames.iter().for_each(|frame| print(frame, out));
                if frames.is_empty() {
                    writeln!(out, "nothing").unwrap();
                }
            }
            "put" | "del" => {
                self.apply(&format!("{} {}", command.name, command.rest));
                self.publish(out);
            }
            "txn" => {
                self.apply(&command.rest);
                self.publish(out);
            }
            "ahead" => self.apply(&command.rest),
            "publish" => self.publish(out),
            "compact" => {
                self.history.compacted = command.word(0);
                let wakes = self.hub.compacted(self.history.compacted);
                wake(&wakes, out);
            }
            "install" => {
                self.apply(&command.rest);
                let wakes = self.hub.installed(self.history.revision, self.history.compacted);
                wake(&wakes, out);
            }
            "slice" => self.slice(out),
            "read" => self.read(),
            "finish" => {
                let slice = self.slice.take().unwrap();
                let wakes = self.hub.finish(slice);
                wake(&wakes, out);
            }
            "catch-up" => {
                while self.hub.has_catch_up() {
                    self.slice(out);
                    if self.slice.is_some() {
                        self.read();
                        let slice = self.slice.take().unwrap();
                        let wakes = self.hub.finish(slice);
                        wake(&wakes, out);
                    }
                }
            }
            "counts" => writeln!(out, "{:?}", self.hub.counts()).unwrap(),
            "room" => writeln!(out, "{}", self.hub.has_room(stream())).unwrap(),
            other => panic!("unknown command {other}"),
        }
    }
}

impl Story {
    fn begin(&mut self, command: &Command) {
        let mut limits = WatchLimits::default();
        let set = |limit: &mut usize, name: &str| *limit = command.option(name).unwrap_or(*limit);
        set(&mut limits.queue_frames, "queue-frames");
        set(&mut limits.queue_bytes, "queue-bytes");
        set(&mut limits.total_bytes, "total-bytes");
        set(&mut limits.fragment_bytes, "fragment-bytes");
        set(&mut limits.frame_bytes, "frame-bytes");
        set(&mut limits.recent_revisions, "recent");
        set(&mut limits.catch_up_rows, "rows");
        set(&mut limits.catch_up_watchers, "watchers");
        set(&mut limits.join_revisions, "join");
        let revision = command.option("revision").unwrap_or(1);
        let compacted = command.option("compacted").unwrap_or(-1);
        self.history = History { revision, compacted, ..History::default() };
        self.hub = WatchHub::new(limits, revision, compacted);
        self.slice = None;
    }

    fn ask(&mut self, stream: StreamId, request_union: Option<RequestUnion>) {
        self.hub.request(stream, &WatchRequest { request_union });
    }

    fn apply(&mut self, text: &str) {
        for revision in text.split(';') {
            let changes: Vec<Change> = revision.split(',').map(change).collect();
            self.history.apply(&changes);
        }
    }

    fn publish(&mut self, out: &mut String) {
        let after = self.hub.revision();
        let new = self.history.revisions.iter().filter(|changes| changes.revision > after).cloned().collect();
        let wakes = self.hub.publish(self.history.revision, new);
        wake(&wakes, out);
    }

    fn slice(&mut self, out: &mut String) {
        self.slice = self.hub.next_catch_up();
        if let Some(slice) = &self.slice {
            let revisions = slice.revisions();
            writeln!(out, "slice {}..={} for {}", revisions.start(), revisions.end(), slice.watchers()).unwrap();
        }
    }

    fn read(&mut self) {
        let history = &self.history;
        let slice = self.slice.as_mut().unwrap();
        slice.read_with(history.bounds(), |from, to, rows, wanted, _| history.read(from, to, rows, wanted)).unwrap();
    }
}

fn create(command: &Command) -> WatchCreateRequest {
    let bytes = |name: &str| Bytes::from(command.option::<String>(name).unwrap_or_default().replace("\\0", "\0"));
    let mut filters = Vec::new();
    filters.extend(command.has("noput").then_some(0));
    filters.extend(command.has("nodelete").then_some(1));
    WatchCreateRequest {
        key: bytes("key"),
        range_end: bytes("end"),
        start_revision: command.option("start").unwrap_or(0),
        progress_notify: command.has("progress"),
        filters,
        prev_kv: command.has("prev"),
        watch_id: command.option("id").unwrap_or(0),
        fragment: command.has("fragment"),
    }
}

fn change(text: &str) -> Change {
    match text.split_whitespace().collect::<Vec<_>>()[..] {
        ["put", key, value] => Change::Put(key.to_owned(), value.to_owned()),
        ["del", key] => Change::Delete(key.to_owned()),
        _ => panic!("not a change: {text}"),
    }
}

fn wake(streams: &[StreamId], out: &mut String) {
    for stream in streams {
        writeln!(out, "wake {}", stream.0).unwrap();
    }
}

fn print(frame: &Frame, out: &mut String) {
    write!(out, "{} @{}", frame.watch_id, frame.revision).unwrap();
    for (said, word) in [(frame.created, " created"), (frame.canceled, " canceled"), (frame.fragment, " fragment")] {
        out.push_str(if said { word } else { "" });
    }
    if frame.compact_revision != 0 {
        write!(out, " compact_revision={}", frame.compact_revision).unwrap();
    }
    if !frame.cancel_reason.is_empty() {
        write!(out, " reason: {}", frame.cancel_reason).unwrap();
    }
    out.push('\n');
    for event in &frame.events {
        let event = mvccpb::Event::decode(event.clone()).unwrap();
        let kv = event.kv.unwrap();
        let key = String::from_utf8_lossy(&kv.key).into_owned();
        match event.r#type {
            0 => write!(
                out,
                "  put {key}={} mod={} create={} version={}",
                String::from_utf8_lossy(&kv.value),
                kv.mod_revision,
                kv.create_revision,
                kv.version
            ),
            _ => write!(out, "  del {key} mod={}", kv.mod_revision),
        }
        .unwrap();
        if let Some(prev) = event.prev_kv {
            write!(out, " (was {} of {})", String::from_utf8_lossy(&prev.value), prev.mod_revision).unwrap();
        }
        out.push('\n');
    }
}

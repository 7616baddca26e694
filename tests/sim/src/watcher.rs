//! Watchers: each follows some keys at one member, is cut off now and then, and goes on at another from where it was. What
//! it was told is kept connection by connection, and each connection is judged against the whole history.
//!
//! What it does not do: look into the frames' order across watchers.

use bytes::Bytes;
use check::revision::Change;
use check::watch::{Told, judge};
use keelson_proto::etcdserverpb::WatchCreateRequest;
use keelson_proto::mvccpb::{Event, event::EventType};
use kvstore_core::types::MemberId;
use kvstore_core::watch::{Frame, StreamId, WatchHub, WatchLimits};
use prost::Message;

use crate::model::text;

#[derive(Debug)]
pub struct Watcher {
    /// First key and range end, as etcd has them.
    from_key: &'static str,
    range_end: &'static str,
    pub at: Option<Connection>,
    /// The next revision it wants.
    next: i64,
    /// (first revision wanted, what came), oldest first.
    told: Vec<(i64, Vec<Told>)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    pub member: MemberId,
    pub life: u64,
    pub stream: StreamId,
}

/// Small, so that sessions fill up and watchers fall behind.
pub fn limits() -> WatchLimits {
    WatchLimits {
        queue_frames: 4,
        recent_revisions: 6,
        catch_up_rows: 5,
        catch_up_watchers: 2,
        join_revisions: 3,
        ..WatchLimits::default()
    }
}

impl Watcher {
    /// One key, all judged keys, and everything there is.
    pub fn all() -> Vec<Watcher> {
        let watcher = |from_key, range_end| Watcher { from_key, range_end, at: None, next: 2, told: Vec::new() };
        vec![watcher("k1", ""), watcher("k", "l"), watcher("\0", "\0")]
    }

    fn wants(&self, key: &str) -> bool {
        match self.range_end {
            "" => key == self.from_key,
            "\0" => key >= self.from_key,
            end => self.from_key <= key && key < end,
        }
    }

    pub fn connect(&mut self, member: MemberId, life: u64, hub: &mut WatchHub) {
        let stream = hub.open();
        let request = WatchCreateRequest {
            key: Bytes::from_static(self.from_key.as_bytes()),
            range_end: Bytes::from_static(self.range_end.as_bytes()),
            start_revision: self.next,
            ..WatchCreateRequest::default()
        };
        hub.create(stream, &request);
        self.at = Some(Connection { member, life, stream });
        self.told.push((self.next, Vec::new()));
    }

    pub fn hear(&mut self, frame: &Frame) -> Result<(), String> {
        if frame.created {
            return Ok(());
        }
        let told = if frame.canceled && frame.compact_revision > 0 {
            self.next = frame.compact_revision;
            self.at = None;
            Told::Compacted(frame.compact_revision)
        } else if frame.canceled {
            return Err(format!("a watch was cancelled: {}", frame.cancel_reason));
        } else if frame.events.is_empty() {
            self.next = self.next.max(frame.revision + 1);
            Told::Progress(frame.revision)
        } else {
            let changes: Vec<Change> = frame.events.iter().map(change).collect::<Result<_, _>>()?;
            self.next = changes.last().map_or(self.next, |change| change.revision + 1);
            Told::Events(changes)
        };
        self.told.last_mut().expect("it is connected").1.push(told);
        Ok(())
    }

    /// Whether it was told everything of a history that has come to its end.
    pub fn up_to_date(&self, all: &[Change]) -> bool {
        self.at.is_some()
            && all.iter().rev().take_while(|change| change.revision >= self.next).all(|change| !self.wants(&change.key))
    }

    pub fn judge(&self, all: &[Change]) -> Result<(), String> {
        for (from, told) in &self.told {
            judge(all, *from, None, |change| self.wants(&change.key), told)
                .map_err(|error| format!("watch of {:?} from {from}: {error}", self.from_key))?;
        }
        Ok(())
    }

    pub fn events(&self) -> usize {
        let all = self.told.iter().flat_map(|(_, told)| told);
        all.map(|told| if let Told::Events(changes) = told { changes.len() } else { 0 }).sum()
    }
}

fn change(event: &Bytes) -> Result<Change, String> {
    let event = Event::decode(event.clone()).map_err(|error| error.to_string())?;
    let put = event.r#type() == EventType::Put;
    let kv = event.kv.ok_or("an event without a key")?;
    Ok(Change { revision: kv.mod_revision, key: text(&kv.key), value: put.then(|| text(&kv.value)) })
}

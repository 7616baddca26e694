//! Plays a story on one store and writes down all that its client can see.
//!
//! What it does not do: it judges nothing but what no comparison would show (a revision split in two, events out of order).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use e2e::cluster::READY;
use e2e::{Cluster, Kind, Member};
use prost_reflect::MessageDescriptor;
use tokio::time::Instant;

use super::mask::{Drawn, Masks, Value, fields};
use super::schema::{self, Method};
use super::script::{self, Fate, Needs, Receive, Request, Step, Story};
use super::wire::{Call, Client, End, Happened};

/// How long an answer may take: a proposal without a quorum gives up after seven seconds, a waiting reader after some more.
const ANSWER: Duration = Duration::from_secs(25);
/// What stands for an answer that did not come.
pub(super) const NOTHING: &str = "nothing more within";
/// How long a progress request is waited for before it is sent again; a server drops it while a watch is behind.
const PROGRESS: Duration = Duration::from_millis(300);

/// A running store and the connections to it.
pub(super) struct Side {
    pub(super) cluster: Cluster,
    needs: Needs,
    clients: Vec<Option<Client>>,
    /// Played on already.
    used: bool,
    /// A story has stopped or killed members: it was the last one here.
    stopped: bool,
}

/// What one step brought to light.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) parts: Vec<Part>,
}

/// One message or one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// What is compared: masked bytes, or a line.
    pub(super) bytes: Vec<u8>,
    /// The same for a reader.
    pub(super) text: String,
}

impl Part {
    fn line(text: String) -> Part {
        Part { bytes: text.clone().into_bytes(), text }
    }

    pub(super) fn is_message(&self) -> bool {
        self.bytes != self.text.as_bytes()
    }
}

impl Side {
    /// Starts a store of its own; `None` after a loud skip because a program is missing.
    pub(super) fn start(kind: Kind, needs: &Needs) -> Option<Side> {
        let flags: Vec<&str> = needs.flags.iter().map(String::as_str).collect();
        Some(Side::of(Cluster::start_with(kind, needs.members.max(1), &flags)?, needs))
    }

    /// The same of another program than the built one.
    pub(super) fn start_program(program: PathBuf, needs: &Needs) -> Side {
        let flags: Vec<&str> = needs.flags.iter().map(String::as_str).collect();
        let mut cluster = Cluster::prepare_program(program, Kind::Keelson, needs.members.max(1), &flags);
        cluster.members.iter_mut().for_each(Member::spawn);
        cluster.members.iter().for_each(Member::wait_ready);
        Side::of(cluster, needs)
    }

    fn of(cluster: Cluster, needs: &Needs) -> Side {
        let clients = vec![None; cluster.members.len()];
        Side { cluster, needs: needs.clone(), clients, used: false, stopped: false }
    }

    /// Whether a story may be played here after those before it.
    pub(super) fn suits(&self, needs: &Needs) -> bool {
        let clean = self.clients.len() == 1 && !needs.fresh || !self.used;
        clean && !self.stopped && self.needs.flags == needs.flags && self.needs.members == needs.members
    }

    async fn client(&mut self, member: usize) -> Result<Client, String> {
        if let Some(client) = &self.clients[member] {
            return Ok(client.clone());
        }
        let client = Client::connect(self.cluster.members[member].client_port).await?;
        self.clients[member] = Some(client.clone());
        Ok(client)
    }

    /// One unary call to its end.
    async fn ask(&mut self, member: usize, method: &str, text: &str) -> Result<Vec<u8>, String> {
        let method = Method::named(method);
        let mut call = self.client(member).await?.open(&method.path, &[]).await?;
        call.send(&method.encode(text)?)?;
        call.close();
        match call.within(ANSWER).await {
            Some(Happened::Message { message, .. }) => Ok(message.to_vec()),
            other => Err(format!("{}: {other:?}", method.path)),
        }
    }

    async fn ask_field(&mut self, member: usize, method: &str, text: &str, path: &str) -> Result<String, String> {
        let answer = self.ask(member, method, text).await?;
        let descriptor = Method::named(method).answer().ok_or("an unknown method")?;
        schema::field(&descriptor, &answer, path).ok_or_else(|| format!("{method} has no {path}"))
    }

    /// Takes away what earlier stories left, in a fixed order, and says the revision then.
    async fn clean(&mut self) -> Result<String, String> {
        if self.used {
            // First the alarms, for they refuse the rest.
            let alarms = self.ask(0, "Maintenance/Alarm", "").await?;
            for field in fields(&alarms).into_iter().flatten().filter(|field| field.number == 2) {
                let Value::Bytes(alarm) = field.value else { continue };
                let numbers: Vec<(u32, u64)> = fields(alarm)
                    .into_iter()
                    .flatten()
                    .filter_map(|field| match field.value {
                        Value::Number(number) => Some((field.number, number)),
                        _ => None,
                    })
                    .collect();
                let number = |of| numbers.iter().find(|(number, _)| *number == of).map_or(0, |(_, value)| *value);
                let request = format!("action: DEACTIVATE memberID: {} alarm: {}", number(1), number(2));
                self.ask(0, "Maintenance/Alarm", &request).await?;
            }
            self.ask(0, "KV/DeleteRange", r#"key: "\0" range_end: "\0""#).await?;
            let leases = self.ask(0, "Lease/LeaseLeases", "").await?;
            let ids: Vec<i64> = fields(&leases)
                .into_iter()
                .flatten()
                .filter(|field| field.number == 2)
                .filter_map(|field| match field.value {
                    Value::Bytes(status) => match fields(status)?.first()?.value {
                        Value::Number(id) => Some(id.cast_signed()),
                        _ => None,
                    },
                    _ => None,
                })
                .collect();
            for id in ids {
                self.ask(0, "Lease/LeaseRevoke", &format!("ID: {id}")).await?;
            }
        }
        self.used = true;
        self.ask_field(0, "KV/Range", r#"key: "\0" count_only: true"#, "header.revision").await
    }

    /// Which member leads, follows, and is the other one.
    async fn roles(&mut self) -> Result<BTreeMap<&'static str, usize>, String> {
        let size = self.clients.len();
        let mut roles = BTreeMap::from([("leader", 0), ("follower", 0), ("other", 0)]);
        if size == 1 {
            return Ok(roles);
        }
        let deadline = Instant::now() + ANSWER;
        loop {
            for member in 0..size {
                let leader = self.ask_field(member, "Maintenance/Status", "", "leader").await?;
                if leader == self.ask_field(member, "Maintenance/Status", "", "header.member_id").await? {
                    for (place, role) in ["leader", "follower", "other"].into_iter().enumerate() {
                        roles.insert(role, (member + place) % size);
                    }
                    return Ok(roles);
                }
            }
            if Instant::now() > deadline {
                return Err("nobody leads".to_owned());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Plays a story from its beginning.
    pub(super) async fn play(&mut self, story: &Story, masks: &Masks) -> Vec<Answer> {
        // Connections live on the runtime they were made on, and each story has its own.
        self.clients.iter_mut().for_each(|client| *client = None);
        let prepared = async {
            let roles = self.roles().await?;
            Ok::<_, String>((self.clean().await?, roles))
        };
        let (revision, roles) =
            prepared.await.unwrap_or_else(|error| panic!("{:?} before {}: {error}", self.cluster.kind, story.name));
        let script: String = story.steps.iter().map(|step| format!("{step}\n")).collect();
        let values = BTreeMap::from([("R".to_owned(), revision.clone()), ("now".to_owned(), revision)]);
        let target = roles["leader"];
        let mut player = Player {
            side: self,
            masks,
            drawn: Drawn::new(script),
            values,
            roles,
            target,
            metadata: Vec::new(),
            streams: BTreeMap::new(),
            last: None,
        };
        let mut answers = Vec::with_capacity(story.steps.len());
        for step in &story.steps {
            let mut answer = Answer::default();
            if let Err(error) = player.step(step, &mut answer.parts).await {
                answer.parts.push(Part::line(error));
            }
            answers.push(answer);
        }
        answers
    }
}

/// A stream that a script named.
struct Stream {
    call: Call,
    method: Method,
    /// Progress requests of ours whose answers may still come.
    owed: usize,
    ended: bool,
}

/// Finds out that a stream is up to date. A create that is refused marks the end of all answers to earlier requests; then a progress
/// request marks the end of all events. Both are needed: etcd sends answers and events on ways of their own.
struct Quiet {
    /// What a progress answer must tell at least: one that was asked for earlier says nothing of what happened since.
    revision: i64,
    marked: bool,
    asked: Option<Instant>,
    reached: bool,
}

impl Quiet {
    fn begin(stream: &mut Stream, now: &str) -> Quiet {
        let refused = r#"create_request { key: "b" range_end: "a" }"#;
        let _ = send(stream, &Request::Text(refused.to_owned()));
        Quiet { revision: now.parse().unwrap_or(0), marked: false, asked: None, reached: false }
    }

    /// Asks for progress, again after a while, and says how long to wait.
    fn ask(&mut self, stream: &mut Stream) -> Instant {
        if self.marked && self.asked.is_none_or(|when| when.elapsed() > PROGRESS) {
            self.asked = Some(Instant::now());
            let _ = send(stream, &Request::Text("progress_request {}".to_owned()));
            stream.owed += 1;
        }
        Instant::now() + PROGRESS
    }

    /// Whether a message is the mark.
    fn takes(&mut self, message: &[u8]) -> bool {
        let refused =
            number(message, WATCH_ID) == -1 && number(message, CREATED) != 0 && number(message, CANCELED) != 0;
        self.marked |= refused;
        refused
    }

    /// Whether an answer about progress is the one waited for.
    fn reaches(&mut self, message: &[u8]) -> bool {
        self.reached = self.asked.is_some() && told_progress(message) >= self.revision;
        self.reached
    }
}

struct Player<'a> {
    side: &'a mut Side,
    masks: &'a Masks,
    drawn: Drawn,
    values: BTreeMap<String, String>,
    roles: BTreeMap<&'static str, usize>,
    target: usize,
    metadata: Vec<(String, String)>,
    streams: BTreeMap<String, Stream>,
    /// The last message and what it is.
    last: Option<(MessageDescriptor, Bytes)>,
}

impl Player<'_> {
    async fn step(&mut self, step: &Step, parts: &mut Vec<Part>) -> Result<(), String> {
        match step {
            Step::With { name, value } => {
                let value = self.expand(value)?;
                self.metadata.push((name.clone(), value));
            }
            Step::Call { method, request } => self.call(method, request, parts).await?,
            Step::Until { words, method, request } => {
                let deadline = Instant::now() + ANSWER;
                loop {
                    parts.clear();
                    self.call(method, request, parts).await?;
                    if parts.iter().any(|part| part.text.contains(words)) || Instant::now() > deadline {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            Step::Keep { name, path } => {
                let (descriptor, message) = self.last.as_ref().ok_or("no message to keep anything of")?;
                let value = schema::field(descriptor, message, path).ok_or_else(|| format!("no field {path}"))?;
                self.values.insert(name.clone(), value);
            }
            Step::Open { stream, method } => {
                let method = Method::named(method);
                let metadata = std::mem::take(&mut self.metadata);
                let call = self.side.client(self.target).await?.open(&method.path, &metadata).await?;
                self.streams.insert(stream.clone(), Stream { call, method, owed: 0, ended: false });
            }
            Step::Send { stream, request } => {
                let text = self.expand_request(request)?;
                send(self.streams.get_mut(stream).ok_or("no such stream")?, &text)?;
            }
            Step::Receive { stream: names, what, words } => {
                for name in names.split('|') {
                    let mut stream = self.streams.remove(name).ok_or("no such stream")?;
                    let mut own = Vec::new();
                    self.receive(&mut stream, *what, &mut own).await;
                    self.streams.insert(name.to_owned(), stream);
                    if own.iter().any(|part| part.text.contains(words)) {
                        parts.extend(own);
                    }
                }
            }
            Step::Close { stream } => self.streams.get_mut(stream).ok_or("no such stream")?.call.close(),
            Step::Reset { stream } => self.streams.get_mut(stream).ok_or("no such stream")?.call.reset(),
            Step::To { role } => self.target = *self.roles.get(role.as_str()).ok_or("no such role")?,
            Step::Fate { what, role } => self.fate(*what, role).await?,
        }
        Ok(())
    }

    async fn fate(&mut self, what: Fate, role: &str) -> Result<(), String> {
        let index = *self.roles.get(role).ok_or("no such role")?;
        let member = &mut self.side.cluster.members[index];
        match what {
            Fate::Kill => {
                member.kill();
                self.side.clients[index] = None;
                self.side.stopped = true;
            }
            Fate::Stop => {
                member.process().signal("TERM");
                self.side.stopped = true;
            }
            Fate::Pause => member.process().signal("STOP"),
            Fate::Resume => member.process().signal("CONT"),
            Fate::Start => {
                member.spawn();
                // Not by waiting for the log: what is under way on other connections goes on meanwhile.
                let deadline = Instant::now() + ANSWER;
                while !member.process().lines().iter().any(|line| line.contains(READY)) {
                    if Instant::now() > deadline {
                        return Err("it does not become ready".to_owned());
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
        Ok(())
    }

    fn expand(&self, text: &str) -> Result<String, String> {
        script::expand(text, &|name| self.values.get(name).cloned())
    }

    fn expand_request(&self, request: &Request) -> Result<Request, String> {
        Ok(match request {
            Request::Text(text) => Request::Text(self.expand(text)?),
            other => other.clone(),
        })
    }

    async fn call(&mut self, method: &str, request: &Request, parts: &mut Vec<Part>) -> Result<(), String> {
        let method = Method::named(method);
        let request = self.expand_request(request)?;
        let metadata = std::mem::take(&mut self.metadata);
        let call = self.side.client(self.target).await?.open(&method.path, &metadata).await?;
        let mut stream = Stream { call, method, owed: 0, ended: false };
        // A server that is done before it has read all is a matter of its answer, not of ours.
        let _ = send(&mut stream, &request);
        if let (Request::Text(text), Err(error)) = (&request, encode(&stream.method, &request)) {
            return Err(format!("{error}: {text}"));
        }
        stream.call.close();
        self.receive(&mut stream, Receive::End, parts).await;
        Ok(())
    }

    async fn receive(&mut self, stream: &mut Stream, what: Receive, parts: &mut Vec<Part>) {
        let descriptor = stream.method.answer();
        let mut messages: Vec<Vec<u8>> = Vec::new();
        let mut end = None;
        let mut events = 0;
        let deadline = Instant::now() + ANSWER;
        let mut quiet = (what == Receive::Quiet).then(|| Quiet::begin(stream, &self.values["now"]));
        loop {
            let enough = match (what, &quiet) {
                (Receive::Messages(count), _) => messages.len() >= count,
                (Receive::Events(count), _) => events >= count,
                (_, quiet) => quiet.as_ref().is_some_and(|quiet| quiet.reached),
            };
            if enough || end.is_some() || stream.ended {
                break;
            }
            let patience = quiet.as_mut().map_or(deadline, |quiet| deadline.min(quiet.ask(stream)));
            match stream.call.next(patience).await {
                Some(Happened::Message { message, compressed }) => {
                    if quiet.as_mut().is_some_and(|quiet| quiet.takes(&message)) {
                        continue;
                    }
                    if stream.owed > 0 && is_progress(&message) {
                        stream.owed -= 1;
                        if !quiet.as_mut().is_some_and(|quiet| quiet.reaches(&message)) {
                            continue;
                        }
                    }
                    events += count_events(&message);
                    if compressed {
                        parts.push(Part::line("a compressed message".to_owned()));
                    }
                    if let Some(descriptor) = &descriptor {
                        self.seen(descriptor, &message);
                        messages.push(self.masks.apply(descriptor, &message, &mut self.drawn));
                    } else {
                        messages.push(message.to_vec());
                    }
                }
                Some(Happened::End(ended)) => {
                    stream.ended = true;
                    end = Some(ended);
                }
                None if Instant::now() >= deadline => {
                    parts.push(Part::line(format!("{NOTHING} {} s", ANSWER.as_secs())));
                    break;
                }
                None => {}
            }
        }
        if stream.method.is_watch() {
            messages = if matches!(what, Receive::Messages(_)) { by_watch(messages) } else { in_rows(messages, parts) };
        }
        parts.extend(messages.into_iter().map(|bytes| Part { text: schema::text(descriptor.as_ref(), &bytes), bytes }));
        if let Some(end) = end {
            parts.push(Part::line(self.end(&end, &stream.method)));
        }
    }

    /// Notes what later steps refer to.
    fn seen(&mut self, descriptor: &MessageDescriptor, message: &Bytes) {
        let newest = schema::field(descriptor, message, "header.revision").and_then(|text| text.parse::<i64>().ok());
        let known = self.values["now"].parse::<i64>().unwrap_or(0);
        if let Some(newest) = newest.filter(|newest| *newest > known) {
            self.values.insert("now".to_owned(), newest.to_string());
        }
        self.last = Some((descriptor.clone(), message.clone()));
    }

    /// How a call ended, in lines.
    fn end(&self, end: &End, method: &Method) -> String {
        if let Some(broken) = &end.broken {
            return format!("broken off: {broken}");
        }
        let mut text = match end.status() {
            Some(status) => format!("status {status} {:?}", end.text()),
            None => "no status".to_owned(),
        };
        text += &format!("\n  HTTP {}", end.http_status);
        let (headers, trailers) = (self.masks.lines(&end.headers), end.trailers.as_deref().unwrap_or_default());
        let trailers = self.masks.lines(trailers);
        if method.is_streaming() {
            // When a stream sends its headers, before its first message or with it, no client sees.
            let mut all = [headers, trailers].concat();
            all.sort();
            all.iter().for_each(|line| text += &format!("\n  {line}"));
        } else {
            text += if end.trailers.is_some() { ", headers and trailers" } else { ", trailers only" };
            headers.iter().for_each(|line| text += &format!("\n  header {line}"));
            trailers.iter().for_each(|line| text += &format!("\n  trailer {line}"));
        }
        text
    }
}

fn encode(method: &Method, request: &Request) -> Result<Vec<u8>, String> {
    match request {
        Request::Text(text) => method.encode(text),
        Request::Message(bytes) | Request::Body(bytes) => Ok(bytes.clone()),
    }
}

fn send(stream: &mut Stream, request: &Request) -> Result<(), String> {
    let bytes = encode(&stream.method, request)?;
    match request {
        Request::Body(_) => stream.call.send_raw(bytes.into()),
        _ => stream.call.send(&bytes),
    }
}

/// Numbers of `WatchResponse`'s fields.
const WATCH_ID: u32 = 2;
const CREATED: u32 = 3;
const CANCELED: u32 = 4;
const FRAGMENT: u32 = 7;
const EVENTS: u32 = 11;

fn number(message: &[u8], of: u32) -> i64 {
    let found = fields(message).into_iter().flatten().find(|field| field.number == of);
    match found.map(|field| field.value) {
        Some(Value::Number(number)) => number.cast_signed(),
        _ => 0,
    }
}

fn count_events(message: &[u8]) -> usize {
    fields(message).into_iter().flatten().filter(|field| field.number == EVENTS).count()
}

/// The answer to a progress request: for all watches, and nothing in it.
fn is_progress(message: &[u8]) -> bool {
    number(message, WATCH_ID) == -1
        && number(message, CREATED) == 0
        && number(message, CANCELED) == 0
        && count_events(message) == 0
}

/// The revision up to which all watches are up to date, if this says so.
fn told_progress(message: &[u8]) -> i64 {
    let header = fields(message).into_iter().flatten().find(|field| field.number == 1);
    match header.map(|field| field.value) {
        Some(Value::Bytes(header)) if is_progress(message) => number(header, 3),
        _ => 0,
    }
}

/// Which of several watches is told first of a revision is chance.
fn by_watch(mut messages: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    messages.sort_by_key(|message| number(message, WATCH_ID));
    messages
}

/// The events of each watch in one row between what else it was told.
fn in_rows(messages: Vec<Vec<u8>>, parts: &mut Vec<Part>) -> Vec<Vec<u8>> {
    let mut rows: Vec<(i64, bool, Vec<u8>)> = Vec::new();
    let mut newest: BTreeMap<i64, (i64, bool)> = BTreeMap::new();
    for message in by_watch(messages) {
        let watch = number(&message, WATCH_ID);
        if count_events(&message) == 0 {
            // How often progress was told depends on how often it was asked for.
            if !is_progress(&message) || !rows.iter().any(|(_, _, row)| is_progress(row)) {
                rows.push((watch, false, message));
            }
            continue;
        }
        let revisions: Vec<i64> = event_revisions(&message);
        // Only a fragment leaves the rest of its revision to the next response.
        let (before, goes_on) = newest.get(&watch).copied().unwrap_or((0, false));
        let first = revisions.first().copied().unwrap_or(0);
        if first < before || (first == before && !goes_on) || !revisions.is_sorted() {
            parts.push(Part::line(format!("watch {watch}: after revision {before} came {revisions:?}")));
        }
        let last = revisions.last().copied().unwrap_or(0);
        newest.insert(watch, (last.max(before), number(&message, FRAGMENT) != 0));
        let events: Vec<u8> = fields(&message)
            .into_iter()
            .flatten()
            .filter(|field| field.number == EVENTS)
            .flat_map(|field| field.raw.to_vec())
            .collect();
        match rows.last_mut() {
            Some((same, true, row)) if *same == watch => row.extend(events),
            _ => {
                let id = fields(&message).into_iter().flatten().find(|field| field.number == WATCH_ID);
                let mut row = id.map_or_else(Vec::new, |id| id.raw.to_vec());
                row.extend(events);
                rows.push((watch, true, row));
            }
        }
    }
    rows.into_iter().map(|(_, _, row)| row).collect()
}

/// The revision of each event of a response.
fn event_revisions(message: &[u8]) -> Vec<i64> {
    fields(message)
        .into_iter()
        .flatten()
        .filter(|field| field.number == EVENTS)
        .filter_map(|field| match field.value {
            Value::Bytes(event) => {
                let kv = fields(event)?.into_iter().find(|field| field.number == 2)?;
                match kv.value {
                    Value::Bytes(kv) => Some(number(kv, 3)),
                    _ => None,
                }
            }
            _ => None,
        })
        .collect()
}

//! The language of the store's stories.

use std::fmt::Write as _;

use keelson_proto::etcdserverpb::alarm_request::AlarmAction;
use keelson_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use keelson_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use keelson_proto::etcdserverpb::request_op::Request;
use keelson_proto::etcdserverpb::response_op::Response;
use keelson_proto::etcdserverpb::*;
use keelson_proto::membershippb::{Attributes, ClusterMemberAttrSetRequest, ClusterVersionSetRequest};
use keelson_proto::mvccpb;

use super::*;
use crate::mvcc::check;
use crate::mvcc::chunks::Chunks;
use crate::mvcc::{EventKind, ReadError, history, range, txn};
use crate::testing::{Word, shown};
use crate::{keys, lease};

/// A runner with a member of its own.
pub(super) fn start() -> impl FnMut(&str) -> String {
    let mut member = TestMember::new(config());
    let mut current = config();
    move |line| run(&mut member, &mut current, line)
}

/// The words after a command: plain ones in order, and `name=value` or flags.
struct Args<'a> {
    words: Vec<&'a Word>,
}

impl<'a> Args<'a> {
    fn new(words: &'a [Word]) -> Self {
        Args { words: words.iter().collect() }
    }

    fn flag(&mut self, name: &str) -> bool {
        let at = self.words.iter().position(|w| matches!(w, Word::Atom(b) if b == name.as_bytes()));
        at.map(|at| self.words.remove(at)).is_some()
    }

    fn option(&mut self, name: &str) -> Option<&'a str> {
        let prefix = format!("{name}=");
        let at = self.words.iter().position(|w| matches!(w, Word::Atom(b) if b.starts_with(prefix.as_bytes())))?;
        Some(&self.words.remove(at).text()[prefix.len()..])
    }

    fn number(&mut self, name: &str) -> i64 {
        self.option(name).map_or(0, |n| n.parse().unwrap())
    }

    fn bytes(&mut self) -> Bytes {
        if self.words.is_empty() { Bytes::new() } else { Bytes::copy_from_slice(self.words.remove(0).bytes()) }
    }

    fn int(&mut self) -> i64 {
        self.words.remove(0).text().parse().unwrap()
    }
}

fn run(member: &mut TestMember, current: &mut StoreConfig, line: &str) -> String {
    let words = Word::parse(line);
    let mut args = Args::new(&words[1..]);
    let read_only = |txn: &TxnRequest| check::is_read_only(txn);
    let mut request = InternalRaftRequest::default();
    match words[0].text() {
        "put" => {
            let put = put(&mut args);
            if let Err(error) = check::validate_put(&put) {
                return refused(error);
            }
            request.put = Some(put);
        }
        "del" => {
            let delete = delete(&mut args);
            if let Err(error) = check::validate_delete_range(&delete) {
                return refused(error);
            }
            request.delete_range = Some(delete);
        }
        "txn" => {
            let txn = transaction(&words[1..]);
            if let Err(error) = check::validate_txn(&txn, 8) {
                return refused(error);
            }
            if read_only(&txn) {
                return match txn::read(member.publish().moment(), &txn) {
                    Ok(response) => format!("read only\n{}", show_txn(&response, 0)),
                    Err(error) => show_read_error(error),
                };
            }
            request.txn = Some(txn);
        }
        "get" => return get(member, &mut args),
        "stream" => return stream(member, &mut args),
        "compact" => request.compaction = Some(CompactionRequest { revision: args.int(), physical: false }),
        "grant" => {
            // What the server does before the log.
            let min_ttl_s = args.option("min").map_or(i64::MIN, |n| n.parse().unwrap());
            let (id, ttl) = (args.int(), args.int());
            request.lease_grant = Some(LeaseGrantRequest { id, ttl: ttl.max(min_ttl_s) });
        }
        "min-ttl" => {
            let (heartbeat_ms, election_ms) = (args.int() as u64, args.int() as u64);
            return format!("{} s", lease::min_ttl_s(heartbeat_ms, election_ms));
        }
        "draw" => return format!("{:?}", lease::drawn(RequestId(args.words.remove(0).text().parse().unwrap()))),
        "revoke" => request.lease_revoke = Some(LeaseRevokeRequest { id: args.int() }),
        "checkpoint" => {
            let mut checkpoints = Vec::new();
            while !args.words.is_empty() {
                checkpoints.push(LeaseCheckpoint { id: args.int(), remaining_ttl: args.int() });
            }
            request.lease_checkpoint = Some(LeaseCheckpointRequest { checkpoints });
        }
        "alarm" => request.alarm = Some(alarm(&mut args)),
        "attributes" => {
            let member_id = args.int() as u64;
            let name = args.option("name").unwrap_or_default().to_owned();
            let client_urls = args.words.iter().map(|w| w.text().to_owned()).collect();
            let member_attributes = Some(Attributes { name, client_urls });
            request.cluster_member_attr_set = Some(ClusterMemberAttrSetRequest { member_id, member_attributes });
        }
        "version" => {
            request.cluster_version_set = Some(ClusterVersionSetRequest { ver: words[1].text().into() });
        }
        "auth" => request.auth_enable = Some(AuthEnableRequest {}),
        other => return inspect(member, current, other, &mut args),
    }
    let (outcome, applied) = member.apply(&request);
    show_outcome(&outcome) + &show_applied(&applied)
}

/// Commands that look, or that do something to the member itself.
fn inspect(member: &mut TestMember, current: &mut StoreConfig, command: &str, args: &mut Args<'_>) -> String {
    match command {
        "slice" => match member.slice(args.int() as usize) {
            Some(done) => format!("to {}: {} rows{}", done.compacted, done.rows, flag(done.finished, " finished")),
            None => "nothing to do".into(),
        },
        "events" => events(member, args),
        "rows" => rows(member, args.words[0].text()),
        "facts" => facts(member),
        "size" => format!("in use {}", member.store.facts().size_in_use),
        "leases" => lease::all(&member.view()).unwrap().iter().fold(String::new(), |all, l| {
            all + &format!("lease {:?} ttl {} remaining {}\n", l.id, l.ttl_s, l.remaining_ttl_s)
        }),
        "keys" => {
            let id = LeaseId(args.int());
            let keys = lease::keys(&member.view(), id).unwrap();
            format!("{:?}: {}", id, keys.iter().map(|k| shown(k)).collect::<Vec<_>>().join(" "))
        }
        "quota" => {
            current.quota_backend_bytes = args.int();
            member.reopen(current.clone());
            format!("quota {}", member.store.facts().quota)
        }
        "flush" => {
            member.backend.start_flush().unwrap();
            member.backend.complete_flush();
            format!("durable {}", member.backend.durable_applied().unwrap())
        }
        "crash" => {
            member.backend.crash();
            member.reopen(current.clone());
            format!("applied {}", member.store.facts().applied_index)
        }
        "reopen" => {
            let before = member.store.facts();
            member.reopen(current.clone());
            assert_eq!(before, member.store.facts(), "a store is what its rows say");
            String::new()
        }
        other => panic!("unknown command {other}"),
    }
}

fn flag(on: bool, text: &str) -> &str {
    if on { text } else { "" }
}

fn put(args: &mut Args<'_>) -> PutRequest {
    PutRequest {
        lease: args.number("lease"),
        prev_kv: args.flag("prev"),
        ignore_value: args.flag("ignore_value"),
        ignore_lease: args.flag("ignore_lease"),
        key: args.bytes(),
        value: args.bytes(),
    }
}

fn delete(args: &mut Args<'_>) -> DeleteRangeRequest {
    DeleteRangeRequest { prev_kv: args.flag("prev"), key: args.bytes(), range_end: args.bytes() }
}

fn range_request(args: &mut Args<'_>) -> RangeRequest {
    let order = match args.option("order") {
        None | Some("none") => SortOrder::None as i32,
        Some("ascend") => SortOrder::Ascend as i32,
        Some("descend") => SortOrder::Descend as i32,
        Some(other) => other.parse().unwrap(),
    };
    let target = match args.option("by") {
        None | Some("key") => SortTarget::Key as i32,
        Some("version") => SortTarget::Version as i32,
        Some("create") => SortTarget::Create as i32,
        Some("mod") => SortTarget::Mod as i32,
        Some("value") => SortTarget::Value as i32,
        Some(other) => other.parse().unwrap(),
    };
    RangeRequest {
        revision: args.number("rev"),
        limit: args.number("limit"),
        min_mod_revision: args.number("min_mod"),
        max_mod_revision: args.number("max_mod"),
        min_create_revision: args.number("min_create"),
        max_create_revision: args.number("max_create"),
        sort_order: order,
        sort_target: target,
        keys_only: args.flag("keys_only"),
        count_only: args.flag("count_only"),
        serializable: args.flag("serializable"),
        key: args.bytes(),
        range_end: args.bytes(),
    }
}

fn transaction(words: &[Word]) -> TxnRequest {
    let mut request = TxnRequest::default();
    for part in words {
        let part = part.list();
        match part[0].text() {
            "if" => request.compare = part[1..].iter().map(|c| compare(c.list())).collect(),
            "then" => request.success = part[1..].iter().map(|o| operation(o.list())).collect(),
            "else" => request.failure = part[1..].iter().map(|o| operation(o.list())).collect(),
            other => panic!("unknown part {other}"),
        }
    }
    request
}

/// `mod KEY = 3`, `value KEY < x end=z`; without an operand it is unset, `mod KEY = version=3` has another target's, and
/// a target or a relation that etcd does not know is a number.
fn compare(words: &[Word]) -> Compare {
    let mut args = Args::new(&words[1..]);
    let range_end = args.option("end").map(|end| Word::parse(end)[0].bytes().to_vec()).unwrap_or_default();
    let key = args.bytes();
    let result = match args.words.remove(0).text() {
        "=" => CompareResult::Equal as i32,
        "!=" => CompareResult::NotEqual as i32,
        ">" => CompareResult::Greater as i32,
        "<" => CompareResult::Less as i32,
        number => number.parse().unwrap(),
    };
    let (target, own) = match words[0].text() {
        "version" => (CompareTarget::Version as i32, "version"),
        "create" => (CompareTarget::Create as i32, "create"),
        "mod" => (CompareTarget::Mod as i32, "mod"),
        "lease" => (CompareTarget::Lease as i32, "lease"),
        "value" => (CompareTarget::Value as i32, "value"),
        number => (number.parse().unwrap(), ""),
    };
    let foreign = ["version", "create", "mod", "lease", "value"].into_iter().find_map(|o| Some((o, args.option(o)?)));
    let operand = match foreign {
        Some((other, operand)) => Some((other, Bytes::copy_from_slice(operand.as_bytes()))),
        None => (!args.words.is_empty()).then(|| (own, args.bytes())),
    };
    let number = |b: &Bytes| std::str::from_utf8(b).unwrap().parse().unwrap();
    let target_union = operand.map(|(kind, operand)| match kind {
        "version" => TargetUnion::Version(number(&operand)),
        "create" => TargetUnion::CreateRevision(number(&operand)),
        "mod" => TargetUnion::ModRevision(number(&operand)),
        "lease" => TargetUnion::Lease(number(&operand)),
        _ => TargetUnion::Value(operand),
    });
    Compare { result, target, key, range_end: range_end.into(), target_union }
}

fn operation(words: &[Word]) -> RequestOp {
    if words.is_empty() {
        return RequestOp { request: None };
    }
    let mut args = Args::new(&words[1..]);
    let request = match words[0].text() {
        "put" => Request::RequestPut(put(&mut args)),
        "get" => Request::RequestRange(range_request(&mut args)),
        "del" => Request::RequestDeleteRange(delete(&mut args)),
        "txn" => Request::RequestTxn(transaction(&words[1..])),
        other => panic!("unknown operation {other}"),
    };
    RequestOp { request: Some(request) }
}

fn alarm(args: &mut Args<'_>) -> AlarmRequest {
    let action = match args.words.remove(0).text() {
        "get" => AlarmAction::Get,
        "activate" => AlarmAction::Activate,
        "deactivate" => AlarmAction::Deactivate,
        other => panic!("unknown action {other}"),
    };
    let member_id = args.number("member") as u64;
    let alarm = match args.words.first().map(|w| w.text()) {
        None | Some("none") => AlarmType::None,
        Some("nospace") => AlarmType::Nospace,
        Some("corrupt") => AlarmType::Corrupt,
        Some(other) => panic!("unknown alarm {other}"),
    };
    AlarmRequest { action: action as i32, member_id, alarm: alarm as i32 }
}

fn get(member: &TestMember, args: &mut Args<'_>) -> String {
    let request = range_request(args);
    if let Err(error) = check::validate_range(&request) {
        return refused(error);
    }
    let published = member.publish();
    match range(published.moment(), &request) {
        Ok(found) => {
            let len = found.len;
            let response = found.into_response(published.facts.revision).unwrap();
            assert_eq!(len, response.kvs.len(), "as many as it says");
            show_range(&response, 0)
        }
        Err(error) => show_read_error(error),
    }
}

/// RangeStream: the keys of each chunk, and what the last one says.
fn stream(member: &TestMember, args: &mut Args<'_>) -> String {
    let target = args.option("target").map_or(1_572_864, |n| n.parse().unwrap());
    let request = range_request(args);
    if let Err(error) = check::validate_range_stream(&request) {
        return refused(error);
    }
    let mut chunks = Chunks::new(request, target);
    let mut out = String::new();
    loop {
        let chunk = match chunks.next(member.publish().moment()) {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return out,
            Err(error) => return out + &show_read_error(error),
        };
        let kvs = RangeResponse::decode(chunk.kvs).unwrap().kvs;
        let keys: Vec<String> = kvs.iter().map(|kv| shown(&kv.key)).collect();
        writeln!(out, "chunk of {}: {}", keys.len(), keys.join(" ")).unwrap();
        if let Some(end) = chunk.end {
            let more = flag(end.more, " more");
            writeln!(out, "end: rev {} count {}{more}", end.revision, end.count).unwrap();
        }
    }
}

fn events(member: &TestMember, args: &mut Args<'_>) -> String {
    let want_prev = args.flag("prev");
    let max_rows = args.option("max").map_or(usize::MAX, |n| n.parse().unwrap());
    let only = args.option("only").map(str::to_owned);
    let (from, to) = (args.int(), args.int());
    let wanted = |key: &[u8]| only.as_ref().is_none_or(|only| key.starts_with(only.as_bytes()));
    let bounds = member.store.facts().bounds();
    let (found, next) = history::events(&member.view(), bounds, from, to, max_rows, &wanted, want_prev).unwrap();
    show_events(&found) + &format!("next {next}")
}

fn rows(member: &TestMember, table: &str) -> String {
    let table = *crate::backend::Table::ALL.iter().find(|t| t.name() == table).unwrap();
    let mut out = String::new();
    for (key, _) in member.view().rows(table) {
        match table {
            crate::backend::Table::Rev => {
                let revision = keys::decode_rev(&key).unwrap();
                writeln!(out, "{}.{}", revision.main, revision.sub).unwrap();
            }
            _ => writeln!(out, "{}", shown(&key)).unwrap(),
        }
    }
    if out.is_empty() { "none".into() } else { out }
}

fn facts(member: &TestMember) -> String {
    let facts = member.store.facts();
    let mut out = format!(
        "revision {} compacted {}{} applied {}.{} leases {} version {:?}\n",
        facts.revision,
        facts.compacted,
        flag(facts.compacting, " (deleting)"),
        facts.applied_term,
        facts.applied_index,
        facts.lease_count,
        facts.cluster_version,
    );
    for member in facts.members.iter() {
        let attributes = member.member_attributes.clone().unwrap_or_default();
        let raft = member.raft_attributes.clone().unwrap_or_default();
        writeln!(
            out,
            "member {:x} {} {:?} {:?}{}",
            member.id,
            attributes.name,
            raft.peer_urls,
            attributes.client_urls,
            flag(raft.is_learner, " learner")
        )
        .unwrap();
    }
    for alarm in facts.alarms.iter() {
        writeln!(out, "alarm {:?} of {:x}", alarm.alarm(), alarm.member_id).unwrap();
    }
    out
}

fn refused(error: Error) -> String {
    format!("refused: {error}")
}

fn show_read_error(error: ReadError) -> String {
    match error {
        ReadError::Answer(error) => format!("error: {error}"),
        ReadError::Fatal(fatal) => panic!("{fatal}"),
    }
}

fn show_kv(kv: &mvccpb::KeyValue) -> String {
    let mut out = format!("{}={}", shown(&kv.key), shown(&kv.value));
    write!(out, " c{} m{} v{}", kv.create_revision, kv.mod_revision, kv.version).unwrap();
    if kv.lease != 0 {
        write!(out, " l{}", kv.lease).unwrap();
    }
    out
}

fn show_range(response: &RangeResponse, depth: usize) -> String {
    let pad = "  ".repeat(depth);
    let mut out = format!(
        "{pad}rev {} count {}{}\n",
        response.header.as_ref().unwrap().revision,
        response.count,
        flag(response.more, " more")
    );
    for kv in &response.kvs {
        writeln!(out, "{pad}{}", show_kv(kv)).unwrap();
    }
    out
}

fn show_txn(response: &TxnResponse, depth: usize) -> String {
    let pad = "  ".repeat(depth);
    let revision = response.header.as_ref().unwrap().revision;
    let mut out = format!("{pad}rev {revision} {}\n", if response.succeeded { "then" } else { "else" });
    for op in &response.responses {
        out += &match op.response.as_ref().unwrap() {
            Response::ResponseRange(range) => show_range(range, depth + 1),
            Response::ResponsePut(put) => show_put(put, depth + 1),
            Response::ResponseDeleteRange(delete) => show_delete(delete, depth + 1),
            Response::ResponseTxn(txn) => show_txn(txn, depth + 1),
        };
    }
    out
}

fn show_put(response: &PutResponse, depth: usize) -> String {
    let prev = response.prev_kv.as_ref().map_or(String::new(), |kv| format!(" was {}", show_kv(kv)));
    format!("{}rev {}{prev}\n", "  ".repeat(depth), response.header.as_ref().unwrap().revision)
}

fn show_delete(response: &DeleteRangeResponse, depth: usize) -> String {
    let pad = "  ".repeat(depth);
    let mut out = format!("{pad}rev {} deleted {}\n", response.header.as_ref().unwrap().revision, response.deleted);
    for kv in &response.prev_kvs {
        writeln!(out, "{pad}was {}", show_kv(kv)).unwrap();
    }
    out
}

fn show_outcome(outcome: &Result<Outcome, Error>) -> String {
    let revision = |header: &Option<ResponseHeader>| header.as_ref().unwrap().revision;
    match outcome {
        Err(error) => format!("error: {error}\n"),
        Ok(Outcome::Range(range)) => show_range(range, 0),
        Ok(Outcome::Put(put)) => show_put(put, 0),
        Ok(Outcome::DeleteRange(delete)) => show_delete(delete, 0),
        Ok(Outcome::Txn(txn)) => show_txn(txn, 0),
        Ok(Outcome::Compaction(response)) => format!("rev {}\n", revision(&response.header)),
        Ok(Outcome::LeaseGrant(response)) => {
            format!("rev {} lease {} ttl {}\n", revision(&response.header), response.id, response.ttl)
        }
        Ok(Outcome::LeaseRevoke(response)) => format!("rev {}\n", revision(&response.header)),
        Ok(Outcome::LeaseCheckpoint(response)) => format!("rev {}\n", revision(&response.header)),
        Ok(Outcome::Alarm(response)) => {
            response.alarms.iter().fold(format!("rev {}\n", revision(&response.header)), |all, alarm| {
                all + &format!("{:?} of {:x}\n", alarm.alarm(), alarm.member_id)
            })
        }
        Ok(Outcome::MemberAttributes | Outcome::ClusterVersion) => "done\n".into(),
    }
}

fn show_events(events: &[RevisionEvents]) -> String {
    let kv = |bytes: &Bytes| mvccpb::KeyValue::decode(bytes.clone()).unwrap();
    let mut out = String::new();
    for revision in events {
        for event in &revision.events {
            let kind = match (event.kind, event.create) {
                (EventKind::Put, true) => "create",
                (EventKind::Put, false) => "put",
                (EventKind::Delete, _) => "delete",
            };
            assert_eq!(event.key, kv(&event.kv).key);
            write!(out, "event {}: {kind} {}", revision.revision, show_kv(&kv(&event.kv))).unwrap();
            let prev = event.prev.as_ref().map_or(String::new(), |prev| format!(" was {}", show_kv(&kv(prev))));
            writeln!(out, "{prev}").unwrap();
        }
    }
    out
}

fn show_applied(applied: &Applied) -> String {
    let mut out = show_events(&applied.events);
    for change in &applied.leases {
        writeln!(out, "lease {change:?}").unwrap();
    }
    if let Some(revision) = applied.compacted {
        writeln!(out, "compacted {revision}").unwrap();
    }
    out.push_str(flag(applied.alarms_changed, "alarms changed\n"));
    out.push_str(flag(applied.members_changed, "members changed\n"));
    out.push_str(flag(applied.over_quota, "over quota: an alarm is to be proposed\n"));
    out
}

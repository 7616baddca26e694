//! The only file that names raft's own protobuf types (they are prost 0.11's, the rest of the house is on prost 0.14).
//! Everywhere else a message, an entry, a hard state and a configuration are bytes; this file also tells the few facts
//! about them that others need.
//!
//! What it does not do: know what is inside an entry's data.

use bytes::Bytes;
use prost_011::Message as _;
use raft::eraftpb::{
    ConfChange as RawConfChange, ConfChangeV2 as RawConfChangeV2, EntryType as RawEntryType, MessageType,
};
use raft::{RawNode, Storage};

use super::{LogEntry, Position};
use crate::Fatal;
use crate::types::{Entry, EntryKind, Index, MemberId, Term};

pub(super) use raft::eraftpb::{
    ConfState as RawConfState, Entry as RawEntry, HardState as RawHardState, Message as RawMessage,
    Snapshot as RawSnapshot,
};

/// Kinds of messages, as far as a transport cares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Entries, or where the log stands.
    Append,
    /// Small and urgent: heartbeats and the answers to them.
    Heartbeat,
    /// Elections.
    Vote,
    /// A forwarded proposal. Never to be sent twice (trap 7).
    Propose,
    /// A forwarded read or its answer.
    Read,
    Snapshot,
    /// Anything else.
    Other,
}

/// What a message says about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    pub kind: Kind,
    pub from: MemberId,
    pub to: MemberId,
    pub term: Term,
    /// Of a snapshot: what it holds.
    pub snapshot: Option<Position>,
}

/// Reads the facts of a message that a peer sent; an error means that it is not a message of ours.
pub fn facts(message: &[u8]) -> Result<Facts, Fatal> {
    let raw = decode_message(message)?;
    Ok(Facts {
        kind: kind(&raw),
        from: MemberId(raw.from),
        to: MemberId(raw.to),
        term: raw.term,
        snapshot: snapshot_position(&raw),
    })
}

/// The configuration of a cluster with these members; what [`Boot::conf_state`](super::Boot::conf_state) wants.
pub fn conf_state(voters: &[MemberId], learners: &[MemberId]) -> Bytes {
    let sorted = |ids: &[MemberId]| {
        let mut ids: Vec<u64> = ids.iter().map(|id| id.0).collect();
        ids.sort_unstable();
        ids
    };
    let raw = RawConfState { voters: sorted(voters), learners: sorted(learners), ..RawConfState::default() };
    raw.encode_to_vec().into()
}

/// Puts what a checkpoint really holds into the `MsgSnapshot` that asked for it.
pub fn with_snapshot(message: &[u8], at: Position, conf_state: &[u8]) -> Result<Bytes, Fatal> {
    let mut raw = decode_message(message)?;
    let asked = snapshot_position(&raw).ok_or_else(|| Fatal::Invariant("a snapshot message without one".into()))?;
    if at.index < asked.index || at.term < asked.term {
        return Err(Fatal::Invariant(format!("the checkpoint holds {at:?}, before {asked:?} that was asked for")));
    }
    let snapshot = raw.snapshot.get_or_insert_default();
    let metadata = snapshot.metadata.get_or_insert_default();
    metadata.index = at.index;
    metadata.term = at.term;
    metadata.conf_state = Some(decode_conf_state(conf_state)?);
    Ok(raw.encode_to_vec().into())
}

/// Reads a stored entry back.
pub fn entry(stored: &[u8]) -> Result<Entry, Fatal> {
    Ok(committed(decode_entry(stored)?))
}

/// An entry as the log would store it; for tools and tests.
pub fn log_entry(index: Index, term: Term, data: &[u8]) -> LogEntry {
    stored(&RawEntry { index, term, data: data.to_vec(), ..RawEntry::default() })
}

/// (term, vote, commit) of a stored hard state; for tools and tests.
pub fn hard_state(stored: &[u8]) -> Result<(Term, MemberId, Index), Fatal> {
    let raw = decode_hard_state(stored)?;
    Ok((raw.term, MemberId(raw.vote), raw.commit))
}

/// Whether a peer's message has the form that raft-rs takes for granted: it indexes a read's only entry, and proposes
/// whatever entries it is handed. Members hand on requests only; changes of membership are proposed where they are asked.
pub(super) fn is_well_formed(message: &RawMessage) -> bool {
    match message.msg_type() {
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => message.entries.len() == 1,
        MessageType::MsgPropose => {
            !message.entries.is_empty()
                && message.entries.iter().all(|entry| entry.entry_type() == RawEntryType::EntryNormal)
        }
        _ => true,
    }
}

pub(super) fn kind(message: &RawMessage) -> Kind {
    match message.msg_type() {
        MessageType::MsgAppend | MessageType::MsgAppendResponse => Kind::Append,
        MessageType::MsgHeartbeat | MessageType::MsgHeartbeatResponse => Kind::Heartbeat,
        MessageType::MsgRequestVote
        | MessageType::MsgRequestVoteResponse
        | MessageType::MsgRequestPreVote
        | MessageType::MsgRequestPreVoteResponse
        | MessageType::MsgTimeoutNow => Kind::Vote,
        MessageType::MsgPropose => Kind::Propose,
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => Kind::Read,
        MessageType::MsgSnapshot => Kind::Snapshot,
        _ => Kind::Other,
    }
}

/// Messages of a follower that promise nothing about its log or its vote, so that they need not wait for the disk.
pub(super) fn promises_nothing(message: &RawMessage) -> bool {
    matches!(
        message.msg_type(),
        MessageType::MsgHeartbeatResponse
            | MessageType::MsgPropose
            | MessageType::MsgReadIndex
            | MessageType::MsgTransferLeader
    )
}

pub(super) fn is_timeout_now(message: &RawMessage) -> bool {
    message.msg_type() == MessageType::MsgTimeoutNow
}

pub(super) fn proposal(from: MemberId, entries: Vec<RawEntry>) -> RawMessage {
    let mut message = RawMessage { from: from.0, entries, ..RawMessage::default() };
    message.set_msg_type(MessageType::MsgPropose);
    message
}

pub(super) fn normal_entry(data: &Bytes) -> RawEntry {
    RawEntry { data: data.to_vec(), ..RawEntry::default() }
}

pub(super) fn snapshot(at: Position, conf_state: &RawConfState) -> RawSnapshot {
    let mut snapshot = RawSnapshot::default();
    let metadata = snapshot.metadata.get_or_insert_default();
    metadata.index = at.index;
    metadata.term = at.term;
    metadata.conf_state = Some(conf_state.clone());
    snapshot
}

pub(super) fn snapshot_position(message: &RawMessage) -> Option<Position> {
    let metadata = message.snapshot.as_ref()?.metadata.as_ref()?;
    Some(Position { index: metadata.index, term: metadata.term })
}

pub(super) fn snapshot_parts(snapshot: &RawSnapshot) -> (Position, RawConfState) {
    let metadata = snapshot.get_metadata();
    (Position { index: metadata.index, term: metadata.term }, metadata.get_conf_state().clone())
}

pub(super) fn is_conf_change(raw: &RawEntry) -> bool {
    raw.entry_type() != RawEntryType::EntryNormal
}

/// Tells Raft that a committed change of membership is applied; returns what the configuration is now.
pub(super) fn apply_conf_change<S: Storage>(node: &mut RawNode<S>, raw: &RawEntry) -> Result<RawConfState, Fatal> {
    let data = raw.data.as_slice();
    let undecodable = |error| damaged("change of membership", error);
    match raw.entry_type() {
        RawEntryType::EntryConfChange => node.apply_conf_change(&RawConfChange::decode(data).map_err(undecodable)?),
        _ => node.apply_conf_change(&RawConfChangeV2::decode(data).map_err(undecodable)?),
    }
    .map_err(|error| Fatal::Invariant(format!("a committed change of membership: {error}")))
}

pub(super) fn stored(raw: &RawEntry) -> LogEntry {
    LogEntry { index: raw.index, term: raw.term, bytes: raw.encode_to_vec().into() }
}

pub(super) fn committed(raw: RawEntry) -> Entry {
    let kind = match raw.entry_type() {
        RawEntryType::EntryNormal => EntryKind::Normal,
        RawEntryType::EntryConfChange | RawEntryType::EntryConfChangeV2 => EntryKind::ConfChange,
    };
    Entry { index: raw.index, term: raw.term, kind, data: raw.data.into() }
}

pub(super) fn encode_message(raw: &RawMessage) -> Bytes {
    raw.encode_to_vec().into()
}

pub(super) fn encode_hard_state(raw: &RawHardState) -> Bytes {
    raw.encode_to_vec().into()
}

pub(super) fn decode_message(bytes: &[u8]) -> Result<RawMessage, Fatal> {
    RawMessage::decode(bytes).map_err(|error| damaged("message", error))
}

pub(super) fn decode_entry(bytes: &[u8]) -> Result<RawEntry, Fatal> {
    RawEntry::decode(bytes).map_err(|error| damaged("entry", error))
}

pub(super) fn decode_hard_state(bytes: &[u8]) -> Result<RawHardState, Fatal> {
    RawHardState::decode(bytes).map_err(|error| damaged("hard state", error))
}

pub(super) fn decode_conf_state(bytes: &[u8]) -> Result<RawConfState, Fatal> {
    RawConfState::decode(bytes).map_err(|error| damaged("configuration", error))
}

fn damaged(what: &str, error: prost_011::DecodeError) -> Fatal {
    Fatal::Damaged { table: "raft", message: format!("{what}: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// raft-rs 0.7 indexes the only entry of a read without looking, and a change of membership that nobody checked would
    /// be committed.
    #[test]
    fn what_raft_takes_for_granted_is_checked_first() {
        let message = |kind: MessageType, entries: Vec<RawEntry>| {
            let mut message = RawMessage { entries, ..RawMessage::default() };
            message.set_msg_type(kind);
            is_well_formed(&message)
        };
        let normal = RawEntry::default();
        let mut change = RawEntry::default();
        change.set_entry_type(RawEntryType::EntryConfChange);
        assert!(message(MessageType::MsgReadIndex, vec![normal.clone()]));
        assert!(!message(MessageType::MsgReadIndex, vec![]));
        assert!(!message(MessageType::MsgReadIndex, vec![normal.clone(), normal.clone()]));
        assert!(message(MessageType::MsgPropose, vec![normal.clone(), normal.clone()]));
        assert!(!message(MessageType::MsgPropose, vec![]));
        assert!(!message(MessageType::MsgPropose, vec![normal, change]));
        assert!(message(MessageType::MsgHeartbeat, vec![]));
    }
}

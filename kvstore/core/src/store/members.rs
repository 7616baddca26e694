//! The members as the cluster agreed on them, its version, and the rows that found a cluster.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use bytes::Bytes;
use keelson_proto::membershippb::{Attributes, ClusterMemberAttrSetRequest, Member, RaftAttributes};
use prost::Message;

use super::{Founder, view};
use crate::backend::{Direction, Read, Table, WriteBatch};
use crate::keys::{self, Applied, MemberRow};
use crate::mvcc::write::Numbers;
use crate::types::{ClusterId, MemberId};
use crate::{Error, Fatal};

/// Raft's `ConfState`, spelled as raft spells it on the wire: the row is raft's own encoding, but raft's types stay in
/// `replica/wire.rs`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ConfState {
    #[prost(uint64, repeated, packed = "false", tag = "1")]
    pub voters: Vec<u64>,
    #[prost(uint64, repeated, packed = "false", tag = "2")]
    pub learners: Vec<u64>,
    #[prost(uint64, repeated, packed = "false", tag = "3")]
    pub voters_outgoing: Vec<u64>,
    #[prost(uint64, repeated, packed = "false", tag = "4")]
    pub learners_next: Vec<u64>,
    #[prost(bool, tag = "5")]
    pub auto_leave: bool,
}

#[derive(Debug)]
pub(crate) struct Members {
    by_id: BTreeMap<MemberId, Member>,
    list: Arc<Vec<Member>>,
    removed: Arc<Vec<MemberId>>,
    version: Option<String>,
}

impl Members {
    pub(crate) fn open<R: Read>(read: &R) -> Result<Members, Fatal> {
        let mut by_id = BTreeMap::new();
        let mut removed = Vec::new();
        let mut failed = None;
        let mut step = |key: &[u8], row: &[u8]| -> Result<(), Fatal> {
            match keys::decode_member(key)? {
                MemberRow::Member(id) => {
                    let member = Member::decode(row).map_err(|error| damaged(Table::Member, &error))?;
                    by_id.insert(id, member);
                }
                MemberRow::Removed(id) => removed.push(id),
            }
            Ok(())
        };
        read.scan(
            Table::Member,
            (Bound::Unbounded, Bound::Unbounded),
            Direction::Forward,
            &mut |key, row| match step(key, row) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            },
        )?;
        if let Some(error) = failed {
            return Err(error);
        }
        let version = read.get(Table::Meta, keys::META_CLUSTER_VERSION)?;
        let version = version.map(|row| String::from_utf8_lossy(&row).into_owned());
        let mut members = Members { by_id, list: Arc::default(), removed: Arc::new(removed), version };
        members.publish();
        Ok(members)
    }

    fn publish(&mut self) {
        self.list = Arc::new(self.by_id.values().cloned().collect());
    }

    pub(crate) fn list(&self) -> Arc<Vec<Member>> {
        self.list.clone()
    }

    pub(crate) fn removed(&self) -> Arc<Vec<MemberId>> {
        self.removed.clone()
    }

    pub(crate) fn version(&self) -> Option<String> {
        self.version.clone()
    }

    /// What a member says of itself. From one that was removed meanwhile it changes nothing, as in etcd.
    pub(crate) fn set_attributes(
        &mut self,
        request: &ClusterMemberAttrSetRequest,
        batch: &mut WriteBatch,
    ) -> Result<(), Error> {
        let id = MemberId(request.member_id);
        let Some(member) = self.by_id.get_mut(&id) else {
            return if self.removed.contains(&id) { Ok(()) } else { Err(Error::MemberNotFound) };
        };
        member.member_attributes = Some(request.member_attributes.clone().unwrap_or_default());
        batch.put(Table::Member, keys::member(id), member.encode_to_vec());
        self.publish();
        Ok(())
    }

    pub(crate) fn set_version(&mut self, version: &str, batch: &mut WriteBatch) {
        batch.put(Table::Meta, keys::META_CLUSTER_VERSION, Bytes::copy_from_slice(version.as_bytes()));
        self.version = Some(version.to_owned());
    }
}

/// The rows of a new cluster, equal on all founders: as if an entry at index 1, term 1 had made them (trap 2).
pub(crate) fn bootstrap(founders: &[Founder], cluster_id: ClusterId) -> WriteBatch {
    let mut batch = WriteBatch::new();
    let founders: BTreeMap<MemberId, &Founder> = founders.iter().map(|founder| (founder.id, founder)).collect();
    for (id, founder) in &founders {
        let member = Member {
            id: id.0,
            raft_attributes: Some(RaftAttributes { peer_urls: founder.peer_urls.clone(), is_learner: false }),
            member_attributes: Some(Attributes { name: founder.name.clone(), client_urls: Vec::new() }),
        };
        batch.put(Table::Member, keys::member(*id), member.encode_to_vec());
    }
    let conf_state = ConfState { voters: founders.keys().map(|id| id.0).collect(), ..ConfState::default() };
    batch.put(Table::Meta, keys::META_CONF_STATE, conf_state.encode_to_vec());
    batch.put(Table::Meta, keys::META_CLUSTER_ID, Bytes::copy_from_slice(&cluster_id.0.to_be_bytes()));
    view::write_format(&mut batch);
    view::write_numbers(&Numbers::EMPTY, &mut batch);
    view::write_applied(Applied { index: 1, term: 1 }, &mut batch);
    batch
}

fn damaged(table: Table, error: &prost::DecodeError) -> Fatal {
    Fatal::Damaged { table: table.name(), message: error.to_string() }
}

//! Where Services come from, and how they reach the sync loop: as [`Update`]s in a queue.
//!
//! A source lists everything as of one moment and reports it whole ([`Listing`]); then it follows changes. When it loses
//! the thread it lists again, and the receiver tells what has gone meanwhile. So a source keeps no copy of the objects.
//!
//! - [`store`]: the etcd API, ours or real etcd's.
//!
//! What it does not do: it decides nothing about objects; the planner does.

pub mod store;

use ipnet::IpNet;
use proxy_core::model::NamespacedName;
use proxy_core::state::{Change, Kind};

use crate::storage::decode::Eligibility;

/// How many updates may wait for the sync loop before the source waits for it.
pub const QUEUE: usize = 256;

/// What a source reports.
#[derive(Clone, Debug)]
pub enum Update {
    Listed(Box<Listing>),
    /// In the order in which they happened.
    Changed(Vec<Change>),
    /// The ranges of all ServiceCIDRs.
    ServiceCidrs(Vec<IpNet>),
    /// Whether load balancers should send traffic to this node; `None` if it has no Node object.
    Eligibility(Option<Eligibility>),
}

/// Everything there is at one moment. What was reported before and is not in here is gone.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// `…Set` of every object.
    pub changes: Vec<Change>,
    /// Objects that are there and cannot be read: what was known of them still holds.
    pub unreadable: Vec<(Kind, NamespacedName)>,
    pub service_cidrs: Vec<IpNet>,
    pub eligibility: Option<Eligibility>,
}

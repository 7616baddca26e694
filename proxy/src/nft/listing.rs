//! What the kernel has been given, by frontend: read from its elements, so any process can list what another wrote.
//!
//! What it does not do: it names no Services; the kernel holds none. The caller joins by address and port.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use proxy_core::model::Family;

use super::NftError;
use super::kernel::Kernel;
use super::object::{Data, Id, Key, SetId};
use super::skeleton::{STEP_DISCARD, STEP_EXTERNAL_CLUSTER, STEP_EXTERNAL_LOCAL, STEP_GUARDED, STEP_REFUSE, StepChain};

/// One address and port, or one node port, and where it leads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListedFrontend {
    pub family: Family,
    /// `None` for a node port.
    pub address: Option<IpAddr>,
    /// The number in the IP header.
    pub protocol: u8,
    pub port: u16,
    /// By external rules: masqueraded, or short-circuited by origin.
    pub external: bool,
    /// Leads to endpoints of this node only (from outside the node, if external).
    pub local: bool,
    /// Only some sources may use it.
    pub guarded: bool,
    pub affinity_timeout_s: Option<u32>,
    pub answer: Answer,
}

/// What becomes of a connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// One of these, by index.
    Endpoints(Vec<SocketAddr>),
    Refused,
    Dropped,
    /// The elements lead nowhere; another process is just changing them, or somebody damaged them.
    Broken,
}

pub fn read<K: Kernel>(kernel: &mut K) -> Result<Vec<ListedFrontend>, NftError> {
    let mut out = Vec::new();
    for table in kernel.tables()? {
        let maps = Maps::read(kernel, table.family)?;
        for (set, at) in [(SetId::Frontends, super::object::address_bytes(table.family)), (SetId::NodePorts, 0)] {
            for (key, data) in maps.set(set) {
                let (Data::Id(id), Some(protocol), Some(port)) = (data, key.byte_at(at), key.port_at(at + 4)) else {
                    continue;
                };
                let address = (set == SetId::Frontends).then(|| key.address_at(table.family, 0)).flatten();
                out.push(maps.follow(table.family, address, protocol, port, *id));
            }
        }
    }
    out.sort();
    Ok(out)
}

struct Maps {
    sets: HashMap<SetId, HashMap<Key, Data>>,
    /// The endpoints of every set, by serial and protocol, in the order of their indices.
    endpoints: HashMap<(Id, u8), Vec<(u32, SocketAddr)>>,
    affinity: HashMap<u16, u32>,
}

impl Maps {
    fn read<K: Kernel>(kernel: &mut K, family: Family) -> Result<Maps, NftError> {
        let mut sets = HashMap::new();
        for set in [
            SetId::Frontends,
            SetId::NodePorts,
            SetId::ClusterSide,
            SetId::Outside,
            SetId::Endpoints,
            SetId::Slots,
            SetId::Steps,
        ] {
            let elements = kernel.elements(family, set)?;
            sets.insert(set, elements.into_iter().map(|element| (element.key, element.data)).collect());
        }
        let mut maps = Maps { sets, endpoints: HashMap::new(), affinity: HashMap::new() };
        let mut endpoints: HashMap<(Id, u8), Vec<(u32, SocketAddr)>> = HashMap::new();
        for (set, index_at) in [(SetId::Endpoints, 8), (SetId::Slots, 0)] {
            for (key, data) in maps.set(set) {
                let (Some(id), Some(protocol), Some(index)) = (key.id_at(0), key.byte_at(4), key.u32_at(index_at))
                else {
                    continue;
                };
                if let Data::Endpoint(endpoint) = data {
                    endpoints.entry((id.serial(), protocol)).or_default().push((index, *endpoint));
                }
            }
        }
        endpoints.values_mut().for_each(|list| list.sort_unstable());
        maps.affinity = maps
            .set(SetId::Steps)
            .filter_map(|(key, data)| match data {
                Data::Goto(chain) => match StepChain::parse(chain)? {
                    StepChain::Affinity { timeout_s, .. } => Some((key.id_at(0)?.step(), timeout_s)),
                    StepChain::Pick(_) => None,
                },
                _ => None,
            })
            .collect();
        maps.endpoints = endpoints;
        Ok(maps)
    }

    fn set(&self, set: SetId) -> impl Iterator<Item = (&Key, &Data)> {
        self.sets.get(&set).into_iter().flatten()
    }

    fn id(&self, set: SetId, id: Id) -> Option<Id> {
        match self.sets.get(&set)?.get(&super::object::key().id(id))? {
            Data::Id(id) => Some(*id),
            _ => None,
        }
    }

    fn follow(&self, family: Family, address: Option<IpAddr>, protocol: u8, port: u16, first: Id) -> ListedFrontend {
        let mut listed = ListedFrontend {
            family,
            address,
            protocol,
            port,
            external: false,
            local: false,
            guarded: false,
            affinity_timeout_s: None,
            answer: Answer::Broken,
        };
        let mut id = Some(first);
        if let Some(guard) = id.filter(|id| id.step() == STEP_GUARDED) {
            listed.guarded = true;
            id = self.id(SetId::Outside, guard);
        }
        match id.map(Id::step) {
            Some(STEP_EXTERNAL_CLUSTER) => {
                listed.external = true;
                id = id.and_then(|id| self.id(SetId::ClusterSide, id));
            }
            Some(STEP_EXTERNAL_LOCAL) => {
                listed.external = true;
                id = id.and_then(|id| self.id(SetId::Outside, id));
            }
            _ => {}
        }
        let Some(id) = id else { return listed };
        listed.local = id.is_local();
        listed.affinity_timeout_s = self.affinity.get(&id.step()).copied();
        listed.answer = match id.step() {
            STEP_REFUSE => Answer::Refused,
            STEP_DISCARD => Answer::Dropped,
            _ => self
                .endpoints
                .get(&(id.serial(), protocol))
                .map_or(Answer::Broken, |list| Answer::Endpoints(list.iter().map(|(_, endpoint)| *endpoint).collect())),
        };
        listed
    }
}

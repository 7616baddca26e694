//! What our tables are made of, as values: sets, keys, elements, rules, and the changes that a batch makes.
//!
//! ```text
//! bits of an id   31                                   12 11            0
//!                 |  serial (pair << 1 | local)         |  step           |     listed by nft as "serial:step", hex
//! ```
//! A *pair* is one Service port of one family. Its even serial is the set of all its endpoints (and its policy and
//! guard, told apart by their steps), its odd serial the set of those on this node. The step says which chain goes on.
//!
//! Keys and data are bytes as they lie in the packet-processing registers: addresses and ports in network order, ids and
//! indices in host order, every field padded to four bytes.
//!
//! What it does not do: nothing here is encoded for netlink ([`super::netlink`]) and nothing decided ([`super::render`]).

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use proxy_core::model::Family;

/// The name of our table in either family.
pub const TABLE: &str = "keelson";

/// A 32-bit id: a serial and the step that handles it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub u32);

impl Id {
    pub const SERIAL_MASK: u32 = 0xffff_f000;
    pub const STEP_MASK: u32 = 0x0000_0fff;
    /// The lowest bit of the serial: the set of this node's endpoints.
    pub const LOCAL_BIT: u32 = 0x0000_1000;
    pub const PAIR_MASK: u32 = Id::SERIAL_MASK & !Id::LOCAL_BIT;
    /// Serial 0 is nobody's, so pairs begin at 1.
    pub const PAIR_MAX: u32 = (1 << 19) - 1;

    pub fn new(pair: u32, local: bool, step: u16) -> Id {
        debug_assert!(pair <= Id::PAIR_MAX && u32::from(step) <= Id::STEP_MASK);
        Id(pair << 13 | u32::from(local) << 12 | u32::from(step))
    }

    pub fn pair(self) -> u32 {
        self.0 >> 13
    }

    pub fn is_local(self) -> bool {
        self.0 & Id::LOCAL_BIT != 0
    }

    pub fn step(self) -> u16 {
        (self.0 & Id::STEP_MASK) as u16
    }

    pub fn serial(self) -> Id {
        Id(self.0 & Id::SERIAL_MASK)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}:{:x}", self.0 >> 12, self.step())
    }
}

/// Every set and map of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetId {
    Frontends,
    NodePorts,
    ClusterSide,
    Outside,
    Endpoints,
    Picks,
    Slots,
    Affinity,
    SourceRanges,
    ClusterIps,
    Hairpin,
    ServiceCidrs,
    PodCidrs,
    NodePortIps,
    Steps,
    PolicySteps,
    BackendSteps,
}

impl SetId {
    pub const ALL: [SetId; 17] = [
        SetId::Frontends,
        SetId::NodePorts,
        SetId::ClusterSide,
        SetId::Outside,
        SetId::Endpoints,
        SetId::Picks,
        SetId::Slots,
        SetId::Affinity,
        SetId::SourceRanges,
        SetId::ClusterIps,
        SetId::Hairpin,
        SetId::ServiceCidrs,
        SetId::PodCidrs,
        SetId::NodePortIps,
        SetId::Steps,
        SetId::PolicySteps,
        SetId::BackendSteps,
    ];

    pub fn name(self) -> &'static str {
        match self {
            SetId::Frontends => "frontends",
            SetId::NodePorts => "nodeports",
            SetId::ClusterSide => "cluster-side",
            SetId::Outside => "outside",
            SetId::Endpoints => "endpoints",
            SetId::Picks => "picks",
            SetId::Slots => "slots",
            SetId::Affinity => "affinity",
            SetId::SourceRanges => "source-ranges",
            SetId::ClusterIps => "cluster-ips",
            SetId::Hairpin => "hairpin",
            SetId::ServiceCidrs => "service-cidrs",
            SetId::PodCidrs => "pod-cidrs",
            SetId::NodePortIps => "nodeport-ips",
            SetId::Steps => "steps",
            SetId::PolicySteps => "policy-steps",
            SetId::BackendSteps => "backend-steps",
        }
    }

    /// Written by packets, not by us.
    pub fn is_dynamic(self) -> bool {
        self == SetId::Affinity
    }

    /// Reached by the second or a later lookup of a packet, whose first may have seen an older generation.
    ///
    /// The source ranges of a guard are too, but none can stay behind: it would overlap those that come after it.
    pub fn is_behind(self) -> bool {
        matches!(self, SetId::ClusterSide | SetId::Outside | SetId::Endpoints | SetId::Picks | SetId::Slots)
    }
}

/// How a key stands in its set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyKind {
    /// The first value after an interval, in a set of plain intervals.
    IntervalEnd,
    Single,
    /// First and last value of a concatenated interval, one after the other.
    Range,
}

const KEY_BYTES_MAX: usize = 40;

/// The key of an element.
///
/// Keys sort by their bytes, so that the end of an interval comes after its beginning and before the next one: the kernel
/// takes a beginning that follows another one for an overlap.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    bytes: [u8; KEY_BYTES_MAX],
    len: u8,
    pub kind: KeyKind,
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // What lies behind the length is zero in all keys. The kind is left out: it rarely tells keys apart.
        state.write(self.bytes());
    }
}

impl Key {
    pub fn empty(kind: KeyKind) -> Key {
        Key { kind, len: 0, bytes: [0; KEY_BYTES_MAX] }
    }

    /// From bytes that the kernel reported; `None` if no key of ours is as long.
    pub fn from_bytes(kind: KeyKind, bytes: &[u8]) -> Option<Key> {
        let mut key = Key::empty(kind);
        key.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        key.len = bytes.len() as u8;
        Some(key)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Appends a field and the padding that ends it.
    fn push(mut self, field: &[u8]) -> Key {
        let at = usize::from(self.len);
        self.bytes[at..at + field.len()].copy_from_slice(field);
        self.len += field.len().next_multiple_of(4) as u8;
        self
    }

    pub fn address(self, address: IpAddr) -> Key {
        match address {
            IpAddr::V4(address) => self.push(&address.octets()),
            IpAddr::V6(address) => self.push(&address.octets()),
        }
    }

    pub fn protocol(self, number: u8) -> Key {
        self.push(&[number])
    }

    pub fn port(self, port: u16) -> Key {
        self.push(&port.to_be_bytes())
    }

    pub fn id(self, id: Id) -> Key {
        self.push(&id.0.to_ne_bytes())
    }

    /// An id where whole keys are compared as numbers: in concatenated intervals.
    pub fn id_be(self, id: Id) -> Key {
        self.push(&id.0.to_be_bytes())
    }

    pub fn index(self, index: u32) -> Key {
        self.push(&index.to_ne_bytes())
    }

    /// The four bytes at `at`, as a host-order number.
    pub fn u32_at(&self, at: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(self.bytes().get(at..)?.first_chunk().copied()?))
    }

    pub fn id_at(&self, at: usize) -> Option<Id> {
        self.u32_at(at).map(Id)
    }

    pub fn port_at(&self, at: usize) -> Option<u16> {
        Some(u16::from_be_bytes(self.bytes().get(at..)?.first_chunk().copied()?))
    }

    pub fn byte_at(&self, at: usize) -> Option<u8> {
        self.bytes().get(at).copied()
    }

    pub fn address_at(&self, family: Family, at: usize) -> Option<IpAddr> {
        address(family, self.bytes().get(at..)?)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}[", self.kind)?;
        self.bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("]")
    }
}

/// An empty single key, to be filled.
pub fn key() -> Key {
    Key::empty(KeyKind::Single)
}

/// The address that `bytes` begin with.
pub fn address(family: Family, bytes: &[u8]) -> Option<IpAddr> {
    Some(match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from(*bytes.first_chunk::<4>()?)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(*bytes.first_chunk::<16>()?)),
    })
}

pub fn address_bytes(family: Family) -> usize {
    match family {
        Family::V4 => 4,
        Family::V6 => 16,
    }
}

/// What an element of a map leads to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Data {
    /// A set has none.
    None,
    Id(Id),
    Endpoint(SocketAddr),
    Goto(Arc<str>),
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Data::None => f.write_str("-"),
            Data::Id(id) => write!(f, "{id:?}"),
            Data::Endpoint(endpoint) => write!(f, "{endpoint}"),
            Data::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

/// An element of a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    pub key: Key,
    pub data: Data,
}

/// What a base chain hooks into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    pub kind: &'static str,
    pub hook: Hook,
    pub priority: i32,
}

/// Netfilter's hooks by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Prerouting = 0,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// One of the sixteen 4-byte registers.
pub type Reg = u8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    Network = 1,
    Transport = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meta {
    Priority = 2,
    Mark = 3,
    InputInterfaceName = 6,
    Protocol = 16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ct {
    State = 0,
    Status = 2,
}

/// `IP_CT_NEW` as a bit of the register that `ct state` loads.
pub const CT_STATE_NEW: u32 = 8;
/// `IPS_DST_NAT`.
pub const CT_STATUS_DNAT: u32 = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FibOf {
    Source,
    Destination,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Drop,
    Goto(Arc<str>),
}

/// One expression of a rule. A rule ends where a comparison or a lookup fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    Payload {
        to: Reg,
        header: Header,
        offset: u32,
        bytes: u32,
    },
    Meta {
        to: Reg,
        key: Meta,
    },
    SetMeta {
        from: Reg,
        key: Meta,
    },
    Ct {
        to: Reg,
        key: Ct,
    },
    /// The type of an address (local, unicast, …) by the routing tables.
    AddressType {
        to: Reg,
        of: FibOf,
    },
    Bitwise {
        reg: Reg,
        mask: u32,
        xor: u32,
    },
    /// Turns a host-order number into network order.
    ToNetworkOrder {
        reg: Reg,
    },
    Equal {
        reg: Reg,
        bytes: Vec<u8>,
    },
    NotEqual {
        reg: Reg,
        bytes: Vec<u8>,
    },
    /// In a set.
    Contains {
        set: SetId,
        reg: Reg,
    },
    NotContains {
        set: SetId,
        reg: Reg,
    },
    /// In a map: goes on with what it leads to.
    Map {
        set: SetId,
        reg: Reg,
        to: Reg,
    },
    /// In a map of verdicts: done.
    VerdictMap {
        set: SetId,
        reg: Reg,
    },
    Verdict(Verdict),
    Load {
        to: Reg,
        bytes: Vec<u8>,
    },
    Random {
        to: Reg,
        modulus: u32,
    },
    DestinationNat {
        address: Reg,
        port: Reg,
    },
    Masquerade,
    RejectByReset,
    RejectByIcmp,
    /// Adds an element or renews its timeout (and keeps what it held).
    Update {
        set: SetId,
        key: Reg,
        data: Reg,
        timeout_ms: u64,
    },
    Forget {
        set: SetId,
        key: Reg,
        data: Reg,
    },
}

/// A rule and what it is for; the comment also tells our rules from others' when a table is adopted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub comment: String,
    pub exprs: Vec<Expr>,
}

/// One change. A batch of them is one transaction: all or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    AddTable { family: Family, owned: bool, comment: String },
    DeleteTable { family: Family },
    AddSet { family: Family, set: SetId },
    AddChain { family: Family, name: Arc<str>, base: Option<Base> },
    AddRule { family: Family, chain: Arc<str>, rule: Rule },
    AddElements { family: Family, set: SetId, elements: Vec<Element> },
    DeleteElements { family: Family, set: SetId, keys: Vec<Key> },
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::AddTable { family, .. } => write!(f, "add table {} {TABLE}", family_name(*family)),
            Op::DeleteTable { family } => write!(f, "delete table {} {TABLE}", family_name(*family)),
            Op::AddSet { family, set } => write!(f, "add set {} {TABLE} {}", family_name(*family), set.name()),
            Op::AddChain { family, name, .. } => write!(f, "add chain {} {TABLE} {name}", family_name(*family)),
            Op::AddRule { family, chain, rule } => {
                write!(f, "add rule {} {TABLE} {chain} \"{}\"", family_name(*family), rule.comment)
            }
            Op::AddElements { family, set, elements } => {
                write!(f, "add {} elements to {} {TABLE} {}", elements.len(), family_name(*family), set.name())
            }
            Op::DeleteElements { family, set, keys } => {
                write!(f, "delete {} elements of {} {TABLE} {}", keys.len(), family_name(*family), set.name())
            }
        }
    }
}

/// The family as nft spells it.
pub fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_holds_pair_view_and_step() {
        let id = Id::new(2, true, 0x12);
        assert_eq!(id.0, 0x0000_5012);
        assert_eq!((id.pair(), id.is_local(), id.step()), (2, true, 0x12));
        assert_eq!(id.serial(), Id(0x5000));
        assert_eq!(format!("{id:?}"), "5:12");
    }

    #[test]
    fn every_field_of_a_key_is_padded_to_four_bytes() {
        let frontend = key().address("172.30.0.10".parse().expect("an address")).protocol(6).port(80);
        assert_eq!(frontend.bytes(), [0xac, 0x1e, 0, 0x0a, 6, 0, 0, 0, 0, 0x50, 0, 0]);
        assert_eq!(frontend.port_at(8), Some(80));
        assert_eq!(frontend.byte_at(4), Some(6));
        assert_eq!(frontend.address_at(Family::V4, 0), Some("172.30.0.10".parse().expect("an address")));
    }
}

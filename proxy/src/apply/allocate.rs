//! Which addresses and node ports are free: the choosing half of allocation. (The guarding half is in `apply.rs`.)
//!
//! As the API server does: the network's own address and, in IPv4, its broadcast address are never given; a request for a
//! particular one is served from the whole range; a choice of ours begins at a random place of the upper part, so
//! that the lower part stays for those that somebody wants to name, and uses the lower part only when the upper is full.
//!
//! Everything here is a function of its arguments; the random numbers are the caller's.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use proxy_core::model::Family;

/// Why an address or a port cannot be had, in Kubernetes' words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    #[error("provided IP is already allocated")]
    AddressTaken,
    #[error("the provided IP ({address}) is not in the valid range. The range of valid IPs is {range}")]
    AddressOutside { address: IpAddr, range: String },
    #[error("provided port is already allocated")]
    PortTaken,
    #[error("provided port is not in the valid range. The range of valid ports is {0}")]
    PortOutside(String),
    #[error("range is full")]
    Full,
}

/// A range of numbers to give out, the lower part kept for who asks by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Band {
    first: u128,
    /// Where the upper part begins.
    upper: u128,
    last: u128,
}

impl Band {
    /// The first free number at or after a random place, upper part first.
    fn pick(self, draw: u64, taken: impl Fn(u128) -> bool) -> Option<u128> {
        let part = |first: u128, last: u128| {
            let size = last.checked_sub(first)?.saturating_add(1);
            let start = first + u128::from(draw) % size;
            (start..=last).chain(first..start).find(|number| !taken(*number))
        };
        part(self.upper, self.last).or_else(|| part(self.first, self.upper.checked_sub(1)?))
    }
}

/// Where the upper part of a range of `size` begins: at `1/step` of it, but not before `min` nor after `max`.
fn reserved(size: u128, min: u128, max: u128, step: u128) -> u128 {
    if size <= min { 0 } else { (size / step).clamp(min, max) }
}

/// One of `--service-cluster-ip-range`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressBlock {
    net: IpNet,
    band: Band,
}

impl AddressBlock {
    pub fn new(net: IpNet) -> AddressBlock {
        let net = net.trunc();
        let (network, last) = match net {
            IpNet::V4(net) => (u128::from(net.network().to_bits()), u128::from(net.broadcast().to_bits())),
            IpNet::V6(net) => (net.network().to_bits(), net.broadcast().to_bits()),
        };
        let size = (last - network).saturating_add(1);
        let first = network.saturating_add(1);
        let last = if net.addr().is_ipv4() { last.saturating_sub(1) } else { last };
        let upper = first.saturating_add(reserved(size, 16, 256, 16));
        AddressBlock { net, band: Band { first, upper, last } }
    }

    pub fn family(&self) -> Family {
        Family::of_net(&self.net)
    }

    fn contains(&self, address: IpAddr) -> bool {
        Family::of(address) == self.family() && (self.band.first..=self.band.last).contains(&number(address))
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(u32::try_from(number).expect("a number out of an IPv4 block")).into(),
        Family::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

/// ClusterIPs: the blocks they come from, and those in use.
#[derive(Clone, Debug)]
pub struct Addresses {
    blocks: Vec<AddressBlock>,
    taken: BTreeSet<IpAddr>,
}

impl Addresses {
    /// One block, or two of different families; the first is of the default family.
    pub fn new(blocks: Vec<AddressBlock>) -> Addresses {
        Addresses { blocks, taken: BTreeSet::new() }
    }

    pub fn families(&self) -> impl Iterator<Item = Family> {
        self.blocks.iter().map(AddressBlock::family)
    }

    /// Notes that somebody has it.
    pub fn note(&mut self, address: IpAddr) {
        self.taken.insert(address);
    }

    pub fn release(&mut self, address: IpAddr) {
        self.taken.remove(&address);
    }

    pub fn request(&mut self, address: IpAddr) -> Result<(), AllocateError> {
        let family = Family::of(address);
        let block = self.blocks.iter().find(|block| block.family() == family);
        if !block.is_some_and(|block| block.contains(address)) {
            let ranges: Vec<String> = match block {
                Some(block) => vec![block.net.to_string()],
                None => self.blocks.iter().map(|block| block.net.to_string()).collect(),
            };
            return Err(AllocateError::AddressOutside { address, range: ranges.join(", ") });
        }
        if self.taken.insert(address) { Ok(()) } else { Err(AllocateError::AddressTaken) }
    }

    pub fn choose(&mut self, family: Family, draw: u64) -> Result<IpAddr, AllocateError> {
        let block = self.blocks.iter().find(|block| block.family() == family).ok_or(AllocateError::Full)?;
        let free = block.band.pick(draw, |candidate| self.taken.contains(&address(family, candidate)));
        let chosen = address(family, free.ok_or(AllocateError::Full)?);
        self.taken.insert(chosen);
        Ok(chosen)
    }
}

/// Node ports: their range, and those in use, as Kubernetes' `RangeAllocation` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports {
    first: u16,
    last: u16,
    taken: BTreeSet<u16>,
}

impl Ports {
    pub fn new(first: u16, last: u16) -> Ports {
        Ports { first, last, taken: BTreeSet::new() }
    }

    /// The range as Kubernetes writes it.
    pub fn range(&self) -> String {
        format!("{}-{}", self.first, self.last)
    }

    /// Notes that somebody has it. What lies outside the range has no place in the allocation and is left alone.
    pub fn note(&mut self, port: u16) {
        if (self.first..=self.last).contains(&port) {
            self.taken.insert(port);
        }
    }

    pub fn release(&mut self, port: u16) {
        self.taken.remove(&port);
    }

    pub fn request(&mut self, port: u16) -> Result<(), AllocateError> {
        if !(self.first..=self.last).contains(&port) {
            return Err(AllocateError::PortOutside(self.range()));
        }
        if self.taken.insert(port) { Ok(()) } else { Err(AllocateError::PortTaken) }
    }

    pub fn choose(&mut self, draw: u64) -> Result<u16, AllocateError> {
        let (first, last) = (u128::from(self.first), u128::from(self.last));
        let upper = first + reserved(last - first + 1, 16, 128, 32);
        let port = |number: u128| u16::try_from(number).expect("a number out of a range of ports");
        let free = Band { first, upper, last }.pick(draw, |number| self.taken.contains(&port(number)));
        let chosen = port(free.ok_or(AllocateError::Full)?);
        self.taken.insert(chosen);
        Ok(chosen)
    }

    /// The allocation as Kubernetes stores it: one number, most significant byte first, without leading zeros; bit i is
    /// the i-th port of the range.
    pub fn to_bits(&self) -> Vec<u8> {
        let bit = |port: &u16| usize::from(port - self.first);
        let mut bytes = vec![0; self.taken.last().map_or(0, |port| bit(port) / 8 + 1)];
        let end = bytes.len();
        for port in &self.taken {
            bytes[end - 1 - bit(port) / 8] |= 1 << (bit(port) % 8);
        }
        bytes
    }

    /// Takes over what Kubernetes stored for the same range.
    pub fn set_bits(&mut self, bytes: &[u8]) {
        self.taken.clear();
        for (i, byte) in bytes.iter().rev().enumerate() {
            for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                let port = usize::from(self.first) + i * 8 + bit;
                if let Ok(port) = u16::try_from(port) {
                    self.note(port);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn addresses(nets: &[&str]) -> Addresses {
        Addresses::new(nets.iter().map(|net| AddressBlock::new(net.parse().unwrap())).collect())
    }

    #[test]
    fn choices_come_from_the_upper_part_and_then_from_the_lower() {
        let mut pool = addresses(&["10.0.0.0/27"]);
        // 30 addresses, 10.0.0.1 to .30; the first 16 are kept for requests.
        let chosen: Vec<String> = (0..14).map(|_| pool.choose(Family::V4, 13).unwrap().to_string()).collect();
        assert_eq!(chosen[0], "10.0.0.30");
        assert_eq!(chosen[1], "10.0.0.17");
        assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), 14);
        assert_eq!(pool.choose(Family::V4, 0).unwrap().to_string(), "10.0.0.1");
        for _ in 0..15 {
            pool.choose(Family::V4, 5).unwrap();
        }
        assert_eq!(pool.choose(Family::V4, 5), Err(AllocateError::Full));
        assert_eq!(pool.choose(Family::V6, 5), Err(AllocateError::Full), "no block of that family");
    }

    #[test]
    fn requests_are_refused_in_kubernetes_words() {
        let mut pool = addresses(&["10.96.0.0/12", "fd00:10:96::/112"]);
        let request = |pool: &mut Addresses, ip: &str| pool.request(ip.parse().unwrap()).map_err(|e| e.to_string());
        assert_eq!(request(&mut pool, "10.96.0.1"), Ok(()));
        assert_eq!(request(&mut pool, "10.96.0.1"), Err("provided IP is already allocated".into()));
        assert_eq!(request(&mut pool, "fd00:10:96::ffff"), Ok(()));
        for outside in ["10.96.0.0", "10.111.255.255", "10.112.0.1"] {
            let text = format!(
                "the provided IP ({outside}) is not in the valid range. The range of valid IPs is 10.96.0.0/12"
            );
            assert_eq!(request(&mut pool, outside), Err(text));
        }
        let mut ports = Ports::new(30000, 32767);
        assert_eq!(ports.request(30080), Ok(()));
        assert_eq!(ports.request(30080).unwrap_err().to_string(), "provided port is already allocated");
        assert_eq!(
            ports.request(80).unwrap_err().to_string(),
            "provided port is not in the valid range. The range of valid ports is 30000-32767"
        );
        assert_eq!(ports.choose(0), Ok(30086), "the first 86 are kept for requests");
    }

    #[test]
    fn the_bits_are_one_big_number() {
        let mut ports = Ports::new(30000, 32767);
        assert_eq!(ports.to_bits(), Vec::<u8>::new());
        ports.note(30000);
        assert_eq!(ports.to_bits(), [1]);
        ports.note(30009);
        assert_eq!(ports.to_bits(), [2, 1]);
        ports.note(80);
        assert_eq!(ports.to_bits(), [2, 1], "outside of the range");
    }

    proptest! {
        #[test]
        fn bits_come_back(taken in proptest::collection::btree_set(30000u16..=32767, 0..100)) {
            let mut ports = Ports::new(30000, 32767);
            taken.iter().for_each(|port| ports.note(*port));
            let mut again = Ports::new(30000, 32767);
            again.set_bits(&ports.to_bits());
            prop_assert_eq!(again, ports);
        }

        #[test]
        fn nothing_is_given_twice_and_everything_is_given(draws in proptest::collection::vec(any::<u64>(), 64)) {
            let mut pool = addresses(&["10.0.0.0/26"]);
            let chosen: BTreeSet<IpAddr> =
                draws.iter().map_while(|draw| pool.choose(Family::V4, *draw).ok()).collect();
            prop_assert_eq!(chosen.len(), 62);
        }
    }
}

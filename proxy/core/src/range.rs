//! Address ranges without overlap.
//!
//! Users write CIDRs that overlap (10.96.0.0/12 and 10.96.0.0/16), nest and touch. The `nft` tool merges them before it
//! speaks to the kernel; over netlink nobody does, and the kernel answers EEXIST to the whole batch. So they are merged
//! here, once, for every backend.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// All addresses from `first` to `last`, both included, both of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressRange {
    pub first: IpAddr,
    pub last: IpAddr,
}

impl AddressRange {
    pub fn contains(&self, address: IpAddr) -> bool {
        // IpAddr orders every IPv4 address before every IPv6 address, so families never mix.
        self.first <= address && address <= self.last
    }
}

impl From<IpNet> for AddressRange {
    fn from(net: IpNet) -> Self {
        AddressRange { first: net.network(), last: net.broadcast() }
    }
}

impl From<IpAddr> for AddressRange {
    fn from(address: IpAddr) -> Self {
        AddressRange { first: address, last: address }
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

/// The same addresses in as few ranges as possible: sorted, disjoint and not adjacent.
pub fn merge<T: Into<AddressRange>>(ranges: impl IntoIterator<Item = T>) -> Vec<AddressRange> {
    let mut ranges: Vec<AddressRange> = ranges.into_iter().map(Into::into).collect();
    ranges.sort_unstable();
    let mut merged: Vec<AddressRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(before) if range.first <= before.last || Some(range.first) == successor(before.last) => {
                before.last = before.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// Is the address in one of the (sorted, disjoint) ranges?
pub fn contains(ranges: &[AddressRange], address: IpAddr) -> bool {
    let after = ranges.partition_point(|range| range.first <= address);
    after > 0 && ranges[after - 1].contains(address)
}

fn successor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => u32::from(v4).checked_add(1).map(|next| Ipv4Addr::from(next).into()),
        IpAddr::V6(v6) => u128::from(v6).checked_add(1).map(|next| Ipv6Addr::from(next).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(nets: &[&str]) -> String {
        let nets = nets.iter().map(|net| net.parse::<IpNet>().unwrap());
        merge(nets).iter().map(AddressRange::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn overlapping_nested_and_adjacent_ranges_become_one() {
        assert_eq!(merged(&[]), "");
        assert_eq!(merged(&["10.96.0.0/12", "10.96.0.0/16"]), "10.96.0.0-10.111.255.255");
        assert_eq!(merged(&["10.0.1.0/24", "10.0.0.0/24"]), "10.0.0.0-10.0.1.255");
        assert_eq!(merged(&["10.0.0.1/32", "10.0.0.3/32"]), "10.0.0.1 10.0.0.3");
        assert_eq!(
            merged(&["0.0.0.0/0", "::/0"]),
            "0.0.0.0-255.255.255.255 ::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
        );
        assert_eq!(merged(&["255.255.255.255/32", "::/128"]), "255.255.255.255 ::");
    }

    #[test]
    fn an_address_is_found_in_its_range_only() {
        let ranges = merge(["10.0.0.0/24", "10.0.2.0/24", "fd00::/64"].map(|net| net.parse::<IpNet>().unwrap()));
        for (address, found) in [
            ("9.255.255.255", false),
            ("10.0.0.0", true),
            ("10.0.0.255", true),
            ("10.0.1.0", false),
            ("10.0.2.9", true),
            ("fd00::9", true),
            ("fd00:0:0:1::", false),
        ] {
            assert_eq!(contains(&ranges, address.parse().unwrap()), found, "{address}");
        }
    }
}

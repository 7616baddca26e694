//! Deletes the UDP flows that lead where no endpoint is any more.
//!
//! A connection tracking entry decides about a flow for as long as packets refresh it, and the nat chains never see the
//! flow again: a client with a fixed source port stays on a removed endpoint, or, if it sent before its Service was there,
//! on no endpoint at all. So for every UDP destination that was added or changed, each flow to it whose replies come from no
//! current endpoint is deleted; once at once and once a second later, because a packet that looked up before the change
//! was committed can confirm its entry after the first sweep (`dataplane-traps.md` 1).
//!
//! Destinations are collected, so that however many change at once there is one dump a sweep; a destination that changes
//! again before its second sweep is judged by its newest endpoints. The dump is filtered to UDP by the kernel where it
//! can (5.8 and later), and deletes name the entry exactly, by tuple and id.
//!
//! What it does not do: it leaves TCP and SCTP alone, as kube-proxy does, and has no timer: the caller says what time it
//! is.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use proxy_core::model::Family;

use crate::netlink::attr::{Attr, Attrs, nest, put, put_u32};
use crate::netlink::{Message, NLM_F_REQUEST, Socket, family_number, frame};

const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ENTRY_ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
const FILTER_BY_PROTOCOL: u32 = 1 << 3;
const UDP: u8 = 17;

/// How long after a change a packet may still confirm an entry that it looked up before.
const SECOND_SWEEP_AFTER: Duration = Duration::from_secs(1);
/// Deletes are sent in messages of about this size together.
const DELETES_BYTES: usize = 256 << 10;

/// Where a UDP client sends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Destination {
    Address(SocketAddr),
    /// This port on an address of this node.
    NodePort(Family, u16),
}

/// UDP destinations whose flows may lead to endpoints that are none any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stale {
    destinations: BTreeMap<Destination, BTreeSet<SocketAddr>>,
    /// Where node ports answer; `None` is every address.
    node_addresses: Option<BTreeSet<IpAddr>>,
}

impl Stale {
    /// Flows to `address`:`port` are to be kept only if they lead to one of `endpoints`.
    pub fn frontend(&mut self, address: IpAddr, port: u16, endpoints: impl IntoIterator<Item = SocketAddr>) {
        let destination = Destination::Address(SocketAddr::new(address, port));
        self.destinations.entry(destination).or_default().extend(endpoints);
    }

    /// The same for a node port.
    pub fn node_port(&mut self, family: Family, port: u16, endpoints: impl IntoIterator<Item = SocketAddr>) {
        self.destinations.entry(Destination::NodePort(family, port)).or_default().extend(endpoints);
    }

    /// On which addresses node ports answer; `None` is every one.
    pub fn node_addresses(&mut self, addresses: Option<BTreeSet<IpAddr>>) {
        self.node_addresses = addresses;
    }

    pub fn is_empty(&self) -> bool {
        self.destinations.is_empty()
    }

    /// How many destinations.
    pub fn count(&self) -> usize {
        self.destinations.len()
    }
}

#[derive(Debug)]
struct Pending {
    endpoints: BTreeSet<SocketAddr>,
    due: Instant,
    second: bool,
}

/// What is to be swept, and when.
#[derive(Debug, Default)]
struct Agenda {
    pending: BTreeMap<Destination, Pending>,
    node_addresses: Option<BTreeSet<IpAddr>>,
}

impl Agenda {
    fn note(&mut self, stale: Stale, now: Instant) {
        if stale.is_empty() {
            return;
        }
        self.node_addresses = stale.node_addresses;
        for (destination, endpoints) in stale.destinations {
            self.pending.insert(destination, Pending { endpoints, due: now, second: false });
        }
    }

    fn next_due(&self) -> Option<Instant> {
        self.pending.values().map(|pending| pending.due).min()
    }

    /// Is a flow to one of the due destinations, and leads elsewhere?
    fn is_stale(&self, flow: &Flow, now: Instant) -> bool {
        let due = |destination| self.pending.get(&destination).filter(|pending| pending.due <= now);
        let to_node =
            || self.node_addresses.as_ref().is_none_or(|addresses| addresses.contains(&flow.destination.ip()));
        let pending = due(Destination::Address(flow.destination)).or_else(|| {
            let family = Family::of(flow.destination.ip());
            due(Destination::NodePort(family, flow.destination.port())).filter(|_| to_node())
        });
        pending.is_some_and(|pending| !pending.endpoints.contains(&flow.replier))
    }

    fn families(&self, now: Instant) -> BTreeSet<Family> {
        let due = self.pending.iter().filter(|(_, pending)| pending.due <= now);
        due.map(|(destination, _)| match destination {
            Destination::Address(address) => Family::of(address.ip()),
            Destination::NodePort(family, _) => *family,
        })
        .collect()
    }

    /// What is due was swept at `swept`: once more later, if this was the first time.
    fn swept(&mut self, now: Instant, swept: Instant) {
        self.pending.retain(|_, pending| {
            if pending.due > now {
                return true;
            }
            pending.due = swept + SECOND_SWEEP_AFTER;
            !std::mem::replace(&mut pending.second, true)
        });
    }
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// UDP flows looked at.
    pub seen: usize,
    pub deleted: usize,
    /// When [`Conntrack::sweep`] wants to be called next.
    pub next: Option<Instant>,
}

/// Connection tracking of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
    agenda: Agenda,
    /// The kernel filters dumps; false once it has refused to.
    filters: bool,
}

/// One UDP flow, as far as it matters.
#[derive(Debug, PartialEq, Eq)]
struct Flow {
    destination: SocketAddr,
    /// Where the replies come from: the endpoint, or the destination itself if it was not translated.
    replier: SocketAddr,
}

impl Conntrack {
    pub fn open() -> io::Result<Conntrack> {
        Ok(Conntrack { socket: Socket::open()?, agenda: Agenda::default(), filters: true })
    }

    /// Puts destinations on the agenda of the next sweep, and of one a second later.
    pub fn note(&mut self, stale: Stale, now: Instant) {
        self.agenda.note(stale, now);
    }

    /// When there is something to sweep.
    pub fn next_due(&self) -> Option<Instant> {
        self.agenda.next_due()
    }

    /// Deletes the stale flows to all destinations that are due, with one dump a family.
    pub fn sweep(&mut self, now: Instant) -> io::Result<Swept> {
        let mut swept = Swept::default();
        for family in self.agenda.families(now) {
            let deletes = self.dump(family, now, &mut swept)?;
            swept.deleted += self.delete(family, &deletes)?;
        }
        self.agenda.swept(now, now);
        swept.next = self.agenda.next_due();
        Ok(swept)
    }

    /// The attributes that name each stale flow.
    fn dump(&mut self, family: Family, now: Instant, swept: &mut Swept) -> io::Result<Vec<Vec<u8>>> {
        let agenda = &self.agenda;
        let read = |(seen, deletes): &mut (usize, Vec<Vec<u8>>), message: &Message<'_>| {
            let Some(flow) = read_flow(message.attrs) else { return };
            *seen += 1;
            if agenda.is_stale(&flow, now) {
                deletes.push(name_entry(message.attrs));
            }
        };
        let number = family_number(family);
        let kind = SUBSYSTEM << 8 | GET;
        if self.filters {
            match self.socket.dump(kind, number, &udp_filter(), read) {
                Ok((seen, deletes)) => {
                    swept.seen += seen;
                    return Ok(deletes);
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                    self.filters = false;
                }
                Err(error) => return Err(error),
            }
        }
        let (seen, deletes) = self.socket.dump(kind, number, &[], read)?;
        swept.seen += seen;
        Ok(deletes)
    }

    /// Deletes the named flows; one that went by itself is no error.
    fn delete(&mut self, family: Family, names: &[Vec<u8>]) -> io::Result<usize> {
        let mut deleted = 0;
        let number = family_number(family);
        let mut rest = names;
        while !rest.is_empty() {
            let mut bytes = Vec::new();
            let mut count = 0;
            while let Some(name) = rest.get(count).filter(|_| bytes.len() < DELETES_BYTES) {
                let seq = self.socket.take_seqs(1);
                frame(&mut bytes, SUBSYSTEM << 8 | DELETE, NLM_F_REQUEST, seq, number, 0, |out| {
                    out.extend_from_slice(name);
                });
                count += 1;
            }
            let answers = self.socket.send_batch(&bytes)?;
            let mut failed = answers.iter().filter(|answer| answer.errno != 0).peekable();
            deleted += count - answers.iter().filter(|answer| answer.errno != 0).count();
            if let Some(answer) = failed.find(|answer| answer.errno != libc::ENOENT) {
                return Err(io::Error::from_raw_os_error(answer.errno));
            }
            rest = &rest[count..];
        }
        Ok(deleted)
    }
}

fn udp_filter() -> Vec<u8> {
    let mut attrs = Vec::new();
    nest(&mut attrs, TUPLE_ORIGINAL, |out| nest(out, 2, |out| put(out, 1, &[UDP])));
    nest(&mut attrs, FILTER, |out| {
        // These are in host order, unlike the rest.
        put(out, 1, &FILTER_BY_PROTOCOL.to_ne_bytes());
        put(out, 2, &0_u32.to_ne_bytes());
    });
    attrs
}

fn read_flow(attrs: Attrs<'_>) -> Option<Flow> {
    if attrs.path(&[TUPLE_ORIGINAL, 2, 1])?.u8()? != UDP {
        return None;
    }
    let address = |tuple, v4, v6| {
        let ip = attrs.path(&[tuple, 1, v4]).or_else(|| attrs.path(&[tuple, 1, v6]))?.value;
        Some(match ip.len() {
            4 => IpAddr::from(*ip.first_chunk::<4>()?),
            _ => IpAddr::from(*ip.first_chunk::<16>()?),
        })
    };
    let port = |tuple, kind| attrs.path(&[tuple, 2, kind]).and_then(Attr::u16);
    Some(Flow {
        destination: SocketAddr::new(address(TUPLE_ORIGINAL, 2, 4)?, port(TUPLE_ORIGINAL, 3)?),
        replier: SocketAddr::new(address(TUPLE_REPLY, 1, 3)?, port(TUPLE_REPLY, 2)?),
    })
}

/// What a delete needs to mean this entry and no later one: its tuple, zone and id.
fn name_entry(attrs: Attrs<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    for attr in attrs {
        match attr.kind {
            TUPLE_ORIGINAL => nest(&mut out, TUPLE_ORIGINAL, |out| out.extend_from_slice(attr.value)),
            ENTRY_ID => attr.u32().into_iter().for_each(|id| put_u32(&mut out, ENTRY_ID, id)),
            ZONE => put(&mut out, ZONE, attr.value),
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn flow(destination: &str, replier: &str) -> Flow {
        Flow { destination: at(destination), replier: at(replier) }
    }

    fn stale(frontend: &str, endpoints: &[&str]) -> Stale {
        let mut stale = Stale::default();
        let frontend = at(frontend);
        stale.frontend(frontend.ip(), frontend.port(), endpoints.iter().map(|text| at(text)));
        stale
    }

    #[test]
    fn a_flow_is_stale_if_no_endpoint_answers_it() {
        let now = Instant::now();
        let mut agenda = Agenda::default();
        agenda.note(stale("10.96.0.1:53", &["10.0.0.1:53"]), now);
        assert!(!agenda.is_stale(&flow("10.96.0.1:53", "10.0.0.1:53"), now));
        assert!(agenda.is_stale(&flow("10.96.0.1:53", "10.0.0.2:53"), now));
        assert!(agenda.is_stale(&flow("10.96.0.1:53", "10.96.0.1:53"), now), "untranslated");
        assert!(!agenda.is_stale(&flow("10.96.0.2:53", "10.0.0.2:53"), now), "somebody else's");
    }

    #[test]
    fn node_ports_count_on_the_addresses_of_the_node_only() {
        let now = Instant::now();
        let mut agenda = Agenda::default();
        let mut stale = Stale::default();
        stale.node_port(Family::V4, 30_050, []);
        stale.node_addresses(Some([at("192.168.0.2:0").ip()].into()));
        agenda.note(stale.clone(), now);
        assert!(agenda.is_stale(&flow("192.168.0.2:30050", "192.168.0.2:30050"), now));
        assert!(!agenda.is_stale(&flow("8.8.8.8:30050", "8.8.8.8:30050"), now));
        stale.node_addresses(None);
        agenda.note(stale, now);
        assert!(agenda.is_stale(&flow("192.168.0.3:30050", "192.168.0.3:30050"), now));
    }

    #[test]
    fn every_change_is_swept_twice_and_by_its_newest_endpoints() {
        let start = Instant::now();
        let half = start + Duration::from_millis(500);
        let second = start + SECOND_SWEEP_AFTER;
        let mut agenda = Agenda::default();
        agenda.note(stale("10.96.0.1:53", &["10.0.0.1:53"]), start);
        assert_eq!(agenda.next_due(), Some(start));
        agenda.swept(start, start);
        assert_eq!(agenda.next_due(), Some(second));

        agenda.note(stale("10.96.0.1:53", &["10.0.0.2:53"]), half);
        assert_eq!(agenda.next_due(), Some(half));
        agenda.swept(half, half);
        assert!(!agenda.is_stale(&flow("10.96.0.1:53", "10.0.0.1:53"), second), "not due yet");
        let last = half + SECOND_SWEEP_AFTER;
        assert!(agenda.is_stale(&flow("10.96.0.1:53", "10.0.0.1:53"), last));
        assert!(!agenda.is_stale(&flow("10.96.0.1:53", "10.0.0.2:53"), last));
        agenda.swept(last, last);
        assert_eq!(agenda.next_due(), None);
    }
}

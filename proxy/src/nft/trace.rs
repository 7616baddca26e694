//! Walks a packet through the rules and elements of the kernel's twin: what our tables do to it, expression by expression.
//!
//! Held against [`proxy_core::trace`], which says what must happen. Where a rule draws a number, every number is followed,
//! so the answer is the set of all that may happen.
//!
//! What it does not do: it follows the first packet of a connection only, with an empty affinity map; it has no routing
//! tables beyond what the packet says of itself.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use proxy_core::model::Family;
use proxy_core::trace::{Origin, Packet, Translation, Verdict as Outcome};

use super::fake::{FakeKernel, FakeTable};
use super::object::{
    CT_STATE_NEW, CT_STATUS_DNAT, Ct, Data, Expr, FibOf, Header, Hook, Key, KeyKind, Meta, Reg, SetId, Verdict,
    address, address_bytes,
};
use super::skeleton::{set_shape, width};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    #[error("chain {0} is not there")]
    NoChain(String),
    /// Chance decides between answers, not only between endpoints.
    #[error("the packet meets different answers: {0:?}")]
    Divided(Vec<String>),
}

/// What the tables of `kernel` do to `packet`.
pub fn trace(kernel: &FakeKernel, packet: &Packet<'_>) -> Result<Outcome, TraceError> {
    let family = Family::of(packet.destination);
    let Some(table) = kernel.tables.get(&family) else { return Ok(Outcome::NoMatch) };
    let hooks: &[Hook] = match packet.origin {
        Origin::Node => &[Hook::Output, Hook::Postrouting],
        Origin::Interface(_) => &[Hook::Prerouting, Hook::Forward, Hook::Postrouting],
    };
    let tracer = Tracer { table, family, packet };
    let mut walks = vec![Walk::new(packet)];
    let mut ends = Vec::new();
    for hook in hooks {
        for chain in tracer.base_chains(*hook) {
            let mut next = Vec::new();
            for walk in walks {
                for (walk, end) in tracer.chain(walk, &chain)? {
                    if end == End::Accept { next.push(walk) } else { ends.push(end) }
                }
            }
            walks = next;
        }
    }
    conclude(&walks, &ends)
}

fn conclude(walks: &[Walk], ends: &[End]) -> Result<Outcome, TraceError> {
    let translations: BTreeSet<Translation> = walks
        .iter()
        .filter_map(|walk| Some(Translation { endpoint: walk.translated?, masquerade: walk.masquerade }))
        .collect();
    let mut outcomes = Vec::new();
    if !translations.is_empty() {
        outcomes.push(Outcome::Translate(translations));
    }
    if walks.iter().any(|walk| walk.translated.is_none()) {
        outcomes.push(Outcome::NoMatch);
    }
    if ends.contains(&End::Reject) {
        outcomes.push(Outcome::Reject);
    }
    if ends.contains(&End::Drop) {
        outcomes.push(Outcome::Drop);
    }
    match outcomes.pop() {
        Some(outcome) if outcomes.is_empty() => Ok(outcome),
        last => Err(TraceError::Divided(outcomes.iter().chain(&last).map(ToString::to_string).collect())),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Accept,
    Drop,
    Reject,
}

/// How a rule ends.
enum Step {
    /// It does not match: the next rule.
    Break,
    Goto(std::sync::Arc<str>),
    End(End),
}

/// A packet on its way.
#[derive(Clone, Debug)]
struct Walk {
    registers: [u8; 64],
    mark: u32,
    priority: u32,
    destination: IpAddr,
    port: u16,
    translated: Option<SocketAddr>,
    masquerade: bool,
}

impl Walk {
    fn new(packet: &Packet<'_>) -> Walk {
        Walk {
            registers: [0; 64],
            mark: 0,
            priority: 0,
            destination: packet.destination,
            port: packet.port,
            translated: None,
            masquerade: false,
        }
    }

    /// A value fills its last register with zeros.
    fn store(&mut self, reg: Reg, bytes: &[u8]) {
        let at = usize::from(reg) * 4;
        let end = at + bytes.len();
        self.registers[at..end.next_multiple_of(4)].fill(0);
        self.registers[at..end].copy_from_slice(bytes);
    }

    fn load(&self, reg: Reg, bytes: usize) -> &[u8] {
        let at = usize::from(reg) * 4;
        &self.registers[at..at + bytes]
    }

    fn number(&self, reg: Reg) -> u32 {
        u32::from_ne_bytes(self.load(reg, 4).try_into().expect("a register has four bytes"))
    }
}

struct Tracer<'a> {
    table: &'a FakeTable,
    family: Family,
    packet: &'a Packet<'a>,
}

impl Tracer<'_> {
    fn base_chains(&self, hook: Hook) -> Vec<String> {
        let mut chains: Vec<_> = self
            .table
            .chains
            .iter()
            .filter_map(|(name, chain)| Some((chain.base.filter(|base| base.hook == hook)?.priority, name.to_string())))
            .collect();
        chains.sort();
        chains.into_iter().map(|(_, name)| name).collect()
    }

    fn chain(&self, walk: Walk, name: &str) -> Result<Vec<(Walk, End)>, TraceError> {
        let chain = self.table.chains.get(name).ok_or_else(|| TraceError::NoChain(name.to_owned()))?;
        let mut out = Vec::new();
        let mut walks = vec![walk];
        for rule in &chain.rules {
            let mut next = Vec::new();
            for walk in walks {
                for (walk, step) in self.exprs(walk, &rule.exprs) {
                    match step {
                        Step::Break => next.push(walk),
                        Step::End(end) => out.push((walk, end)),
                        Step::Goto(chain) => out.extend(self.chain(walk, &chain)?),
                    }
                }
            }
            walks = next;
        }
        // The end of a base chain, or of one that was gone to from it, is its policy: accept.
        out.extend(walks.into_iter().map(|walk| (walk, End::Accept)));
        Ok(out)
    }

    /// Follows a rule; one walk in, as many out as its draw has numbers.
    fn exprs(&self, mut walk: Walk, exprs: &[Expr]) -> Vec<(Walk, Step)> {
        for (at, expr) in exprs.iter().enumerate() {
            if let Expr::Random { to, modulus } = expr {
                let draws = (0..*modulus).flat_map(|number| {
                    let mut walk = walk.clone();
                    walk.store(*to, &number.to_ne_bytes());
                    self.exprs(walk, &exprs[at + 1..])
                });
                return draws.collect();
            }
            if let Some(step) = self.expr(&mut walk, expr) {
                return vec![(walk, step)];
            }
        }
        vec![(walk, Step::Break)]
    }

    /// One expression; `None` goes on with the next.
    fn expr(&self, walk: &mut Walk, expr: &Expr) -> Option<Step> {
        match expr {
            Expr::Payload { to, header, offset, bytes } => {
                let value = self.payload(walk, *header, *offset, *bytes);
                walk.store(*to, &value);
            }
            Expr::Meta { to, key } => match key {
                Meta::Priority => walk.store(*to, &walk.priority.to_ne_bytes()),
                Meta::Mark => walk.store(*to, &walk.mark.to_ne_bytes()),
                Meta::Protocol => walk.store(*to, &[self.packet.protocol.number()]),
                Meta::InputInterfaceName => {
                    let mut name = [0; libc::IFNAMSIZ];
                    if let Origin::Interface(interface) = self.packet.origin {
                        name[..interface.len()].copy_from_slice(interface.as_bytes());
                    }
                    walk.store(*to, &name);
                }
            },
            Expr::SetMeta { from, key } => match key {
                Meta::Priority => walk.priority = walk.number(*from),
                Meta::Mark => walk.mark = walk.number(*from),
                Meta::Protocol | Meta::InputInterfaceName => return Some(Step::Break),
            },
            Expr::Ct { to, key } => {
                let status = if walk.translated.is_some() { CT_STATUS_DNAT } else { 0 };
                let value = if *key == Ct::State { CT_STATE_NEW } else { status };
                walk.store(*to, &value.to_ne_bytes());
            }
            Expr::AddressType { to, of } => {
                let local = match of {
                    FibOf::Source => self.packet.origin == Origin::Node,
                    FibOf::Destination => self.packet.destination_is_local,
                };
                let kind = if local { libc::RTN_LOCAL } else { libc::RTN_UNICAST };
                walk.store(*to, &u32::from(kind).to_ne_bytes());
            }
            Expr::Bitwise { reg, mask, xor } => {
                let value = walk.number(*reg) & mask ^ xor;
                walk.store(*reg, &value.to_ne_bytes());
            }
            Expr::ToNetworkOrder { reg } => walk.store(*reg, &walk.number(*reg).to_be_bytes()),
            Expr::Equal { reg, bytes } if walk.load(*reg, bytes.len()) != bytes => return Some(Step::Break),
            Expr::NotEqual { reg, bytes } if walk.load(*reg, bytes.len()) == bytes => return Some(Step::Break),
            Expr::Equal { .. } | Expr::NotEqual { .. } => {}
            Expr::Load { to, bytes } => walk.store(*to, bytes),
            _ => return self.deed(walk, expr),
        }
        None
    }

    /// The expressions that look something up or decide.
    fn deed(&self, walk: &mut Walk, expr: &Expr) -> Option<Step> {
        match expr {
            Expr::Contains { set, reg } => self.lookup(walk, *set, *reg).is_none().then_some(Step::Break),
            Expr::NotContains { set, reg } => self.lookup(walk, *set, *reg).is_some().then_some(Step::Break),
            Expr::Map { set, reg, to } => {
                match self.lookup(walk, *set, *reg).cloned() {
                    Some(Data::Id(id)) => walk.store(*to, &id.0.to_ne_bytes()),
                    Some(Data::Endpoint(endpoint)) => {
                        let value = Key::empty(KeyKind::Single).address(endpoint.ip()).port(endpoint.port());
                        walk.store(*to, value.bytes());
                    }
                    _ => return Some(Step::Break),
                }
                None
            }
            Expr::VerdictMap { set, reg } => Some(match self.lookup(walk, *set, *reg) {
                Some(Data::Goto(chain)) => Step::Goto(chain.clone()),
                _ => Step::Break,
            }),
            Expr::Verdict(Verdict::Drop) => Some(Step::End(End::Drop)),
            Expr::Verdict(Verdict::Goto(chain)) => Some(Step::Goto(chain.clone())),
            Expr::DestinationNat { address: at, port } => {
                let ip = address(self.family, walk.load(*at, address_bytes(self.family)))?;
                let port = u16::from_be_bytes([walk.load(*port, 2)[0], walk.load(*port, 2)[1]]);
                walk.translated = Some(SocketAddr::new(ip, port));
                walk.destination = ip;
                walk.port = port;
                Some(Step::End(End::Accept))
            }
            Expr::Masquerade => {
                walk.masquerade = true;
                Some(Step::End(End::Accept))
            }
            Expr::RejectByReset | Expr::RejectByIcmp => Some(Step::End(End::Reject)),
            // Written by packets, and empty here: nothing to renew, nothing to forget.
            Expr::Update { .. } | Expr::Forget { .. } => None,
            _ => None,
        }
    }

    fn payload(&self, walk: &Walk, header: Header, offset: u32, bytes: u32) -> Vec<u8> {
        let octets = |address: IpAddr| Key::empty(KeyKind::Single).address(address).bytes().to_vec();
        let field = match (header, offset, self.family) {
            (Header::Network, 12, Family::V4) | (Header::Network, 8, Family::V6) => octets(self.packet.source),
            (Header::Network, 16, Family::V4) | (Header::Network, 24, Family::V6) => octets(walk.destination),
            (Header::Transport, 2, _) => walk.port.to_be_bytes().to_vec(),
            other => unreachable!("no rule of ours reads {other:?}"),
        };
        field[..bytes as usize].to_vec()
    }

    fn lookup(&self, walk: &Walk, set: SetId, reg: Reg) -> Option<&Data> {
        let map = self.table.sets.get(&set)?;
        let fields = set_shape(set).key;
        let key = walk.load(reg, width(self.family, fields) as usize);
        if !set_shape(set).interval {
            return map.get(&Key::from_bytes(KeyKind::Single, key)?);
        }
        if set == SetId::SourceRanges {
            let inside = |range: &Key| {
                let (first, last) = range.bytes().split_at(key.len());
                // Field by field, as the kernel does; here an id (4 bytes) and an address.
                first[..4] == key[..4] && first[4..] <= key[4..] && key[4..] <= last[4..]
            };
            return map.iter().find(|(range, _)| inside(range)).map(|(_, data)| data);
        }
        let before = map.iter().filter(|(edge, _)| edge.bytes() <= key);
        // Of an end and a beginning at the same address the beginning counts.
        let nearest = before.max_by_key(|(edge, _)| (edge.bytes(), edge.kind == KeyKind::Single))?;
        (nearest.0.kind == KeyKind::Single).then_some(nearest.1)
    }
}

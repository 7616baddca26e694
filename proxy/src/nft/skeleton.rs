//! The constant part of the dataplane: sets, chains and rules that do not change when Services do.
//!
//! ```text
//!  prerouting, output ─▶ services ─ frontends ─┐              ┌▶ refuse · discard
//!                             └──── nodeports ─┴─ id ─ steps ─┼▶ guarded ─ outside ─┐
//!                                                             ├▶ external-cluster ◀─┤ cluster-side ─┐
//!                                                             ├▶ external-local   ◀─┘ outside ──────┤
//!                                                             └▶ pick-N, affinity-T-N ◀─────────────┘
//!                                                                    └ endpoints · picks, slots: dnat
//!  forward, output (filter) ─▶ drop what is left for the Service ranges
//!  postrouting ─▶ id off the packet, masquerade by mark, masquerade hairpins
//! ```
//! An id lives in `meta priority` between the lookups: the only 32-bit field of a packet that nftables may write and that
//! nobody relies on between these hooks. Every rule is one that `nft list ruleset` can print, which is why the result of a
//! lookup is stored there and loaded again before it is part of another key.
//!
//! Where this differs from the prototype's skeleton, `dataplane-traps.md` says why: affinity by pairs (4), postrouting at
//! 99 (5), the drop of unknown addresses in the filter hooks (2), the repeated lookup before `refuse` (12).
//!
//! What it does not do: round robin (its counter would be shared by all Services of one endpoint count), and counters.

mod sets;

use std::collections::BTreeMap;
use std::sync::Arc;

use proxy_core::dataplane::{LocalDetection, NodePlan, NodePortAddresses};
use proxy_core::model::Family;

pub use self::sets::{Field, SetData, SetShape, set_shape, width};
use super::object::{
    Base, CT_STATE_NEW, CT_STATUS_DNAT, Ct, Data, Element, Expr, FibOf, Header, Hook, Id, Meta, Op, Reg, Rule, SetId,
    Verdict, address_bytes, key,
};

pub const STEP_REFUSE: u16 = 1;
pub const STEP_DISCARD: u16 = 2;
pub const STEP_GUARDED: u16 = 3;
pub const STEP_EXTERNAL_CLUSTER: u16 = 4;
pub const STEP_EXTERNAL_LOCAL: u16 = 5;
/// Steps from here on are handed out as chains are made.
pub const STEP_FIRST_FREE: u16 = 17;
pub const STEP_MAX: u16 = Id::STEP_MASK as u16;

/// Chains for so many endpoints are made at start: making one later walks the map it uses.
pub const PICKS_AT_START: u32 = 128;

/// Changes whenever the meaning of sets, chains or rules does, so that a newer program never adopts an older table.
const LAYOUT_VERSION: u32 = 1;

/// What of the configuration shapes the rules of a family; everything else is elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub masquerade_all: bool,
    pub masquerade_mark: u32,
    pub detection: Detection,
    /// Node ports answer on every local address, not on those of `nodeport-ips`.
    pub node_ports_everywhere: bool,
}

/// How a packet of one of this node's pods is known in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detection {
    None,
    PodCidrs,
    /// The bytes that the name of the input interface begins with, or is (then it ends in NUL).
    Interface(Vec<u8>),
}

impl Shape {
    pub fn of(node: &NodePlan, family: Family) -> Shape {
        let interface = |name: &str, whole: bool| {
            let mut bytes = name.as_bytes().to_vec();
            bytes.truncate(libc::IFNAMSIZ - 1);
            if whole {
                bytes.resize(libc::IFNAMSIZ, 0);
            }
            if bytes.is_empty() { Detection::None } else { Detection::Interface(bytes) }
        };
        let detection = match &node.local_detection {
            LocalDetection::None => Detection::None,
            LocalDetection::PodCidrs(ranges) if ranges.iter().any(|range| Family::of(range.first) == family) => {
                Detection::PodCidrs
            }
            LocalDetection::PodCidrs(_) => Detection::None,
            LocalDetection::InterfacePrefix(prefix) => interface(prefix, false),
            LocalDetection::Interface(name) => interface(name, true),
        };
        Shape {
            masquerade_all: node.masquerade_all,
            masquerade_mark: node.masquerade_mark,
            detection,
            node_ports_everywhere: node.node_port_addresses == NodePortAddresses::AllLocal,
        }
    }

    /// What the comment of the table says: a table that says otherwise is not adopted but replaced.
    pub fn comment(&self) -> String {
        let detection = match &self.detection {
            Detection::None => "none".to_owned(),
            Detection::PodCidrs => "pod-cidrs".to_owned(),
            Detection::Interface(name) => {
                let whole = if name.ends_with(&[0]) { "" } else { "*" };
                format!("interface {}{whole}", String::from_utf8_lossy(name).trim_end_matches('\0').escape_default())
            }
        };
        format!(
            "keelson-proxy layout {LAYOUT_VERSION}, mark {:#x}, masquerade-all {}, local {detection}, node ports {}",
            self.masquerade_mark,
            self.masquerade_all,
            if self.node_ports_everywhere { "everywhere" } else { "by address" },
        )
    }
}

/// A chain that handles one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StepChain {
    /// One of so many endpoints.
    Pick(u32),
    /// The endpoint that a client had in the last `timeout_s` seconds, or one of `count`.
    Affinity { timeout_s: u32, count: u32, local: bool },
}

impl StepChain {
    pub fn name(self) -> Arc<str> {
        match self {
            StepChain::Pick(count) => format!("pick-{count}").into(),
            StepChain::Affinity { timeout_s, count, local: false } => format!("affinity-{timeout_s}-{count}").into(),
            StepChain::Affinity { timeout_s, count, local: true } => {
                format!("affinity-local-{timeout_s}-{count}").into()
            }
        }
    }

    /// Reads a name back, for adoption.
    pub fn parse(name: &str) -> Option<StepChain> {
        if let Some(count) = name.strip_prefix("pick-") {
            return Some(StepChain::Pick(count.parse().ok()?));
        }
        let rest = name.strip_prefix("affinity-")?;
        let (local, rest) = rest.strip_prefix("local-").map_or((false, rest), |rest| (true, rest));
        let (timeout, count) = rest.split_once('-')?;
        Some(StepChain::Affinity { timeout_s: timeout.parse().ok()?, count: count.parse().ok()?, local })
    }

    /// The chain, its rules and its two step elements.
    pub fn ops(self, family: Family, step: u16) -> Vec<Op> {
        let name = self.name();
        let mut ops = vec![Op::AddChain { family, name: name.clone(), base: None }];
        let rules = match self {
            StepChain::Pick(count) => pick_rules(family, count),
            StepChain::Affinity { timeout_s, count, local } => affinity_rules(family, timeout_s, count, local),
        };
        ops.extend(rules.into_iter().map(|rule| Op::AddRule { family, chain: name.clone(), rule }));
        for set in [SetId::Steps, SetId::BackendSteps] {
            ops.push(Op::AddElements { family, set, elements: vec![step_element(step, name.clone())] });
        }
        ops
    }
}

/// The steps and chains that every table begins with.
pub fn chains_at_start() -> impl Iterator<Item = (StepChain, u16)> {
    (1..=PICKS_AT_START).map(|count| (StepChain::Pick(count), STEP_FIRST_FREE - 1 + count as u16))
}

/// Everything that makes a table of `family`, in an order in which each part finds what it refers to.
pub fn table(family: Family, shape: &Shape, owned: bool) -> Vec<Op> {
    let mut ops = vec![Op::AddTable { family, owned, comment: shape.comment() }];
    ops.extend(SetId::ALL.map(|set| Op::AddSet { family, set }));
    let mut chain = |name: &str, rules: Vec<Rule>| {
        let name: Arc<str> = name.into();
        ops.push(Op::AddChain { family, name: name.clone(), base: None });
        ops.extend(rules.into_iter().map(|rule| Op::AddRule { family, chain: name.clone(), rule }));
    };
    chain("refuse", refuse_rules());
    chain("discard", vec![rule("endpoints elsewhere only", [drop()])]);
    chain("guarded", guarded_rules(family));
    chain("external-cluster", external_cluster_rules(shape));
    chain("external-local", external_local_rules(family, shape));
    chain("pick-first", pick_first_rules(family));
    chain("affinity-first", affinity_first_rules(family, false));
    chain("affinity-local-first", affinity_first_rules(family, true));
    for (step_chain, step) in chains_at_start() {
        ops.extend(step_chain.ops(family, step));
    }
    ops.extend(fixed_steps(family));
    ops.push(Op::AddChain { family, name: "services".into(), base: None });
    ops.extend(services_rules(family, shape).into_iter().map(|rule| Op::AddRule {
        family,
        chain: "services".into(),
        rule,
    }));
    for (name, base, rules) in base_chains(family, shape) {
        let name: Arc<str> = name.into();
        ops.push(Op::AddChain { family, name: name.clone(), base: Some(base) });
        ops.extend(rules.into_iter().map(|rule| Op::AddRule { family, chain: name.clone(), rule }));
    }
    ops
}

/// The steps that are no step chain's. One map a stage: the kernel refuses a verdict map that is reached from its own
/// targets.
const FIXED_STEPS: [(SetId, &[(u16, &str)]); 3] = {
    const REFUSE: (u16, &str) = (STEP_REFUSE, "refuse");
    const DISCARD: (u16, &str) = (STEP_DISCARD, "discard");
    const GUARDED: (u16, &str) = (STEP_GUARDED, "guarded");
    const CLUSTER: (u16, &str) = (STEP_EXTERNAL_CLUSTER, "external-cluster");
    const LOCAL: (u16, &str) = (STEP_EXTERNAL_LOCAL, "external-local");
    [
        (SetId::Steps, &[REFUSE, DISCARD, GUARDED, CLUSTER, LOCAL]),
        (SetId::PolicySteps, &[CLUSTER, LOCAL]),
        (SetId::BackendSteps, &[REFUSE, DISCARD]),
    ]
};

fn fixed_steps(family: Family) -> impl Iterator<Item = Op> {
    FIXED_STEPS.into_iter().map(move |(set, steps)| Op::AddElements {
        family,
        set,
        elements: steps.iter().map(|(step, chain)| step_element(*step, (*chain).into())).collect(),
    })
}

/// What the three step maps hold when there are these step chains.
pub fn step_maps(chains: &[(StepChain, u16)]) -> Vec<BTreeMap<u16, Arc<str>>> {
    let map = |(set, fixed): &(SetId, &[(u16, &str)])| {
        let mut map: BTreeMap<u16, Arc<str>> = fixed.iter().map(|(step, chain)| (*step, (*chain).into())).collect();
        if *set != SetId::PolicySteps {
            map.extend(chains.iter().map(|(chain, step)| (*step, chain.name())));
        }
        map
    };
    FIXED_STEPS.iter().map(map).collect()
}

pub fn step_element(step: u16, chain: Arc<str>) -> Element {
    Element { key: key().id(Id(u32::from(step))), data: Data::Goto(chain) }
}

fn base_chains(family: Family, shape: &Shape) -> Vec<(&'static str, Base, Vec<Rule>)> {
    let to_services = || vec![rule("every first packet", [goto("services")])];
    let drop_unknown = || vec![drop_unknown_rule(family)];
    // 99 is just before other proxies' and networks' srcnat (100): their masquerade would end the hook before our chain.
    // 10 is after another proxy's filter chains (0), which may have answered for a Service of theirs.
    vec![
        ("filter-forward", Base { kind: "filter", hook: Hook::Forward, priority: 10 }, drop_unknown()),
        ("filter-output", Base { kind: "filter", hook: Hook::Output, priority: 10 }, drop_unknown()),
        (
            "nat-postrouting",
            Base { kind: "nat", hook: Hook::Postrouting, priority: 99 },
            postrouting_rules(family, shape),
        ),
        ("nat-prerouting", Base { kind: "nat", hook: Hook::Prerouting, priority: -100 }, to_services()),
        ("nat-output", Base { kind: "nat", hook: Hook::Output, priority: -100 }, to_services()),
    ]
}

fn refuse_rules() -> Vec<Rule> {
    // A reset reaches a client whose socket is locked, or that has sent its SYN over IPv6; an ICMP error may not.
    let tcp = [Expr::Meta { to: 0, key: Meta::Protocol }, equal(0, &[6]), Expr::RejectByReset];
    vec![rule("no endpoints: tcp", tcp), rule("no endpoints: others", [Expr::RejectByIcmp])]
}

fn guarded_rules(family: Family) -> Vec<Rule> {
    let mut allowed = vec![
        Expr::Meta { to: 0, key: Meta::Priority },
        Expr::ToNetworkOrder { reg: 0 },
        source(family, 1),
        Expr::Contains { set: SetId::SourceRanges, reg: 0 },
    ];
    allowed.extend(follow(SetId::Outside, SetId::PolicySteps));
    vec![rule("source allowed", allowed), rule("source not allowed", [drop()])]
}

fn external_cluster_rules(shape: &Shape) -> Vec<Rule> {
    vec![
        rule("masquerade", mark(shape)),
        rule("all endpoints", follow(SetId::ClusterSide, SetId::BackendSteps)),
        rule("overtaken by a change", [drop()]),
    ]
}

fn external_local_rules(family: Family, shape: &Shape) -> Vec<Rule> {
    let mut rules = Vec::new();
    if let Some(mut exprs) = from_pod(family, shape, true) {
        exprs.extend(follow(SetId::ClusterSide, SetId::BackendSteps));
        rules.push(rule("pods reach all endpoints", exprs));
    }
    let mut node = vec![
        Expr::AddressType { to: 0, of: FibOf::Source },
        equal(0, &libc::c_int::from(libc::RTN_LOCAL).to_ne_bytes()),
    ];
    node.extend(mark(shape));
    node.extend(follow(SetId::ClusterSide, SetId::BackendSteps));
    rules.push(rule("this node reaches all endpoints", node));
    rules.push(rule("endpoints of this node", follow(SetId::Outside, SetId::BackendSteps)));
    rules.push(rule("overtaken by a change", [drop()]));
    rules
}

fn pick_rules(family: Family, count: u32) -> Vec<Rule> {
    vec![rule("one of them", pick(family, count)), rule("overtaken by a change", [goto("pick-first")])]
}

/// Index 0 exists while there is any endpoint: where a packet lands that read its step before a change and looks its
/// endpoint up after it.
fn pick_first_rules(family: Family) -> Vec<Rule> {
    vec![rule("the first", pick(family, 1)), rule("none left", [drop()])]
}

fn pick(family: Family, count: u32) -> Vec<Expr> {
    let mut exprs = load_id(0, Id::SERIAL_MASK, 0);
    exprs.extend([
        Expr::Meta { to: 1, key: Meta::Protocol },
        Expr::Random { to: 2, modulus: count },
        Expr::Map { set: SetId::Endpoints, reg: 0, to: 0 },
        destination_nat(family),
    ]);
    exprs
}

/// Affinity is kept per pair, so a client sticks whichever address and policy it comes by: its key and what is
/// remembered have the local bit off, and the chains of the local view set it again before they look a slot up.
fn affinity_rules(family: Family, timeout_s: u32, count: u32, local: bool) -> Vec<Rule> {
    let client = address_bytes(family) as Reg / 4;
    // Behind the longest key, so that the data never lies over it.
    let data: Reg = 8;
    let load_client = || {
        let mut exprs = vec![source(family, 0)];
        exprs.extend(load_id(client, Id::PAIR_MASK, 0));
        exprs
    };
    let remember = |exprs: &mut Vec<Expr>| {
        exprs.extend(load_client());
        exprs.push(Expr::Meta { to: data, key: Meta::Priority });
        let timeout_ms = u64::from(timeout_s) * 1000;
        exprs.push(Expr::Update { set: SetId::Affinity, key: 0, data, timeout_ms });
    };
    let mut recall = load_client();
    recall.push(Expr::Map { set: SetId::Affinity, reg: 0, to: 0 });
    recall.push(Expr::SetMeta { from: 0, key: Meta::Priority });
    remember(&mut recall);
    recall.extend(slot(family, local));
    let mut forget = load_client();
    forget.push(Expr::Meta { to: data, key: Meta::Priority });
    forget.push(Expr::Forget { set: SetId::Affinity, key: 0, data });
    let mut draw = pick_slot(count, local);
    remember(&mut draw);
    draw.extend(slot(family, local));
    let mut draw_only = pick_slot(count, local);
    draw_only.extend(slot(family, local));
    let first = if local { "affinity-local-first" } else { "affinity-first" };
    vec![
        rule("the one it had", recall),
        rule("it is gone", forget),
        rule("draw and remember", draw),
        rule("no room to remember", draw_only),
        rule("overtaken by a change", [goto(first)]),
    ]
}

fn affinity_first_rules(family: Family, local: bool) -> Vec<Rule> {
    let mut exprs = pick_slot(1, local);
    exprs.extend(slot(family, local));
    vec![rule("the first", exprs), rule("none left", [drop()])]
}

/// Priority := a random pick of the set.
fn pick_slot(count: u32, local: bool) -> Vec<Expr> {
    let mut exprs = load_id(0, Id::PAIR_MASK, if local { Id::LOCAL_BIT } else { 0 });
    exprs.extend([
        Expr::Random { to: 1, modulus: count },
        Expr::Map { set: SetId::Picks, reg: 0, to: 0 },
        Expr::SetMeta { from: 0, key: Meta::Priority },
    ]);
    exprs
}

/// Goes to the slot that the priority names, if it (still) is one of the view.
fn slot(family: Family, local: bool) -> Vec<Expr> {
    let mut exprs = Vec::new();
    if local {
        exprs.extend(load_id(0, !Id::LOCAL_BIT, Id::LOCAL_BIT));
        exprs.push(Expr::SetMeta { from: 0, key: Meta::Priority });
    }
    exprs.extend([
        Expr::Meta { to: 0, key: Meta::Priority },
        Expr::Meta { to: 1, key: Meta::Protocol },
        Expr::Map { set: SetId::Slots, reg: 0, to: 0 },
        destination_nat(family),
    ]);
    exprs
}

fn services_rules(family: Family, shape: &Shape) -> Vec<Rule> {
    let known = || vec![destination(family, 0), Expr::Contains { set: SetId::ClusterIps, reg: 0 }];
    let frontend = || {
        let protocol = address_bytes(family) as Reg / 4;
        let mut exprs = vec![
            destination(family, 0),
            Expr::Meta { to: protocol, key: Meta::Protocol },
            port(protocol + 1),
            Expr::Map { set: SetId::Frontends, reg: 0, to: 0 },
        ];
        exprs.extend(go_on(SetId::Steps));
        exprs
    };
    let mut rules = Vec::new();
    if shape.masquerade_all {
        let mut exprs = known();
        exprs.extend(mark(shape));
        rules.push(rule("masquerade all", exprs));
    } else if let Some(not_pod) = from_pod(family, shape, false) {
        let mut exprs = known();
        exprs.extend(not_pod);
        exprs.extend(mark(shape));
        rules.push(rule("masquerade what no pod of this node sends", exprs));
    }
    rules.push(rule("services", frontend()));
    let mut node_port = node_address(family, shape);
    node_port.extend([
        Expr::Meta { to: 0, key: Meta::Protocol },
        port(1),
        Expr::Map { set: SetId::NodePorts, reg: 0, to: 0 },
    ]);
    node_port.extend(go_on(SetId::Steps));
    rules.push(rule("node ports", node_port));
    // Kernels before 6.17 may miss a key while it is being replaced; a second look saves the connection from a reset.
    rules.push(rule("services, for a key that was being replaced", frontend()));
    let mut refuse = known();
    refuse.push(goto("refuse"));
    rules.push(rule("no such port", refuse));
    rules
}

/// Matches node-port addresses. Loopback is never one: a reply from an endpoint could not come back to it.
fn node_address(family: Family, shape: &Shape) -> Vec<Expr> {
    if !shape.node_ports_everywhere {
        return vec![destination(family, 0), Expr::Contains { set: SetId::NodePortIps, reg: 0 }];
    }
    let mut exprs = vec![
        Expr::AddressType { to: 0, of: FibOf::Destination },
        equal(0, &libc::c_int::from(libc::RTN_LOCAL).to_ne_bytes()),
    ];
    match family {
        Family::V4 => exprs.extend([
            Expr::Payload { to: 0, header: Header::Network, offset: 16, bytes: 1 },
            Expr::NotEqual { reg: 0, bytes: vec![127] },
        ]),
        Family::V6 => {
            let loopback = std::net::Ipv6Addr::LOCALHOST.octets().to_vec();
            exprs.extend([destination(family, 0), Expr::NotEqual { reg: 0, bytes: loopback }]);
        }
    }
    exprs
}

fn drop_unknown_rule(family: Family) -> Rule {
    let exprs = [
        Expr::Ct { to: 0, key: Ct::State },
        Expr::Bitwise { reg: 0, mask: CT_STATE_NEW, xor: 0 },
        Expr::NotEqual { reg: 0, bytes: vec![0; 4] },
        destination(family, 0),
        Expr::Contains { set: SetId::ServiceCidrs, reg: 0 },
        drop(),
    ];
    rule("no such service", exprs)
}

fn postrouting_rules(family: Family, shape: &Shape) -> Vec<Rule> {
    let translated = || {
        vec![
            Expr::Ct { to: 0, key: Ct::Status },
            Expr::Bitwise { reg: 0, mask: CT_STATUS_DNAT, xor: 0 },
            Expr::NotEqual { reg: 0, bytes: vec![0; 4] },
        ]
    };
    let mut clear = translated();
    clear.push(Expr::Load { to: 0, bytes: vec![0; 4] });
    clear.push(Expr::SetMeta { from: 0, key: Meta::Priority });
    let bit = shape.masquerade_mark;
    let marked = [
        Expr::Meta { to: 0, key: Meta::Mark },
        Expr::Bitwise { reg: 0, mask: bit, xor: 0 },
        Expr::NotEqual { reg: 0, bytes: vec![0; 4] },
        Expr::Meta { to: 0, key: Meta::Mark },
        Expr::Bitwise { reg: 0, mask: u32::MAX, xor: bit },
        Expr::SetMeta { from: 0, key: Meta::Mark },
        Expr::Masquerade,
    ];
    let mut hairpin = translated();
    hairpin.extend([
        source(family, 0),
        destination(family, address_bytes(family) as Reg / 4),
        Expr::Contains { set: SetId::Hairpin, reg: 0 },
        Expr::Masquerade,
    ]);
    vec![
        rule("no id leaves as a queueing class", clear),
        rule("masquerade what was marked", marked),
        rule("masquerade who meets itself", hairpin),
    ]
}

/// Matches packets that a pod of this node sent (or did not); `None` without local detection.
fn from_pod(family: Family, shape: &Shape, pod: bool) -> Option<Vec<Expr>> {
    match &shape.detection {
        Detection::None => None,
        Detection::PodCidrs => {
            let set = SetId::PodCidrs;
            let lookup = if pod { Expr::Contains { set, reg: 0 } } else { Expr::NotContains { set, reg: 0 } };
            Some(vec![source(family, 0), lookup])
        }
        Detection::Interface(name) => {
            let bytes = name.clone();
            let compare = if pod { Expr::Equal { reg: 0, bytes } } else { Expr::NotEqual { reg: 0, bytes } };
            Some(vec![Expr::Meta { to: 0, key: Meta::InputInterfaceName }, compare])
        }
    }
}

/// Priority := what it leads to in `map`; then the chain of its step.
fn follow(map: SetId, steps: SetId) -> Vec<Expr> {
    let mut exprs = vec![Expr::Meta { to: 0, key: Meta::Priority }, Expr::Map { set: map, reg: 0, to: 0 }];
    exprs.extend(go_on(steps));
    exprs
}

/// Stores the id that a lookup left in register 0, and goes to the chain of its step.
fn go_on(steps: SetId) -> Vec<Expr> {
    let mut exprs = vec![Expr::SetMeta { from: 0, key: Meta::Priority }];
    exprs.extend(load_id(0, Id::STEP_MASK, 0));
    exprs.push(Expr::VerdictMap { set: steps, reg: 0 });
    exprs
}

fn load_id(to: Reg, mask: u32, xor: u32) -> Vec<Expr> {
    vec![Expr::Meta { to, key: Meta::Priority }, Expr::Bitwise { reg: to, mask, xor }]
}

fn mark(shape: &Shape) -> Vec<Expr> {
    let bit = shape.masquerade_mark;
    vec![
        Expr::Meta { to: 0, key: Meta::Mark },
        Expr::Bitwise { reg: 0, mask: !bit, xor: bit },
        Expr::SetMeta { from: 0, key: Meta::Mark },
    ]
}

fn source(family: Family, to: Reg) -> Expr {
    let offset = if family == Family::V4 { 12 } else { 8 };
    Expr::Payload { to, header: Header::Network, offset, bytes: address_bytes(family) as u32 }
}

fn destination(family: Family, to: Reg) -> Expr {
    let offset = if family == Family::V4 { 16 } else { 24 };
    Expr::Payload { to, header: Header::Network, offset, bytes: address_bytes(family) as u32 }
}

fn port(to: Reg) -> Expr {
    Expr::Payload { to, header: Header::Transport, offset: 2, bytes: 2 }
}

fn destination_nat(family: Family) -> Expr {
    Expr::DestinationNat { address: 0, port: address_bytes(family) as Reg / 4 }
}

fn equal(reg: Reg, bytes: &[u8]) -> Expr {
    Expr::Equal { reg, bytes: bytes.to_vec() }
}

fn drop() -> Expr {
    Expr::Verdict(Verdict::Drop)
}

fn goto(chain: &str) -> Expr {
    Expr::Verdict(Verdict::Goto(chain.into()))
}

fn rule(comment: &str, exprs: impl IntoIterator<Item = Expr>) -> Rule {
    Rule { comment: comment.to_owned(), exprs: exprs.into_iter().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_are_read_back() {
        let chains = [
            StepChain::Pick(7),
            StepChain::Affinity { timeout_s: 10_800, count: 3, local: false },
            StepChain::Affinity { timeout_s: 5, count: 12, local: true },
        ];
        for chain in chains {
            assert_eq!(StepChain::parse(&chain.name()), Some(chain));
        }
        assert_eq!(StepChain::parse("pick-first"), None);
        assert_eq!(StepChain::parse("affinity-local-first"), None);
        assert_eq!(StepChain::parse("services"), None);
    }

    #[test]
    fn a_comment_fits_what_nft_can_list() {
        let shape = Shape {
            masquerade_all: false,
            masquerade_mark: u32::MAX,
            detection: Detection::Interface(b"abcdefghijklmno".to_vec()),
            node_ports_everywhere: true,
        };
        assert!(shape.comment().len() < 128, "{}", shape.comment());
        for op in table(Family::V6, &shape, true) {
            if let Op::AddRule { rule, .. } = op {
                assert!(rule.comment.len() < 128);
            }
        }
    }
}

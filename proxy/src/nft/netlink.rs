//! The real kernel: our values as nftables messages, and what it answers as our values.
//!
//! One [`Kernel::transact`] is one `sendmsg` of one batch, so it is one transaction; the acknowledgement is asked of the
//! last message only. A refusal names the message at fault, and through it the change. Element messages are cut before
//! their nested list reaches 64 KiB, the most a netlink attribute can hold.
//!
//! Facts (message and attribute numbers, encodings) are those of `nft-flat-prototype.md` section 7; the user data of
//! sets and tables follow what `nft` itself stores, so that it lists our sets with the names of their fields.
//!
//! What it does not do: it caches nothing and retries nothing.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use proxy_core::model::Family;

use super::kernel::{ChainInfo, Kernel, KernelError, Receipt, TableInfo};
use super::object::{
    Base, Data, Element, Expr, FibOf, Id, Key, KeyKind, Op, Rule, SetId, TABLE, Verdict, address, address_bytes,
};
use super::skeleton::{Field, SetData, SetShape, set_shape, width};
use crate::netlink::attr::{Attr, Attrs, close, nest, open, put, put_text, put_u32, put_u64};
use crate::netlink::{
    Answer, Message, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, Socket, family_number, frame,
};

pub(super) const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const GETSETELEM: u16 = 13;
const DELSETELEM: u16 = 14;
const GETGEN: u16 = 16;

const LIST_ENTRY: u16 = 1;
const TABLE_FLAG_OWNER: u32 = 2;
const TABLE_FLAG_PERSIST: u32 = 4;
const SET_FLAG_INTERVAL: u32 = 0x04;
const SET_FLAG_MAP: u32 = 0x08;
const SET_FLAG_TIMEOUT: u32 = 0x10;
const SET_FLAG_EVAL: u32 = 0x20;
const SET_FLAG_CONCAT: u32 = 0x80;
const DATA_VERDICT: u32 = 0xffff_ff00;
const ELEMENT_FLAG_INTERVAL_END: u32 = 1;
const VERDICT_DROP: u32 = 0;
const VERDICT_GOTO: u32 = -4_i32 as u32;

/// Leaves room for the last element and the attributes around the list.
const ELEMENTS_BYTES_MAX: usize = 48 << 10;

/// nftables of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    can_own: bool,
}

impl Netlink {
    pub fn open() -> io::Result<Netlink> {
        let mut netlink = Netlink { socket: Socket::open()?, can_own: false };
        netlink.can_own = kernel_release().is_some_and(|release| release >= (6, 9));
        Ok(netlink)
    }

    /// Names our own changes in notifications.
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    fn encode(&mut self, ops: &[Op]) -> (Vec<u8>, Vec<(u32, usize)>) {
        let mut batch = Batch { out: Vec::new(), seq: 0, starts: Vec::new(), last: 0 };
        let messages = ops.iter().map(message_bound).sum::<usize>() + 2;
        batch.seq = self.socket.take_seqs(u32::try_from(messages).expect("a batch has fewer than 2^32 messages"));
        batch.push(BATCH_BEGIN, 0, 0, usize::MAX);
        for (index, op) in ops.iter().enumerate() {
            batch.op(op, index);
        }
        batch.acknowledge_last();
        batch.push(BATCH_END, 0, 0, usize::MAX);
        (batch.out, batch.starts)
    }

    /// Two dumps of a table's parts name it; a third narrows to a set.
    fn names(set: Option<SetId>) -> Vec<u8> {
        let mut attrs = Vec::new();
        put_text(&mut attrs, 1, TABLE);
        if let Some(set) = set {
            put_text(&mut attrs, 2, set.name());
        }
        attrs
    }
}

impl Kernel for Netlink {
    fn can_own(&self) -> bool {
        self.can_own
    }

    fn owner_id(&self) -> u32 {
        self.socket.port()
    }

    fn transact(&mut self, ops: &[Op]) -> Result<Receipt, KernelError> {
        if ops.is_empty() {
            return Ok(Receipt::default());
        }
        let (bytes, starts) = self.encode(ops);
        let messages = starts.len() - 2;
        let answers = self.socket.send_batch(&bytes)?;
        let refusal = answers.iter().filter(|answer| answer.errno != 0).min_by_key(|answer| answer.seq);
        if let Some(answer) = refusal {
            return Err(refused(answer, &starts, ops));
        }
        let acknowledged = starts.len().checked_sub(2).and_then(|last| starts.get(last)).map(|(seq, _)| *seq);
        if !answers.iter().any(|answer| Some(answer.seq) == acknowledged) {
            return Err(KernelError::NoAnswer { messages });
        }
        Ok(Receipt { bytes: bytes.len(), messages })
    }

    fn tables(&mut self) -> Result<Vec<TableInfo>, KernelError> {
        let read = |tables: &mut Vec<TableInfo>, message: &Message<'_>| tables.extend(read_table(message));
        Ok(self.socket.dump(SUBSYSTEM << 8 | GETTABLE, 0, &[], read)?)
    }

    fn chains(&mut self, family: Family) -> Result<Vec<ChainInfo>, KernelError> {
        let number = family_number(family);
        let read = |chains: &mut Vec<ChainInfo>, message: &Message<'_>| {
            if message.attrs.find(1).and_then(Attr::text) == Some(TABLE)
                && let Some(name) = message.attrs.find(3).and_then(Attr::text)
            {
                chains.push(ChainInfo { name: name.into(), rules: Vec::new() });
            }
        };
        let mut chains = self.socket.dump(SUBSYSTEM << 8 | GETCHAIN, number, &[], read)?;
        let read = |rules: &mut Vec<(String, Option<String>)>, message: &Message<'_>| {
            if message.attrs.find(1).and_then(Attr::text) == Some(TABLE)
                && let Some(chain) = message.attrs.find(2).and_then(Attr::text)
            {
                let comment = message.attrs.find(7).and_then(|attr| read_comment(attr.value));
                rules.push((chain.to_owned(), comment));
            }
        };
        let rules = self.socket.dump(SUBSYSTEM << 8 | GETRULE, number, &Netlink::names(None), read)?;
        chains.sort();
        for (chain, comment) in rules {
            if let Ok(at) = chains.binary_search_by(|info| (*info.name).cmp(chain.as_str())) {
                chains[at].rules.push(comment);
            }
        }
        Ok(chains)
    }

    fn elements(&mut self, family: Family, set: SetId) -> Result<Vec<Element>, KernelError> {
        let shape = set_shape(set);
        let read = |elements: &mut Vec<Element>, message: &Message<'_>| {
            let Some(list) = message.attrs.find(3) else { return };
            elements.extend(list.nested().into_iter().filter_map(|attr| read_element(family, &shape, attr.nested())));
        };
        let attrs = Netlink::names(Some(set));
        Ok(self.socket.dump(SUBSYSTEM << 8 | GETSETELEM, family_number(family), &attrs, read)?)
    }

    fn generation(&mut self) -> Result<u32, KernelError> {
        let read = |message: &Message<'_>| message.attrs.find(1).and_then(Attr::u32);
        let answer = self.socket.ask(SUBSYSTEM << 8 | GETGEN, 0, &[], read)?;
        answer.ok_or(KernelError::NoAnswer { messages: 1 })
    }
}

fn refused(answer: &Answer, starts: &[(u32, usize)], ops: &[Op]) -> KernelError {
    let op = starts.iter().find(|(seq, _)| *seq == answer.seq).map_or(usize::MAX, |(_, op)| *op);
    KernelError::Refused {
        op,
        what: ops.get(op).map_or_else(|| "accept the batch".to_owned(), Op::to_string),
        error: io::Error::from_raw_os_error(answer.errno),
        reason: answer.text.clone(),
    }
}

/// At most so many messages come of a change.
fn message_bound(op: &Op) -> usize {
    match op {
        Op::AddElements { elements, .. } => elements.len().div_ceil(ELEMENTS_BYTES_MAX / 256) + 1,
        Op::DeleteElements { keys, .. } => keys.len().div_ceil(ELEMENTS_BYTES_MAX / 256) + 1,
        _ => 1,
    }
}

struct Batch {
    out: Vec<u8>,
    seq: u32,
    /// The sequence number of each message, and the change it belongs to.
    starts: Vec<(u32, usize)>,
    last: usize,
}

impl Batch {
    fn push(&mut self, kind: u16, flags: u16, family: u8, op: usize) {
        self.message(kind, flags, family, op, |_| {});
    }

    fn message(&mut self, kind: u16, flags: u16, family: u8, op: usize, body: impl FnOnce(&mut Vec<u8>)) {
        let framing = kind == BATCH_BEGIN || kind == BATCH_END;
        let (kind, resource) = if framing { (kind, SUBSYSTEM) } else { (SUBSYSTEM << 8 | kind, 0) };
        if !framing {
            self.last = self.out.len();
        }
        frame(&mut self.out, kind, NLM_F_REQUEST | flags, self.seq, family, resource, body);
        self.starts.push((self.seq, op));
        self.seq += 1;
    }

    fn acknowledge_last(&mut self) {
        let flags = &mut self.out[self.last + 6..self.last + 8];
        let value = u16::from_ne_bytes([flags[0], flags[1]]) | NLM_F_ACK;
        flags.copy_from_slice(&value.to_ne_bytes());
    }

    fn op(&mut self, op: &Op, index: usize) {
        match op {
            Op::AddTable { family, owned, comment } => {
                self.message(NEWTABLE, NLM_F_CREATE, family_number(*family), index, |out| {
                    put_text(out, 1, TABLE);
                    let flags = if *owned { TABLE_FLAG_OWNER | TABLE_FLAG_PERSIST } else { 0 };
                    put_u32(out, 2, flags);
                    put(out, 6, &comment_data(comment));
                });
            }
            Op::DeleteTable { family } => {
                self.message(DELTABLE, 0, family_number(*family), index, |out| put_text(out, 1, TABLE));
            }
            Op::AddSet { family, set } => {
                let id = *set as u32 + 1;
                self.message(NEWSET, NLM_F_CREATE, family_number(*family), index, |out| {
                    put_set(out, *family, *set, id);
                });
            }
            Op::AddChain { family, name, base } => {
                self.message(NEWCHAIN, NLM_F_CREATE, family_number(*family), index, |out| {
                    put_chain(out, name, *base);
                });
            }
            Op::AddRule { family, chain, rule } => {
                let flags = NLM_F_CREATE | NLM_F_APPEND;
                self.message(NEWRULE, flags, family_number(*family), index, |out| {
                    put_rule(out, *family, chain, rule);
                });
            }
            Op::AddElements { family, set, elements } => {
                let mut rest = elements.iter();
                let mut put = |out: &mut Vec<u8>| rest.next().map(|element| put_element(out, element)).is_some();
                self.elements(NEWSETELEM, NLM_F_CREATE, (*family, *set), index, elements.len(), &mut put);
            }
            Op::DeleteElements { family, set, keys } => {
                let mut rest = keys.iter();
                let mut put =
                    |out: &mut Vec<u8>| rest.next().map(|key| nest(out, LIST_ENTRY, |out| put_key(out, key))).is_some();
                self.elements(DELSETELEM, 0, (*family, *set), index, keys.len(), &mut put);
            }
        }
    }

    /// As many messages as the elements need.
    fn elements(
        &mut self,
        kind: u16,
        flags: u16,
        (family, set): (Family, SetId),
        index: usize,
        count: usize,
        put: &mut dyn FnMut(&mut Vec<u8>) -> bool,
    ) {
        let mut left = count;
        while left > 0 {
            self.message(kind, flags, family_number(family), index, |out| {
                put_text(out, 1, TABLE);
                put_text(out, 2, set.name());
                let start = open(out, 3);
                while left > 0 && out.len() - start < ELEMENTS_BYTES_MAX && put(out) {
                    left -= 1;
                }
                close(out, start);
            });
        }
    }
}

fn put_element(out: &mut Vec<u8>, element: &Element) {
    nest(out, LIST_ENTRY, |out| {
        put_key(out, &element.key);
        match &element.data {
            Data::None => {}
            Data::Id(id) => nest(out, 2, |out| put(out, 1, &id.0.to_ne_bytes())),
            Data::Endpoint(endpoint) => {
                let value = Key::empty(KeyKind::Single).address(endpoint.ip()).port(endpoint.port());
                nest(out, 2, |out| put(out, 1, value.bytes()));
            }
            Data::Goto(chain) => nest(out, 2, |out| put_verdict(out, &Verdict::Goto(chain.clone()))),
        }
    });
}

fn put_key(out: &mut Vec<u8>, key: &Key) {
    let bytes = key.bytes();
    match key.kind {
        KeyKind::Single => nest(out, 1, |out| put(out, 1, bytes)),
        KeyKind::IntervalEnd => {
            nest(out, 1, |out| put(out, 1, bytes));
            put_u32(out, 3, ELEMENT_FLAG_INTERVAL_END);
        }
        KeyKind::Range => {
            let (first, last) = bytes.split_at(bytes.len() / 2);
            nest(out, 1, |out| put(out, 1, first));
            nest(out, 10, |out| put(out, 1, last));
        }
    }
}

fn put_verdict(out: &mut Vec<u8>, verdict: &Verdict) {
    nest(out, 2, |out| match verdict {
        Verdict::Drop => put_u32(out, 1, VERDICT_DROP),
        Verdict::Goto(chain) => {
            put_u32(out, 1, VERDICT_GOTO);
            put_text(out, 2, chain);
        }
    });
}

fn put_chain(out: &mut Vec<u8>, name: &str, base: Option<Base>) {
    put_text(out, 1, TABLE);
    put_text(out, 3, name);
    let Some(base) = base else { return };
    put_text(out, 7, base.kind);
    put_u32(out, 5, 1);
    nest(out, 4, |out| {
        put_u32(out, 1, base.hook as u32);
        put_u32(out, 2, base.priority as u32);
    });
}

fn put_rule(out: &mut Vec<u8>, family: Family, chain: &str, rule: &Rule) {
    put_text(out, 1, TABLE);
    put_text(out, 2, chain);
    nest(out, 4, |out| {
        for expr in &rule.exprs {
            let (name, attrs) = expression(family, expr);
            nest(out, LIST_ENTRY, |out| {
                put_text(out, 1, name);
                nest(out, 2, |out| out.extend_from_slice(&attrs));
            });
        }
    });
    put(out, 7, &comment_data(&rule.comment));
}

/// Registers are numbered from 8, after the verdict (0) and the old 16-byte ones.
fn put_reg(out: &mut Vec<u8>, kind: u16, reg: u8) {
    put_u32(out, kind, 8 + u32::from(reg));
}

fn put_value(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    nest(out, kind, |out| put(out, 1, value));
}

fn expression(family: Family, expr: &Expr) -> (&'static str, Vec<u8>) {
    let mut attrs = Vec::new();
    let out = &mut attrs;
    let name = match expr {
        Expr::Payload { to, header, offset, bytes } => {
            put_reg(out, 1, *to);
            put_u32(out, 2, *header as u32);
            put_u32(out, 3, *offset);
            put_u32(out, 4, *bytes);
            "payload"
        }
        Expr::Meta { to, key } => {
            put_u32(out, 2, *key as u32);
            put_reg(out, 1, *to);
            "meta"
        }
        Expr::SetMeta { from, key } => {
            put_u32(out, 2, *key as u32);
            put_reg(out, 3, *from);
            "meta"
        }
        Expr::Ct { to, key } => {
            put_u32(out, 2, *key as u32);
            put_reg(out, 1, *to);
            "ct"
        }
        Expr::AddressType { to, of } => {
            put_reg(out, 1, *to);
            put_u32(out, 2, 3);
            put_u32(out, 3, if *of == FibOf::Source { 1 } else { 2 });
            "fib"
        }
        Expr::Bitwise { reg, mask, xor } => {
            put_reg(out, 1, *reg);
            put_reg(out, 2, *reg);
            put_u32(out, 3, 4);
            put_value(out, 4, &mask.to_ne_bytes());
            put_value(out, 5, &xor.to_ne_bytes());
            "bitwise"
        }
        Expr::ToNetworkOrder { reg } => {
            put_reg(out, 1, *reg);
            put_reg(out, 2, *reg);
            put_u32(out, 3, 1);
            put_u32(out, 4, 4);
            put_u32(out, 5, 4);
            "byteorder"
        }
        Expr::Equal { reg, bytes } | Expr::NotEqual { reg, bytes } => {
            put_reg(out, 1, *reg);
            put_u32(out, 2, u32::from(matches!(expr, Expr::NotEqual { .. })));
            put_value(out, 3, bytes);
            "cmp"
        }
        Expr::Contains { .. } | Expr::NotContains { .. } | Expr::Map { .. } | Expr::VerdictMap { .. } => {
            lookup(out, expr);
            "lookup"
        }
        Expr::Verdict(verdict) => {
            put_u32(out, 1, 0);
            nest(out, 2, |out| put_verdict(out, verdict));
            "immediate"
        }
        Expr::Load { to, bytes } => {
            put_reg(out, 1, *to);
            put_value(out, 2, bytes);
            "immediate"
        }
        Expr::Random { to, modulus } => {
            put_reg(out, 1, *to);
            put_u32(out, 2, *modulus);
            put_u32(out, 3, 1);
            put_u32(out, 4, 0);
            "numgen"
        }
        _ => statement(out, family, expr),
    };
    (name, attrs)
}

fn lookup(out: &mut Vec<u8>, expr: &Expr) {
    let (set, reg) = match expr {
        Expr::Contains { set, reg } | Expr::NotContains { set, reg } | Expr::VerdictMap { set, reg } => (set, reg),
        Expr::Map { set, reg, .. } => (set, reg),
        _ => return,
    };
    put_text(out, 1, set.name());
    put_reg(out, 2, *reg);
    match expr {
        Expr::Map { to, .. } => put_reg(out, 3, *to),
        Expr::VerdictMap { .. } => put_u32(out, 3, 0),
        Expr::NotContains { .. } => put_u32(out, 5, 1),
        _ => {}
    }
}

/// The expressions that change the packet, a set or its fate.
fn statement(out: &mut Vec<u8>, family: Family, expr: &Expr) -> &'static str {
    const RANDOM_FULLY: u32 = 0x10;
    const PORT_UNREACHABLE_V4: u8 = 3;
    const PORT_UNREACHABLE_V6: u8 = 4;
    match expr {
        Expr::DestinationNat { address, port } => {
            put_u32(out, 1, 1);
            put_u32(out, 2, u32::from(family_number(family)));
            put_reg(out, 3, *address);
            put_reg(out, 5, *port);
            "nat"
        }
        Expr::Masquerade => {
            put_u32(out, 1, RANDOM_FULLY);
            "masq"
        }
        Expr::RejectByReset => {
            put_u32(out, 1, 1);
            put(out, 2, &[0]);
            "reject"
        }
        Expr::RejectByIcmp => {
            put_u32(out, 1, 0);
            put(out, 2, &[if family == Family::V4 { PORT_UNREACHABLE_V4 } else { PORT_UNREACHABLE_V6 }]);
            "reject"
        }
        Expr::Update { set, key, data, timeout_ms } => {
            put_dynset(out, *set, 1, *key, *data);
            put_u64(out, 6, *timeout_ms);
            "dynset"
        }
        Expr::Forget { set, key, data } => {
            put_dynset(out, *set, 2, *key, *data);
            "dynset"
        }
        other => unreachable!("{other:?} is not a statement"),
    }
}

fn put_dynset(out: &mut Vec<u8>, set: SetId, op: u32, key: u8, data: u8) {
    put_text(out, 1, set.name());
    put_u32(out, 3, op);
    put_reg(out, 4, key);
    put_reg(out, 5, data);
}

fn put_set(out: &mut Vec<u8>, family: Family, set: SetId, id: u32) {
    let shape = set_shape(set);
    let mut flags = 0;
    put_text(out, 1, TABLE);
    put_text(out, 2, set.name());
    if shape.interval {
        flags |= SET_FLAG_INTERVAL;
    }
    if shape.interval && shape.key.len() > 1 {
        flags |= SET_FLAG_CONCAT;
    }
    if shape.data != SetData::Nothing {
        flags |= SET_FLAG_MAP;
    }
    if shape.dynamic_size.is_some() {
        flags |= SET_FLAG_TIMEOUT | SET_FLAG_EVAL;
    }
    put_u32(out, 3, flags);
    put_u32(out, 4, type_id(family, shape.key));
    put_u32(out, 5, width(family, shape.key));
    match shape.data {
        SetData::Nothing => {}
        SetData::Fields(fields) => {
            put_u32(out, 6, type_id(family, fields));
            put_u32(out, 7, width(family, fields));
        }
        SetData::Verdict => {
            put_u32(out, 6, DATA_VERDICT);
            put_u32(out, 7, 0);
        }
    }
    if let Some(size) = shape.dynamic_size {
        nest(out, 9, |out| put_u32(out, 1, size));
    } else if flags & SET_FLAG_CONCAT != 0 {
        nest(out, 9, |out| {
            nest(out, 2, |out| {
                for field in shape.key {
                    nest(out, LIST_ENTRY, |out| put_u32(out, 1, width(family, &[*field])));
                }
            });
        });
    }
    put_u32(out, 10, id);
    put(out, 13, &set_user_data(family, &shape));
}

/// nft's number for the type of a field; those of a concatenation are packed, six bits each.
fn type_id(family: Family, fields: &[Field]) -> u32 {
    fields.iter().fold(0, |id, field| {
        id << 6
            | match (field, family) {
                (Field::Source | Field::Destination, Family::V4) => 7,
                (Field::Source | Field::Destination, Family::V6) => 8,
                (Field::Protocol, _) => 12,
                (Field::Port, _) => 13,
                (Field::Id, _) => 23,
                (Field::Index, _) => 4,
            }
    })
}

/// What `nft` reads to list a set by the expressions that fill it (`typeof`): tagged bytes, with no padding.
fn set_user_data(family: Family, shape: &SetShape) -> Vec<u8> {
    const KEY_BYTE_ORDER: u8 = 0;
    const DATA_BYTE_ORDER: u8 = 1;
    const KEY_TYPEOF: u8 = 3;
    const DATA_TYPEOF: u8 = 4;
    const DATA_INTERVAL: u8 = 6;
    const EXPR_VERDICT: u32 = 1;
    let mut out = Vec::new();
    tagged_u32(&mut out, KEY_BYTE_ORDER, byte_order(shape.key));
    match shape.data {
        SetData::Nothing => {}
        SetData::Fields(fields) => tagged_u32(&mut out, DATA_BYTE_ORDER, byte_order(fields)),
        SetData::Verdict => tagged_u32(&mut out, DATA_BYTE_ORDER, 0),
    }
    tagged(&mut out, KEY_TYPEOF, &type_of(family, shape.key));
    match shape.data {
        SetData::Nothing => return out,
        SetData::Fields(fields) => tagged(&mut out, DATA_TYPEOF, &type_of(family, fields)),
        SetData::Verdict => {
            let mut verdict = Vec::new();
            tagged_u32(&mut verdict, 0, EXPR_VERDICT);
            tagged(&mut verdict, 1, &[]);
            tagged(&mut out, DATA_TYPEOF, &verdict);
        }
    }
    tagged_u32(&mut out, DATA_INTERVAL, 0);
    out
}

fn byte_order(fields: &[Field]) -> u32 {
    match fields {
        [Field::Id] => 1,
        [_] => 2,
        _ => 0,
    }
}

fn type_of(family: Family, fields: &[Field]) -> Vec<u8> {
    const EXPR_CONCAT: u32 = 13;
    if let [field] = fields {
        return type_of_field(family, *field);
    }
    let mut list = Vec::new();
    for (index, field) in fields.iter().enumerate() {
        tagged(&mut list, index as u8, &type_of_field(family, *field));
    }
    let mut out = Vec::new();
    tagged_u32(&mut out, 0, EXPR_CONCAT);
    tagged(&mut out, 1, &list);
    out
}

fn type_of_field(family: Family, field: Field) -> Vec<u8> {
    const EXPR_PAYLOAD: u32 = 7;
    const EXPR_META: u32 = 9;
    const EXPR_NUMGEN: u32 = 23;
    let (ip, source) = if family == Family::V4 { (12, 11) } else { (13, 8) };
    let (kind, parts): (u32, &[u32]) = match field {
        Field::Source => (EXPR_PAYLOAD, &[ip, source]),
        Field::Destination => (EXPR_PAYLOAD, &[ip, source + 1]),
        Field::Port => (EXPR_PAYLOAD, &[11, 2]),
        Field::Protocol => (EXPR_META, &[16]),
        Field::Id => (EXPR_META, &[2]),
        Field::Index => (EXPR_NUMGEN, &[1, 65_536, 0]),
    };
    let mut data = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        tagged_u32(&mut data, index as u8, *part);
    }
    let mut out = Vec::new();
    tagged_u32(&mut out, 0, kind);
    tagged(&mut out, 1, &data);
    out
}

fn tagged(out: &mut Vec<u8>, tag: u8, value: &[u8]) {
    out.push(tag);
    out.push(u8::try_from(value.len()).expect("user data is bounded by the shapes of our sets"));
    out.extend_from_slice(value);
}

fn tagged_u32(out: &mut Vec<u8>, tag: u8, value: u32) {
    tagged(out, tag, &value.to_ne_bytes());
}

/// A comment as `nft` stores it in the user data of tables and rules: tag 0, length, text with NUL.
fn comment_data(comment: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut text: Vec<u8> = comment.bytes().take(127).collect();
    text.push(0);
    tagged(&mut out, 0, &text);
    out
}

fn read_comment(data: &[u8]) -> Option<String> {
    let [0, len, text @ ..] = data else { return None };
    let text = text.get(..usize::from(*len).checked_sub(1)?)?;
    String::from_utf8(text.to_vec()).ok()
}

fn read_table(message: &Message<'_>) -> Option<TableInfo> {
    let family = match libc::c_int::from(message.family) {
        libc::NFPROTO_IPV4 => Family::V4,
        libc::NFPROTO_IPV6 => Family::V6,
        _ => return None,
    };
    if message.attrs.find(1)?.text()? != TABLE {
        return None;
    }
    let comment = message.attrs.find(6).and_then(|attr| read_comment(attr.value));
    let owner = message.attrs.find(7).and_then(Attr::u32).filter(|owner| *owner != 0);
    let flags = message.attrs.find(2).and_then(Attr::u32).unwrap_or_default();
    Some(TableInfo { family, comment, owner, persists: flags & TABLE_FLAG_PERSIST != 0 })
}

fn read_element(family: Family, shape: &SetShape, attrs: Attrs<'_>) -> Option<Element> {
    let first = attrs.path(&[1, 1])?.value;
    let flags = attrs.find(3).and_then(Attr::u32).unwrap_or_default();
    let key = if let Some(last) = attrs.path(&[10, 1]) {
        Key::from_bytes(KeyKind::Range, &[first, last.value].concat())?
    } else if flags & ELEMENT_FLAG_INTERVAL_END != 0 {
        Key::from_bytes(KeyKind::IntervalEnd, first)?
    } else {
        Key::from_bytes(KeyKind::Single, first)?
    };
    let data = match shape.data {
        SetData::Nothing => Data::None,
        SetData::Fields([Field::Id]) => Data::Id(Id(u32::from_ne_bytes(*attrs.path(&[2, 1])?.value.first_chunk()?))),
        SetData::Fields(_) => {
            let value = attrs.path(&[2, 1])?.value;
            let port = u16::from_be_bytes(*value.get(address_bytes(family)..)?.first_chunk()?);
            Data::Endpoint(SocketAddr::new(address(family, value)?, port))
        }
        SetData::Verdict => Data::Goto(Arc::from(attrs.path(&[2, 2, 2])?.text()?)),
    };
    Some(Element { key, data })
}

fn kernel_release() -> Option<(u32, u32)> {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let mut parts = text.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

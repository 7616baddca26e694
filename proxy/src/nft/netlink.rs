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

mod expr;
mod sets;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use proxy_core::model::Family;

use self::expr::expression;
use self::sets::{put_set, tagged};
use super::kernel::{ChainInfo, Kernel, KernelError, Receipt, TableInfo};
use super::object::{Base, Data, Element, Id, Key, KeyKind, Op, Rule, SetId, TABLE, Verdict, address, address_bytes};
use super::skeleton::{Field, SetData, SetShape, set_shape};
use crate::netlink::attr::{Attr, Attrs, close, nest, open, put, put_text, put_u32};
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

//! Expressions of rules as nftables encodes them.

use proxy_core::model::Family;

use super::super::object::{Expr, FibOf, SetId};
use super::put_verdict;
use crate::netlink::attr::{nest, put, put_text, put_u32, put_u64};
use crate::netlink::family_number;

/// Registers are numbered from 8, after the verdict (0) and the old 16-byte ones.
fn put_reg(out: &mut Vec<u8>, kind: u16, reg: u8) {
    put_u32(out, kind, 8 + u32::from(reg));
}

fn put_value(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    nest(out, kind, |out| put(out, 1, value));
}

pub(super) fn expression(family: Family, expr: &Expr) -> (&'static str, Vec<u8>) {
    let mut attrs = Vec::new();
    let out = &mut attrs;
    let name = match expr {
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
        Expr::Payload { .. }
        | Expr::Meta { .. }
        | Expr::SetMeta { .. }
        | Expr::Ct { .. }
        | Expr::AddressType { .. } => field(out, expr),
        _ => statement(out, family, expr),
    };
    (name, attrs)
}

/// The expressions that read a field of the packet, or write one.
fn field(out: &mut Vec<u8>, expr: &Expr) -> &'static str {
    match expr {
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
        other => unreachable!("{other:?} is no field"),
    }
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

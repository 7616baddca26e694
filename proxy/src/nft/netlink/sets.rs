//! Sets and maps as nftables encodes them, with the user data by which `nft` lists their keys as the fields they are.

use proxy_core::model::Family;

use super::super::object::{SetId, TABLE};
use super::super::skeleton::{Field, SetData, SetShape, set_shape, width};
use super::LIST_ENTRY;
use crate::netlink::attr::{nest, put, put_text, put_u32};

const SET_FLAG_INTERVAL: u32 = 0x04;
const SET_FLAG_MAP: u32 = 0x08;
const SET_FLAG_TIMEOUT: u32 = 0x10;
const SET_FLAG_EVAL: u32 = 0x20;
const SET_FLAG_CONCAT: u32 = 0x80;
const DATA_VERDICT: u32 = 0xffff_ff00;

pub(super) fn put_set(out: &mut Vec<u8>, family: Family, set: SetId, id: u32) {
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

pub(super) fn tagged(out: &mut Vec<u8>, tag: u8, value: &[u8]) {
    out.push(tag);
    out.push(u8::try_from(value.len()).expect("user data is bounded by the shapes of our sets"));
    out.extend_from_slice(value);
}

fn tagged_u32(out: &mut Vec<u8>, tag: u8, value: u32) {
    tagged(out, tag, &value.to_ne_bytes());
}

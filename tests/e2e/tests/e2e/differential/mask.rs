//! What may differ between two answers: `tests/e2e/differential/masks.txt`, applied to the bytes of a message.
//!
//! A message is walked field by field as it lies on the wire and put together again with the masked values replaced, so that order,
//! presence and encoding of all else stay what the server sent.
//!
//! What it does not do: it compares nothing, and takes no field away: whether a field is there is never masked.

use std::collections::BTreeMap;
use std::path::Path;

use prost_reflect::{Kind, MessageDescriptor};

/// How a value is masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// Any value.
    Any,
    /// Any number above zero; zero and less stay.
    Positive,
    /// Runs of ten digits and more in a text, and how many blanks part its words.
    Digits,
    /// A number above 2^32 that the script does not name: it was drawn by the server, and becomes its place among those.
    Drawn,
    /// Twelve hexadecimal digits and more after the last slash of a key.
    DrawnTail,
    /// The elements of a repeated field are sorted.
    Unordered,
}

/// The masks, by the full name of a field or the name of a header.
#[derive(Debug)]
pub(super) struct Masks {
    fields: BTreeMap<String, How>,
    headers: Vec<String>,
}

/// Numbers that a server drew while a story was played, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Drawn {
    /// The script's own text: what it names was not drawn.
    script: String,
    numbers: Vec<u64>,
}

impl Drawn {
    pub(super) fn new(script: String) -> Drawn {
        Drawn { script, numbers: Vec::new() }
    }

    /// What stands for `number`.
    fn place(&mut self, number: u64) -> u64 {
        if number <= u64::from(u32::MAX)
            || self.script.contains(&number.to_string())
            || self.script.contains(&number.cast_signed().to_string())
        {
            return number;
        }
        let known = self.numbers.iter().position(|drawn| *drawn == number);
        let place = known.unwrap_or_else(|| {
            self.numbers.push(number);
            self.numbers.len() - 1
        });
        u64::from(u32::MAX) + 1 + place as u64
    }
}

impl Masks {
    /// Reads the one file of masks.
    pub(super) fn load() -> Masks {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("differential/masks.txt");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Masks::parse(&text).unwrap_or_else(|error| panic!("masks.txt: {error}"))
    }

    fn parse(text: &str) -> Result<Masks, String> {
        let mut masks = Masks { fields: BTreeMap::new(), headers: Vec::new() };
        for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
            let (mask, reason) = line.split_once(" # ").ok_or_else(|| format!("`{line}` has no reason"))?;
            if reason.trim().is_empty() {
                return Err(format!("`{line}` has no reason"));
            }
            match mask.split_whitespace().collect::<Vec<_>>()[..] {
                ["header", name] => masks.headers.push(name.to_owned()),
                ["field", name, how] => {
                    let how = match how {
                        "any" => How::Any,
                        "positive" => How::Positive,
                        "digits" => How::Digits,
                        "drawn" => How::Drawn,
                        "drawn-tail" => How::DrawnTail,
                        "unordered" => How::Unordered,
                        _ => return Err(format!("`{how}` is no way to mask")),
                    };
                    let (message, field) = name.rsplit_once('.').ok_or_else(|| format!("`{name}` is no field"))?;
                    let known = super::schema::pool().get_message_by_name(message);
                    if known.and_then(|message| message.get_field_by_name(field)).is_none() {
                        return Err(format!("there is no field `{name}`"));
                    }
                    masks.fields.insert(name.to_owned(), how);
                }
                _ => return Err(format!("`{line}`")),
            }
        }
        Ok(masks)
    }

    /// Header or trailer lines that count.
    pub(super) fn lines(&self, lines: &[(String, String)]) -> Vec<String> {
        lines
            .iter()
            .filter(|(name, value)| !self.headers.contains(name) && (name != "grpc-message" || !value.is_empty()))
            .map(|(name, value)| match name.as_str() {
                // How much of a text is sent as `%xx` is each side's own; a client sees the text.
                "grpc-message" => format!("{name}: {}", super::wire::decode_percent(value).replace('\u{a0}', " ")),
                _ => format!("{name}: {value}"),
            })
            .collect()
    }

    /// The bytes of a message with what is masked replaced; bytes that are no message stay as they are.
    pub(super) fn apply(&self, descriptor: &MessageDescriptor, bytes: &[u8], drawn: &mut Drawn) -> Vec<u8> {
        self.walk(descriptor, bytes, drawn).unwrap_or_else(|| bytes.to_vec())
    }

    fn walk(&self, descriptor: &MessageDescriptor, bytes: &[u8], drawn: &mut Drawn) -> Option<Vec<u8>> {
        let mut parts: Vec<(u32, Vec<u8>)> = Vec::new();
        for field in fields(bytes)? {
            let Some(known) = descriptor.get_field(field.number) else {
                parts.push((field.number, field.raw.to_vec()));
                continue;
            };
            let how = self.fields.get(known.full_name()).copied();
            let part = match (field.value, known.kind(), how) {
                (Value::Number(number), _, Some(how)) => rebuild_number(field.number, how, number, drawn),
                (Value::Bytes(inner), Kind::Message(inner_descriptor), _) => {
                    rebuild_bytes(field.number, &self.walk(&inner_descriptor, inner, drawn)?)
                }
                (Value::Bytes(inner), _, Some(How::Any)) => {
                    rebuild_bytes(field.number, if inner.is_empty() { b"" } else { b"MASKED" })
                }
                (Value::Bytes(inner), _, Some(How::Digits)) => rebuild_bytes(field.number, &without_digits(inner)),
                (Value::Bytes(inner), _, Some(How::DrawnTail)) => rebuild_bytes(field.number, &without_tail(inner)),
                _ => field.raw.to_vec(),
            };
            parts.push((field.number, part));
        }
        self.order(descriptor, &mut parts);
        Some(parts.into_iter().flat_map(|(_, part)| part).collect())
    }

    /// Sorts what has no order, in its places.
    fn order(&self, descriptor: &MessageDescriptor, parts: &mut [(u32, Vec<u8>)]) {
        for (name, _) in self.fields.iter().filter(|(_, how)| **how == How::Unordered) {
            let Some((message, field)) = name.rsplit_once('.') else { continue };
            if message != descriptor.full_name() {
                continue;
            }
            let Some(field) = descriptor.get_field_by_name(field) else { continue };
            let places: Vec<usize> = (0..parts.len()).filter(|place| parts[*place].0 == field.number()).collect();
            let mut values: Vec<Vec<u8>> = places.iter().map(|place| parts[*place].1.clone()).collect();
            values.sort();
            for (place, value) in places.into_iter().zip(values) {
                parts[place].1 = value;
            }
        }
    }
}

/// A field as it lies on the wire.
pub(super) struct Field<'a> {
    pub(super) number: u32,
    /// Tag and value.
    pub(super) raw: &'a [u8],
    pub(super) value: Value<'a>,
}

pub(super) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Fixed,
}

/// The fields of a message in the order they came in; `None` if these bytes are no message.
pub(super) fn fields(mut bytes: &[u8]) -> Option<Vec<Field<'_>>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let start = bytes;
        let tag = varint(&mut bytes)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut bytes)?),
            1 => {
                bytes = bytes.get(8..)?;
                Value::Fixed
            }
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let inner = bytes.get(..length)?;
                bytes = &bytes[length..];
                Value::Bytes(inner)
            }
            5 => {
                bytes = bytes.get(4..)?;
                Value::Fixed
            }
            _ => return None,
        };
        let raw = &start[..start.len() - bytes.len()];
        found.push(Field { number: u32::try_from(tag >> 3).ok()?, raw, value });
    }
    Some(found)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for place in 0..10 {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn rebuild_number(field: u32, how: How, number: u64, drawn: &mut Drawn) -> Vec<u8> {
    let number = match how {
        How::Any if number != 0 => 1,
        How::Positive if number.cast_signed() > 0 => 1,
        How::Drawn => drawn.place(number),
        _ => number,
    };
    let mut out = Vec::new();
    put_varint(u64::from(field) << 3, &mut out);
    put_varint(number, &mut out);
    out
}

pub(super) fn rebuild_bytes(field: u32, inner: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_varint(u64::from(field) << 3 | 2, &mut out);
    put_varint(inner.len() as u64, &mut out);
    out.extend_from_slice(inner);
    out
}

fn without_digits(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(&first) = rest.first() {
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if digits >= 10 {
            out.push(b'N');
            rest = &rest[digits..];
        } else if rest.starts_with(b"  ") {
            rest = &rest[1..];
        } else {
            out.push(first);
            rest = &rest[1..];
        }
    }
    out
}

fn without_tail(key: &[u8]) -> Vec<u8> {
    let Some(slash) = key.iter().rposition(|byte| *byte == b'/') else { return key.to_vec() };
    let tail = &key[slash + 1..];
    if tail.len() < 12 || !tail.iter().all(u8::is_ascii_hexdigit) {
        return key.to_vec();
    }
    [&key[..=slash], b"DRAWN"].concat()
}

//! Netlink attributes: length, type, value, padded to four bytes; nested ones hold more of the same.
//!
//! What it does not do: it checks no meaning. A truncated attribute ends the iteration, as in every other reader.

const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
const HEADER_BYTES: usize = 4;

/// Appends an attribute.
pub fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    header(out, kind, value.len());
    out.extend_from_slice(value);
    pad(out);
}

/// Appends a number in network order, as all numbers in netfilter's attributes are.
pub fn put_u32(out: &mut Vec<u8>, kind: u16, value: u32) {
    put(out, kind, &value.to_be_bytes());
}

pub fn put_u64(out: &mut Vec<u8>, kind: u16, value: u64) {
    put(out, kind, &value.to_be_bytes());
}

/// Appends a name with the NUL that the kernel expects at its end.
pub fn put_text(out: &mut Vec<u8>, kind: u16, value: &str) {
    header(out, kind, value.len() + 1);
    out.extend_from_slice(value.as_bytes());
    out.push(0);
    pad(out);
}

/// Appends an attribute that holds what `body` appends.
pub fn nest(out: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let start = open(out, kind);
    body(out);
    close(out, start);
}

/// Begins a nested attribute whose end is not known yet.
pub fn open(out: &mut Vec<u8>, kind: u16) -> usize {
    let start = out.len();
    header(out, kind | NESTED, 0);
    start
}

/// Ends what [`open`] began.
pub fn close(out: &mut [u8], start: usize) {
    let length = u16::try_from(out.len() - start).expect("callers keep a nested list under 64 KiB");
    out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
}

fn header(out: &mut Vec<u8>, kind: u16, length: usize) {
    let length = u16::try_from(HEADER_BYTES + length).expect("an attribute holds less than 64 KiB");
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A list of attributes as it arrived.
#[derive(Debug, Clone, Copy)]
pub struct Attrs<'a>(&'a [u8]);

/// One of them.
#[derive(Debug, Clone, Copy)]
pub struct Attr<'a> {
    pub kind: u16,
    pub value: &'a [u8],
}

impl<'a> Attrs<'a> {
    pub fn new(bytes: &'a [u8]) -> Attrs<'a> {
        Attrs(bytes)
    }

    pub fn find(self, kind: u16) -> Option<Attr<'a>> {
        self.into_iter().find(|attr| attr.kind == kind)
    }

    /// Follows nested attributes down a path.
    pub fn path(self, kinds: &[u16]) -> Option<Attr<'a>> {
        let (first, rest) = kinds.split_first()?;
        let attr = self.find(*first)?;
        if rest.is_empty() { Some(attr) } else { attr.nested().path(rest) }
    }
}

impl<'a> IntoIterator for Attrs<'a> {
    type Item = Attr<'a>;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        Iter(self.0)
    }
}

pub struct Iter<'a>(&'a [u8]);

impl<'a> Iterator for Iter<'a> {
    type Item = Attr<'a>;

    fn next(&mut self) -> Option<Attr<'a>> {
        let &[l0, l1, t0, t1, ..] = self.0 else { return None };
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let kind = u16::from_ne_bytes([t0, t1]) & TYPE_MASK;
        let value = self.0.get(HEADER_BYTES..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Attr { kind, value })
    }
}

impl<'a> Attr<'a> {
    pub fn nested(self) -> Attrs<'a> {
        Attrs(self.value)
    }

    pub fn u32(self) -> Option<u32> {
        Some(u32::from_be_bytes(*self.value.first_chunk()?))
    }

    pub fn u16(self) -> Option<u16> {
        Some(u16::from_be_bytes(*self.value.first_chunk()?))
    }

    pub fn u8(self) -> Option<u8> {
        self.value.first().copied()
    }

    /// A name, without its NUL.
    pub fn text(self) -> Option<&'a str> {
        let end = self.value.iter().position(|byte| *byte == 0).unwrap_or(self.value.len());
        std::str::from_utf8(&self.value[..end]).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_found_again() {
        let mut out = Vec::new();
        put_text(&mut out, 1, "keelson");
        nest(&mut out, 2, |out| {
            put_u32(out, 1, 7);
            put(out, 2, &[1, 2, 3]);
        });
        assert_eq!(out.len(), 12 + 4 + 8 + 8);
        let attrs = Attrs::new(&out);
        assert_eq!(attrs.find(1).and_then(Attr::text), Some("keelson"));
        assert_eq!(attrs.path(&[2, 1]).and_then(Attr::u32), Some(7));
        assert_eq!(attrs.path(&[2, 2]).map(|attr| attr.value), Some(&[1, 2, 3][..]));
        assert!(attrs.find(3).is_none());
    }

    #[test]
    fn a_truncated_attribute_ends_the_list() {
        let mut out = Vec::new();
        put_u32(&mut out, 1, 7);
        put_u32(&mut out, 2, 8);
        assert_eq!(Attrs::new(&out[..13]).into_iter().count(), 1);
    }
}

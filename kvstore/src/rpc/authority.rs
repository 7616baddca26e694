//! Mends the `:authority` of old clients before HTTP/2 sees it.
//!
//! etcdctl 3.4 dials an endpoint by its URL and sends `:authority: http://127.0.0.1:2379` where only `127.0.0.1:2379` may
//! stand. etcd does not look; our HTTP/2 refuses the stream before a request exists. So the client's bytes pass through
//! [`Mended`]: it looks at the first HEADERS frame of a connection and, if the authority is in order, steps aside for good,
//! at the price of one branch a read. Only on an odd connection are all HEADERS frames rewritten.
//!
//! The rewrite needs no state of HPACK: a literal is found by walking the lengths, and the scheme is cut from it whether it
//! stands there in plain or in Huffman's code, of which a prefix of the text is a prefix of the bits. The shorter entry
//! then stands in the decoder's table too; the encoder believes it to be longer and forgets it no later than we do.
//!
//! What it does not do: mend anything else, or look into CONTINUATION frames (an authority comes first).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER_BYTES: usize = 9;
const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// A longer HEADERS frame is not looked into: what is read ahead stays bounded.
const HEADERS_BYTES_MAX: usize = 16 * 1024;
const READ_BYTES: usize = 4 * 1024;
/// Where `:authority` stands in HPACK's static table.
const AUTHORITY_INDEX: usize = 1;
/// The longer one first: neither is a prefix of the other.
const SCHEMES: [&str; 2] = ["https://", "http://"];

/// A client's connection whose authorities are in order when they are read.
#[derive(Debug)]
pub(super) struct Mended<S> {
    stream: S,
    state: State,
    /// Read and not yet understood.
    raw: Vec<u8>,
    /// Understood and not yet handed on, from `given` on.
    out: Vec<u8>,
    given: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Nothing but a part of HTTP/2's first bytes was seen.
    Preface,
    /// Between or in frames, with so many bytes of the current one to pass on; `odd`: an authority had to be mended.
    Frames { pass: usize, odd: bool },
    /// All that comes is in order.
    Clear,
}

impl<S> Mended<S> {
    pub(super) fn new(stream: S) -> Mended<S> {
        Mended { stream, state: State::Preface, raw: Vec::new(), out: Vec::new(), given: 0 }
    }

    /// Moves what is understood from `raw` to `out`.
    fn digest(&mut self) {
        loop {
            let taken = match self.state {
                State::Preface => self.preface(),
                State::Frames { pass: 0, odd } => self.frame(odd),
                State::Frames { pass, odd } => {
                    let taken = pass.min(self.raw.len());
                    self.state = State::Frames { pass: pass - taken, odd };
                    self.out.extend_from_slice(&self.raw[..taken]);
                    taken
                }
                State::Clear => {
                    self.out.append(&mut self.raw);
                    return;
                }
            };
            self.raw.drain(..taken);
            if taken == 0 && self.state != State::Clear {
                return;
            }
        }
    }

    fn preface(&mut self) -> usize {
        let seen = self.raw.len().min(PREFACE.len());
        if self.raw[..seen] != PREFACE[..seen] {
            self.state = State::Clear; // HTTP/1
            return 0;
        }
        if seen < PREFACE.len() {
            return 0;
        }
        self.state = State::Frames { pass: 0, odd: false };
        self.out.extend_from_slice(PREFACE);
        seen
    }

    /// Begins a frame; one of HEADERS is dealt with as a whole.
    fn frame(&mut self, odd: bool) -> usize {
        let Some(head) = self.raw.get(..FRAME_HEADER_BYTES) else { return 0 };
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        if head[3] != HEADERS || length > HEADERS_BYTES_MAX {
            self.out.extend_from_slice(head);
            self.state = State::Frames { pass: length, odd };
            return FRAME_HEADER_BYTES;
        }
        let whole = FRAME_HEADER_BYTES + length;
        let Some(frame) = self.raw.get(..whole) else { return 0 };
        match mend(frame) {
            Some(mended) => {
                self.out.extend_from_slice(&mended);
                self.state = State::Frames { pass: 0, odd: true };
            }
            None => {
                self.out.extend_from_slice(frame);
                if !odd {
                    self.state = State::Clear;
                }
            }
        }
        whole
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Mended<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.given < this.out.len() {
                let rest = &this.out[this.given..];
                let count = rest.len().min(buf.remaining());
                buf.put_slice(&rest[..count]);
                this.given += count;
                return Poll::Ready(Ok(()));
            }
            if this.state == State::Clear {
                return Pin::new(&mut this.stream).poll_read(cx, buf);
            }
            this.out.clear();
            this.given = 0;
            let mut bytes = [0; READ_BYTES];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                // The end: what was held back is all that there will be.
                this.state = State::Clear;
            }
            this.raw.extend_from_slice(read.filled());
            this.digest();
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Mended<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// A HEADERS frame with the scheme cut from its authority, or `None` if there is nothing to cut.
fn mend(frame: &[u8]) -> Option<Vec<u8>> {
    let flags = frame[4];
    let mut block = FRAME_HEADER_BYTES + usize::from(flags & PADDED != 0) + if flags & PRIORITY == 0 { 0 } else { 5 };
    let (start, text) = loop {
        let field = Field::read(frame.get(block..)?)?;
        if field.name == AUTHORITY_INDEX
            && let Some(value) = field.value
        {
            break (block + value, frame.get(block + value..block + field.length)?);
        }
        block += field.length;
    };
    let (huffman, value) = (text[0] & 0x80 != 0, string(text)?);
    let value = SCHEMES.iter().find_map(|scheme| {
        if huffman { cut_bits(value, scheme) } else { value.strip_prefix(scheme.as_bytes()).map(<[u8]>::to_vec) }
    })?;
    let mut mended = frame[..start].to_vec();
    write_length(&mut mended, value.len(), huffman);
    mended.extend_from_slice(&value);
    mended.extend_from_slice(&frame[start + text.len()..]);
    let length = u32::try_from(mended.len() - FRAME_HEADER_BYTES).expect("it became shorter").to_be_bytes();
    mended[..3].copy_from_slice(&length[1..]);
    Some(mended)
}

/// One representation of HPACK (RFC 7541, section 6): the index of its name, where its value string begins, its length.
struct Field {
    name: usize,
    value: Option<usize>,
    length: usize,
}

impl Field {
    fn read(bytes: &[u8]) -> Option<Field> {
        let first = *bytes.first()?;
        let (prefix, literal) = match first {
            0x80.. => (7, false),      // both from the table
            0x40..=0x7f => (6, true),  // a literal that enters the table
            0x20..=0x3f => (5, false), // the table's size
            _ => (4, true),            // a literal that does not
        };
        let (name, mut length) = integer(bytes, prefix)?;
        if !literal {
            return Some(Field { name: 0, value: None, length });
        }
        if name == 0 {
            length += string_length(bytes.get(length..)?)?;
        }
        let value = length;
        length += string_length(bytes.get(length..)?)?;
        Some(Field { name, value: Some(value), length })
    }
}

/// An integer in the last `prefix` bits of the first byte and what follows (section 5.1): its value and its length.
fn integer(bytes: &[u8], prefix: u32) -> Option<(usize, usize)> {
    let most = (1_usize << prefix) - 1;
    let mut value = usize::from(*bytes.first()?) & most;
    if value < most {
        return Some((value, 1));
    }
    for (at, byte) in bytes.iter().enumerate().skip(1).take(3) {
        value += usize::from(byte & 0x7f) << (7 * (at - 1));
        if byte & 0x80 == 0 {
            return Some((value, at + 1));
        }
    }
    None
}

/// How many bytes a string takes, its length included, if they are all there.
fn string_length(bytes: &[u8]) -> Option<usize> {
    let (length, head) = integer(bytes, 7)?;
    (bytes.len() >= head + length).then_some(head + length)
}

fn string(bytes: &[u8]) -> Option<&[u8]> {
    let (length, head) = integer(bytes, 7)?;
    bytes.get(head..head + length)
}

fn write_length(bytes: &mut Vec<u8>, length: usize, huffman: bool) {
    let flag = if huffman { 0x80 } else { 0 };
    if length < 0x7f {
        bytes.push(flag | length as u8);
        return;
    }
    bytes.push(flag | 0x7f);
    let mut rest = length - 0x7f;
    while rest >= 0x80 {
        bytes.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    bytes.push(rest as u8);
}

/// Huffman's code (RFC 7541, appendix B) of the letters that schemes are made of: its bits and how many they are.
fn code(letter: u8) -> (u64, u32) {
    match letter {
        b'h' => (0b10_0111, 6),
        b't' => (0b0_1001, 5),
        b'p' => (0b10_1011, 6),
        b's' => (0b0_1000, 5),
        b':' => (0b101_1100, 7),
        b'/' => (0b01_1000, 6),
        _ => unreachable!("no letter of a scheme"),
    }
}

/// Cuts the bits of `prefix` from a string in Huffman's code.
fn cut_bits(coded: &[u8], prefix: &str) -> Option<Vec<u8>> {
    let (bits, count) =
        prefix.bytes().map(code).fold((0, 0), |(bits, count), (more, width)| (bits << width | more, count + width));
    let end = content_bits(coded)?;
    let count = count as usize;
    if end < count || (0..count).any(|at| u64::from(bit(coded, at)) != bits >> (count - 1 - at) & 1) {
        return None;
    }
    // Padding is ones.
    let byte =
        |start: usize| (start..start + 8).fold(0, |byte, at| byte << 1 | if at < end { bit(coded, at) } else { 1 });
    Some((count..end).step_by(8).map(byte).collect())
}

/// The bit at a place, and ones beyond the end.
fn bit(coded: &[u8], at: usize) -> u8 {
    coded.get(at / 8).map_or(1, |byte| byte >> (7 - at % 8) & 1)
}

/// Where the letters end and the padding begins: fewer than eight ones, which are no letter. The code is canonical, so the
/// length of a letter shows in its first bits. `None` for letters that stand in no authority.
fn content_bits(coded: &[u8]) -> Option<usize> {
    let all = coded.len() * 8;
    let next = |at: usize, count: usize| (at..at + count).fold(0_u32, |bits, at| bits << 1 | u32::from(bit(coded, at)));
    let mut at = 0;
    while at < all {
        if all - at < 8 && next(at, all - at).trailing_ones() as usize >= all - at {
            return Some(at);
        }
        at += match next(at, 8) {
            0..80 => 5,
            80..184 => 6,
            184..248 => 7,
            248..254 => 8,
            _ if (0x1ff8..=0x1ffd).contains(&next(at, 13)) => 13, // brackets, the at sign
            _ => return None,
        };
    }
    (at == all).then_some(all)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    /// Huffman's code of the text, for the letters that the tests use.
    fn huffman(text: &str) -> Vec<u8> {
        let mut bits = String::new();
        for letter in text.bytes() {
            let (code, width) = match letter {
                b'0'..=b'2' => (u64::from(letter - b'0'), 5),
                b'3'..=b'9' => (0b01_1001 + u64::from(letter - b'3'), 6),
                b'.' => (0b01_0111, 6),
                b'a' => (0b0_0011, 5),
                b'[' => (0x1ffb, 13),
                b']' => (0x1ffc, 13),
                _ => code(letter),
            };
            bits += &format!("{code:0width$b}", width = width as usize);
        }
        while !bits.len().is_multiple_of(8) {
            bits.push('1');
        }
        (0..bits.len() / 8).map(|at| u8::from_str_radix(&bits[at * 8..at * 8 + 8], 2).unwrap()).collect()
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags, 0, 0, 0, 1]);
        frame.extend(payload);
        frame
    }

    /// `:method POST`, `:scheme http`, a literal path, the authority, and one more.
    fn headers(authority: &[u8], coded: bool) -> Vec<u8> {
        let mut block = vec![0x83, 0x86, 0x44, 2, b'/', b'x', 0x41];
        write_length(&mut block, authority.len(), coded);
        block.extend(authority);
        block.extend([0x40, 2, b't', b'e', 1, b'x']);
        frame(HEADERS, 4, &block)
    }

    /// What comes out when `bytes` go in, so many at a time.
    async fn through(bytes: &[u8], piece: usize) -> (Vec<u8>, State) {
        let (mut client, server) = tokio::io::duplex(piece);
        let mut mended = Mended::new(server);
        let bytes = bytes.to_vec();
        let writing = tokio::spawn(async move { tokio::io::AsyncWriteExt::write_all(&mut client, &bytes).await });
        let mut read = Vec::new();
        mended.read_to_end(&mut read).await.unwrap();
        writing.await.unwrap().unwrap();
        (read, mended.state)
    }

    #[tokio::test]
    async fn a_scheme_is_cut_from_the_authority() {
        for address in
            ["127.0.0.1:2379", "127.0.0.1:29", "10.0.0.99:32379", "a:1", "9.9.9.9:9999", "[::1]:2379", "[::1]", "a"]
        {
            for scheme in SCHEMES {
                let whole = format!("{scheme}{address}");
                let rest = frame(0, 1, b"data http://stays");
                for piece in [1, 7, 4096] {
                    let odd = [PREFACE, &frame(4, 0, &[]), &headers(&huffman(&whole), true), &rest].concat();
                    let want = [PREFACE, &frame(4, 0, &[]), &headers(&huffman(address), true), &rest].concat();
                    assert_eq!(through(&odd, piece).await.0, want, "{whole}");
                    let odd =
                        [PREFACE, &headers(whole.as_bytes(), false), &rest, &headers(whole.as_bytes(), false)].concat();
                    let want =
                        [PREFACE, &headers(address.as_bytes(), false), &rest, &headers(address.as_bytes(), false)]
                            .concat();
                    assert_eq!(through(&odd, piece).await.0, want, "{whole}");
                }
            }
        }
    }

    #[tokio::test]
    async fn what_is_in_order_passes_as_it_came() {
        let plain =
            [PREFACE, &frame(4, 0, &[]), &headers(&huffman("127.0.0.1:2379"), true), &frame(0, 0, b"x")].concat();
        let http1 = b"GET /health HTTP/1.1\r\nHost: http://odd\r\n\r\n".to_vec();
        let cut_short = [PREFACE, &headers(b"http://a", false)[..12]].concat();
        let garbage = [PREFACE, &frame(HEADERS, 0x2c, &[9; 40])].concat();
        for bytes in [plain, http1, PREFACE[..9].to_vec(), cut_short, garbage, b"P".to_vec(), Vec::new()] {
            for piece in [1, 4096] {
                let (read, state) = through(&bytes, piece).await;
                assert_eq!((read, state), (bytes.clone(), State::Clear));
            }
        }
    }

    #[test]
    fn our_table_is_the_standards() {
        // RFC 7541, C.4.1 and C.6.1, where the texts hold letters of ours.
        assert_eq!(huffman("302"), [0x64, 0x02]);
        assert_eq!(huffman("http"), [0x9d, 0x29, 0xaf]);
    }
}

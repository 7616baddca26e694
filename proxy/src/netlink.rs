//! A netlink socket of the netfilter family, and the attribute encoding that everything on it shares.
//!
//! The kernel handles a request inside `sendmsg`: when it returns, every answer already lies in the receive queue. So
//! a batch is one `sendmsg` followed by reads that never wait, and there is no event loop, thread or timeout here.
//! nftables ([`crate::nft`]) and conntrack ([`crate::conntrack`]) talk through it.
//!
//! What it does not do: it knows no message of either; it only frames, sends, receives and names errors.

pub mod attr;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use proxy_core::model::Family;

use self::attr::Attrs;

pub const NLM_F_REQUEST: u16 = 0x1;
pub const NLM_F_ACK: u16 = 0x4;
pub const NLM_F_DUMP_INTR: u16 = 0x10;
pub const NLM_F_DUMP: u16 = 0x300;
pub const NLM_F_CREATE: u16 = 0x400;
pub const NLM_F_APPEND: u16 = 0x800;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_HEADER_BYTES: usize = 16;
/// netlink's header and then netfilter's (family, version, resource id).
pub const HEADER_BYTES: usize = NLMSG_HEADER_BYTES + 4;

const NETLINK_EXT_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Bounds of the kernel's queues. A refused batch answers with an error per message, a dump comes in 32 KiB pieces.
const RECEIVE_QUEUE_BYTES: libc::c_int = 16 << 20;
const SEND_QUEUE_MIN_BYTES: usize = 1 << 20;
const RECEIVE_BUFFER_BYTES: usize = 256 << 10;
/// A dump that others interrupt is begun again, but not for ever.
const DUMP_ATTEMPTS: usize = 10;

/// One message as it arrived: header fields, and what follows netfilter's own header.
#[derive(Debug)]
pub struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub seq: u32,
    /// Port id of the socket whose request this answers or whose change this reports.
    pub port: u32,
    /// Address family byte of the netfilter header; 0 if the message has none.
    pub family: u8,
    pub attrs: Attrs<'a>,
}

/// What the kernel said about one message: `errno` 0 is an acknowledgement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub seq: u32,
    pub errno: i32,
    /// The kernel's own words, when it has any.
    pub text: Option<String>,
}

/// A socket in the network namespace of the thread that opened it; it stays there wherever it is moved.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    port: u32,
    next_seq: u32,
    send_queue_bytes: usize,
    buffer: Vec<u8>,
}

impl Socket {
    pub fn open() -> io::Result<Socket> {
        // SAFETY: a plain socket call; the result is checked before it is used.
        let fd =
            unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fd is a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let port = bind(&fd)?;
        let mut socket = Socket { fd, port, next_seq: 1, send_queue_bytes: 0, buffer: vec![0; RECEIVE_BUFFER_BYTES] };
        socket.force_buffer(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_QUEUE_BYTES)?;
        socket.make_room(SEND_QUEUE_MIN_BYTES)?;
        // Both are niceties of the error answers (no echo of the request, words for the errno): old kernels lack them.
        let _ = socket.set_option(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1);
        let _ = socket.set_option(libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1);
        Ok(socket)
    }

    /// The id by which notifications name changes made through this socket.
    pub fn port(&self) -> u32 {
        self.port
    }

    pub fn join(&self, group: libc::c_int) -> io::Result<()> {
        self.set_option(libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group)
    }

    /// Drops, in the kernel, every datagram whose first message came from socket `port`.
    ///
    /// nftables packs the messages of one transaction into datagrams of their own, so a listener with this filter never
    /// hears the changes of `port` and cannot be flooded by them.
    pub fn ignore(&self, port: u32) -> io::Result<()> {
        let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        // The filter loads in network order; the header is in host order.
        let mut program = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 12),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, port.to_be()),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        ];
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: filter points to a program that outlives the call; its length is given with it.
        let done = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const filter).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        };
        check(done as isize).map(drop)
    }

    /// Takes `count` sequence numbers and returns the first.
    pub fn take_seqs(&mut self, count: u32) -> u32 {
        // 0 means "no number" to some readers, so the count begins again at 1.
        if self.next_seq.checked_add(count).is_none() {
            self.next_seq = 1;
        }
        let first = self.next_seq;
        self.next_seq += count;
        first
    }

    /// Sends everything in one `sendmsg`, which is what makes a batch one transaction, and collects the answers.
    ///
    /// `ENOBUFS` among the answers' reading is passed over: answers were lost, but those that arrived first stand.
    pub fn send_batch(&mut self, bytes: &[u8]) -> io::Result<Vec<Answer>> {
        self.discard_pending();
        self.make_room(bytes.len())?;
        self.send(bytes)?;
        let mut answers = Vec::new();
        loop {
            let length = match self.receive(libc::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(answers),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => continue,
                Err(error) => return Err(error),
            };
            for message in Messages(&self.buffer[..length]) {
                answers.extend(answer(message));
            }
        }
    }

    /// Sends one request and hands each message of its answer to `visit`, until the kernel says it is done.
    ///
    /// A dump that a change overtook (`NLM_F_DUMP_INTR`, `EINTR`) is begun again: `restart` then forgets what was visited.
    pub fn dump<T: Default>(
        &mut self,
        kind: u16,
        family: u8,
        attrs: &[u8],
        mut visit: impl FnMut(&mut T, &Message<'_>),
    ) -> io::Result<T> {
        for _ in 0..DUMP_ATTEMPTS {
            self.discard_pending();
            let seq = self.take_seqs(1);
            let mut request = Vec::with_capacity(HEADER_BYTES + attrs.len());
            frame(&mut request, kind, NLM_F_REQUEST | NLM_F_DUMP, seq, family, 0, |out| out.extend_from_slice(attrs));
            self.send(&request)?;
            if let Some(result) = self.read_dump(seq, &mut visit)? {
                return Ok(result);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "a dump was interrupted by changes too often"))
    }

    fn read_dump<T: Default>(
        &mut self,
        seq: u32,
        visit: &mut impl FnMut(&mut T, &Message<'_>),
    ) -> io::Result<Option<T>> {
        let mut result = T::default();
        let mut interrupted = false;
        loop {
            let length = self.receive(0)?;
            for raw in Messages(&self.buffer[..length]) {
                if raw.seq != seq {
                    continue;
                }
                interrupted |= raw.flags & NLM_F_DUMP_INTR != 0;
                match raw.kind {
                    NLMSG_DONE | NLMSG_ERROR => match errno(raw.payload) {
                        0 => return Ok((!interrupted).then_some(result)),
                        libc::EINTR => return Ok(None),
                        errno => return Err(io::Error::from_raw_os_error(errno)),
                    },
                    _ => visit(&mut result, &raw.netfilter()),
                }
            }
        }
    }

    /// Sends one request that is answered by one message or an error.
    pub fn ask<T>(
        &mut self,
        kind: u16,
        family: u8,
        attrs: &[u8],
        read: impl Fn(&Message<'_>) -> Option<T>,
    ) -> io::Result<Option<T>> {
        self.discard_pending();
        let seq = self.take_seqs(1);
        let mut request = Vec::with_capacity(HEADER_BYTES + attrs.len());
        frame(&mut request, kind, NLM_F_REQUEST | NLM_F_ACK, seq, family, 0, |out| out.extend_from_slice(attrs));
        self.send(&request)?;
        let mut result = None;
        loop {
            let length = self.receive(0)?;
            for raw in Messages(&self.buffer[..length]) {
                if raw.seq != seq {
                    continue;
                }
                if raw.kind != NLMSG_ERROR {
                    result = read(&raw.netfilter());
                    continue;
                }
                match errno(raw.payload) {
                    0 => return Ok(result),
                    errno => return Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }

    /// Reads one datagram of notifications if there is one. `ENOBUFS` says that some were lost.
    pub fn notifications(&mut self, mut visit: impl FnMut(&Message<'_>)) -> io::Result<bool> {
        let length = match self.receive(libc::MSG_DONTWAIT) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        for raw in Messages(&self.buffer[..length]) {
            visit(&raw.netfilter());
        }
        Ok(true)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            // SAFETY: the pointer and length describe a live slice; the socket is connected to the kernel by default.
            let sent = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
            match check(sent) {
                Ok(length) if length == bytes.len() => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn receive(&mut self, flags: libc::c_int) -> io::Result<usize> {
        loop {
            // SAFETY: the pointer and length describe a buffer that we own. MSG_TRUNC asks for the datagram's real length.
            let received = unsafe {
                libc::recv(
                    self.fd.as_raw_fd(),
                    self.buffer.as_mut_ptr().cast(),
                    self.buffer.len(),
                    flags | libc::MSG_TRUNC,
                )
            };
            match check(received) {
                Ok(length) if length <= self.buffer.len() => return Ok(length),
                Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink datagram is too long")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Throws away what an abandoned request may have left in the queue.
    fn discard_pending(&mut self) {
        while self.receive(libc::MSG_DONTWAIT).is_ok() {}
    }

    fn make_room(&mut self, bytes: usize) -> io::Result<()> {
        if bytes + 4096 <= self.send_queue_bytes {
            return Ok(());
        }
        let wanted = (bytes + 4096).next_power_of_two();
        let option = i32::try_from(wanted).map_err(|_| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
        self.force_buffer(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, option)?;
        self.send_queue_bytes = wanted;
        Ok(())
    }

    fn force_buffer(&self, force: libc::c_int, plain: libc::c_int, bytes: libc::c_int) -> io::Result<()> {
        self.set_option(libc::SOL_SOCKET, force, bytes).or_else(|_| self.set_option(libc::SOL_SOCKET, plain, bytes))
    }

    fn set_option(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
        // SAFETY: value is a live c_int of the stated size.
        let done = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        check(done as isize).map(drop)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn bind(fd: &OwnedFd) -> io::Result<u32> {
    // SAFETY: all-zero is a valid sockaddr_nl: "any port, no groups".
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    let mut length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: address and length are live and agree.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) } as isize)?;
    // SAFETY: as above; the kernel writes at most `length` bytes.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut length) } as isize)?;
    Ok(address.nl_pid)
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The family byte of the netfilter header.
pub fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::NFPROTO_IPV4 as u8,
        Family::V6 => libc::NFPROTO_IPV6 as u8,
    }
}

/// Appends one message: both headers, whatever `body` writes, and the length put right afterwards.
pub fn frame(
    out: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    seq: u32,
    family: u8,
    resource: u16,
    body: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&seq.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&[family, 0]);
    out.extend_from_slice(&resource.to_be_bytes());
    body(out);
    let length = u32::try_from(out.len() - start).expect("a message is bounded by its 64 KiB attributes");
    out[start..start + 4].copy_from_slice(&length.to_ne_bytes());
}

struct Raw<'a> {
    kind: u16,
    flags: u16,
    seq: u32,
    port: u32,
    payload: &'a [u8],
}

impl<'a> Raw<'a> {
    fn netfilter(&self) -> Message<'a> {
        let (family, attrs) = match self.payload {
            [family, _, _, _, attrs @ ..] => (*family, attrs),
            _ => (0, &[][..]),
        };
        Message { kind: self.kind, flags: self.flags, seq: self.seq, port: self.port, family, attrs: Attrs::new(attrs) }
    }
}

struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Raw<'a>;

    fn next(&mut self) -> Option<Raw<'a>> {
        let header = self.0.get(..NLMSG_HEADER_BYTES)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let half = |at: usize| u16::from_ne_bytes(header[at..at + 2].try_into().expect("two bytes"));
        let length = word(0) as usize;
        let payload = self.0.get(NLMSG_HEADER_BYTES..length)?;
        let raw = Raw { kind: half(4), flags: half(6), seq: word(8), port: word(12), payload };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(raw)
    }
}

fn errno(payload: &[u8]) -> i32 {
    payload.first_chunk::<4>().map_or(0, |bytes| i32::from_ne_bytes(*bytes).wrapping_neg())
}

fn answer(raw: Raw<'_>) -> Option<Answer> {
    if raw.kind != NLMSG_ERROR {
        return None;
    }
    let errno = errno(raw.payload);
    // An answer is: errno, the header of the request, and then, if flagged, attributes with the reason.
    let text = (raw.flags & NETLINK_EXT_ACK_TLVS != 0)
        .then(|| raw.payload.get(4 + NLMSG_HEADER_BYTES..))
        .flatten()
        .and_then(|tlvs| Attrs::new(tlvs).find(NLMSGERR_ATTR_MSG).and_then(|attr| attr.text()).map(str::to_owned));
    Some(Answer { seq: raw.seq, errno, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_carry_their_length_and_split_again() {
        let mut out = Vec::new();
        frame(&mut out, 7, NLM_F_REQUEST, 3, 2, 10, |out| attr::put(out, 1, b"abc"));
        frame(&mut out, 8, 0, 4, 10, 0, |_| {});
        assert_eq!(out.len(), 28 + 20);
        let read: Vec<_> = Messages(&out).map(|raw| (raw.kind, raw.seq, raw.netfilter().family)).collect();
        assert_eq!(read, [(7, 3, 2), (8, 4, 10)]);
    }

    #[test]
    fn an_error_answer_names_its_message_and_reason() {
        let mut payload = (-libc::ENOENT).to_ne_bytes().to_vec();
        payload.extend_from_slice(&[0; NLMSG_HEADER_BYTES]);
        attr::put(&mut payload, NLMSGERR_ATTR_MSG, b"no such thing\0");
        let raw = Raw { kind: NLMSG_ERROR, flags: NETLINK_EXT_ACK_TLVS, seq: 9, port: 0, payload: &payload };
        let expected = Answer { seq: 9, errno: libc::ENOENT, text: Some("no such thing".into()) };
        assert_eq!(answer(raw), Some(expected));
    }

    #[test]
    fn sequence_numbers_never_wrap_through_zero() {
        let Ok(mut socket) = Socket::open() else { panic!("a netlink socket can be opened by anybody") };
        socket.next_seq = u32::MAX - 1;
        assert_eq!(socket.take_seqs(5), 1);
        assert_eq!(socket.take_seqs(1), 6);
    }
}

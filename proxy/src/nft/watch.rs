//! Notices when somebody else changes our tables.
//!
//! nftables reports every change to a multicast group. A filter in the kernel takes our own changes out, so a large
//! reconcile cannot flood this listener; what is left is judged by table. If the kernel had to drop reports, nothing is
//! known, which means: verify.
//!
//! The generation id cannot serve here: it is one for the whole namespace and rises with every firewall's change.
//!
//! What it does not do: it repairs nothing. Who hears [`Foreign`] calls [`super::Nft::distrust`] and reconciles.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use proxy_core::model::Family;

use super::netlink::SUBSYSTEM;
use super::object::TABLE;
use crate::netlink::attr::Attr;
use crate::netlink::{Message, Socket, family_number};

const GROUP_NFTABLES: libc::c_int = 7;
const NEWGEN: u16 = 15;

/// Something that was not us touched our tables, or may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// One of our tables was named.
    Touched,
    /// Reports were lost.
    Unknown,
}

/// A listener in the network namespace of the thread that opened it. Its descriptor is readable when there is news.
#[derive(Debug)]
pub struct Watch {
    socket: Socket,
    own: u32,
}

impl Watch {
    /// Listens to everybody but `own`, the port of [`super::Nft::port`].
    pub fn open(own: u32) -> io::Result<Watch> {
        let socket = Socket::open()?;
        socket.ignore(own)?;
        socket.join(GROUP_NFTABLES)?;
        Ok(Watch { socket, own })
    }

    /// Reads all news without waiting; `None` if none of it concerns us.
    pub fn poll(&mut self) -> io::Result<Option<Foreign>> {
        let mut found = None;
        loop {
            let own = self.own;
            let more = self.socket.notifications(|message| {
                if message.port != own && names_our_table(message) {
                    found = found.or(Some(Foreign::Touched));
                }
            });
            match more {
                Ok(true) => {}
                Ok(false) => return Ok(found),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => found = Some(Foreign::Unknown),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Every message about a table, or something in one, has its name in attribute 1.
fn names_our_table(message: &Message<'_>) -> bool {
    message.kind >> 8 == SUBSYSTEM
        && message.kind & 0xff != NEWGEN
        && Family::BOTH.iter().any(|family| family_number(*family) == message.family)
        && message.attrs.find(1).and_then(Attr::text) == Some(TABLE)
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

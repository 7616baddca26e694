//! Free ports on loopback that stay free.
//!
//! A port the kernel would hand out by itself (bind to 0) can be taken by any outgoing connection while a killed server is down, so
//! ports come from below that range. Each is checked by binding it, and held against other test processes by a name in
//! the abstract socket namespace for as long as this process lives.

use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::Mutex;

const FIRST: u16 = 21_000;
const LAST: u16 = 31_999;

static HELD: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A port that nobody listens on and that no other caller is given.
pub fn free() -> u16 {
    let mut held = HELD.lock().unwrap();
    let span = LAST - FIRST + 1;
    // Processes start looking at different places, so that they seldom meet.
    let start = (std::process::id() as u16).wrapping_mul(37);
    for step in 0..span {
        let port = FIRST + start.wrapping_add(step) % span;
        let name = SocketAddr::from_abstract_name(format!("keelson-e2e-port-{port}")).expect("the name is short");
        let Ok(claim) = UnixListener::bind_addr(&name) else { continue };
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            held.push(claim);
            return port;
        }
    }
    panic!("no free port between {FIRST} and {LAST}");
}

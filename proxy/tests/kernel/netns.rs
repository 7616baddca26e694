//! Network namespaces for the length of a test, and what tests do in them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Long enough for any answer on a virtual wire; how long silence is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_millis(400);

/// Runs `body` in a thread that lives in a fresh network namespace, which goes when the thread does. Commands that it
/// starts are in the namespace too.
pub(crate) fn isolated<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    // One at a time: a thread between fork and exec holds copies of the others' sockets, and with them their tables.
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: unshare takes no pointers; it changes the namespace of this thread only.
            let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            let error = io::Error::last_os_error();
            assert_eq!(done, 0, "these tests need root to make network namespaces: {error}");
            run("ip", &["link", "set", "lo", "up"]);
            body()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs a command that must succeed, and returns what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} cannot be run: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}{errors}", output.status);
    text
}

/// Another host, joined to the node (the namespace it is made in) by a wire of its own.
pub(crate) struct Host {
    name: String,
    namespace: File,
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
}

/// What a server of a pod answered: who it is, and whom it saw.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Hello {
    pub(crate) who: String,
    pub(crate) peer: IpAddr,
}

impl Host {
    /// A host at 10.244.`net`.2 and fd00:244:`net`::2, reached from the node by an interface called `veth`net.
    pub(crate) fn new(label: &str, net: u8) -> Host {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pnft-{}-{}-{label}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let wire = format!("veth{net}");
        run("ip", &["netns", "add", &name]);
        run("ip", &["link", "add", &wire, "type", "veth", "peer", "name", "eth0", "netns", &name]);
        run("ip", &["link", "set", &wire, "up"]);
        run("ip", &["addr", "add", &format!("10.244.{net}.1/24"), "dev", &wire]);
        run("ip", &["addr", "add", &format!("fd00:244:{net}::1/64"), "dev", &wire, "nodad"]);
        let inside = |arguments: &str| {
            let arguments: Vec<&str> = ["-n", &name].into_iter().chain(arguments.split(' ')).collect();
            run("ip", &arguments);
        };
        inside("link set lo up");
        inside("link set eth0 up");
        inside(&format!("addr add 10.244.{net}.2/24 dev eth0"));
        inside(&format!("addr add fd00:244:{net}::2/64 dev eth0 nodad"));
        inside(&format!("route add default via 10.244.{net}.1"));
        inside(&format!("-6 route add default via fd00:244:{net}::1"));
        let namespace = File::open(format!("/run/netns/{name}")).expect("the namespace was just made");
        Host {
            name,
            namespace,
            v4: IpAddr::from([10, 244, net, 2]),
            v6: format!("fd00:244:{net}::2").parse().expect("an address"),
        }
    }

    /// Runs `body` in a thread that has entered this host.
    pub(crate) fn inside<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: the descriptor is a network namespace that is open as long as self.
                let done = unsafe { libc::setns(self.namespace.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(done, 0, "{}", io::Error::last_os_error());
                body()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Serves TCP and UDP on `port` of both families, each answer naming `who` and the client, until the test ends.
    pub(crate) fn serve(&self, who: &str, port: u16) {
        let who: Arc<str> = who.into();
        for ip in [self.v4, self.v6] {
            let address = SocketAddr::new(ip, port);
            let (tcp, udp) = self.inside(|| (TcpListener::bind(address), UdpSocket::bind(address)));
            let (tcp, udp) = (tcp.expect("a listener"), udp.expect("a socket"));
            let name = who.clone();
            std::thread::spawn(move || {
                for mut stream in tcp.incoming().flatten() {
                    let peer = stream.peer_addr().map(|peer| peer.ip());
                    if let Ok(peer) = peer {
                        let _ = stream.write_all(format!("{name} {peer}").as_bytes());
                    }
                }
            });
            let name = who.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, peer)) = udp.recv_from(&mut buffer) {
                    let _ = udp.send_to(format!("{name} {}", peer.ip()).as_bytes(), peer);
                }
            });
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// Lets the node forward, and gives it addresses of its own.
pub(crate) fn become_node() {
    for (file, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
    ] {
        let path = format!("/proc/sys/{file}");
        std::fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
    // A wire to nobody, for the default route.
    run("ip", &["link", "add", "uplink", "type", "veth", "peer", "name", "nobody"]);
    run("ip", &["link", "set", "nobody", "up"]);
    run("ip", &["link", "set", "uplink", "up"]);
    run("ip", &["addr", "add", "192.168.0.2/24", "dev", "uplink"]);
    run("ip", &["addr", "add", "fd00:192::2/64", "dev", "uplink", "nodad"]);
    run("ip", &["route", "add", "default", "via", "192.168.0.1"]);
    run("ip", &["-6", "route", "add", "default", "via", "fd00:192::1"]);
}

fn hello(text: &[u8]) -> io::Result<Hello> {
    let text = String::from_utf8_lossy(text);
    let (who, peer) = text.split_once(' ').ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(Hello { who: who.to_owned(), peer: peer.parse().map_err(io::Error::other)? })
}

/// One TCP connection from the current namespace.
pub(crate) fn tcp(address: SocketAddr) -> io::Result<Hello> {
    tcp_within(address, PATIENCE)
}

fn tcp_within(address: SocketAddr, patience: Duration) -> io::Result<Hello> {
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    hello(&text)
}

/// One UDP question from the current namespace, from a port of its own.
pub(crate) fn udp(address: SocketAddr) -> io::Result<Hello> {
    let any: IpAddr = if address.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    udp_on(&socket, PATIENCE)
}

/// One question on a socket that keeps its port.
pub(crate) fn udp_on(socket: &UdpSocket, patience: Duration) -> io::Result<Hello> {
    socket.set_read_timeout(Some(patience))?;
    socket.send(b"?")?;
    let mut buffer = [0; 128];
    let length = socket.recv(&mut buffer)?;
    hello(&buffer[..length])
}

/// Nobody answers a connection, with nothing at all.
pub(crate) fn is_silent(address: SocketAddr) -> bool {
    matches!(tcp_within(address, SILENCE), Err(error) if error.kind() == io::ErrorKind::TimedOut)
}

pub(crate) fn is_refused(result: io::Result<Hello>) -> bool {
    match result {
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
        Ok(hello) => panic!("answered by {hello:?}"),
    }
}

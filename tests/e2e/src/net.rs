//! Machines that are network namespaces: a node, pods behind it, a machine outside. Nothing in them reaches the real network.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Process, folder, peers};

/// A node with an uplink, and pods, each with an address of either family and everything else by way of the node.
#[derive(Debug)]
pub struct Net {
    id: String,
    spaces: Vec<String>,
}

/// The node's address on the network outside, and the outside machine's.
pub const NODE_V4: &str = "192.168.77.1";
pub const NODE_V6: &str = "fd00:77::1";
const OUTSIDE_V4: &str = "192.168.77.2";
const OUTSIDE_V6: &str = "fd00:77::2";

impl Net {
    /// A node and a machine outside; `None` after a loud skip because only root may make namespaces.
    pub fn new() -> Option<Net> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let is_root = std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
        if !is_root {
            peers::skip("only root may make network namespaces");
            return None;
        }
        let id = format!("ke2e-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut net = Net { id, spaces: Vec::new() };
        net.add_space("node");
        net.add_space("outside");
        let node = net.space("node");
        let outside = net.space("outside");
        for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
            net.ok("node", &["sysctl", "-qw", setting]);
        }
        ip(&["-n", &node, "link", "add", "uplink", "type", "veth", "peer", "name", "uplink", "netns", &outside]);
        for (space, v4, v6) in [(&node, NODE_V4, NODE_V6), (&outside, OUTSIDE_V4, OUTSIDE_V6)] {
            ip(&["-n", space, "address", "add", &format!("{v4}/24"), "dev", "uplink"]);
            ip(&["-n", space, "address", "add", &format!("{v6}/64"), "dev", "uplink", "nodad"]);
            ip(&["-n", space, "link", "set", "uplink", "up"]);
        }
        // The node itself needs a way for what it sends to a ClusterIP before that is translated.
        ip(&["-n", &node, "route", "add", "default", "via", OUTSIDE_V4]);
        ip(&["-n", &node, "-6", "route", "add", "default", "via", OUTSIDE_V6]);
        Some(net)
    }

    /// Adds a pod with the addresses 10.244.0.`number` and fd00:10:244::`number` (decimal digits read as hexadecimal).
    pub fn add_pod(&mut self, name: &str, number: u8) {
        self.add_space(name);
        let (node, pod) = (self.space("node"), self.space(name));
        let (v4, v6) = (pod_v4(number), pod_v6(number));
        ip(&["-n", &node, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", &pod]);
        ip(&["-n", &node, "address", "add", "10.244.0.1/32", "dev", name]);
        ip(&["-n", &node, "address", "add", "fd00:10:244::1/128", "dev", name, "nodad"]);
        ip(&["-n", &node, "link", "set", name, "up"]);
        ip(&["-n", &pod, "address", "add", &format!("{v4}/32"), "dev", "eth0"]);
        ip(&["-n", &pod, "address", "add", &format!("{v6}/128"), "dev", "eth0", "nodad"]);
        ip(&["-n", &pod, "link", "set", "eth0", "up"]);
        ip(&["-n", &node, "route", "add", &format!("{v4}/32"), "dev", name]);
        ip(&["-n", &node, "-6", "route", "add", &format!("{v6}/128"), "dev", name]);
        ip(&["-n", &pod, "route", "add", "10.244.0.1/32", "dev", "eth0"]);
        ip(&["-n", &pod, "-6", "route", "add", "fd00:10:244::1/128", "dev", "eth0"]);
        ip(&["-n", &pod, "route", "add", "default", "via", "10.244.0.1"]);
        ip(&["-n", &pod, "-6", "route", "add", "default", "via", "fd00:10:244::1"]);
    }

    /// The namespace's name of a machine.
    pub fn space(&self, machine: &str) -> String {
        format!("{}-{machine}", self.id)
    }

    /// Runs a program on a machine to its end.
    pub fn run(&self, machine: &str, command: &[&str]) -> Output {
        self.command(machine, command).output().expect("ip netns exec runs")
    }

    /// The standard output of a program that has to succeed.
    pub fn ok(&self, machine: &str, command: &[&str]) -> String {
        let output = self.run(machine, command);
        assert!(output.status.success(), "on {machine}: {command:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Starts a program on a machine.
    pub fn start(&self, machine: &str, command: &[&str]) -> Process {
        Process::start(&format!("{machine}: {}", command.join(" ")), &mut self.command(machine, command))
    }

    /// Starts the stand-in for a pod, which answers with the machine's name, and waits until it listens.
    pub fn serve(&self, machine: &str, ports: &[&str]) -> Process {
        let program = pod_program();
        let mut command = vec![program.as_str(), "serve", machine];
        command.extend(ports);
        let process = self.start(machine, &command);
        process.wait_for("serves", crate::PATIENCE);
        process
    }

    /// Asks once from a machine: who answered and whom it saw, or `Err` with how the question was turned away.
    pub fn ask(&self, machine: &str, protocol: &str, address: &str) -> Result<(String, String), String> {
        let output = self.run(machine, &[&pod_program(), "ask", protocol, address]);
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match text.split_once(" saw ") {
            Some((name, client)) if output.status.success() => Ok((name.to_owned(), client.to_owned())),
            _ => Err(text),
        }
    }

    fn command(&self, machine: &str, command: &[&str]) -> Command {
        let mut whole = Command::new("ip");
        whole.args(["netns", "exec", &self.space(machine)]).args(command);
        whole
    }

    fn add_space(&mut self, machine: &str) {
        let name = self.space(machine);
        ip(&["netns", "add", &name]);
        self.spaces.push(name.clone());
        ip(&["-n", &name, "link", "set", "lo", "up"]);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for space in &self.spaces {
            let _ = Command::new("ip").args(["netns", "delete", space]).output();
        }
    }
}

pub fn pod_v4(number: u8) -> String {
    format!("10.244.0.{number}")
}

pub fn pod_v6(number: u8) -> String {
    format!("fd00:10:244::{number}")
}

fn pod_program() -> String {
    let program = folder::release().join("pod");
    assert!(program.is_file(), "{} is not built: cargo build --release -p e2e --bins", program.display());
    program.display().to_string()
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("iproute2 is there");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

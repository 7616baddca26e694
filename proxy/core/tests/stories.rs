//! Golden stories: objects in, dataplane and packets' fates out.
//!
//! A story is a file of `testscripts/`: first words for the reader, then sections that begin with `-- name --` and are played
//! in order. `UPDATE=1 cargo test -p proxy-core --test stories` writes what came out into the files; read the difference
//! before committing it.
//!
//! | section | |
//! |---|---|
//! | `node` | the node's configuration, `key: value` a line |
//! | `apply` | YAML documents, checked as `keelson-proxy apply` checks them |
//! | `report` | the same, taken as a source takes what is stored already: nothing is refused |
//! | `delete` | `Kind namespace/name` a line |
//! | `dataplane`, `services` | printed: the dataplane, or its Services only |
//! | `changes` | printed: the keys that the last step changed |
//! | `problems` | printed: what the last step refused or could not read |
//! | `packets` | `who source -> address:port/protocol = verdict` a line; who is `pod`, `node` or `outside` |
//!
//! At every step the incremental plan is compared with a full one, and its changes with the difference.
#![allow(clippy::disallowed_methods, reason = "a test reads its stories from files")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use proxy_core::dataplane::Changes;
use proxy_core::model::manifest::{self, Object};
use proxy_core::model::{NamespacedName, Protocol, mirror};
use proxy_core::plan::{Planner, plan};
use proxy_core::state::{Change, DetectLocal, Kind, NodeConfig, NodePortSelection, State};
use proxy_core::trace::{Origin, Packet, trace};
use serde::Deserialize;

#[test]
fn stories() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testscripts");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    let update = std::env::var("UPDATE").is_ok_and(|value| value == "1");
    let mut failed = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        println!("story {name}");
        let played = Story::default().play(&text);
        if played != text && update {
            fs::write(&file, &played).unwrap();
        } else if played != text {
            println!("{}", difference(&text, &played));
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "stories that ended differently: {failed:?}");
}

/// A story being told.
struct Story {
    state: State,
    planner: Planner,
    changes: Changes,
    problems: String,
}

impl Default for Story {
    fn default() -> Self {
        Story {
            state: State::new(),
            planner: Planner::new(NodeConfig::new("node1")),
            changes: Changes::default(),
            problems: String::new(),
        }
    }
}

impl Story {
    /// The same story, with what came out in place of what was expected.
    fn play(mut self, text: &str) -> String {
        let mut out = String::new();
        for (name, body) in sections(text) {
            let Some(name) = name else {
                out += body;
                continue;
            };
            out += &format!("-- {name} --\n");
            out += &match name {
                "node" => self.step(body, |story| story.configure(body)),
                "apply" => self.step(body, |story| story.apply(body)),
                "report" => self.step(body, |story| story.report(body)),
                "delete" => self.step(body, |story| story.delete(body)),
                "dataplane" => format!("{}\n", self.planner.dataplane()),
                "services" => {
                    let listing = self.planner.dataplane().to_string();
                    let is_service = |line: &&str| line.starts_with("service ") && !line.starts_with("service cidrs");
                    let lines: Vec<&str> = listing.lines().skip_while(|line| !is_service(line)).collect();
                    lines.iter().map(|line| format!("{line}\n")).collect::<String>() + "\n"
                }
                "changes" => format!("{}\n", self.changes),
                "problems" => format!("{}\n", self.problems),
                "packets" => body.lines().map(|line| self.packet(line) + "\n").collect(),
                other => panic!("no such section: {other}"),
            };
        }
        out
    }

    fn step(&mut self, body: &str, act: impl FnOnce(&mut Self)) -> String {
        self.problems.clear();
        let before = self.planner.dataplane().clone();
        act(self);
        self.changes = self.planner.update(&mut self.state);
        let full = plan(&self.state, self.planner.config());
        assert_eq!(self.planner.dataplane(), &full, "the incremental plan is the full one");
        assert_eq!(self.changes, Changes::between(&before, &full), "the changes are the difference");
        body.to_string()
    }

    fn configure(&mut self, body: &str) {
        let mut config = NodeConfig::new("node1");
        for line in body.lines().filter(|line| !line.is_empty()) {
            let (key, value) = line.split_once(':').unwrap_or_else(|| panic!("{line}"));
            let words: Vec<&str> = value.split_whitespace().collect();
            let nets = |words: &[&str]| words.iter().map(|word| word.parse().unwrap()).collect();
            let ips = || words.iter().map(|word| word.parse().unwrap()).collect::<Vec<IpAddr>>();
            match key {
                "name" => config.name = words[0].into(),
                "ips" => config.node_ips = ips(),
                "local addresses" => config.local_addresses = ips(),
                "node ports" => {
                    config.node_port_addresses = match words[0] {
                        "primary" => NodePortSelection::Primary,
                        "all" => NodePortSelection::All,
                        _ => NodePortSelection::Cidrs(nets(&words)),
                    }
                }
                "pods" => {
                    config.detect_local = match words[0] {
                        "none" => DetectLocal::None,
                        "node-cidrs" => DetectLocal::NodeCidrs,
                        "interface" => DetectLocal::Interface(words[1].into()),
                        "interfaces" => DetectLocal::InterfacePrefix(words[1].into()),
                        _ => DetectLocal::ClusterCidrs(nets(&words)),
                    }
                }
                "masquerade all" => config.masquerade_all = words[0] == "yes",
                "service cidrs" => config.service_cidrs = nets(&words),
                "proxy name" => config.proxy_name = Some(words[0].into()),
                other => panic!("no such key: {other}"),
            }
        }
        self.planner.reconfigure(config);
    }

    fn apply(&mut self, body: &str) {
        for (i, document) in serde_norway::Deserializer::from_str(body).enumerate() {
            let value = serde_norway::Value::deserialize(document).unwrap();
            match manifest::objects(i + 1, &value) {
                Ok(objects) => objects.iter().for_each(|object| self.take(object)),
                Err(error) => self.problems += &format!("{error}\n"),
            }
        }
    }

    fn report(&mut self, body: &str) {
        for document in serde_norway::Deserializer::from_str(body) {
            let value = serde_norway::Value::deserialize(document).unwrap();
            let object = match value["kind"].as_str().unwrap() {
                "Service" => Object::Service(serde_norway::from_value(value).unwrap()),
                "EndpointSlice" => Object::EndpointSlice(serde_norway::from_value(value).unwrap()),
                "Endpoints" => Object::Endpoints(serde_norway::from_value(value).unwrap()),
                "Node" => Object::Node(serde_norway::from_value(value).unwrap()),
                other => panic!("no such kind: {other}"),
            };
            self.take(&object);
        }
    }

    fn take(&mut self, object: &Object) {
        let mut notes = Vec::new();
        let change = match object {
            Object::Service(service) => Some(Change::ServiceSet(service.to_model(&mut notes))),
            Object::EndpointSlice(slice) => slice.to_model(&mut notes).map(Change::SliceSet),
            Object::Node(node) => Some(Change::NodeSet(node.to_model(&mut notes))),
            Object::Endpoints(endpoints) => {
                let slices = mirror::to_model(endpoints, &mut notes);
                let meta = &endpoints.metadata;
                Some(Change::EndpointsSet(NamespacedName::new(&*meta.namespace, &*meta.name), slices))
            }
        };
        let name = &object.metadata().name;
        notes.iter().for_each(|note| self.problems += &format!("{} {name}: {note}\n", object.kind()));
        if let Some(change) = change {
            self.state.apply(change);
        }
    }

    fn delete(&mut self, body: &str) {
        for line in body.lines().filter(|line| !line.is_empty()) {
            let (kind, name) = line.split_once(' ').unwrap();
            let (namespace, name) = name.split_once('/').unwrap_or(("", name));
            let name = NamespacedName::new(namespace, name);
            let (kind, change) = match kind {
                "Service" => (Kind::Service, Change::ServiceGone(name.clone())),
                "EndpointSlice" => (Kind::EndpointSlice, Change::SliceGone(name.clone())),
                "Endpoints" => (Kind::Endpoints, Change::EndpointsGone(name.clone())),
                "Node" => (Kind::Node, Change::NodeGone),
                other => panic!("no such kind: {other}"),
            };
            assert!(self.state.names(kind).contains(&name), "{line}: not there");
            self.state.apply(change);
        }
    }

    fn packet(&self, line: &str) -> String {
        let flow = line.split(" = ").next().unwrap().trim_end();
        if flow.is_empty() || flow.starts_with('#') {
            return line.to_string();
        }
        let words: Vec<&str> = flow.split_whitespace().collect();
        let &[who, source, "->", target] = &words[..] else { panic!("{line}") };
        let origin = match who {
            "node" => Origin::Node,
            "pod" => Origin::Interface("veth1"),
            "outside" => Origin::Interface("eth0"),
            other => panic!("no such place: {other}"),
        };
        let (address, protocol) = target.rsplit_once('/').unwrap();
        let address: SocketAddr = address.parse().unwrap();
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            other => panic!("no such protocol: {other}"),
        };
        let packet = Packet {
            origin,
            source: source.parse().unwrap(),
            destination: address.ip(),
            protocol,
            port: address.port(),
            destination_is_local: self.planner.config().local_addresses.contains(&address.ip()),
        };
        let verdict = trace(self.planner.dataplane(), &packet);
        format!("{flow} = {verdict}")
    }
}

/// What stands before the first section, without a name; then each section.
fn sections(text: &str) -> Vec<(Option<&str>, &str)> {
    let mut found = Vec::new();
    let (mut name, mut start, mut at) = (None, 0, 0);
    for line in text.split_inclusive('\n') {
        let heading = line.strip_prefix("-- ").and_then(|rest| rest.trim_end().strip_suffix(" --"));
        if let Some(heading) = heading {
            found.push((name, &text[start..at]));
            (name, start) = (Some(heading), at + line.len());
        }
        at += line.len();
    }
    found.push((name, &text[start..]));
    found
}

/// The lines that differ, the expected ones with `-`, the others with `+`.
fn difference(expected: &str, found: &str) -> String {
    let (expected, found): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), found.lines().collect());
    let same = expected.iter().zip(&found).take_while(|(a, b)| a == b).count();
    let tail = expected[same..].iter().rev().zip(found[same..].iter().rev()).take_while(|(a, b)| a == b).count();
    let minus = expected[same..expected.len() - tail].iter().map(|line| format!("-{line}\n"));
    let plus = found[same..found.len() - tail].iter().map(|line| format!("+{line}\n"));
    format!("from line {}:\n{}", same + 1, minus.chain(plus).collect::<String>())
}

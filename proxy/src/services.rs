//! `keelson-proxy services`: what the kernel has been given, as a table.
//!
//! What is listed is read from the kernel's elements, not from what this program would write; so it says what packets meet.
//! The kernel holds no names; they are joined from the store, by address, protocol and port, if there is one.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use proxy_core::model::{Family, Protocol, Service};

use crate::etcd::{Bring, Etcd, EtcdError};
use crate::nft::listing::{Answer, ListedFrontend};
use crate::storage::{Keys, Kind, decode};

/// So many endpoints are written out; the others are counted.
const SHOWN: usize = 3;

/// Which Service port a frontend belongs to.
#[derive(Debug, Default)]
pub struct Names {
    by_address: HashMap<(IpAddr, u8, u16), String>,
    by_node_port: HashMap<(Family, u8, u16), String>,
}

impl Names {
    /// Reads all Services of a store.
    pub async fn read(etcd: &Etcd, keys: &Keys) -> Result<Names, EtcdError> {
        let mut names = Names::default();
        for kv in etcd.list(&keys.all(Kind::Service), 0, Bring::Values).await?.kvs {
            match decode::service(&kv.value, &mut Vec::new()) {
                Ok(service) => names.add(&service),
                Err(error) => tracing::warn!(key = %String::from_utf8_lossy(&kv.key), %error, "not readable"),
            }
        }
        Ok(names)
    }

    fn add(&mut self, service: &Service) {
        for port in &service.ports {
            let name = match &*port.name {
                "" => service.name.to_string(),
                name => format!("{}:{name}", service.name),
            };
            let protocol = port.protocol.number();
            let ingress = service.ingress.iter().map(|ingress| ingress.ip);
            // A ClusterIP is nobody else's; other addresses may be asked for by several Services, the first is shown.
            for address in service.external_ips.iter().copied().chain(ingress) {
                self.by_address.entry((address, protocol, port.port)).or_insert_with(|| name.clone());
            }
            for address in &service.cluster_ips {
                self.by_address.insert((*address, protocol, port.port), name.clone());
                if let Some(node_port) = port.node_port {
                    self.by_node_port.insert((Family::of(*address), protocol, node_port), name.clone());
                }
            }
        }
    }

    fn of(&self, listed: &ListedFrontend) -> Option<&str> {
        let found = match listed.address {
            Some(address) => self.by_address.get(&(address, listed.protocol, listed.port)),
            None => self.by_node_port.get(&(listed.family, listed.protocol, listed.port)),
        };
        found.map(String::as_str)
    }
}

/// The table, with a line of heads. With `names`, Services come first and sort.
pub fn table(listed: &[ListedFrontend], names: Option<&Names>) -> String {
    let mut rows: Vec<Vec<String>> = listed.iter().map(|frontend| row(frontend, names)).collect();
    if names.is_some() {
        rows.sort_by(|a, b| a[0].cmp(&b[0]));
    }
    let mut heads = vec!["PROTOCOL", "FRONTEND", "POLICY", "ENDPOINTS"];
    if names.is_some() {
        heads.insert(0, "SERVICE");
    }
    rows.insert(0, heads.into_iter().map(String::from).collect());
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("   ").trim_end());
        text.push('\n');
    }
    text
}

fn row(listed: &ListedFrontend, names: Option<&Names>) -> Vec<String> {
    let frontend = match (listed.address, listed.family) {
        (Some(address), _) => SocketAddr::new(address, listed.port).to_string(),
        (None, Family::V4) => format!("*:{}", listed.port),
        (None, Family::V6) => format!("[*]:{}", listed.port),
    };
    let mut row = vec![protocol(listed.protocol), frontend, policy(listed), answer(&listed.answer)];
    if let Some(names) = names {
        row.insert(0, names.of(listed).unwrap_or("-").to_owned());
    }
    row
}

fn protocol(number: u8) -> String {
    let known = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|known| known.number() == number);
    known.map_or_else(|| number.to_string(), |known| known.to_string().to_uppercase())
}

fn policy(listed: &ListedFrontend) -> String {
    let mut words = vec![match (listed.address, listed.external) {
        (None, _) => "node port".to_owned(),
        (Some(_), true) => "external".to_owned(),
        (Some(_), false) => "cluster ip".to_owned(),
    }];
    if listed.local {
        words.push("local".into());
    }
    if listed.guarded {
        words.push("some sources".into());
    }
    if let Some(seconds) = listed.affinity_timeout_s {
        words.push(format!("affinity {seconds}s"));
    }
    words.join(", ")
}

fn answer(answer: &Answer) -> String {
    match answer {
        Answer::Refused => "none, refused".into(),
        Answer::Dropped => "none, dropped".into(),
        Answer::Broken => "broken".into(),
        Answer::Endpoints(endpoints) => {
            let shown: Vec<String> = endpoints.iter().take(SHOWN).map(ToString::to_string).collect();
            let more = endpoints.len().saturating_sub(SHOWN);
            let shown = shown.join(", ");
            if more > 0 { format!("{shown} and {more} more") } else { shown }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn listed(address: Option<&str>, port: u16, answer: Answer) -> ListedFrontend {
        let address: Option<IpAddr> = address.map(|address| address.parse().unwrap());
        ListedFrontend {
            family: address.map_or(Family::V4, Family::of),
            address,
            protocol: 6,
            port,
            external: address.is_none(),
            local: false,
            guarded: false,
            affinity_timeout_s: None,
            answer,
        }
    }

    #[test]
    fn the_table_is_aligned_and_names_services() {
        let endpoints = (1..=5).map(|i| format!("10.1.0.{i}:8080").parse().unwrap()).collect();
        let mut sticky = listed(Some("fd00::9"), 80, Answer::Refused);
        sticky.affinity_timeout_s = Some(10_800);
        let list =
            [listed(Some("10.96.0.9"), 80, Answer::Endpoints(endpoints)), listed(None, 30080, Answer::Dropped), sticky];
        let json = br#"{"metadata":{"name":"web","namespace":"shop"},"spec":{"type":"NodePort","clusterIP":"10.96.0.9",
            "ports":[{"name":"http","port":80,"nodePort":30080}]}}"#;
        let mut names = Names::default();
        names.add(&decode::service(&Bytes::from_static(json), &mut Vec::new()).unwrap());
        assert_eq!(
            table(&list, Some(&names)),
            "\
SERVICE         PROTOCOL   FRONTEND       POLICY                        ENDPOINTS
-               TCP        [fd00::9]:80   cluster ip, affinity 10800s   none, refused
shop/web:http   TCP        10.96.0.9:80   cluster ip                    10.1.0.1:8080, 10.1.0.2:8080, 10.1.0.3:8080 and 2 more
shop/web:http   TCP        *:30080        node port                     none, dropped
"
        );
        assert!(table(&[], None).starts_with("PROTOCOL   FRONTEND   POLICY   ENDPOINTS"));
    }
}

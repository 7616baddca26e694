//! `keelson-proxy apply` and `delete`: objects straight into the store, as if an API server had taken them.
//!
//! ```text
//! YAML ─▶ objects ─▶ jobs ─▶ settle (families, addresses, ports) ─▶ one guarded Txn ─▶ "service/web created"
//!                     ▲                                                │ a guard failed: its `else` brings
//!                     └──────────── look again with what it brought ◀──┘ what every guarded key holds now
//! ```
//! **Guards.** Every write is a Txn that holds only if nothing it was decided upon has moved:
//! - the object: the mod revision it was read at, 0 for a new one. So nothing is overwritten unseen;
//! - an address it takes: `/registry/ipaddresses/<ip>` must not exist, and is created with it. This is what kube-apiserver's own
//!   allocator does, with the same object, so that an address is never given out twice, neither by two of us nor by
//!   one of us and an API server on the same store;
//! - node ports it takes or gives back: `/registry/ranges/servicenodeports`, the bitmap of all of them, must be at the
//!   revision it was read at, and is written anew with it. That is kube-apiserver's allocation too, guarded in its way; its
//!   range must be ours, or nothing is written.
//!
//! Object, address and bitmap move in one Txn: there is no moment at which one of them is in the store without the others. (An
//! API server that watches them by kind may hear of a Service before it hears of its address; then its repair loop says
//! so, and finds that there is nothing to repair.) Before the first choice all Services are
//! read, so that addresses and ports are respected whose owner was written by somebody who kept no books.
//!
//! **Speed.** Up to 64 Txns are under way at once. Those that touch node ports share the bitmap, so they go one
//! after the other, many Services in each.
//!
//! What it does not do: it merges nothing three-way, as `kubectl apply` does (see `write.rs` for what is kept), knows no
//! namespaces that would have to exist, and runs no admission.

pub mod allocate;
pub mod service;
mod session;
pub mod write;

use std::collections::HashSet;
use std::fmt;

use ipnet::IpNet;
use proxy_core::model::NamespacedName;
use proxy_core::model::manifest::{self, ManifestError, Object};
use serde::Deserialize;

use self::session::{Job, Session};
use crate::etcd::{Etcd, EtcdError};
use crate::storage::{self, Keys, Kind};

#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("document {document}: {error}")]
    Yaml { document: usize, error: serde_norway::Error },
    #[error("{kind} {name}: only Service, EndpointSlice and Endpoints are written; a Node is written by its kubelet")]
    Kind { kind: &'static str, name: String },
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    #[error("--service-node-port-range: {ours}, but the node ports in the store are of {stored} ({key})")]
    OtherRange { ours: String, stored: String, key: String },
    #[error("{key}: {error}")]
    Stored { key: String, error: storage::StorageError },
    #[error("/dev/urandom: {0}")]
    Random(std::io::Error),
}

/// The objects of a file: YAML (or JSON, which is YAML too), any number of documents.
pub fn read(text: &str) -> Result<Vec<Object>, ApplyError> {
    let mut objects = Vec::new();
    for (i, document) in serde_norway::Deserializer::from_str(text).enumerate() {
        let document_number = i + 1;
        let value = serde_norway::Value::deserialize(document)
            .map_err(|error| ApplyError::Yaml { document: document_number, error })?;
        objects.extend(manifest::objects(document_number, &value)?);
    }
    if let Some(node) = objects.iter().find(|object| matches!(object, Object::Node(_))) {
        let name = node.metadata().name.clone();
        return Err(ApplyError::Kind { kind: node.kind(), name });
    }
    Ok(objects)
}

/// What `apply` and `delete` work with.
#[derive(Clone, Debug)]
pub struct Target {
    pub etcd: Etcd,
    pub keys: Keys,
    /// `--service-cluster-ip-range`: one, or one of each family.
    pub cluster_ip_ranges: Vec<IpNet>,
    /// `--service-node-port-range`, both ends included.
    pub node_ports: (u16, u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Apply,
    Delete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Created,
    Configured,
    Unchanged,
    Deleted,
}

/// What became of one object. Printed as kubectl prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub kind: Kind,
    pub name: NamespacedName,
    pub result: Result<Outcome, String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (resource, name) = (singular(self.kind), &self.name.name);
        match &self.result {
            Ok(Outcome::Created) => write!(f, "{resource}/{name} created"),
            Ok(Outcome::Configured) => write!(f, "{resource}/{name} configured"),
            Ok(Outcome::Unchanged) => write!(f, "{resource}/{name} unchanged"),
            Ok(Outcome::Deleted) => write!(f, "{resource} \"{name}\" deleted"),
            Err(reason) => f.write_str(reason),
        }
    }
}

fn singular(kind: Kind) -> &'static str {
    match kind {
        Kind::Service => "service",
        Kind::EndpointSlice => "endpointslice.discovery.k8s.io",
        _ => "endpoints",
    }
}

fn plural(kind: Kind) -> &'static str {
    match kind {
        Kind::Service => "services",
        Kind::EndpointSlice => "endpointslices.discovery.k8s.io",
        _ => "endpoints",
    }
}

/// Does it, and tells of each object in the order of the file.
pub async fn run(target: Target, verb: Verb, objects: Vec<Object>) -> Result<Vec<Report>, ApplyError> {
    let mut session = Session::open(target, &objects).await?;
    let mut jobs: Vec<Job> = Vec::with_capacity(objects.len());
    for object in objects {
        jobs.push(session.job(verb, object));
    }
    // An object that a file has twice is written twice, one after the other.
    let mut waves: Vec<Vec<usize>> = Vec::new();
    let mut seen: Vec<HashSet<&str>> = Vec::new();
    for (i, job) in jobs.iter().enumerate() {
        let wave = seen.iter().position(|keys| !keys.contains(job.key.as_str())).unwrap_or(seen.len());
        if wave == seen.len() {
            seen.push(HashSet::new());
            waves.push(Vec::new());
        }
        seen[wave].insert(&job.key);
        waves[wave].push(i);
    }
    for wave in waves {
        session.load(&mut jobs, &wave).await?;
        session.drive(&mut jobs, wave).await?;
    }
    let report = |job: Job| Report {
        kind: job.kind,
        name: job.name,
        result: job.result.expect("every job of every wave was driven to its end"),
    };
    Ok(jobs.into_iter().map(report).collect())
}

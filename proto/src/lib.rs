//! Every message that crosses a border of Keelson, and the services that carry them.
//!
//! - [`etcdserverpb`] and its companions: the etcd v3 API (feature `etcd`);
//! - [`k8s`]: the few Kubernetes objects that are read from and written to the store (feature `k8s`);
//! - [`peer`]: what members of a cluster say to each other (feature `internal`).
//!
//! The `.proto` files beside this crate are written here; their names, numbers and types are the contract. Every
//! `bytes` field is a [`bytes::Bytes`], so decoding from `Bytes` shares the buffer instead of copying it. Maps are
//! ordered, so that equal messages have equal bytes. The feature `grpc` adds a `…_client` and a `…_server` module
//! for each service; without it no transport is pulled in, and the cores stay pure.
//!
//! What this crate does not do: it checks nothing and decides nothing. A decoded message is what was said, not what
//! is allowed.

/// What the build script wrote: one module a package, nested as the packages are.
#[allow(unreachable_pub, unused_qualifications, clippy::all, clippy::pedantic)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/_modules.rs"));
}

#[cfg(feature = "etcd")]
pub use generated::{authpb, etcdserverpb, leasepb, membershippb, mvccpb, v3electionpb, v3lockpb};

#[cfg(feature = "etcd")]
pub use generated::grpc::health::v1 as grpc_health_v1;

#[cfg(feature = "internal")]
pub use generated::keelson::peer::v1 as peer;

/// Kubernetes objects in their storage encoding. Every scalar is an `Option`: absent and false differ.
#[cfg(feature = "k8s")]
pub mod k8s {
    use crate::generated::k8s::io;

    pub use io::api::core::v1 as core_v1;
    pub use io::api::discovery::v1 as discovery_v1;
    pub use io::api::networking::v1 as networking_v1;
    pub use io::apimachinery::pkg::apis::meta::v1 as meta_v1;
    pub use io::apimachinery::pkg::runtime;
    pub use io::apimachinery::pkg::util::intstr;
}

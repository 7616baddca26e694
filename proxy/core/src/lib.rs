//! Services in, a desired dataplane out: the deciding half of `keelson-proxy`.
//!
//! ```text
//! objects ─▶ model ─▶ state ─▶ plan (topology) ─▶ Dataplane ─▶ backends render it
//!                                                     └──────▶ trace says what must happen to a packet
//! ```
//!
//! Everything here is a function of its arguments: no clock, thread, file, kernel or randomness (`clippy.toml` of this
//! crate holds that), so each rule of Kubernetes is tested in microseconds and both backends are held against one oracle.
//!
//! - [`model`]: Kubernetes' objects with everything parsed; `model::k8s` has them as they are written, `model::manifest`
//!   reads documents, `model::convert` defaults and parses, `model::mirror` makes slices of old Endpoints;
//! - [`state`]: every object the sources reported, and what changed;
//! - [`topology`]: which endpoints may be used from this node;
//! - [`plan`]: the rules of Services, whole or only for what changed;
//! - [`dataplane`]: the desired state of the kernel, as a value; [`listing`] prints it;
//! - [`trace`]: what must happen to a packet;
//! - [`range`]: address ranges without overlap.

pub mod dataplane;
pub mod listing;
pub mod model;
pub mod plan;
pub mod range;
pub mod state;
pub mod topology;
pub mod trace;

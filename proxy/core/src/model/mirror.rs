//! Endpoints, the old form: what the EndpointSlice mirroring controller would make of them.
//!
//! In a cluster a controller turns hand-made Endpoints into EndpointSlices, and proxies read slices only. Straight on a store
//! there may be no controller, so [`State`](crate::state::State) keeps Endpoints too and plans with the slices made here, but
//! only while nobody else has made any: as soon as one EndpointSlice is labelled with the Service's name, the Endpoints of that
//! name are ignored. (It may come from the mirroring controller, from the controller that follows selectors, or by hand; in
//! each case it says what Endpoints say, or better.) When the last such slice goes, the Endpoints count again.
//!
//! As the controller does, Endpoints are left alone that carry the label `endpointslice.kubernetes.io/skip-mirror: "true"`
//! or the annotation of a leader election, which once lived in Endpoints. Unlike the controller's, these slices are not
//! split at 1,000 addresses, never stored, and made for Services with selectors too.

use super::convert::{FieldError, endpoint_ports, parse_ip};
use super::{Conditions, Endpoint, EndpointSlice, Family, NamespacedName, k8s};

pub const LABEL_SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";
pub const ANNOTATION_LEADER: &str = "control-plane.alpha.kubernetes.io/leader";

/// The slices that stand for `endpoints`: one a subset and family, named after both. Empty if they are not to be mirrored.
/// Addresses that are not ready are kept as not ready.
pub fn to_model(endpoints: &k8s::Endpoints, problems: &mut Vec<FieldError>) -> Vec<EndpointSlice> {
    let meta = &endpoints.metadata;
    if meta.labels.get(LABEL_SKIP_MIRROR).is_some_and(|value| value == "true")
        || meta.annotations.contains_key(ANNOTATION_LEADER)
    {
        return Vec::new();
    }
    let namespace = if meta.namespace.is_empty() { "default" } else { &meta.namespace };
    let mut slices = Vec::new();
    for (i, subset) in endpoints.subsets.iter().enumerate() {
        let ports = endpoint_ports(&subset.ports, &format!("subsets[{i}].ports"), problems);
        let mut ready = endpoints_of(&subset.addresses, &format!("subsets[{i}].addresses"), true, problems);
        let field = format!("subsets[{i}].notReadyAddresses");
        ready.extend(endpoints_of(&subset.not_ready_addresses, &field, false, problems));
        for family in Family::BOTH {
            let of_family: Vec<Endpoint> =
                ready.iter().filter(|endpoint| Family::of(endpoint.address) == family).cloned().collect();
            if of_family.is_empty() {
                continue;
            }
            slices.push(EndpointSlice {
                name: NamespacedName::new(namespace, format!("{}-{i}-{family}", meta.name)),
                service: Some(meta.name.as_str().into()),
                family,
                headless: false,
                ports: ports.clone(),
                endpoints: of_family,
            });
        }
    }
    slices
}

fn endpoints_of(
    addresses: &[k8s::EndpointAddress],
    field: &str,
    ready: bool,
    problems: &mut Vec<FieldError>,
) -> Vec<Endpoint> {
    let mut list = Vec::with_capacity(addresses.len());
    for (i, address) in addresses.iter().enumerate() {
        let Some(ip) = parse_ip(&address.ip) else {
            let reason = format!("{:?} is not an IP address", address.ip);
            problems.push(FieldError::new(format!("{field}[{i}].ip"), reason));
            continue;
        };
        list.push(Endpoint {
            address: ip,
            conditions: Conditions { ready: Some(ready), serving: Some(ready), terminating: None },
            node_name: address.node_name.as_deref().map(Into::into),
            zone_hints: Default::default(),
            node_hints: Default::default(),
        });
    }
    list
}

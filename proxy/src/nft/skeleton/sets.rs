//! The shape of every set and map.

use proxy_core::model::Family;

use super::super::object::{SetId, address_bytes};

/// A field of a key or of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    Source,
    Destination,
    Protocol,
    Port,
    Id,
    Index,
}

/// What the kernel (and `nft`, when it lists) must know of a set.
#[derive(Debug, PartialEq, Eq)]
pub struct SetShape {
    pub key: &'static [Field],
    pub data: SetData,
    pub interval: bool,
    /// Elements that packets write, with a timeout; at most so many.
    pub dynamic_size: Option<u32>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum SetData {
    Nothing,
    Fields(&'static [Field]),
    Verdict,
}

const AFFINITY_ENTRIES_MAX: u32 = 262_144;

pub fn set_shape(set: SetId) -> SetShape {
    use Field::{Destination, Id, Index, Port, Protocol, Source};
    let (key, data): (&'static [Field], SetData) = match set {
        SetId::Frontends => (&[Destination, Protocol, Port], SetData::Fields(&[Id])),
        SetId::NodePorts => (&[Protocol, Port], SetData::Fields(&[Id])),
        SetId::ClusterSide | SetId::Outside => (&[Id], SetData::Fields(&[Id])),
        SetId::Endpoints => (&[Id, Protocol, Index], SetData::Fields(&[Destination, Port])),
        SetId::Picks => (&[Id, Index], SetData::Fields(&[Id])),
        SetId::Slots => (&[Id, Protocol], SetData::Fields(&[Destination, Port])),
        SetId::Affinity => (&[Source, Id], SetData::Fields(&[Id])),
        SetId::SourceRanges => (&[Id, Source], SetData::Nothing),
        SetId::Hairpin => (&[Source, Destination], SetData::Nothing),
        SetId::PodCidrs => (&[Source], SetData::Nothing),
        SetId::ClusterIps | SetId::ServiceCidrs | SetId::NodePortIps => (&[Destination], SetData::Nothing),
        SetId::Steps | SetId::PolicySteps | SetId::BackendSteps => (&[Id], SetData::Verdict),
    };
    SetShape {
        key,
        data,
        interval: matches!(set, SetId::SourceRanges | SetId::PodCidrs | SetId::ServiceCidrs),
        dynamic_size: (set == SetId::Affinity).then_some(AFFINITY_ENTRIES_MAX),
    }
}

/// How many bytes fields take in a key.
pub fn width(family: Family, fields: &[Field]) -> u32 {
    let bytes = |field: &Field| match field {
        Field::Source | Field::Destination => address_bytes(family),
        Field::Protocol | Field::Port | Field::Id | Field::Index => 4,
    };
    fields.iter().map(bytes).sum::<usize>() as u32
}

//! Taking over what an earlier process left in the kernel.
//!
//! A table is ours if its comment states the wanted shape, every chain of the skeleton is there with exactly its rules (told
//! by their comments, in order), every further chain is a step chain with its rules, and the step maps lead to them. Then
//! its elements become the picture, and serials and steps go on where they were. Anything else is replaced whole.
//!
//! The kernel does not say that a dump of elements was overtaken by a change, so a reading counts only if the generation
//! was the same before and after; it is tried again a bounded number of times.
//!
//! What it does not do: it does not compare the expressions of rules. Who edits a rule and keeps its comment is not found
//! out.

use std::collections::BTreeMap;
use std::sync::Arc;

use proxy_core::model::Family;

use super::NftError;
use super::diff::Picture;
use super::kernel::{ChainInfo, Kernel, KernelError, TableInfo};
use super::object::{Data, Op, SetId};
use super::render::Steps;
use super::skeleton::{self, Shape, StepChain};

const READINGS: usize = 8;

/// What there is of one family.
#[derive(Debug)]
pub enum Adoption {
    Nothing,
    /// A table of our name, but not as it should be.
    Other,
    Ours {
        picture: Box<Picture>,
        steps: Steps,
        last_pair: u32,
    },
}

/// Reads both families at one generation; claims the tables that are ours and nobody's.
pub fn read<K: Kernel>(kernel: &mut K, shapes: &[Shape; 2]) -> Result<[Adoption; 2], NftError> {
    let tables = kernel.tables()?;
    if let Some((family, owner)) = foreign_owner(&tables, kernel.owner_id()) {
        return Err(KernelError::Owned { family, owner }.into());
    }
    claim(kernel, &tables)?;
    for _ in 0..READINGS {
        let before = kernel.generation()?;
        let v4 = read_table(kernel, Family::V4, &shapes[0], &tables);
        let v6 = read_table(kernel, Family::V6, &shapes[1], &tables);
        if kernel.generation()? == before {
            return Ok([v4?, v6?]);
        }
    }
    Err(NftError::Restless { attempts: READINGS })
}

/// A living process, other than us, that holds one of the tables.
pub fn foreign_owner(tables: &[TableInfo], own: u32) -> Option<(Family, u32)> {
    tables.iter().find_map(|table| Some((table.family, table.owner.filter(|owner| *owner != own)?)))
}

/// A claimed table survives other tools' `flush ruleset`. A table that cannot be claimed still serves.
fn claim<K: Kernel>(kernel: &mut K, tables: &[TableInfo]) -> Result<(), NftError> {
    if !kernel.can_own() {
        return Ok(());
    }
    let ops: Vec<Op> = tables
        .iter()
        .filter(|table| table.owner.is_none() && table.persists)
        .map(|table| Op::AddTable {
            family: table.family,
            owned: true,
            comment: table.comment.clone().unwrap_or_default(),
        })
        .collect();
    kernel.transact(&ops)?;
    Ok(())
}

fn read_table<K: Kernel>(
    kernel: &mut K,
    family: Family,
    shape: &Shape,
    tables: &[TableInfo],
) -> Result<Adoption, NftError> {
    let Some(table) = tables.iter().find(|table| table.family == family) else { return Ok(Adoption::Nothing) };
    if table.comment.as_deref() != Some(&shape.comment()) {
        return Ok(Adoption::Other);
    }
    let Some(steps) = read_steps(kernel, family)? else { return Ok(Adoption::Other) };
    let mut found = kernel.chains(family)?;
    found.sort();
    if found != expected_chains(family, shape, &steps) {
        return Ok(Adoption::Other);
    }
    let mut picture = Box::<Picture>::default();
    for set in SetId::ALL {
        if matches!(set, SetId::Affinity | SetId::Steps | SetId::PolicySteps | SetId::BackendSteps) {
            continue;
        }
        match kernel.elements(family, set) {
            Ok(elements) => elements.into_iter().for_each(|element| picture.insert(set, element)),
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(Adoption::Other),
            Err(error) => return Err(error.into()),
        }
    }
    let last_pair = last_pair(&picture);
    let steps = Steps::of(steps);
    Ok(Adoption::Ours { picture, steps, last_pair })
}

/// The step chains, if all three step maps hold what they should.
fn read_steps<K: Kernel>(kernel: &mut K, family: Family) -> Result<Option<Vec<(StepChain, u16)>>, NftError> {
    let mut maps = Vec::new();
    for set in [SetId::Steps, SetId::PolicySteps, SetId::BackendSteps] {
        let elements = match kernel.elements(family, set) {
            Ok(elements) => elements,
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let map: BTreeMap<u16, Arc<str>> = elements
            .into_iter()
            .filter_map(|element| match element.data {
                Data::Goto(chain) => Some((element.key.id_at(0)?.step(), chain)),
                _ => None,
            })
            .collect();
        maps.push(map);
    }
    let chains: Vec<_> = maps[0].iter().filter_map(|(step, chain)| Some((StepChain::parse(chain)?, *step))).collect();
    let expected = skeleton::step_maps(&chains);
    Ok((maps == expected).then_some(chains))
}

fn expected_chains(family: Family, shape: &Shape, steps: &[(StepChain, u16)]) -> Vec<ChainInfo> {
    let mut ops = skeleton::table(family, shape, false);
    let at_start: Vec<_> = skeleton::chains_at_start().collect();
    for (chain, step) in steps.iter().filter(|step| !at_start.contains(step)) {
        ops.extend(chain.ops(family, *step));
    }
    let mut chains: BTreeMap<Arc<str>, Vec<Option<String>>> = BTreeMap::new();
    for op in ops {
        match op {
            Op::AddChain { name, .. } => drop(chains.entry(name).or_default()),
            Op::AddRule { chain, rule, .. } => chains.entry(chain).or_default().push(Some(rule.comment)),
            _ => {}
        }
    }
    chains.into_iter().map(|(name, rules)| ChainInfo { name, rules }).collect()
}

fn last_pair(picture: &Picture) -> u32 {
    let ids = picture.iter().flat_map(|(set, key, data)| {
        let of_key = set.is_behind().then(|| key.id_at(0)).flatten();
        let of_data = if let Data::Id(id) = data { Some(*id) } else { None };
        [of_key, of_data]
    });
    ids.flatten().map(|id| id.pair()).max().unwrap_or_default()
}

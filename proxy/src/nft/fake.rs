//! A kernel in memory: it executes the same batches by the same rules, and refuses what the real one refuses.
//!
//! | | refused with |
//! |---|---|
//! | delete of what is not there; reference to a table, set or chain that is not there | `ENOENT` |
//! | a key that is there with other data; overlapping intervals | `EEXIST` |
//! | a key of another width than its set's | `EINVAL` |
//! | a change to a table that another socket owns | `EPERM` |
//!
//! A refused batch changes nothing. Every batch is kept, so tests can see what was sent.
//!
//! What it does not do: timeouts, the elements that packets write, and the checks of rules beyond what they refer to.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use proxy_core::model::Family;

use super::kernel::{ChainInfo, Kernel, KernelError, Receipt, TableInfo};
use super::object::{Base, Data, Element, Expr, Key, KeyKind, Op, Rule, SetId, Verdict};
use super::skeleton::{set_shape, width};

/// One table as the kernel would hold it.
#[derive(Clone, Debug, Default)]
pub struct FakeTable {
    comment: String,
    owner: Option<u32>,
    persists: bool,
    pub sets: BTreeMap<SetId, BTreeMap<Key, Data>>,
    pub chains: BTreeMap<Arc<str>, FakeChain>,
}

impl FakeTable {
    /// Gives it to the process of another socket.
    pub fn own_by(&mut self, port: u32) {
        self.owner = Some(port);
    }
}

#[derive(Clone, Debug, Default)]
pub struct FakeChain {
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
}

/// The kernel, as one socket sees it.
#[derive(Debug)]
pub struct FakeKernel {
    pub tables: BTreeMap<Family, FakeTable>,
    /// Every batch that was sent, refused or not.
    pub batches: Vec<Vec<Op>>,
    generation: u32,
    port: u32,
    can_own: bool,
}

impl Default for FakeKernel {
    fn default() -> Self {
        FakeKernel { tables: BTreeMap::new(), batches: Vec::new(), generation: 1, port: 1, can_own: true }
    }
}

impl FakeKernel {
    /// A kernel from before tables could be owned.
    pub fn without_ownership() -> FakeKernel {
        FakeKernel { can_own: false, ..FakeKernel::default() }
    }

    /// The process ends, and another one opens a socket: its tables stay, without an owner.
    pub fn reopen(mut self) -> FakeKernel {
        for table in self.tables.values_mut().filter(|table| table.owner == Some(self.port)) {
            table.owner = None;
        }
        FakeKernel { port: self.port + 1, batches: Vec::new(), ..self }
    }

    /// All elements, for comparison.
    pub fn all_elements(&self) -> BTreeMap<(Family, SetId), BTreeMap<Key, Data>> {
        let tables = self.tables.iter();
        tables.flat_map(|(family, table)| table.sets.iter().map(|(set, map)| ((*family, *set), map.clone()))).collect()
    }
}

impl Kernel for FakeKernel {
    fn can_own(&self) -> bool {
        self.can_own
    }

    fn owner_id(&self) -> u32 {
        self.port
    }

    fn transact(&mut self, ops: &[Op]) -> Result<Receipt, KernelError> {
        if ops.is_empty() {
            return Ok(Receipt::default());
        }
        self.batches.push(ops.to_vec());
        let mut tables = self.tables.clone();
        for (index, op) in ops.iter().enumerate() {
            execute(&mut tables, op, self.port).map_err(|errno| KernelError::Refused {
                op: index,
                what: op.to_string(),
                error: io::Error::from_raw_os_error(errno),
                reason: None,
            })?;
        }
        self.tables = tables;
        self.generation += 1;
        Ok(Receipt { bytes: 0, messages: ops.len() })
    }

    fn tables(&mut self) -> Result<Vec<TableInfo>, KernelError> {
        let info = |(family, table): (&Family, &FakeTable)| TableInfo {
            family: *family,
            comment: Some(table.comment.clone()),
            owner: table.owner,
            persists: table.persists,
        };
        Ok(self.tables.iter().map(info).collect())
    }

    fn chains(&mut self, family: Family) -> Result<Vec<ChainInfo>, KernelError> {
        let chains = self.tables.get(&family).into_iter().flat_map(|table| &table.chains);
        let comments = |chain: &FakeChain| chain.rules.iter().map(|rule| Some(rule.comment.clone())).collect();
        Ok(chains.map(|(name, chain)| ChainInfo { name: name.clone(), rules: comments(chain) }).collect())
    }

    fn elements(&mut self, family: Family, set: SetId) -> Result<Vec<Element>, KernelError> {
        let map = self.tables.get(&family).and_then(|table| table.sets.get(&set));
        let map = map.ok_or_else(|| KernelError::Io(io::Error::from_raw_os_error(libc::ENOENT)))?;
        Ok(map.iter().map(|(key, data)| Element { key: *key, data: data.clone() }).collect())
    }

    fn generation(&mut self) -> Result<u32, KernelError> {
        Ok(self.generation)
    }
}

type Tables = BTreeMap<Family, FakeTable>;

fn execute(tables: &mut Tables, op: &Op, port: u32) -> Result<(), i32> {
    match op {
        Op::AddTable { family, owned, comment } => {
            let table = tables.entry(*family).or_insert_with(|| FakeTable {
                comment: comment.clone(),
                persists: *owned,
                ..FakeTable::default()
            });
            check_owner(table, port)?;
            if *owned {
                table.owner = Some(port);
            }
        }
        Op::DeleteTable { family } => {
            open(tables, *family, port)?;
            tables.remove(family);
        }
        Op::AddSet { family, set } => drop(open(tables, *family, port)?.sets.entry(*set).or_default()),
        Op::AddChain { family, name, base } => {
            let chain = open(tables, *family, port)?.chains.entry(name.clone()).or_default();
            chain.base = chain.base.or(*base);
        }
        Op::AddRule { family, chain, rule } => {
            let table = open(tables, *family, port)?;
            check_references(table, rule)?;
            table.chains.get_mut(chain).ok_or(libc::ENOENT)?.rules.push(rule.clone());
        }
        Op::AddElements { family, set, elements } => {
            let table = open(tables, *family, port)?;
            for element in elements {
                add_element(table, *family, *set, element)?;
            }
        }
        Op::DeleteElements { family, set, keys } => {
            let map = open(tables, *family, port)?.sets.get_mut(set).ok_or(libc::ENOENT)?;
            for key in keys {
                map.remove(key).ok_or(libc::ENOENT)?;
            }
        }
    }
    Ok(())
}

fn open(tables: &mut Tables, family: Family, port: u32) -> Result<&mut FakeTable, i32> {
    let table = tables.get_mut(&family).ok_or(libc::ENOENT)?;
    check_owner(table, port)?;
    Ok(table)
}

fn check_owner(table: &FakeTable, port: u32) -> Result<(), i32> {
    if table.owner.is_some_and(|owner| owner != port) { Err(libc::EPERM) } else { Ok(()) }
}

fn check_references(table: &FakeTable, rule: &Rule) -> Result<(), i32> {
    for expr in &rule.exprs {
        let found = match expr {
            Expr::Verdict(Verdict::Goto(chain)) => table.chains.contains_key(chain),
            Expr::Contains { set, .. } | Expr::NotContains { set, .. } | Expr::VerdictMap { set, .. } => {
                table.sets.contains_key(set)
            }
            Expr::Map { set, .. } | Expr::Update { set, .. } | Expr::Forget { set, .. } => table.sets.contains_key(set),
            _ => true,
        };
        if !found {
            return Err(libc::ENOENT);
        }
    }
    Ok(())
}

fn add_element(table: &mut FakeTable, family: Family, set: SetId, element: &Element) -> Result<(), i32> {
    let parts = if element.key.kind == KeyKind::Range { 2 } else { 1 };
    if element.key.bytes().len() != parts * width(family, set_shape(set).key) as usize {
        return Err(libc::EINVAL);
    }
    if let Data::Goto(chain) = &element.data
        && !table.chains.contains_key(chain)
    {
        return Err(libc::ENOENT);
    }
    let map = table.sets.get_mut(&set).ok_or(libc::ENOENT)?;
    if set_shape(set).interval && element.key.kind != KeyKind::Range {
        check_interval(map, &element.key)?;
    }
    match map.insert(element.key, element.data.clone()) {
        Some(old) if old != element.data => Err(libc::EEXIST),
        _ => Ok(()),
    }
}

/// Plain intervals begin and end in turn, at every moment: what begins inside another, or before the one before it has
/// ended, is an overlap.
fn check_interval(map: &BTreeMap<Key, Data>, key: &Key) -> Result<(), i32> {
    let before = map.range(..key).next_back().is_some_and(|(edge, _)| edge.kind == KeyKind::Single);
    if before == (key.kind == KeyKind::IntervalEnd) { Ok(()) } else { Err(libc::EEXIST) }
}

#[cfg(test)]
mod tests {
    use super::super::object::{Id, key};
    use super::*;

    fn kernel() -> FakeKernel {
        let mut kernel = FakeKernel::default();
        let family = Family::V4;
        let ops = [
            Op::AddTable { family, owned: true, comment: "test".into() },
            Op::AddSet { family, set: SetId::Outside },
            Op::AddSet { family, set: SetId::ServiceCidrs },
        ];
        kernel.transact(&ops).expect("a table with two sets");
        kernel
    }

    fn add(id: u32, to: u32) -> Op {
        let elements = vec![Element { key: key().id(Id(id)), data: Data::Id(Id(to)) }];
        Op::AddElements { family: Family::V4, set: SetId::Outside, elements }
    }

    fn delete(id: u32) -> Op {
        Op::DeleteElements { family: Family::V4, set: SetId::Outside, keys: vec![key().id(Id(id))] }
    }

    fn errno(result: Result<Receipt, KernelError>) -> Option<i32> {
        result.err().and_then(|error| error.errno())
    }

    #[test]
    fn a_refused_batch_changes_nothing() {
        let mut kernel = kernel();
        kernel.transact(&[add(1, 10)]).expect("a new key");
        let before = kernel.all_elements();
        assert_eq!(errno(kernel.transact(&[add(2, 20), add(1, 11)])), Some(libc::EEXIST));
        assert_eq!(errno(kernel.transact(&[add(2, 20), delete(3)])), Some(libc::ENOENT));
        assert_eq!(kernel.all_elements(), before);
        kernel
            .transact(&[add(1, 10), delete(1), add(1, 11)])
            .expect("the same again is no error, nor is a replacement");
    }

    #[test]
    fn overlapping_intervals_are_refused() {
        let mut kernel = kernel();
        let interval = |first: [u8; 4], next: [u8; 4]| {
            let begin = Element { key: key().address(first.into()), data: Data::None };
            let end = Element { key: Key::empty(KeyKind::IntervalEnd).address(next.into()), data: Data::None };
            Op::AddElements { family: Family::V4, set: SetId::ServiceCidrs, elements: vec![begin, end] }
        };
        kernel.transact(&[interval([10, 96, 0, 0], [10, 112, 0, 0])]).expect("a first interval");
        let inner = kernel.transact(&[interval([10, 97, 0, 0], [10, 98, 0, 0])]);
        assert_eq!(errno(inner), Some(libc::EEXIST));
    }

    #[test]
    fn an_owned_table_is_nobody_elses() {
        let mut kernel = kernel();
        kernel.port = 2;
        assert_eq!(errno(kernel.transact(&[add(1, 10)])), Some(libc::EPERM));
        kernel.port = 1;
        let mut kernel = kernel.reopen();
        kernel.transact(&[add(1, 10)]).expect("its owner is gone");
    }
}

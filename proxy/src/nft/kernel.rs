//! The seam between deciding and doing: what the backend asks of a kernel.
//!
//! Two implementations: [`super::netlink::Netlink`] is the real one, [`super::fake::FakeKernel`] executes the same batches in
//! memory with the same refusals.

use std::io;
use std::sync::Arc;

use proxy_core::model::Family;

use super::object::{Element, Op, SetId, family_name};

/// What a batch cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    pub bytes: usize,
    pub messages: usize,
}

/// A table that bears our name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableInfo {
    pub family: Family,
    pub comment: Option<String>,
    /// A process holds it, and while it lives nobody else may change it.
    pub owner: Option<u32>,
    /// It outlives its owner, and without one it may be claimed.
    pub persists: bool,
}

/// A chain and the comments of its rules, in order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChainInfo {
    pub name: Arc<str>,
    pub rules: Vec<Option<String>>,
}

pub trait Kernel {
    /// Whether tables can be owned and outlive their owner (since Linux 6.9).
    fn can_own(&self) -> bool;
    /// What a table's owner is, if it is us.
    fn owner_id(&self) -> u32;
    /// Applies all of it or nothing.
    fn transact(&mut self, ops: &[Op]) -> Result<Receipt, KernelError>;
    /// The tables of our name, in both families.
    fn tables(&mut self) -> Result<Vec<TableInfo>, KernelError>;
    fn chains(&mut self, family: Family) -> Result<Vec<ChainInfo>, KernelError>;
    fn elements(&mut self, family: Family, set: SetId) -> Result<Vec<Element>, KernelError>;
    /// Rises by one with every transaction of anybody in this network namespace.
    fn generation(&mut self) -> Result<u32, KernelError>;
}

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("netlink: {0}")]
    Io(#[from] io::Error),
    /// Nothing of the batch was applied.
    #[error("the kernel refused to {what}: {}{}", error, reason.as_deref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Refused { op: usize, what: String, error: io::Error, reason: Option<String> },
    #[error("table {} keelson belongs to another process (netlink port {owner})", family_name(*family))]
    Owned { family: Family, owner: u32 },
    #[error("the kernel did not say whether a batch of {messages} messages was applied")]
    NoAnswer { messages: usize },
}

impl KernelError {
    /// The errno of a refusal.
    pub fn errno(&self) -> Option<i32> {
        match self {
            KernelError::Refused { error, .. } | KernelError::Io(error) => error.raw_os_error(),
            _ => None,
        }
    }
}

//! What the store asks of a database, and no more: atomic batches, consistent views, and the truth about what a crash
//! would leave.
//!
//! Two implementations exist: RocksDB (`kvstore/src/disk/rocks.rs`) and [`memory`], which loses on `crash` exactly what
//! RocksDB would lose, so that the simulator meets the same schedules as a real disk.
//!
//! A [`WriteBatch`] is readable: within one apply the later entries see what the earlier ones wrote, through
//! [`Overlay`]. Within a batch the last write to a key wins, so that a key overwritten many times in one batch reaches the
//! database once.
//!
//! What it does not do: it knows no revision, no lease and no key encoding (`keys.rs` alone does).

pub mod memory;

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use bytes::Bytes;

use crate::Fatal;
use crate::types::{Index, Term};

/// The tables of the state database. The discriminants travel in snapshots between members: never renumber.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Table {
    /// user key → newest record of that key (tombstones included until compacted)
    Key = 0,
    /// (main, sub) → the same record, in revision order
    Rev = 1,
    /// (escaped user key, ¬main) → sub: a mark at every 4th record of a key
    Old = 2,
    /// lease → its grant; (lease, key) → nothing
    Lease = 3,
    /// Users, roles and the auth revision (a later room).
    Auth = 4,
    /// member → its record; removed ids
    Member = 5,
    /// (member, alarm) → nothing
    Alarm = 6,
    /// applied index and term, revisions, configuration, format version
    Meta = 7,
}

impl Table {
    pub const ALL: [Table; 8] =
        [Table::Key, Table::Rev, Table::Old, Table::Lease, Table::Auth, Table::Member, Table::Alarm, Table::Meta];

    pub const fn name(self) -> &'static str {
        match self {
            Table::Key => "key",
            Table::Rev => "rev",
            Table::Old => "old",
            Table::Lease => "lease",
            Table::Auth => "auth",
            Table::Member => "member",
            Table::Alarm => "alarm",
            Table::Meta => "meta",
        }
    }

    pub fn from_u8(n: u8) -> Option<Table> {
        Table::ALL.get(usize::from(n)).copied()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    Forward,
    Backward,
}

/// The half-open or closed stretch of a table that a scan covers.
pub type Range<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);

/// Called with each (key, value) of a scan until it breaks; the slices live only during the call.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// A consistent picture of the whole state database at one moment. Cheap to clone; safe to read from any thread; never
/// changes, whatever the applier writes meanwhile.
pub trait ReadView: Clone + Send + Sync + 'static {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Fatal>;

    /// Calls `visit` with each (key, value) of `range` in order, until it breaks.
    fn scan(&self, table: Table, range: Range<'_>, direction: Direction, visit: &mut Visit<'_>) -> Result<(), Fatal>;
}

/// The state database as its single writer has it.
pub trait Backend: Send + 'static {
    type View: ReadView;
    type Install: Install;

    /// A view of everything written so far.
    fn view(&self) -> Self::View;

    /// Writes the whole batch or nothing; visible at once, durable only after a flush.
    fn write(&mut self, batch: WriteBatch) -> Result<(), Fatal>;

    /// Starts making everything written so far durable, all tables at one moment; returns at once.
    fn start_flush(&mut self) -> Result<(), Fatal>;

    /// The applied index that would survive a crash now (the `meta` row of the durable state; 0 for none).
    fn durable_applied(&self) -> Result<Index, Fatal>;

    /// Begins a complete new state beside the present one; dropping it discards it.
    fn begin_install(&mut self) -> Result<Self::Install, Fatal>;

    /// Makes a finished new state the only one, durably (the rename of the pointer). Views of the old one stay readable.
    fn install(&mut self, new: Self::Install) -> Result<(), Fatal>;
}

/// A state under construction from a leader's snapshot.
pub trait Install: Send {
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> Result<(), Fatal>;

    /// Everything has come: makes the files complete and durable, and says what they hold. The state is not current
    /// yet: Raft may still refuse it (trap 4).
    fn finish(&mut self) -> Result<Installed, Fatal>;
}

/// What a finished snapshot holds, read back from its own `meta` rows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Installed {
    pub index: Index,
    pub term: Term,
}

/// The writes of one apply, readable before they are written.
#[derive(Clone, Default, Debug)]
pub struct WriteBatch {
    tables: [BTreeMap<Bytes, Option<Bytes>>; Table::ALL.len()],
}

impl WriteBatch {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn put(&mut self, table: Table, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.tables[table as usize].insert(key.into(), Some(value.into()));
    }

    pub fn delete(&mut self, table: Table, key: impl Into<Bytes>) {
        self.tables[table as usize].insert(key.into(), None);
    }

    pub fn is_empty(&self) -> bool {
        self.tables.iter().all(BTreeMap::is_empty)
    }

    /// `Some(None)` is a deletion in this batch; `None`: the batch does not know the key.
    pub fn get(&self, table: Table, key: &[u8]) -> Option<Option<&Bytes>> {
        self.tables[table as usize].get(key).map(Option::as_ref)
    }

    /// The batch's rows of one table in key order; `None` is a deletion.
    pub fn rows(&self, table: Table) -> impl DoubleEndedIterator<Item = (&Bytes, Option<&Bytes>)> {
        self.tables[table as usize].iter().map(|(k, v)| (k, v.as_ref()))
    }

    /// Consumes the batch, table by table.
    pub fn into_tables(self) -> impl Iterator<Item = (Table, BTreeMap<Bytes, Option<Bytes>>)> {
        Table::ALL.into_iter().zip(self.tables)
    }

    fn range(&self, table: Table, range: Range<'_>) -> std::collections::btree_map::Range<'_, Bytes, Option<Bytes>> {
        self.tables[table as usize].range::<[u8], _>(range)
    }
}

/// A view with a batch laid over it: what the database will hold once the batch is written.
#[derive(Clone, Copy)]
pub struct Overlay<'a, V> {
    pub view: &'a V,
    pub batch: &'a WriteBatch,
}

/// Something that can be read like a database: a view, or a view under a batch. Applying reads through the overlay,
/// serving reads through the view; the keyspace's code is the same.
pub trait Read {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Fatal>;

    fn scan(&self, table: Table, range: Range<'_>, direction: Direction, visit: &mut Visit<'_>) -> Result<(), Fatal>;
}

impl<V: ReadView> Read for V {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Fatal> {
        ReadView::get(self, table, key)
    }

    fn scan(&self, table: Table, range: Range<'_>, direction: Direction, visit: &mut Visit<'_>) -> Result<(), Fatal> {
        ReadView::scan(self, table, range, direction, visit)
    }
}

impl<V: ReadView> Read for Overlay<'_, V> {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Fatal> {
        match self.batch.get(table, key) {
            Some(known) => Ok(known.cloned()),
            None => self.view.get(table, key),
        }
    }

    fn scan(&self, table: Table, range: Range<'_>, direction: Direction, visit: &mut Visit<'_>) -> Result<(), Fatal> {
        if is_empty_range(&range) {
            return Ok(());
        }
        let mut rows = self.batch.range(table, range);
        let mut next = || match direction {
            Direction::Forward => rows.next(),
            Direction::Backward => rows.next_back(),
        };
        let mut pending = next();
        let mut stopped = false;
        self.view.scan(table, range, direction, &mut |key, value| {
            // Rows of the batch that come before this row of the view.
            while let Some((k, v)) = pending {
                let before = match direction {
                    Direction::Forward => k.as_ref() < key,
                    Direction::Backward => k.as_ref() > key,
                };
                if !before {
                    break;
                }
                pending = next();
                if let Some(v) = v
                    && visit(k, v).is_break()
                {
                    stopped = true;
                    return ControlFlow::Break(());
                }
            }
            let flow = match pending {
                Some((k, v)) if k.as_ref() == key => {
                    pending = next();
                    v.as_ref().map_or(ControlFlow::Continue(()), |v| visit(k, v))
                }
                _ => visit(key, value),
            };
            stopped = flow.is_break();
            flow
        })?;
        while let Some((k, v)) = pending {
            if stopped {
                break;
            }
            if let Some(v) = v {
                stopped = visit(k, v).is_break();
            }
            pending = next();
        }
        Ok(())
    }
}

/// Whether no key can lie in `range`; `BTreeMap::range` panics on such a range, and a reversed one is a legal question.
pub fn is_empty_range(range: &Range<'_>) -> bool {
    match range {
        (Bound::Unbounded, _) | (_, Bound::Unbounded) => false,
        (Bound::Included(a), Bound::Included(b)) => a > b,
        (Bound::Included(a), Bound::Excluded(b))
        | (Bound::Excluded(a), Bound::Included(b))
        | (Bound::Excluded(a), Bound::Excluded(b)) => a >= b,
    }
}

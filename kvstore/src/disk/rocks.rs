//! The state database: [`Backend`] and [`ReadView`] over RocksDB.
//!
//! It is written without a WAL and flushed atomically over all families, so that what a crash leaves is one consistent
//! prefix of the applied entries; the Raft log replays the rest. How far that prefix reaches is asked with a read of the
//! persisted tier ([`Backend::durable_applied`]), never guessed.
//!
//! A [`View`] is a RocksDB snapshot together with the database it was taken from: after an install the old database
//! lives on until its last view is dropped, and its files go with it.
//!
//! What it does not do: it knows no key of the store but the one that holds the applied index, and it never decides when
//! to flush.

use std::fs;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use kvstore_core::Fatal;
use kvstore_core::backend::{
    Backend, Direction, Install, Installed, Range, ReadView, Table, Visit, WriteBatch, is_empty_range,
};
use kvstore_core::keys;
use kvstore_core::replica::Position;
use kvstore_core::types::Index;
use rocksdb::{
    BlockBasedOptions, BlockBasedTablePinningTier, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType,
    FlushOptions, Options, ReadOptions, ReadTier, Snapshot, WriteOptions,
};

use super::current::Current;
use super::{current, disk_error, sync_dir};

/// Sizes of the state database. Defaults are the measured ones (storage-measurements 10.2).
#[derive(Clone, Debug)]
pub struct StateOptions {
    /// Shared by all families and all states of this process.
    pub block_cache_bytes: usize,
    pub write_buffer_bytes: usize,
    pub small_write_buffer_bytes: usize,
    pub background_jobs: i32,
}

impl Default for StateOptions {
    fn default() -> Self {
        StateOptions {
            block_cache_bytes: 64 << 20,
            write_buffer_bytes: 32 << 20,
            small_write_buffer_bytes: 4 << 20,
            background_jobs: 2,
        }
    }
}

/// What every state database of this process is opened with.
#[derive(Clone)]
pub struct Opener {
    options: StateOptions,
    cache: Cache,
}

impl Opener {
    pub fn new(options: StateOptions) -> Self {
        let cache = Cache::new_lru_cache(options.block_cache_bytes);
        Opener { options, cache }
    }

    fn open(&self, path: &Path) -> Result<State, Fatal> {
        let mut db = Options::default();
        db.create_if_missing(true);
        db.create_missing_column_families(true);
        db.set_atomic_flush(true);
        db.set_max_background_jobs(self.options.background_jobs);
        db.set_bytes_per_sync(1 << 20);
        db.set_keep_log_file_num(2);
        db.set_max_log_file_size(4 << 20);
        let families = Table::ALL.map(|table| ColumnFamilyDescriptor::new(table.name(), self.family(table)));
        let db = DB::open_cf_descriptors(&db, path, families).map_err(disk_error(path))?;
        Ok(State { db, files: Files { path: path.to_owned(), doomed: AtomicBool::new(false) } })
    }

    fn family(&self, table: Table) -> Options {
        let mut block = BlockBasedOptions::default();
        block.set_block_cache(&self.cache);
        block.set_block_size(16 << 10);
        block.set_format_version(6);
        block.set_bloom_filter(10.0, false);
        block.set_optimize_filters_for_memory(true);
        // In the cache, so that memory is bounded; pinned, or an index block larger than a cache shard is read again
        // for every get (storage-measurements 11.1).
        block.set_cache_index_and_filter_blocks(true);
        block.set_unpartitioned_pinning_tier(BlockBasedTablePinningTier::All);
        let mut options = Options::default();
        options.set_block_based_table_factory(&block);
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_max_write_buffer_number(3);
        options.set_write_buffer_size(match table {
            Table::Key | Table::Rev | Table::Old => self.options.write_buffer_bytes,
            _ => self.options.small_write_buffer_bytes,
        });
        options
    }
}

/// One open state database and its files.
pub(super) struct State {
    // The order matters: the database is closed before `files` may remove its directory.
    db: DB,
    files: Files,
}

struct Files {
    path: PathBuf,
    /// Superseded by an install, or never finished: the files go when the last view does.
    doomed: AtomicBool,
}

impl Drop for Files {
    fn drop(&mut self) {
        if self.doomed.load(Ordering::Acquire) {
            // A directory that stays behind is removed at the next start.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

impl State {
    fn family(&self, table: Table) -> &ColumnFamily {
        self.db.cf_handle(table.name()).expect("all families are opened together")
    }

    fn error(&self, error: rocksdb::Error) -> Fatal {
        disk_error(&self.files.path)(error)
    }

    /// The only flush there is: it names every family, because a flush of one would make its rows durable without the
    /// others (trap 1). Blocks until the rows are on disk.
    fn flush_all(&self) -> Result<(), Fatal> {
        let families = Table::ALL.map(|table| self.family(table));
        let mut options = FlushOptions::default();
        options.set_wait(true);
        self.db.flush_cfs_opt(&families.each_ref(), &options).map_err(|e| self.error(e))
    }

    fn write(&self, batch: rocksdb::WriteBatch) -> Result<(), Fatal> {
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        self.db.write_opt(batch, &options).map_err(|e| self.error(e))
    }

    fn meta(&self, key: &[u8], tier: ReadTier) -> Result<Option<Vec<u8>>, Fatal> {
        let mut options = ReadOptions::default();
        options.set_read_tier(tier);
        self.db.get_cf_opt(self.family(Table::Meta), key, &options).map_err(|e| self.error(e))
    }

    fn applied(&self, tier: ReadTier) -> Result<keys::Applied, Fatal> {
        match self.meta(keys::META_APPLIED, tier)? {
            Some(row) => keys::decode_applied(&row),
            None => Ok(keys::Applied::default()),
        }
    }
}

const FULL_SCAN_READAHEAD_BYTES: usize = 1 << 20;

/// A consistent picture of the state database.
#[derive(Clone)]
pub struct View(Arc<Held>);

struct Held {
    // The order matters: both borrow from `state` and are dropped before it.
    options: ReadOptions,
    snapshot: Snapshot<'static>,
    state: Arc<State>,
}

impl View {
    fn new(state: &Arc<State>) -> View {
        let state = Arc::clone(state);
        // SAFETY: the snapshot borrows `state.db`, which lives on the heap behind an `Arc` that is kept beside it and is
        // dropped after it; the borrow never leaves this struct, whose methods hand out nothing that outlives `&self`.
        let snapshot = unsafe { std::mem::transmute::<Snapshot<'_>, Snapshot<'static>>(state.db.snapshot()) };
        let mut options = ReadOptions::default();
        options.set_snapshot(&snapshot);
        View(Arc::new(Held { options, snapshot, state }))
    }
}

impl ReadView for View {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, Fatal> {
        let Held { options, state, .. } = &*self.0;
        // A pinned slice pins its block: it is copied and let go at once.
        let found = state.db.get_pinned_cf_opt(state.family(table), key, options).map_err(|e| state.error(e))?;
        Ok(found.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn scan(&self, table: Table, range: Range<'_>, direction: Direction, visit: &mut Visit<'_>) -> Result<(), Fatal> {
        if is_empty_range(&range) {
            return Ok(());
        }
        let Held { snapshot, state, .. } = &*self.0;
        let mut options = ReadOptions::default();
        options.set_snapshot(snapshot);
        if let (Bound::Unbounded, Bound::Unbounded) = range {
            // A whole table: it would only drive out of the cache what others will want again.
            options.fill_cache(false);
            options.set_readahead_size(FULL_SCAN_READAHEAD_BYTES);
        }
        match range.0 {
            Bound::Unbounded => {}
            Bound::Included(key) => options.set_iterate_lower_bound(key),
            Bound::Excluded(key) => options.set_iterate_lower_bound(just_after(key)),
        }
        match range.1 {
            Bound::Unbounded => {}
            Bound::Included(key) => options.set_iterate_upper_bound(just_after(key)),
            Bound::Excluded(key) => options.set_iterate_upper_bound(key),
        }
        let mut rows = state.db.raw_iterator_cf_opt(state.family(table), options);
        match direction {
            Direction::Forward => rows.seek_to_first(),
            Direction::Backward => rows.seek_to_last(),
        }
        while let Some((key, value)) = rows.item() {
            if visit(key, value).is_break() {
                return Ok(());
            }
            match direction {
                Direction::Forward => rows.next(),
                Direction::Backward => rows.prev(),
            }
        }
        // An iterator that meets an error just ends: without this a range would come back short.
        rows.status().map_err(|e| state.error(e))
    }
}

/// The smallest key greater than `key`.
fn just_after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

/// The state as its single writer has it.
pub struct Rocks {
    opener: Opener,
    member_dir: PathBuf,
    state: Arc<State>,
    current: Current,
    flusher: Flusher,
}

impl Rocks {
    /// Opens the state that the pointer file names.
    pub(super) fn open(opener: Opener, member_dir: &Path, current: Current) -> Result<Rocks, Fatal> {
        let state = Arc::new(opener.open(&current::state_dir(member_dir, current.number))?);
        Ok(Rocks { opener, member_dir: member_dir.to_owned(), state, current, flusher: Flusher::start()? })
    }

    /// Founds the first state of a member with `rows`, durably; the rename of the pointer ends it.
    pub(super) fn found(opener: Opener, member_dir: &Path, rows: WriteBatch) -> Result<Rocks, Fatal> {
        let number = 1;
        let path = current::state_dir(member_dir, number);
        remove_dir_if_exists(&path)?;
        let state = Arc::new(opener.open(&path)?);
        state.write(to_rocks(&state, rows))?;
        state.flush_all()?;
        sync_dir(&path)?;
        let keys::Applied { index, term } = state.applied(ReadTier::Persisted)?;
        let current = Current { number, installed: Position { index, term } };
        current::point_to(member_dir, current)?;
        Ok(Rocks { opener, member_dir: member_dir.to_owned(), state, current, flusher: Flusher::start()? })
    }

    /// Where the state was founded or installed.
    pub fn installed(&self) -> Position {
        self.current.installed
    }

    /// Makes everything durable and waits for it: the end of a clean stop.
    pub fn flush_and_wait(&mut self) -> Result<(), Fatal> {
        self.flusher.failure()?;
        self.state.flush_all()
    }

    /// Where the state's files are, for whoever asks their size.
    pub fn path(&self) -> &Path {
        &self.state.files.path
    }
}

#[cfg(test)]
impl Rocks {
    /// From here on only flushes change the files, so that they can be copied between them.
    pub(super) fn stop_compactions(&self) {
        for table in Table::ALL {
            let options = [("disable_auto_compactions", "true")];
            self.state.db.set_options_cf(self.state.family(table), &options).expect("an option that can be changed");
        }
    }
}

impl Backend for Rocks {
    type View = View;
    type Install = NewState;

    fn view(&self) -> View {
        View::new(&self.state)
    }

    fn write(&mut self, batch: WriteBatch) -> Result<(), Fatal> {
        let batch = to_rocks(&self.state, batch);
        if batch.is_empty() { Ok(()) } else { self.state.write(batch) }
    }

    fn start_flush(&mut self) -> Result<(), Fatal> {
        self.flusher.failure()?;
        self.flusher.flush(Arc::clone(&self.state))
    }

    fn durable_applied(&self) -> Result<Index, Fatal> {
        self.flusher.failure()?;
        Ok(self.state.applied(ReadTier::Persisted)?.index)
    }

    fn begin_install(&mut self) -> Result<NewState, Fatal> {
        self.nursery().begin()
    }

    fn install(&mut self, mut new: NewState) -> Result<(), Fatal> {
        let (state, installed) = new.take()?;
        // From here on this state survives whatever happens: the rename is the install.
        state.files.doomed.store(false, Ordering::Release);
        let current = Current { number: new.number, installed };
        current::point_to(&self.member_dir, current)?;
        self.state.files.doomed.store(true, Ordering::Release);
        self.state = Arc::new(state);
        self.current = current;
        Ok(())
    }
}

/// Begins new states without the writer: a transfer fills one while the applier goes on applying.
#[derive(Clone)]
pub struct Nursery {
    opener: Opener,
    member_dir: PathBuf,
}

impl Rocks {
    pub fn nursery(&self) -> Nursery {
        Nursery { opener: self.opener.clone(), member_dir: self.member_dir.clone() }
    }
}

impl Nursery {
    /// Numbers above every state that exists. One transfer at a time, or two could take the same number.
    pub fn begin(&self) -> Result<NewState, Fatal> {
        NewState::begin(&self.opener, &self.member_dir, current::highest_state(&self.member_dir)? + 1)
    }
}

/// A state under construction beside the present one. Dropped unfinished, its files go.
pub struct NewState {
    number: u64,
    state: Option<State>,
    batch: rocksdb::WriteBatch,
    finished: Option<Position>,
}

const INSTALL_BATCH_BYTES: usize = 1 << 20;

impl NewState {
    fn begin(opener: &Opener, member_dir: &Path, number: u64) -> Result<NewState, Fatal> {
        let path = current::state_dir(member_dir, number);
        remove_dir_if_exists(&path)?;
        let state = opener.open(&path)?;
        state.files.doomed.store(true, Ordering::Release);
        Ok(NewState { number, state: Some(state), batch: rocksdb::WriteBatch::default(), finished: None })
    }

    fn state(&self) -> &State {
        self.state.as_ref().expect("taken only by value, in `take`")
    }

    fn write_out(&mut self) -> Result<(), Fatal> {
        let batch = std::mem::take(&mut self.batch);
        self.state().write(batch)
    }

    fn take(&mut self) -> Result<(State, Position), Fatal> {
        match (self.state.take(), self.finished) {
            (Some(state), Some(installed)) => Ok((state, installed)),
            _ => Err(Fatal::Invariant("an unfinished snapshot was to be installed".into())),
        }
    }
}

impl Install for NewState {
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) -> Result<(), Fatal> {
        let state = self.state.as_ref().expect("taken only by value, in `take`");
        self.batch.put_cf(state.family(table), key, value);
        if self.batch.size_in_bytes() >= INSTALL_BATCH_BYTES { self.write_out() } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<Installed, Fatal> {
        self.write_out()?;
        let state = self.state();
        state.flush_all()?;
        sync_dir(&state.files.path)?;
        let keys::Applied { index, term } = state.applied(ReadTier::Persisted)?;
        if index == 0 {
            return Err(Fatal::Damaged { table: "meta", message: "a snapshot without an applied index".into() });
        }
        self.finished = Some(Position { index, term });
        Ok(Installed { index, term })
    }
}

fn to_rocks(state: &State, batch: WriteBatch) -> rocksdb::WriteBatch {
    let mut out = rocksdb::WriteBatch::default();
    for (table, rows) in batch.into_tables() {
        if rows.is_empty() {
            continue;
        }
        let family = state.family(table);
        for (key, value) in rows {
            match value {
                Some(value) => out.put_cf(family, key, value),
                None => out.delete_cf(family, key),
            }
        }
    }
    out
}

fn remove_dir_if_exists(path: &Path) -> Result<(), Fatal> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(disk_error(path)(e)),
        _ => Ok(()),
    }
}

/// The thread that flushes, so that nobody who applies ever waits for a flush.
struct Flusher {
    requests: Option<Sender<Arc<State>>>,
    failed: Arc<Mutex<Option<Fatal>>>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    fn start() -> Result<Flusher, Fatal> {
        let (requests, incoming) = channel();
        let failed = Arc::new(Mutex::new(None));
        let failure = Arc::clone(&failed);
        let thread = std::thread::Builder::new()
            .name("state-flush".into())
            .spawn(move || flush_loop(&incoming, &failure))
            .map_err(|e| Fatal::Invariant(format!("no thread for flushing: {e}")))?;
        Ok(Flusher { requests: Some(requests), failed, thread: Some(thread) })
    }

    fn flush(&self, state: Arc<State>) -> Result<(), Fatal> {
        let requests = self.requests.as_ref().expect("taken only on drop");
        requests.send(state).map_err(|_| Fatal::Invariant("the flushing thread has ended".into()))
    }

    /// A flush that failed ends the member: taken here by the next call of its writer.
    fn failure(&self) -> Result<(), Fatal> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }
}

fn flush_loop(incoming: &Receiver<Arc<State>>, failure: &Mutex<Option<Fatal>>) {
    while let Ok(mut state) = incoming.recv() {
        // Requests that came meanwhile are served by one flush of the newest.
        while let Ok(newer) = incoming.try_recv() {
            state = newer;
        }
        if let Err(fatal) = state.flush_all() {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(fatal);
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

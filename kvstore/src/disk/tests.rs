//! What a crash leaves, what is refused, and that RocksDB keeps the promises of the memory backend.
//!
//! A crash is played by copying the files of a database that is still open: what was only in its memory is not in the
//! copy. (Dropping the database would flush it.)

use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use keelson_proto::peer::SnapshotRows;
use kvstore_core::backend::memory::MemoryBackend;
use kvstore_core::backend::{Backend, Direction, Install, Range, ReadView, Table, WriteBatch};
use kvstore_core::keys;
use kvstore_core::replica::{Fetch, LogEntry, LogWrite, Position};
use kvstore_core::types::{ClusterId, MemberId};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::disk::rocks::Opener;
use crate::disk::snapshot::{ReadIn, read_out};
use crate::testing::TempDir;

fn small() -> StateOptions {
    StateOptions {
        block_cache_bytes: 1 << 20,
        write_buffer_bytes: 1 << 20,
        small_write_buffer_bytes: 1 << 20,
        background_jobs: 1,
    }
}

fn applied_row(index: u64, batch: &mut WriteBatch) {
    batch.put(Table::Meta, keys::META_APPLIED, keys::encode_applied(keys::Applied { index, term: 1 }));
}

/// One row in every table, and the applied index.
fn one_row_each(index: u64) -> WriteBatch {
    let mut batch = WriteBatch::new();
    for table in Table::ALL {
        batch.put(table, format!("row {index}").into_bytes(), vec![table as u8]);
    }
    applied_row(index, &mut batch);
    batch
}

fn wait_durable(state: &Rocks, index: u64) {
    while state.durable_applied().unwrap() < index {
        std::thread::yield_now();
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &to);
        } else if entry.file_name() != "LOCK" {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// The state as it would be found after a crash now, in a directory of its own.
fn after_crash(member: &Path, into: &Path) -> Rocks {
    copy_dir(member, into);
    let state = Rocks::open(Opener::new(small()), into, current::read(into).unwrap().unwrap()).unwrap();
    state.stop_compactions();
    state
}

fn founded(member: &Path) -> Rocks {
    fs::create_dir_all(member).unwrap();
    let state = Rocks::found(Opener::new(small()), member, one_row_each(1)).unwrap();
    state.stop_compactions();
    state
}

fn scanned<V: ReadView>(
    view: &V,
    table: Table,
    range: Range<'_>,
    direction: Direction,
    max: usize,
) -> Vec<(Bytes, Bytes)> {
    let mut rows = Vec::new();
    view.scan(table, range, direction, &mut |key, value| {
        rows.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
        if rows.len() < max { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })
    .unwrap();
    rows
}

fn all_rows<V: ReadView>(view: &V) -> Vec<Vec<(Bytes, Bytes)>> {
    let range = (Bound::Unbounded, Bound::Unbounded);
    Table::ALL.map(|table| scanned(view, table, range, Direction::Forward, usize::MAX)).into()
}

#[test]
fn trap_01_a_flush_makes_every_family_durable_at_one_moment() {
    let dir = TempDir::new("flush");
    let live = dir.path().join("live");
    let mut state = founded(&live);
    state.write(one_row_each(2)).unwrap();
    assert_eq!(state.durable_applied().unwrap(), 1);
    let flushed = state.view();
    state.start_flush().unwrap();
    wait_durable(&state, 2);
    state.write(one_row_each(3)).unwrap();
    assert_eq!(state.durable_applied().unwrap(), 2);

    let crashed = after_crash(&live, &dir.path().join("crashed"));
    assert_eq!(crashed.durable_applied().unwrap(), 2);
    assert_eq!(all_rows(&crashed.view()), all_rows(&flushed));
}

#[test]
fn a_clean_stop_leaves_everything() {
    let dir = TempDir::new("stop");
    let mut state = Rocks::found(Opener::new(small()), dir.path(), one_row_each(1)).unwrap();
    state.write(one_row_each(2)).unwrap();
    let before = all_rows(&state.view());
    state.flush_and_wait().unwrap();
    drop(state);
    let current = current::read(dir.path()).unwrap().unwrap();
    let state = Rocks::open(Opener::new(small()), dir.path(), current).unwrap();
    assert_eq!(all_rows(&state.view()), before);
    assert_eq!(state.installed(), Position { index: 1, term: 1 });
}

// ---- The log ---------------------------------------------------------------------------------------------

fn entry(index: u64) -> LogEntry {
    LogEntry { index, term: 1, bytes: Bytes::from(format!("entry {index} {}", "x".repeat(100))) }
}

fn append(indexes: std::ops::RangeInclusive<u64>) -> LogWrite {
    LogWrite { entries: indexes.map(entry).collect(), must_sync: true, ..LogWrite::default() }
}

fn indexes(recovered: &Recovered) -> Vec<u64> {
    recovered.entries.iter().map(|entry| entry.index).collect()
}

/// The newest WAL below `log`.
fn wal(log: &Path) -> PathBuf {
    let files = fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|ext| ext == "log")).max().unwrap()
}

#[test]
fn the_log_holds_what_was_written_in_order() {
    let dir = TempDir::new("log");
    let mut log = Log::open(dir.path()).unwrap();
    assert!(log.is_empty().unwrap());
    let start = Position { index: 1, term: 1 };
    let hard_state = Some(Bytes::from_static(b"hard"));
    let reset = LogWrite { reset: Some(start), hard_state: hard_state.clone(), must_sync: true, ..LogWrite::default() };
    log.write(&[reset, append(2..=9)]).unwrap();
    let replaced = LogEntry { index: 7, term: 2, bytes: Bytes::from_static(b"other") };
    log.write(&[LogWrite { truncate_from: Some(7), entries: vec![replaced.clone()], ..LogWrite::default() }]).unwrap();
    let cut = Position { index: 3, term: 1 };
    log.write(&[LogWrite { cut_to: Some(cut), ..LogWrite::default() }]).unwrap();

    let recovered = log.recover(0, 0).unwrap();
    assert_eq!((recovered.start, recovered.hard_state.clone()), (cut, hard_state));
    assert_eq!(indexes(&recovered), [4, 5, 6, 7]);
    assert_eq!(recovered.entries.last(), Some(&replaced));
    // What is applied and does not fit into the tail is told by its terms alone.
    let recovered = log.recover(6, 0).unwrap();
    assert_eq!((indexes(&recovered), recovered.terms), (vec![7], vec![(4, 1)]));

    let fetched = log.fetch(&Fetch { id: 1, from: 5, to: 7, max_bytes: 1 }).unwrap();
    assert_eq!(fetched, [entry(5)]);
    let fetched = log.fetch(&Fetch { id: 1, from: 5, to: 7, max_bytes: 1 << 20 }).unwrap();
    assert_eq!(fetched, [entry(5), entry(6)]);
    let install = Position { index: 100, term: 3 };
    log.write(&[LogWrite { reset: Some(install), must_sync: true, ..LogWrite::default() }]).unwrap();
    let recovered = log.recover(100, 0).unwrap();
    assert_eq!((recovered.start, recovered.entries.len()), (install, 0));
}

#[test]
fn trap_03_a_record_that_a_crash_cut_short_is_dropped() {
    let dir = TempDir::new("torn");
    let (live, torn) = (dir.path().join("live"), dir.path().join("torn"));
    let mut log = Log::open(&live).unwrap();
    for index in 1..=20 {
        log.write(&[append(index..=index)]).unwrap();
    }
    copy_dir(&live, &torn);
    let file = OpenOptions::new().write(true).open(wal(&torn)).unwrap();
    file.set_len(file.metadata().unwrap().len() - 30).unwrap();
    let recovered = Log::open(&torn).unwrap().recover(0, 0).unwrap();
    assert_eq!(indexes(&recovered), (1..=19).collect::<Vec<_>>());
}

#[test]
fn trap_03_a_flip_in_the_middle_is_refused() {
    let dir = TempDir::new("flip");
    let (live, flipped) = (dir.path().join("live"), dir.path().join("flipped"));
    let mut log = Log::open(&live).unwrap();
    for index in 1..=20 {
        log.write(&[append(index..=index)]).unwrap();
    }
    copy_dir(&live, &flipped);
    let path = wal(&flipped);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = Log::open(&flipped).err().expect("forgetting acknowledged entries is no way to start").to_string();
    assert!(error.contains(&flipped.display().to_string()), "{error}");
}

// ---- Installing a snapshot -------------------------------------------------------------------------------

fn chunks<V: ReadView>(view: &V) -> (Vec<SnapshotRows>, keelson_proto::peer::SnapshotTail) {
    let mut chunks = Vec::new();
    let tail = read_out(view, &mut |rows| {
        chunks.push(rows);
        true
    });
    (chunks, tail.unwrap().unwrap())
}

fn leader_state() -> MemoryBackend {
    let mut leader = MemoryBackend::new();
    let mut batch = one_row_each(50);
    for n in 0..3_000_u32 {
        batch.put(Table::Rev, n.to_be_bytes().to_vec(), vec![7; 300]);
    }
    leader.write(batch).unwrap();
    leader
}

#[test]
fn trap_04_an_install_is_the_pointers_rename() {
    let dir = TempDir::new("install");
    let live = dir.path().join("live");
    let mut state = founded(&live);
    let leader = leader_state();
    let (chunks, tail) = chunks(&leader.view());
    assert!(chunks.len() > 2);
    let mut incoming = ReadIn::new(state.nursery().begin().unwrap());
    for chunk in &chunks {
        incoming.rows(chunk).unwrap();
    }
    let (new, installed, rows) = incoming.finish(&tail).unwrap();
    assert_eq!((installed.index, installed.term, rows), (50, 1, tail.rows));

    // Complete, but not current: a crash now starts from the old state, and sweeps the new one away.
    let crashed = dir.path().join("crashed");
    let old = state.view();
    assert_eq!(all_rows(&after_crash(&live, &crashed).view()), all_rows(&old));
    current::remove_strays(&crashed, 1).unwrap();
    assert!(!current::state_dir(&crashed, 2).exists());

    state.install(new).unwrap();
    assert_eq!(all_rows(&state.view()), all_rows(&leader.view()));
    assert_eq!((state.durable_applied().unwrap(), state.installed()), (50, Position { index: 50, term: 1 }));
    let pointer = current::read(&live).unwrap().unwrap();
    assert_eq!((pointer.number, pointer.installed), (2, state.installed()));
    // A view of the old state is readable for as long as somebody has it; its files go with the last one.
    assert_eq!(scanned(&old, Table::Key, (Bound::Unbounded, Bound::Unbounded), Direction::Forward, 9).len(), 1);
    assert!(current::state_dir(&live, 1).exists());
    drop(old);
    assert!(!current::state_dir(&live, 1).exists());
}

#[test]
fn a_damaged_or_incomplete_snapshot_is_refused_and_its_files_go() {
    let dir = TempDir::new("damaged");
    let state = Rocks::found(Opener::new(small()), dir.path(), one_row_each(1)).unwrap();
    let (chunks, tail) = chunks(&leader_state().view());

    let mut flipped = chunks[1].clone();
    flipped.rows[0].value = Bytes::from_static(b"flipped");
    assert!(ReadIn::new(state.nursery().begin().unwrap()).rows(&flipped).is_err());

    let mut short = ReadIn::new(state.nursery().begin().unwrap());
    chunks.iter().skip(1).for_each(|chunk| short.rows(chunk).unwrap());
    assert!(short.finish(&tail).is_err());

    let mut twice = ReadIn::new(state.nursery().begin().unwrap());
    chunks.iter().chain(&chunks[..1]).for_each(|chunk| twice.rows(chunk).unwrap());
    assert!(twice.finish(&tail).is_err());
    assert_eq!(current::highest_state(dir.path()).unwrap(), 1);
}

#[test]
fn an_unfinished_state_is_never_installed() {
    let dir = TempDir::new("unfinished");
    let mut state = Rocks::found(Opener::new(small()), dir.path(), one_row_each(1)).unwrap();
    let mut new = state.begin_install().unwrap();
    new.put(Table::Key, b"k", b"v").unwrap();
    assert!(state.install(new).is_err());
    assert_eq!(current::read(dir.path()).unwrap().unwrap().number, 1);
}

// ---- Whose directory it is -------------------------------------------------------------------------------

fn owner() -> Owner {
    Owner { cluster_id: ClusterId(1), member_id: MemberId(2), name: "m1".into(), peer_urls: vec!["http://h:1".into()] }
}

fn found(data_dir: &Path) -> Disk {
    match MemberDir::lock(data_dir, |_| Ok(())).unwrap().open(small()).unwrap() {
        Opened::Fresh(fresh) => fresh.found(owner(), one_row_each(1)).unwrap(),
        Opened::Member(_) => panic!("there is a member already"),
    }
}

fn refusal(data_dir: &Path) -> String {
    let refused = MemberDir::lock(data_dir, |_| Ok(())).and_then(|dir| dir.open(small()).map(drop));
    refused.expect_err("this directory must be refused").to_string()
}

#[test]
fn a_directory_of_etcd_is_refused_and_left_as_it_is() {
    for part in ["member/snap/db", "member/wal/0.wal"] {
        let dir = TempDir::new("etcd");
        let file = dir.path().join(part);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, b"etcd's").unwrap();
        let error = refusal(dir.path());
        assert!(error.contains("written by etcd") && error.contains("keelsonctl migrate"), "{error}");
        assert!(!dir.path().join("member/lock").exists());
    }
}

#[test]
fn a_second_process_another_member_and_the_future_are_refused() {
    let dir = TempDir::new("owner");
    let disk = found(dir.path());
    assert!(refusal(dir.path()).contains("another process"));
    drop(disk);
    let judged = MemberDir::lock(dir.path(), |found| Err(format!("belongs to {}", found.name)));
    assert!(judged.err().unwrap().to_string().contains("belongs to m1"));
    let path = dir.path().join("member/OWNER");
    let text = fs::read_to_string(&path).unwrap().replace("format 1", "format 2");
    fs::write(&path, text).unwrap();
    assert!(refusal(dir.path()).contains("newer version"));
}

#[test]
fn trap_02_a_log_without_a_pointer_is_refused_unless_it_is_empty() {
    let dir = TempDir::new("pointer");
    let mut disk = found(dir.path());
    let pointer = dir.path().join("member/CURRENT-STATE");
    drop(disk);
    // As a crash before the end of a bootstrap leaves it: founded anew.
    fs::remove_file(&pointer).unwrap();
    disk = found(dir.path());
    disk.log.write(&[append(2..=3)]).unwrap();
    drop(disk);
    fs::remove_file(&pointer).unwrap();
    assert!(refusal(dir.path()).contains("no state beside it"));
}

// ---- RocksDB against the memory backend ------------------------------------------------------------------

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<(u8, u8, Option<u8>)>),
    Flush,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => vec((0..3_u8, 0..40_u8, prop::option::weighted(0.7, any::<u8>())), 1..20).prop_map(Step::Write),
        1 => Just(Step::Flush),
        1 => Just(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same writes, flushes and crashes leave the same rows in both, under every bound and direction.
    #[test]
    fn rocks_and_memory_agree(steps in vec(step(), 1..16), from in 0..40_u8, to in 0..40_u8, max in 1..10_usize) {
        let dir = TempDir::new("agree");
        let mut member = dir.path().join("0");
        let mut memory = MemoryBackend::new();
        memory.write(one_row_each(1)).unwrap();
        memory.start_flush().unwrap();
        memory.complete_flush();
        let mut rocks = founded(&member);
        let mut index = 1;
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Write(rows) => {
                    let mut batch = WriteBatch::new();
                    for (table, key, value) in rows {
                        let table = Table::from_u8(table).unwrap();
                        match value {
                            Some(value) => batch.put(table, vec![key], vec![value]),
                            None => batch.delete(table, vec![key]),
                        }
                    }
                    index += 1;
                    applied_row(index, &mut batch);
                    memory.write(batch.clone()).unwrap();
                    rocks.write(batch).unwrap();
                }
                Step::Flush => {
                    memory.start_flush().unwrap();
                    memory.complete_flush();
                    rocks.start_flush().unwrap();
                    wait_durable(&rocks, index);
                }
                Step::Crash => {
                    memory.crash();
                    let crashed = dir.path().join((number + 1).to_string());
                    rocks = after_crash(&member, &crashed);
                    member = crashed;
                    index = memory.durable_applied().unwrap();
                }
            }
            prop_assert_eq!(rocks.durable_applied().unwrap(), memory.durable_applied().unwrap());
        }
        let (ours, theirs) = (rocks.view(), memory.view());
        prop_assert_eq!(all_rows(&ours), all_rows(&theirs));
        let (from, to) = ([from], [to]);
        for low in [Bound::Unbounded, Bound::Included(&from[..]), Bound::Excluded(&from[..])] {
            for high in [Bound::Unbounded, Bound::Included(&to[..]), Bound::Excluded(&to[..])] {
                for direction in [Direction::Forward, Direction::Backward] {
                    prop_assert_eq!(
                        scanned(&ours, Table::Key, (low, high), direction, max),
                        scanned(&theirs, Table::Key, (low, high), direction, max)
                    );
                }
            }
        }
        for key in 0..40_u8 {
            prop_assert_eq!(ours.get(Table::Key, &[key]).unwrap(), theirs.get(Table::Key, &[key]).unwrap());
        }
    }
}

//! The creates and deletes of a little while ago, in memory, so that a count of the past need not read history.
//!
//! An apiserver pages through a list at one revision for as long as the list takes, and asks for the count with every
//! page; most of what happens meanwhile are updates, which change no count and stand not here. Entries are appended to
//! blocks that all versions share; a version is how many of them it may see. The oldest block is let go when there are
//! too many.
//!
//! What it does not do: it is not stored, and it begins anew at open; what it does not reach `count.rs` reads from `rev`.

use std::sync::{Arc, OnceLock};

/// Entries of a block, and blocks that are kept: 3 MB at most. In this crate's tests they are soon too many.
const BLOCK: usize = if cfg!(test) { 8 } else { 1_024 };
const MAX_BLOCKS: usize = if cfg!(test) { 4 } else { 32 };

/// A key came to life at a revision (1), or went (-1).
#[derive(Debug)]
pub(super) struct Gain {
    revision: i64,
    pub(super) key: Box<[u8]>,
    pub(super) gain: i64,
}

/// The gains that one version may see, in the order of their revisions.
#[derive(Clone, Debug)]
pub(super) struct Gains {
    blocks: Arc<Vec<Arc<[OnceLock<Gain>]>>>,
    len: usize,
    /// Every gain of a later revision is here.
    complete_after: i64,
}

impl Gains {
    /// None yet, of a store that is at `revision`.
    pub(super) fn new(revision: i64) -> Gains {
        Gains { blocks: Arc::default(), len: 0, complete_after: revision }
    }

    pub(super) fn push(&mut self, revision: i64, key: &[u8], gain: i64) {
        if self.len == self.blocks.len() * BLOCK {
            let blocks = Arc::make_mut(&mut self.blocks);
            if blocks.len() == MAX_BLOCKS {
                let oldest = blocks.remove(0);
                self.complete_after = oldest[BLOCK - 1].get().map_or(revision, |gain| gain.revision);
                self.len -= BLOCK;
            }
            blocks.push((0..BLOCK).map(|_| OnceLock::new()).collect());
        }
        // The one writer appends once at each place; no version that was cloned before looks so far.
        let _ = self.blocks[self.len / BLOCK][self.len % BLOCK].set(Gain { revision, key: key.into(), gain });
        self.len += 1;
    }

    /// The gains after revision `at`, and how many; `None` if some of them are no longer here.
    pub(super) fn since(&self, at: i64) -> Option<impl ExactSizeIterator<Item = &Gain>> {
        if at < self.complete_after {
            return None;
        }
        let (mut first, mut end) = (0, self.len);
        while first < end {
            let middle = first.midpoint(end);
            if self.get(middle).revision <= at { first = middle + 1 } else { end = middle }
        }
        Some((first..self.len).map(|place| self.get(place)))
    }

    fn get(&self, place: usize) -> &Gain {
        self.blocks[place / BLOCK][place % BLOCK].get().expect("a version sees only what was appended before it")
    }
}

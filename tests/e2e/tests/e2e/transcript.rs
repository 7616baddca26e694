//! What etcdctl prints, text for text: the same commands against ours and against etcd, the newest etcdctl and Debian's old one.
//!
//! A transcript is every command with its output, its errors and its exit status. What differs from server to server is
//! masked by `tests/e2e/masks.txt`, which says why. The same is done with two etcds, so that a mask that is missing is not
//! taken for a fault of ours, nor a fault for a difference that etcd has with itself. Each story is told to a cluster of its own,
//! so that its revisions are known; `coverage` holds that no command and no flag of either etcdctl is left out unless
//! `tests/e2e/etcdctl-left-out.txt` says why.
//!
//! It does not say what is right: etcd does.

mod cluster;
mod coverage;
mod globals;
mod keys;
mod leases;
mod mask;
mod mirrors;
mod ranges;
mod recipes;
mod recorder;
mod transactions;
mod watches;

use e2e::Kind;
use e2e::peers::{self, Program};

use recorder::Recorder;

/// A sequence of commands, told to one member that is started with these flags beside the usual.
struct Story {
    name: &'static str,
    flags: &'static [&'static str],
    tell: fn(&mut Recorder),
}

const KEYS: Story = Story { name: "keys", flags: &[], tell: keys::tell };
const RANGES: Story = Story { name: "ranges", flags: &[], tell: ranges::tell };
const TRANSACTIONS: Story = Story { name: "transactions", flags: &["--max-txn-ops=4"], tell: transactions::tell };
const WATCHES: Story = Story { name: "watches", flags: &["--watch-progress-notify-interval=1s"], tell: watches::tell };
const LEASES: Story = Story { name: "leases", flags: &[], tell: leases::tell };
const LOCKS: Story = Story { name: "locks", flags: &[], tell: recipes::locks };
const ELECTIONS: Story = Story { name: "elections", flags: &[], tell: recipes::elections };
const MIRRORS: Story = Story { name: "mirrors", flags: &[], tell: mirrors::tell };
const CLUSTER: Story = Story { name: "cluster", flags: &[], tell: cluster::tell };
const NO_SPACE: Story = Story { name: "no space", flags: &["--quota-backend-bytes=8388608"], tell: cluster::no_space };
const CHECKS: Story = Story { name: "checks", flags: &[], tell: cluster::checks };
const GLOBALS: Story = Story { name: "globals", flags: &[], tell: globals::tell };

/// What `coverage` asks of; each of them has a body below.
const STORIES: &[Story] =
    &[KEYS, RANGES, TRANSACTIONS, WATCHES, LEASES, LOCKS, ELECTIONS, MIRRORS, CLUSTER, NO_SPACE, CHECKS, GLOBALS];

/// Each story a test of its own on both stores.
macro_rules! bodies {
    ($($body:ident = $story:expr),* $(,)?) => {
        on_both!($($body),*);
        $(fn $body(kind: Kind) {
            compare(kind, &$story);
        })*
    };
}

bodies!(
    story_of_keys = KEYS,
    story_of_ranges = RANGES,
    story_of_transactions = TRANSACTIONS,
    story_of_watches = WATCHES,
    story_of_leases = LEASES,
    story_of_locks = LOCKS,
    story_of_elections = ELECTIONS,
    story_of_mirrors = MIRRORS,
    story_of_the_cluster = CLUSTER,
    story_of_no_space = NO_SPACE,
    story_of_checks = CHECKS,
    story_of_global_flags = GLOBALS,
);

/// Tells the story to `kind` and to etcd at the same time, by each etcdctl in turn.
fn compare(kind: Kind, story: &Story) {
    let (Some(new), Some(old)) = (peers::need(Program::Etcdctl), peers::need(Program::Etcdctl34)) else { return };
    if peers::need(Program::Etcd).is_none() {
        return;
    }
    for (client, program, is_new) in [("3.7", new, true), ("3.4", old, false)] {
        let record = |kind| recorder::tell(story, kind, &program, is_new);
        let (got, want) = std::thread::scope(|scope| {
            let other = scope.spawn(|| record(Kind::Etcd));
            let got = record(kind);
            (got, other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let (got, want) = (mask::apply(&got), mask::apply(&want));
        assert!(
            got == want,
            "etcdctl {client}, story of {}: the transcripts differ (- etcd, + {kind:?}):\n{}",
            story.name,
            mask::differences(&want, &got)
        );
    }
}

//! Which watchers watch this key: exact keys by a map, ranges by an interval tree.
//!
//! Equal ranges share a node. The tree is a treap whose priorities are a hash of the range, so its shape is a function of its
//! content and needs no randomness; each node knows the largest end below it, so a lookup visits only subtrees that can hold
//! a match: `O(log n + found)` for ranges that nest or lie apart, as prefixes do.
//!
//! What this module does not do: it knows no revision and no stream; it maps keys to numbers.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A watcher in the hub; never used twice.
pub(super) type WatcherKey = u64;

/// Where a range ends.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum End {
    Before(Arc<[u8]>),
    Never,
}

/// What a watcher watches. The bytes are its own, shared with the index: those of a request would keep all that came with it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Span {
    Key(Arc<[u8]>),
    Range(Arc<[u8]>, End),
}

impl Span {
    /// What a request watches; `None` if no key lies in it. An empty key is the smallest one; an end of one zero byte is no end.
    pub(super) fn of_request(key: &[u8], range_end: &[u8]) -> Option<Span> {
        let key = if key.is_empty() { b"\0" } else { key };
        match range_end {
            [] => Some(Span::Key(key.into())),
            [0] => Some(Span::Range(key.into(), End::Never)),
            end if end <= key => None,
            end => Some(Span::Range(key.into(), End::Before(end.into()))),
        }
    }

    pub(super) fn contains(&self, key: &[u8]) -> bool {
        match self {
            Span::Key(only) => **only == *key,
            Span::Range(start, end) => **start <= *key && end.is_after(key),
        }
    }
}

impl End {
    fn is_after(&self, key: &[u8]) -> bool {
        match self {
            End::Before(end) => **end > *key,
            End::Never => true,
        }
    }
}

/// The synced watchers by what they watch.
#[derive(Default, Debug)]
pub(super) struct Ranges {
    keys: BTreeMap<Arc<[u8]>, Holders>,
    tree: Tree,
}

/// Who watches one key or range: mostly one.
#[derive(Debug)]
enum Holders {
    One(WatcherKey),
    Many(BTreeSet<WatcherKey>),
}

impl Holders {
    fn insert(&mut self, watcher: WatcherKey) {
        match self {
            Holders::One(only) if *only == watcher => {}
            Holders::One(only) => *self = Holders::Many(BTreeSet::from([*only, watcher])),
            Holders::Many(watchers) => {
                watchers.insert(watcher);
            }
        }
    }

    /// True if nobody is left.
    fn remove(&mut self, watcher: WatcherKey) -> bool {
        match self {
            Holders::One(only) => *only == watcher,
            Holders::Many(watchers) => {
                watchers.remove(&watcher);
                watchers.is_empty()
            }
        }
    }

    fn add_to(&self, found: &mut Vec<WatcherKey>) {
        match self {
            Holders::One(only) => found.push(*only),
            Holders::Many(watchers) => found.extend(watchers),
        }
    }
}

impl Ranges {
    pub(super) fn insert(&mut self, span: &Span, watcher: WatcherKey) {
        match span {
            Span::Key(key) => match self.keys.get_mut(key) {
                Some(holders) => holders.insert(watcher),
                None => {
                    self.keys.insert(Arc::clone(key), Holders::One(watcher));
                }
            },
            Span::Range(start, end) => self.tree.insert(start, end, watcher),
        }
    }

    pub(super) fn remove(&mut self, span: &Span, watcher: WatcherKey) {
        match span {
            Span::Key(key) => {
                if let Entry::Occupied(mut entry) = self.keys.entry(Arc::clone(key))
                    && entry.get_mut().remove(watcher)
                {
                    entry.remove();
                }
            }
            Span::Range(start, end) => self.tree.remove(start, end, watcher),
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Ranges::default();
    }

    /// Adds everyone who watches `key` to `found`.
    pub(super) fn find(&self, key: &[u8], found: &mut Vec<WatcherKey>) {
        if let Some(exact) = self.keys.get(key) {
            exact.add_to(found);
        }
        self.tree.find(self.tree.root, key, found);
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.tree.root.is_none()
    }
}

type Link = Option<usize>;

#[derive(Default, Debug)]
struct Tree {
    nodes: Vec<Node>,
    free: Vec<usize>,
    root: Link,
}

#[derive(Debug)]
struct Node {
    start: Arc<[u8]>,
    end: End,
    /// The largest end in this subtree.
    last_end: End,
    priority: u64,
    left: Link,
    right: Link,
    holders: Holders,
}

impl Tree {
    fn find(&self, link: Link, key: &[u8], found: &mut Vec<WatcherKey>) {
        let Some(at) = link else { return };
        let node = &self.nodes[at];
        if !node.last_end.is_after(key) {
            return;
        }
        self.find(node.left, key, found);
        if *node.start <= *key {
            if node.end.is_after(key) {
                node.holders.add_to(found);
            }
            self.find(node.right, key, found);
        }
    }

    fn insert(&mut self, start: &Arc<[u8]>, end: &End, watcher: WatcherKey) {
        if let Some(at) = self.at(start, end) {
            self.nodes[at].holders.insert(watcher);
            return;
        }
        let node = Node {
            start: start.clone(),
            end: end.clone(),
            last_end: end.clone(),
            priority: priority(start, end),
            left: None,
            right: None,
            holders: Holders::One(watcher),
        };
        let new = match self.free.pop() {
            Some(at) => {
                self.nodes[at] = node;
                at
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        };
        let (left, right) = self.split(self.root, start, end);
        let left = self.merge(left, Some(new));
        self.root = self.merge(left, right);
    }

    fn remove(&mut self, start: &Arc<[u8]>, end: &End, watcher: WatcherKey) {
        let Some(at) = self.at(start, end) else { return };
        if self.nodes[at].holders.remove(watcher) {
            self.root = self.without(self.root, start, end);
            self.free.push(at);
            // Lets the range's bytes go; the slot waits for the next insert.
            self.nodes[at].start = Arc::default();
            self.nodes[at].end = End::Never;
            self.nodes[at].last_end = End::Never;
        }
    }

    fn at(&self, start: &Arc<[u8]>, end: &End) -> Link {
        let mut link = self.root;
        while let Some(at) = link {
            let node = &self.nodes[at];
            link = match (start, end).cmp(&(&node.start, &node.end)) {
                std::cmp::Ordering::Equal => return Some(at),
                std::cmp::Ordering::Less => node.left,
                std::cmp::Ordering::Greater => node.right,
            };
        }
        None
    }

    /// The subtree without the node of exactly this range, which is in it.
    fn without(&mut self, link: Link, start: &Arc<[u8]>, end: &End) -> Link {
        let at = link?;
        let (left, right) = (self.nodes[at].left, self.nodes[at].right);
        match (start, end).cmp(&(&self.nodes[at].start, &self.nodes[at].end)) {
            std::cmp::Ordering::Equal => return self.merge(left, right),
            std::cmp::Ordering::Less => self.nodes[at].left = self.without(left, start, end),
            std::cmp::Ordering::Greater => self.nodes[at].right = self.without(right, start, end),
        }
        self.update(at);
        Some(at)
    }

    /// The subtree's ranges before the given one, and the others.
    fn split(&mut self, link: Link, start: &Arc<[u8]>, end: &End) -> (Link, Link) {
        let Some(at) = link else { return (None, None) };
        if (&self.nodes[at].start, &self.nodes[at].end) < (start, end) {
            let (left, right) = self.split(self.nodes[at].right, start, end);
            self.nodes[at].right = left;
            self.update(at);
            (Some(at), right)
        } else {
            let (left, right) = self.split(self.nodes[at].left, start, end);
            self.nodes[at].left = right;
            self.update(at);
            (left, Some(at))
        }
    }

    /// One subtree of two, of which all of `left` comes before all of `right`.
    fn merge(&mut self, left: Link, right: Link) -> Link {
        let (Some(l), Some(r)) = (left, right) else { return left.or(right) };
        if self.nodes[l].priority >= self.nodes[r].priority {
            self.nodes[l].right = self.merge(self.nodes[l].right, right);
            self.update(l);
            Some(l)
        } else {
            self.nodes[r].left = self.merge(left, self.nodes[r].left);
            self.update(r);
            Some(r)
        }
    }

    fn update(&mut self, at: usize) {
        let node = &self.nodes[at];
        let below = [node.left, node.right].into_iter().flatten().map(|child| &self.nodes[child].last_end).max();
        let last_end = below.map_or(&node.end, |below| below.max(&node.end)).clone();
        self.nodes[at].last_end = last_end;
    }
}

/// FNV-1a with a final mix: spread evenly is all it has to be, and the same everywhere.
fn priority(start: &Arc<[u8]>, end: &End) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    start.iter().copied().for_each(&mut add);
    match end {
        End::Before(end) => end.iter().copied().for_each(&mut add),
        End::Never => add(0xff),
    }
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    fn depth(tree: &Tree, link: Link) -> usize {
        link.map_or(0, |at| 1 + depth(tree, tree.nodes[at].left).max(depth(tree, tree.nodes[at].right)))
    }

    fn prefix(text: String) -> Span {
        let mut end = text.clone().into_bytes();
        *end.last_mut().unwrap() += 1;
        Span::Range(text.as_bytes().into(), End::Before(end.into()))
    }

    /// Ten thousand watchers must not mean ten thousand comparisons an event.
    #[test]
    fn ten_thousand_prefixes_in_order_make_a_shallow_tree() {
        let mut ranges = Ranges::default();
        for n in 0..10_000_u64 {
            ranges.insert(&prefix(format!("/registry/pods/ns-{n:05}/")), n);
        }
        assert!(depth(&ranges.tree, ranges.tree.root) < 45, "{}", depth(&ranges.tree, ranges.tree.root));
        let mut found = Vec::new();
        ranges.find(b"/registry/pods/ns-04711/web", &mut found);
        assert_eq!(found, [4711]);
        for n in 0..10_000_u64 {
            ranges.remove(&prefix(format!("/registry/pods/ns-{n:05}/")), n);
        }
        assert!(ranges.is_empty());
    }

    fn span() -> impl Strategy<Value = Span> {
        let key = prop::collection::vec(0..4_u8, 0..3).prop_map(Arc::<[u8]>::from);
        (key.clone(), key, 0..3_u8).prop_map(|(a, b, kind)| match kind {
            0 => Span::Key(a),
            1 => Span::Range(a, End::Never),
            _ => Span::Range(a.clone().min(b.clone()), End::Before(a.max(b))),
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            rng_seed: RngSeed::Fixed(7),
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn finds_what_a_list_would(steps in prop::collection::vec((span(), any::<bool>()), 1..120)) {
            let mut ranges = Ranges::default();
            let mut list: Vec<(Span, WatcherKey)> = Vec::new();
            for (at, (span, add)) in steps.into_iter().enumerate() {
                if add || list.is_empty() {
                    ranges.insert(&span, at as WatcherKey);
                    list.push((span, at as WatcherKey));
                } else {
                    let (span, watcher) = list.swap_remove(at % list.len());
                    ranges.remove(&span, watcher);
                }
                for key in [&b""[..], b"\0", b"\x01", b"\x01\x02", b"\x02", b"\x03\x03"] {
                    let mut found = Vec::new();
                    ranges.find(key, &mut found);
                    found.sort_unstable();
                    let mut expected: Vec<WatcherKey> =
                        list.iter().filter(|(span, _)| span.contains(key)).map(|(_, watcher)| *watcher).collect();
                    expected.sort_unstable();
                    prop_assert_eq!(found, expected);
                }
            }
            for (span, watcher) in list {
                ranges.remove(&span, watcher);
            }
            prop_assert!(ranges.is_empty());
        }
    }
}

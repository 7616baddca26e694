//! What `key` and `range_end` of a request mean (contract 2.6.2).

use std::ops::Bound;

use crate::backend;

/// The keys that a request is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Span<'a> {
    Point(&'a [u8]),
    /// From the first key up to but without the second.
    Keys(&'a [u8], &'a [u8]),
    /// From the key to the end.
    From(&'a [u8]),
}

impl<'a> Span<'a> {
    pub(crate) fn new(key: &'a [u8], range_end: &'a [u8]) -> Self {
        match range_end {
            [] => Span::Point(key),
            [0] => Span::From(key),
            _ => Span::Keys(key, range_end),
        }
    }

    pub(crate) fn bounds(self) -> backend::Range<'a> {
        match self {
            Span::Point(key) => (Bound::Included(key), Bound::Included(key)),
            Span::Keys(key, end) => (Bound::Included(key), Bound::Excluded(end)),
            Span::From(key) => (Bound::Included(key), Bound::Unbounded),
        }
    }
}

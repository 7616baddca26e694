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

    pub(crate) fn contains(self, key: &[u8]) -> bool {
        match self {
            Span::Point(point) => key == point,
            Span::Keys(first, end) => first <= key && key < end,
            Span::From(first) => first <= key,
        }
    }

    /// The keys of the span from `start` on, which is in it or after it.
    pub(crate) fn starting(self, start: &'a [u8]) -> Span<'a> {
        match self {
            Span::Point(_) => Span::Keys(start, start),
            Span::Keys(_, end) => Span::Keys(start, end),
            Span::From(_) => Span::From(start),
        }
    }
}

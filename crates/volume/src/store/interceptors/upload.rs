//! What the interceptors of uploads have in common: which request it is, and its body as one piece.

use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::primitives::{AggregatedBytes, ByteStream, SdkBody};
use futures::FutureExt;

/// Whether the query of a request's URI has a parameter of this name.
pub(crate) fn has_parameter(uri: &str, name: &str) -> bool {
    let query = uri.split_once('?').map_or("", |(_, query)| query);
    query.split('&').any(|pair| pair.split('=').next() == Some(name))
}

/// The bytes of a body. The bodies of a volume are streams only in that they are pieces of memory.
///
/// # Errors
/// `not_in_memory` for a body that is not; what reading it fails with.
pub(crate) fn pieces(body: SdkBody, not_in_memory: &'static str) -> Result<AggregatedBytes, BoxError> {
    let pieces = ByteStream::new(body).collect().now_or_never();
    Ok(pieces.ok_or(not_in_memory)??)
}

/// Makes a body one piece of memory.
///
/// # Errors
/// As [`pieces`].
pub(crate) fn in_one_piece(body: &mut SdkBody, not_in_memory: &'static str) -> Result<(), BoxError> {
    if body.bytes().is_some() {
        return Ok(());
    }
    let whole = pieces(std::mem::replace(body, SdkBody::taken()), not_in_memory)?;
    *body = SdkBody::from(whole.into_bytes());
    Ok(())
}

//! What can go wrong between a volume and its store.

use std::error::Error;
use std::fmt;

/// The class of a [`StoreError`]: what a caller may decide by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// No such object, bucket or directory.
    NotFound,
    /// The credentials are missing, wrong, expired, or not allowed to do this.
    AccessDenied,
    /// A conditional write was refused: somebody else wrote the object.
    PreconditionFailed,
    /// No answer, a cut-off answer, or a store that is overloaded or failing (429, 5xx): worth trying again. Whether
    /// a write that ended so was carried out is not known.
    Unreachable,
    /// What came back is not what was written.
    Corrupt,
    /// The store does not take a request of this form: a header, a checksum or a condition that it does not know. A
    /// setting decides, not chance and not the data.
    Refused,
    /// Anything else.
    Other,
}

/// A failed operation on the store. Its `Display` is one complete sentence: what was tried, on what, what came of it
/// and, where somebody can do something about it, what.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {target}: {detail}")]
pub struct StoreError {
    /// What was tried, as a verb: `read`, `list`, `connect to`.
    pub operation: &'static str,
    /// The object, prefix or directory: `s3://bucket/key`, `file:///path (key)`.
    pub target: String,
    /// The class of the failure.
    pub kind: StoreErrorKind,
    /// What happened, and what to do.
    pub detail: String,
    /// The error below. Not its `source()`, because `detail` already tells what it says.
    pub cause: Option<Box<dyn Error + Send + Sync>>,
}

impl StoreError {
    /// An error that does not come from the SDK.
    pub(crate) fn new(
        operation: &'static str,
        target: impl fmt::Display,
        kind: StoreErrorKind,
        detail: impl Into<String>,
    ) -> Self {
        Self {
            operation,
            target: target.to_string(),
            kind,
            detail: detail.into(),
            cause: None,
        }
    }
}

//! The errors between a volume and its store.

use std::error::Error;
use std::fmt;

/// The class of a [`StoreError`]. Callers may base decisions on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// No such object, bucket or directory.
    NotFound,
    /// The store says that these credentials may not do this. Waiting does not change that.
    AccessDenied,
    /// The credentials are missing, wrong or expired, or the clock is. Others may be there a moment later.
    Unauthenticated,
    /// A conditional write was refused: somebody else wrote the object.
    PreconditionFailed,
    /// There was no answer, or it was cut off, or the store is overloaded or failing (429, 5xx). A retry may succeed.
    /// It is not known whether a write that ended so was carried out.
    Unreachable,
    /// The returned bytes are not those that were written.
    Corrupt,
    /// The store does not accept requests of this form: it does not know a header, a checksum or a condition. The cause
    /// is its configuration and not chance or the data.
    Refused,
    /// Anything else.
    Other,
}

/// A failed operation on the store. Its `Display` is one complete sentence: what was tried, on which object, what
/// happened, and what to do if there is anything to do.
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
    /// The underlying error. It is not the `source()`, because `detail` already says the same.
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

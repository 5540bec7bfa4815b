//! What the store is asked for: requests as they go over the line, repeats and all, since each is paid for.

use std::time::Duration;

use super::count::{Count, Durations};
use crate::base::prices;

/// Operations of S3 that are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// `GetObject`
    Get,
    /// `HeadObject`
    Head,
    /// `PutObject`
    Put,
    /// `CopyObject` and `UploadPartCopy`
    Copy,
    /// `UploadPart`
    Part,
    /// The other steps of an upload in parts.
    Multipart,
    /// `ListObjectsV2` and `ListMultipartUploads`
    List,
    /// `DeleteObject` and `DeleteObjects`
    Delete,
    /// Anything else.
    Other,
}

impl Operation {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 9] = [
        Self::Get,
        Self::Head,
        Self::Put,
        Self::Copy,
        Self::Part,
        Self::Multipart,
        Self::List,
        Self::Delete,
        Self::Other,
    ];

    /// By its name in S3's own interface.
    pub fn of_name(name: &str) -> Self {
        match name {
            "GetObject" => Self::Get,
            "HeadObject" => Self::Head,
            "PutObject" => Self::Put,
            "CopyObject" | "UploadPartCopy" => Self::Copy,
            "UploadPart" => Self::Part,
            "CreateMultipartUpload" | "CompleteMultipartUpload" | "AbortMultipartUpload" => Self::Multipart,
            "ListObjectsV2" | "ListMultipartUploads" | "ListObjectVersions" => Self::List,
            "DeleteObject" | "DeleteObjects" => Self::Delete,
            _ => Self::Other,
        }
    }

    /// Its name where it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Head => "head",
            Self::Put => "put",
            Self::Copy => "copy",
            Self::Part => "part",
            Self::Multipart => "multipart",
            Self::List => "list",
            Self::Delete => "delete",
            Self::Other => "other",
        }
    }

    /// What one request costs at AWS, in billionths of a US dollar.
    fn price_nanodollars(self) -> u64 {
        match self {
            Self::Put | Self::Copy | Self::Part | Self::Multipart | Self::List => prices::WRITE_NANODOLLARS,
            Self::Get | Self::Head | Self::Other => prices::READ_NANODOLLARS,
            Self::Delete => prices::DELETE_NANODOLLARS,
        }
    }
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No answer, or none in time.
    Unreachable,
    /// The store asks for fewer requests (429, 503).
    Throttled,
    /// The store failed (other 5xx).
    Server,
    /// The store does not permit it (401, 403).
    Denied,
    /// There is no such object (404). Often that is the answer that was hoped for.
    Absent,
    /// A condition did not hold (409, 412). That is how one owner learns of another.
    Condition,
    /// Anything else.
    Other,
}

impl Failure {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 7] = [
        Self::Unreachable,
        Self::Throttled,
        Self::Server,
        Self::Denied,
        Self::Absent,
        Self::Condition,
        Self::Other,
    ];

    /// By the status of the answer; `None` when there was none.
    pub fn of_status(status: Option<u16>) -> Self {
        match status {
            None => Self::Unreachable,
            Some(429 | 503) => Self::Throttled,
            Some(500..) => Self::Server,
            Some(401 | 403) => Self::Denied,
            Some(404) => Self::Absent,
            Some(409 | 412) => Self::Condition,
            Some(_) => Self::Other,
        }
    }

    /// Its name where it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Throttled => "throttled",
            Self::Server => "server",
            Self::Denied => "denied",
            Self::Absent => "absent",
            Self::Condition => "condition",
            Self::Other => "other",
        }
    }
}

/// Requests of one operation.
#[derive(Debug, Default)]
pub struct OfOperation {
    /// From the sending of each to the head of its answer, or to its failure.
    pub durations: Durations,
    failures: [Count; Failure::ALL.len()],
}

impl OfOperation {
    /// How many failed in this way.
    pub fn failures(&self, failure: Failure) -> u64 {
        self.failures[failure as usize].get()
    }
}

/// Requests of all operations.
#[derive(Debug, Default)]
pub struct StoreRequests {
    of: [OfOperation; Operation::ALL.len()],
    /// Bytes of the bodies that were sent.
    pub sent_bytes: Count,
    /// Bytes of the bodies of answers, as their heads announce them.
    pub received_bytes: Count,
}

impl StoreRequests {
    /// Those of one operation.
    pub fn of(&self, operation: Operation) -> &OfOperation {
        &self.of[operation as usize]
    }

    /// A request was answered, or failed, after `took`.
    pub fn ended(&self, operation: Operation, took: Duration, failure: Option<Failure>) {
        let of = self.of(operation);
        of.durations.observe(took);
        if let Some(failure) = failure {
            of.failures[failure as usize].one();
        }
    }

    /// About what all requests so far cost at AWS, in US dollars.
    pub fn cost_dollars(&self) -> f64 {
        let nanodollars = Operation::ALL.map(|operation| {
            let count = self.of(operation).durations.distribution().count();
            count.saturating_mul(operation.price_nanodollars())
        });
        nanodollars.into_iter().fold(0, u64::saturating_add) as f64 / 1e9
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_paid_for_by_their_class() {
        let requests = StoreRequests::default();
        let took = Duration::from_millis(3);
        for name in ["PutObject", "UploadPart", "ListObjectsV2"] {
            requests.ended(Operation::of_name(name), took, None);
        }
        requests.ended(Operation::of_name("DeleteObjects"), took, None);
        requests.ended(Operation::Get, took, Some(Failure::of_status(Some(404))));
        assert!((requests.cost_dollars() - 0.000_015_4).abs() < 1e-12);
        assert_eq!(requests.of(Operation::Get).failures(Failure::Absent), 1);
        assert_eq!(requests.of(Operation::Put).failures(Failure::Absent), 0);
    }

    #[test]
    fn failures_are_told_by_their_status() {
        for (status, failure) in [
            (None, Failure::Unreachable),
            (Some(503), Failure::Throttled),
            (Some(429), Failure::Throttled),
            (Some(500), Failure::Server),
            (Some(403), Failure::Denied),
            (Some(412), Failure::Condition),
            (Some(400), Failure::Other),
        ] {
            assert_eq!(Failure::of_status(status), failure, "{status:?}");
        }
    }
}

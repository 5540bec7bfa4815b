//! What is done to every request of an S3 client on its way, and to its answer.
//!
//! * [`checksums`]: gives uploads the checksums that S3 checks.
//! * [`window_checksums`]: gives every object checksums of our own, and checks them in answers.
//! * [`sums`]: gives those that are uploaded in parts theirs, beside them.
//! * [`signing`], [`sse`]: whether bodies are signed, and which encryption is asked for.
//! * [`upload_limiter`]: how many pieces of uploads are on the line at once.
//! * [`answer_time`]: how long a request may be answered nothing.
//! * [`foreign`]: takes answers that are not the store's for none.
//! * [`count_requests`]: counts requests as they go over the line.
//! * [`upload`]: what the interceptors of uploads have in common.

pub(crate) mod answer_time;
pub(crate) mod checksums;
pub(crate) mod count_requests;
pub(crate) mod foreign;
pub(crate) mod signing;
pub(crate) mod sse;
pub(crate) mod sums;
mod upload;
pub(crate) mod upload_limiter;
pub(crate) mod window_checksums;

//! What the benchmark's two programs share: the model of a network line, the count of S3 requests and the summary
//! of latencies. All are pure: bytes and time come in as arguments, so that they are tested without waiting.

#![deny(unsafe_code)]

pub mod http;
pub mod latency;
pub mod line;

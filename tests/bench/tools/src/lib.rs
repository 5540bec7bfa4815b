//! What the benchmark's two programs share: the model of a network line and the summary of latencies. Both are
//! pure: time comes in as an argument, so that they are tested without waiting.

#![deny(unsafe_code)]

pub mod latency;
pub mod line;

//! A read/write block volume kept on S3 in the Hyperfile format.
#![deny(unsafe_code)]

pub mod durability;
pub mod options;
pub mod units;
pub mod url;

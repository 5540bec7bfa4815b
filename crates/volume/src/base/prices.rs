//! What AWS asks for, in one table: S3 Standard in us-east-1, as <https://aws.amazon.com/s3/pricing/> had it in 2025. Traffic out of AWS
//! comes on top. All that is said of costs is estimated by these prices.

/// Storage of a GB (10^9 bytes) for a month, in US dollars: the first 50 TB.
pub const STORED_GB_MONTH_DOLLARS: f64 = 0.023;
/// A request that writes, copies or lists, in billionths of a US dollar.
pub const WRITE_NANODOLLARS: u64 = 5_000;
/// A request that reads, in billionths of a US dollar.
pub const READ_NANODOLLARS: u64 = 400;
/// A request that deletes, in billionths of a US dollar.
pub const DELETE_NANODOLLARS: u64 = 0;

/// About what the storage of some bytes costs a month, at a price for each GB (10^9 bytes), in that price's currency.
pub fn cost_a_month(stored_bytes: u64, gb_month: f64) -> f64 {
    stored_bytes as f64 / 1e9 * gb_month
}

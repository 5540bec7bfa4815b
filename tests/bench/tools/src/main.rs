//! Tools of the benchmarks.
fn main() {}

//! `hypernbd`: the command line for the life of a volume.
fn main() {}

//! Images in files: which format one has, and those that QEMU's programs read and write for us.

pub mod format;
pub mod qemu;

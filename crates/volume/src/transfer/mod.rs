//! Data moved in and out of volumes: images in files, on devices and in pipes.
//!
//! Both ways are one: [`copy()`] takes an [`Image`] or a pipe to another, in parallel, without what reads as zeros, and tells the
//! checksum of what it read. A volume is an image like any other ([`VolumeImage`]), and a copy to nowhere is a verification.
//! [`import()`] and [`export()`] are what that takes of a volume around it. Nothing here knows how an image is encoded, nor of a
//! terminal.
//!
//! All of it blocks the calling thread, which must be none of the runtime's.

mod begin;
mod checksum;
mod copy;
mod error;
mod export;
mod image;
mod import;
mod new_file;
mod pace;
mod pipe;
mod plan;
mod raw;
#[cfg(test)]
mod tests;
mod volume_image;

pub use crate::base::control::{Control, Phase};
pub use crate::meta::import_record::{FileId, ImportRecord};
pub use checksum::{CHECKSUM_NAME, PIECE_BYTES};
pub use copy::{Copied, Copy, Source, Target, copy};
pub use error::TransferError;
pub use export::{Exported, Opened, export, open_for_export, verify};
pub use image::{Image, Port, Run};
pub use import::{Imported, Input, Request, import};
pub use new_file::NewFile;
pub use pace::Pace;
pub use pipe::PipeReader;
pub use raw::RawImage;
pub use volume_image::VolumeImage;

/// The smallest unit of a block device, in bytes.
pub const SECTOR_BYTES: u64 = 512;

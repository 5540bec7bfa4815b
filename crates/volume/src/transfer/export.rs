//! An export: one state of a volume, to an image or a pipe.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Control, Copy, Image, Pace, Phase, Source, Target, TransferError, VolumeImage, copy};
use crate::base::error::VolumeError;
use crate::base::units::MIB;
use crate::base::url::VolumeUrl;
use crate::engine::parents;
use crate::format::inode;
use crate::meta::import_record::ImportRecord;
use crate::meta::wal_marker;
use crate::options::{StoreOptions, VolumeOptions};
use crate::past::{self, At};
use crate::read::cache_config::ReadCacheConfig;
use crate::store::Store;
use crate::volume::Volume;

/// Parts that are read at once: 64 MiB, what a line of 10 Gbit/s carries in 50 ms.
const READS_AT_ONCE: usize = 16;
/// Memory for data that was read for more than was asked for, in bytes: read-ahead takes a share of it.
const CACHE_BYTES: u64 = 128 * MIB;
/// Memory for the index, in bytes.
const INDEX_BYTES: u64 = 32 * MIB;
/// The unit of zeros in files: that of nearly all file systems.
const ZERO_UNIT_BYTES: u64 = 4096;
/// How long the reading side may take to close.
const CLOSE_MAX: Duration = Duration::from_secs(5);

/// How a state is opened that is read from its start to its end.
fn read_options() -> VolumeOptions {
    VolumeOptions {
        read_only: true,
        index_memory_bytes: INDEX_BYTES,
        read_cache: ReadCacheConfig {
            memory_bytes: CACHE_BYTES,
            disk: None,
        },
        ..VolumeOptions::default()
    }
}

/// A state of a volume, open to be read.
pub struct Opened {
    /// It.
    pub volume: Arc<Volume>,
    /// The number of its checkpoint; `None` for a volume that nothing was ever written to.
    pub checkpoint: Option<u64>,
}

impl Drop for Opened {
    /// Whoever waits for what is read to be removed need not wait longer.
    fn drop(&mut self) {
        // It changes nothing, so there is nothing that could be lost.
        let _ = self.volume.close(CLOSE_MAX);
    }
}

/// Opens the state of a volume that `at` means, or the newest published. Takes no lease: a server may go on beside it.
///
/// # Errors
/// When there is no volume, or no such checkpoint.
pub async fn open_for_export(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    at: Option<&At>,
) -> Result<Opened, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    if let Some(import) = ImportRecord::load(&store).await? {
        log::warn!(
            "an import of {} into {url} was not finished: what is read may be half of it",
            import.source_name()
        );
    }
    // A checkpoint that is named is what it is.
    if at.is_none() {
        wal_marker::warn_if_unpublished(&store, "exported").await;
    }
    open_state(&store, store_options, at).await
}

/// As [`open_for_export`], without a look at what else goes on.
pub(super) async fn open_state(
    store: &Store,
    store_options: &StoreOptions,
    at: Option<&At>,
) -> Result<Opened, VolumeError> {
    if at.is_none() && inode::load(store).await?.0.i_last_cno == 0 {
        return Ok(Opened {
            volume: Volume::open(&store.url, store_options, &read_options()).await?,
            checkpoint: None,
        });
    }
    let point = past::find(store, at).await?;
    Ok(Opened {
        volume: Volume::open_point(store, &point, &read_options()).await?,
        checkpoint: Some(point.number()),
    })
}

/// What an export did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Exported {
    /// Size of the volume in bytes.
    pub bytes: u64,
    /// Bytes of it that are data.
    pub data_bytes: u64,
    /// Its checksum.
    pub checksum: String,
    /// Time that it took, in seconds.
    pub seconds: f64,
    /// The number of the checkpoint; none where nothing was ever written.
    pub checkpoint: Option<u64>,
    /// What was written was read again, and is the same.
    pub is_verified: bool,
}

/// Copies a state to `target`, which is large enough. What it wrote is neither durable nor verified.
///
/// # Errors
/// As [`copy()`].
pub fn export(
    opened: &Opened,
    target: Target<'_>,
    pace: Option<&Pace>,
    control: &Control,
) -> Result<Exported, TransferError> {
    let started = Instant::now();
    let image = VolumeImage::new(opened.volume.clone());
    let bytes = image.size_bytes();
    let copied = copy(
        Copy {
            source: Source::Image(&image),
            target,
            size_bytes: bytes,
            written_bytes: 0,
            zero_unit_bytes: ZERO_UNIT_BYTES,
            threads: READS_AT_ONCE,
            pace,
            phase: Phase::Copying,
        },
        control,
    );
    let copied = copied?;
    Ok(Exported {
        bytes,
        data_bytes: copied.data_bytes,
        checksum: copied.checksum,
        seconds: started.elapsed().as_secs_f64(),
        checkpoint: opened.checkpoint,
        is_verified: false,
    })
}

/// Reads the first `size_bytes` of an image, and compares their checksum.
///
/// # Errors
/// [`TransferError::Differs`].
pub fn verify(
    what: &str,
    image: &dyn Image,
    size_bytes: u64,
    expected: &str,
    control: &Control,
) -> Result<(), TransferError> {
    let read = copy(
        Copy {
            source: Source::Image(image),
            target: Target::Nowhere,
            size_bytes,
            written_bytes: 0,
            zero_unit_bytes: ZERO_UNIT_BYTES,
            threads: READS_AT_ONCE,
            pace: None,
            phase: Phase::Verifying,
        },
        control,
    )?;
    match read.checksum == expected {
        true => Ok(()),
        false => Err(TransferError::Differs {
            what: what.to_owned(),
            found: read.checksum,
            expected: expected.to_owned(),
        }),
    }
}

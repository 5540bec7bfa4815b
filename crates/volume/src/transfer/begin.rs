//! What comes before an import: every check, the volume, its lease, and the note beside it.

use std::sync::Arc;

use log::warn;

use super::import::{CLOSE_MAX, Input, Request};
use super::{SECTOR_BYTES, TransferError};
use crate::admin::{self, CreateOptions, DEFAULT_BLOCK_SIZE_BYTES, IfDamaged, VolumeInfo};
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::units::{MIB, format_size};
use crate::engine::parents;
use crate::meta::import_record::{FileId, ImportRecord};
use crate::options::{LeaseOptions, VolumeOptions};
use crate::read::cache_config::ReadCacheConfig;
use crate::store::Store;
use crate::volume::Volume;

/// Memory for data that is read while it is written, in bytes: nothing but the volume's last block.
const CACHE_BYTES: u64 = 16 * MIB;

/// A volume that is written to.
pub(super) struct Written {
    /// Where it is.
    pub store: Store,
    /// It, open.
    pub volume: Arc<Volume>,
    /// The note beside it.
    pub record: ImportRecord,
    /// Nothing was ever written to it.
    pub is_blank: bool,
}

/// Checks everything, makes the volume where there is none, opens it, and leaves the note.
///
/// # Errors
/// When anything is in the way; then nothing is changed, and nothing is left.
pub(super) async fn begin(input: &Input<'_>, request: &Request<'_>) -> Result<Written, TransferError> {
    let found = match admin::info(request.url, request.store_options).await {
        Ok(info) => Some(info),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(e.into()),
    };
    let file_id = input.file.as_ref().map(|(_, id)| id.clone());
    let unwritten = |is_new| ImportRecord {
        source: file_id.clone(),
        written_bytes: 0,
        epoch: 0,
        is_new,
        is_finished: false,
    };
    let (note, is_blank) = match &found {
        None => {
            let size_bytes = new_size(input.size_bytes(), request.size_bytes)?;
            let options = CreateOptions {
                size_bytes,
                block_size_bytes: request.block_size_bytes.unwrap_or(DEFAULT_BLOCK_SIZE_BYTES),
            };
            let note = unwritten(true);
            admin::create_noting(request.url, request.store_options, &options, Some(&note)).await?;
            if request.size_bytes.is_none() && input.size_bytes() != Some(size_bytes) {
                warn!(
                    "the image's size is no multiple of {SECTOR_BYTES}: the volume has {size_bytes} bytes, the last of them zeros"
                );
            }
            (note, true)
        }
        Some(info) => {
            check_fit(info, input.size_bytes(), request)?;
            let taken_up = settle(info, file_id.as_ref(), request)?;
            let note = taken_up.map(|record| ImportRecord {
                source: file_id.clone(),
                is_finished: false,
                ..record
            });
            (note.unwrap_or_else(|| unwritten(false)), false)
        }
    };
    let opened = open(request, note, is_blank).await;
    if opened.is_err() && is_blank {
        // It was made a moment ago.
        let is_empty = |info: &VolumeInfo| info.last_checkpoint == 0;
        if let Err(e) = remove(request, is_empty).await {
            warn!("the volume that was made for the import is left: {}", e.chain());
        }
    }
    Ok(opened?)
}

/// The size of a volume for an image of this size.
fn new_size(image_bytes: Option<u64>, wanted_bytes: Option<u64>) -> Result<u64, TransferError> {
    let refused = |text: String| Err(TransferError::Refused(text));
    match (image_bytes, wanted_bytes) {
        (None, None) => refused(
            "the size of what a pipe will bring is not known: give the volume's, as in --size 10G".to_owned(),
        ),
        (_, Some(0)) => {
            refused("a volume of 0 bytes holds nothing: give a size, as in --size 10G".to_owned())
        }
        (Some(0), None) => refused("the image is empty: give the volume a size, as in --size 10G".to_owned()),
        (Some(image), Some(wanted)) if wanted < image => refused(format!(
            "the image has {} ({image} bytes), which do not fit a volume of {}: give a larger --size, or none",
            format_size(image),
            format_size(wanted)
        )),
        (_, Some(wanted)) => Ok(wanted),
        (Some(image), None) => Ok(image.next_multiple_of(SECTOR_BYTES)),
    }
}

/// Whether the image fits a volume that is there, and what was said of a new one fits it, too.
fn check_fit(
    info: &VolumeInfo,
    image_bytes: Option<u64>,
    request: &Request<'_>,
) -> Result<(), TransferError> {
    let (url, has) = (request.url, info.size_bytes);
    let refused = |text: String| Err(TransferError::Refused(text));
    if let Some(image) = image_bytes.filter(|image| *image > has) {
        return refused(format!(
            "the image has {} ({image} bytes), and the volume {url} only {} ({has} bytes): enlarge it first with hypernbd \
             resize {url} --size {}",
            format_size(image),
            format_size(has),
            image.next_multiple_of(SECTOR_BYTES)
        ));
    }
    if request.size_bytes.is_some_and(|wanted| wanted != has) {
        return refused(format!(
            "the volume {url} is there already, with {} ({has} bytes): leave --size away, or change it with hypernbd resize",
            format_size(has)
        ));
    }
    let block = info.block_size_bytes;
    if request.block_size_bytes.is_some_and(|wanted| wanted != block) {
        return refused(format!(
            "the volume {url} is there already, with blocks of {}, which stay: leave --block-size away",
            format_size(block.into())
        ));
    }
    Ok(())
}

/// Whether a volume that is there may be written to, and what of an earlier import is taken up.
fn settle(
    info: &VolumeInfo,
    file_id: Option<&FileId>,
    request: &Request<'_>,
) -> Result<Option<ImportRecord>, TransferError> {
    let (url, overwrites) = (request.url, request.overwrites);
    let refused = |text: String| Err(TransferError::Refused(text));
    let Some(mut record) = info.import.clone() else {
        return match overwrites {
            true => Ok(None),
            false => refused(format!(
                "there is a volume at {url} already: add --overwrite to replace everything that is in it, or choose another URL"
            )),
        };
    };
    let is_same = record.source.as_ref() == file_id;
    let epoch = info.lease.as_ref().map_or(0, |lease| lease.epoch);
    // Whatever somebody else may have done to it meanwhile must not be taken for the import's, and not be lost without a word.
    let is_undisturbed = epoch == record.epoch;
    if !(is_same && is_undisturbed) {
        record.written_bytes = 0;
        // There may be more in it by now than the import that made it can answer for.
        record.is_new = false;
    }
    if overwrites || record.is_new {
        return Ok(Some(record));
    }
    let name = record.source_name();
    refused(match is_same && !is_undisturbed {
        true => format!(
            "the import of {name} into {url} was not finished, and somebody else had the volume since then: add --overwrite \
             to import all of it anew, or delete the volume"
        ),
        false => format!(
            "an import of {name} into {url} was not finished: run that again as it was, with the file unchanged, or add \
             --overwrite to import this instead, or delete the volume"
        ),
    })
}

/// Opens the volume as a server does, and leaves the note. Its epoch is that of the import that is taken up, if one is.
async fn open(request: &Request<'_>, note: ImportRecord, is_blank: bool) -> Result<Written, VolumeError> {
    let mut options = VolumeOptions {
        lease: request.lease.clone(),
        read_cache: ReadCacheConfig {
            memory_bytes: CACHE_BYTES,
            disk: None,
        },
        ..VolumeOptions::default()
    };
    options.lease.sighting = admin::check_servable(request.url, request.store_options, &options).await?;
    let volume = Volume::open(request.url, request.store_options, &options).await?;
    let noted = async {
        // A clone is read through what it has from its parents, too.
        let store = parents::connect(request.url, request.store_options).await?;
        let found = admin::info(request.url, request.store_options).await?;
        let epoch = found.lease.map_or(0, |lease| lease.epoch);
        let takes_up = note.written_bytes > 0 || (note.is_new && !is_blank);
        // Zeros are not written to a blank one: what somebody wrote since it was made would show in them.
        let is_written = is_blank && found.last_checkpoint > 0;
        if is_written || (takes_up && epoch != note.epoch + 1) {
            return Err(VolumeError::InvalidInput(format!(
                "somebody else had {} a moment ago: look at what is in it now, and run the import again",
                request.url
            )));
        }
        let record = ImportRecord { epoch, ..note };
        record.put(&store).await?;
        Ok((store, record))
    };
    match noted.await {
        Ok((store, record)) => Ok(Written {
            store,
            volume,
            record,
            is_blank,
        }),
        Err(e) => {
            let closed = tokio::task::spawn_blocking(move || volume.close(CLOSE_MAX));
            let _ = closed.await;
            Err(e)
        }
    }
}

/// Deletes the volume that was made for an import, if `is_ours` says that it still is that.
///
/// # Errors
/// As [`admin::delete`].
pub(super) async fn remove(
    request: &Request<'_>,
    is_ours: impl FnOnce(&VolumeInfo) -> bool,
) -> Result<(), VolumeError> {
    let (url, store_options) = (request.url, request.store_options);
    if !is_ours(&admin::info(url, store_options).await?) {
        return Err(VolumeError::InvalidInput(
            "somebody else has had it since then".to_owned(),
        ));
    }
    // Of nobody who holds it is it taken.
    let lease = LeaseOptions::default();
    admin::delete(url, store_options, &lease, IfDamaged::Refuse)
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::url::VolumeUrl;
    use crate::lease::{LeaseRecord, LeaseState};
    use crate::options::StoreOptions;

    const EPOCH: u64 = 7;

    fn file(modified_ns: i128) -> Option<FileId> {
        Some(FileId {
            path: "/image".into(),
            size_bytes: 1,
            modified_ns,
            inode: 3,
        })
    }

    fn note(is_new: bool) -> ImportRecord {
        ImportRecord {
            source: file(1),
            written_bytes: 5,
            epoch: EPOCH,
            is_new,
            is_finished: false,
        }
    }

    fn volume(import: Option<ImportRecord>, epoch: u64) -> VolumeInfo {
        let lease = format!(
            r#"{{"state":"released","epoch":{epoch},"token":"t","renewals":1,"duration_ms":30000,"volume_id":"971042b2-deec-4714-b02c-8745cd37ad39","holder":{{"host":"h","boot_id":"b","pid_namespace":"n","pid":1,"started_ticks":1,"program":"p"}},"taken_ms":1}}"#
        );
        let lease = LeaseRecord::decode(lease.as_bytes()).unwrap();
        assert_eq!(lease.state, LeaseState::Released);
        VolumeInfo {
            url: "file:///v/".into(),
            volume_id: None,
            size_bytes: 1 << 20,
            block_size_bytes: 4096,
            format: "Parted".into(),
            last_checkpoint: 1,
            checkpoint_numbers_used: 1,
            checkpoint_numbers_max: 10,
            nearest_end: None,
            modified_ms: 0,
            mapped_bytes: 0,
            wal_url: None,
            durability: String::new(),
            import,
            scrub: None,
            lease: Some(lease),
            clone_of: None,
            clones: Vec::new(),
            replica_of: None,
        }
    }

    /// What is taken up of what is noted: how far it was, and whether the import made the volume.
    fn settled(
        import: Option<ImportRecord>,
        epoch: u64,
        of: Option<&FileId>,
        overwrites: bool,
    ) -> Result<Option<(u64, bool)>, String> {
        let url = VolumeUrl::parse("file:///v/").unwrap();
        let request = Request {
            url: &url,
            store_options: &StoreOptions::default(),
            size_bytes: None,
            block_size_bytes: None,
            overwrites,
            verifies: true,
            lease: LeaseOptions::default(),
            pace: None,
        };
        let settled = settle(&volume(import, epoch), of, &request);
        let settled = settled.map(|record| record.map(|record| (record.written_bytes, record.is_new)));
        settled.map_err(|e| e.to_string())
    }

    #[test]
    fn only_what_is_certainly_the_same_import_goes_on() {
        let (same, changed) = (file(1), file(2));
        let (same, changed) = (same.as_ref(), changed.as_ref());
        // Of a volume that the import made: without a word if nothing changed.
        assert_eq!(settled(Some(note(true)), EPOCH, same, false), Ok(Some((5, true))));
        for (epoch, of) in [(EPOCH + 1, same), (EPOCH, changed), (EPOCH, None)] {
            let error = settled(Some(note(true)), epoch, of, false).unwrap_err();
            assert!(
                error.contains("was not finished") && error.contains("--overwrite"),
                "{error}"
            );
            // All of it anew, and never removed.
            assert_eq!(settled(Some(note(true)), epoch, of, true), Ok(Some((0, false))));
        }
        // Of one that was there before: only as it was said the first time.
        assert!(settled(Some(note(false)), EPOCH, same, false).is_err());
        assert_eq!(
            settled(Some(note(false)), EPOCH, same, true),
            Ok(Some((5, false)))
        );
        assert_eq!(settled(None, EPOCH, same, true), Ok(None));
        let error = settled(None, EPOCH, same, false).unwrap_err();
        assert!(
            error.contains("already") && error.contains("--overwrite"),
            "{error}"
        );
    }

    #[test]
    fn the_size_of_a_new_volume() {
        for (image, wanted, size) in [
            (Some(1 << 20), None, 1 << 20),
            (Some(1000), None, 1024),
            (Some(1), None, 512),
            (Some(1000), Some(1 << 30), 1 << 30),
            (None, Some(4096), 4096),
            (Some(0), Some(4096), 4096),
        ] {
            assert_eq!(new_size(image, wanted).unwrap(), size, "{image:?} {wanted:?}");
        }
        for (image, wanted) in [
            (None, None),
            (Some(0), None),
            (Some(5), Some(0)),
            (Some(1025), Some(1024)),
        ] {
            let error = new_size(image, wanted).unwrap_err().to_string();
            assert!(error.contains("--size"), "{image:?} {wanted:?}: {error}");
        }
    }
}

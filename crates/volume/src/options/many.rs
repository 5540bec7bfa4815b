//! Many volumes on one server: what each of them gets of what the server has.

use super::{
    CACHE_MEMORY_LEAST_BYTES, INDEX_MEMORY_LEAST_BYTES, OptionError, ServeConfig, VolumeOptions,
    WRITE_BUFFER_LEAST_BYTES,
};
use crate::base::url::UrlError;
use crate::base::volume_name::VolumeName;
use crate::base::wal_place::WalPlace;

/// `volumes_open` unless it is given: as many as the least memory of each leaves room for in the usual memory of one.
pub const VOLUMES_OPEN: usize = 16;

/// Checks that the memory of the server, shared by so many open volumes, is enough for each.
pub(super) fn check_shares(volume: &VolumeOptions, open: usize) -> Result<(), OptionError> {
    let wanted = [
        (
            "write_buffer",
            volume.write_buffer_bytes,
            WRITE_BUFFER_LEAST_BYTES,
        ),
        (
            "cache_memory",
            volume.read_cache.memory_bytes,
            CACHE_MEMORY_LEAST_BYTES,
        ),
        (
            "index_memory",
            volume.index_memory_bytes,
            INDEX_MEMORY_LEAST_BYTES,
        ),
    ];
    for (key, all_bytes, least_bytes) in wanted {
        // No cache at all is none for each.
        if all_bytes > 0 && all_bytes / (open as u64) < least_bytes {
            return Err(OptionError::Share {
                key,
                all_bytes,
                open,
                least_bytes,
            });
        }
    }
    Ok(())
}

/// Refuses what is said of one volume, once: each of many is opened again and again.
pub(super) fn check_none_of_one(volume: &VolumeOptions) -> Result<(), OptionError> {
    let said = [
        ("takeover", volume.lease.takeover),
        ("discard_wal", volume.discard_wal),
        ("adopt", volume.adopt),
    ];
    match said.into_iter().find(|(_, is_said)| *is_said) {
        None => Ok(()),
        Some((key, _)) => Err(OptionError::Missing {
            key,
            reason: "is said of one volume: serve that one alone with it, with backend_url",
        }),
    }
}

impl ServeConfig {
    /// How the volume of this name is served: with its share of the memory, and with a log and a buffer file in places of its own below
    /// those of the server.
    ///
    /// # Errors
    /// [`UrlError`] when its URL, or its log's, is too long.
    pub fn of_volume(&self, name: &VolumeName) -> Result<Self, UrlError> {
        let mut own = self.clone();
        own.url = self.url.below(name)?;
        let open = own.volumes_open.take().unwrap_or(1) as u64;
        let volume = &mut own.volume;
        volume.write_buffer_bytes /= open;
        volume.read_cache.memory_bytes /= open;
        volume.index_memory_bytes /= open;
        if let Some(dir) = &mut volume.write_buffer_dir {
            dir.push(name.as_str());
        }
        if let Some(WalPlace::At(all)) = &volume.wal {
            volume.wal = Some(WalPlace::At(all.below(name)?));
        }
        Ok(own)
    }
}

//! What a cache on a local disk records of the volume from which it was filled: the newest checkpoint that its contents
//! may come from.
//!
//! A cache is keyed by places in the store. A volume that was restored from a backup, rolled back or created again
//! stores other data under the same numbers. So a cache is used only by a volume that has the recorded checkpoint.
//! Otherwise it is emptied.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use futures::join;
use log::warn;
use serde::{Deserialize, Serialize};

use crate::base::checkpoint_id::CheckpointId;
use crate::meta::checkpoint_list::{self, CatalogueEntry};
use crate::store::Store;

/// Name of the file in the cache's directory.
pub(crate) const NAME: &str = "checkpoint";
/// The name of the file while it is being written.
pub(crate) const NEW_NAME: &str = "checkpoint.new";

#[derive(Debug, Serialize, Deserialize)]
struct Written {
    checkpoint: CheckpointId,
    /// The id of the machine's boot. What was written before a reboot may not all be on the disk.
    boot_id: String,
    is_closed: bool,
}

/// The file in a cache's directory that records the checkpoint.
#[derive(Debug)]
pub(crate) struct CacheState {
    dir: PathBuf,
    found: Option<CheckpointId>,
}

/// The id of the machine's boot, as the kernel gives it; empty when it is not known.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

impl CacheState {
    /// The state of the cache in this directory.
    pub fn load(dir: &Path) -> Self {
        let written = fs::read(dir.join(NAME))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Written>(&bytes).ok())
            .filter(|w| w.is_closed || (!w.boot_id.is_empty() && w.boot_id == boot_id()));
        Self {
            dir: dir.to_owned(),
            found: written.map(|w| w.checkpoint),
        }
    }

    /// The checkpoint that was recorded when the cache was opened, if it is known.
    pub fn found(&self) -> Option<CheckpointId> {
        self.found
    }

    /// Records the checkpoint that the contents may come from, from here on. Returns `false` when it could not be
    /// written. Then nothing of a newer checkpoint may be kept.
    pub fn note(&self, checkpoint: CheckpointId, is_closed: bool) -> bool {
        let written = Written {
            checkpoint,
            boot_id: boot_id(),
            is_closed,
        };
        let write = || -> io::Result<()> {
            fs::write(self.dir.join(NEW_NAME), serde_json::to_vec(&written)?)?;
            fs::rename(self.dir.join(NEW_NAME), self.dir.join(NAME))
        };
        let Err(e) = write() else { return true };
        warn!("the cache in {} is not kept: {e}", self.dir.display());
        match fs::remove_file(self.dir.join(NAME)) {
            Ok(()) => true,
            Err(e) => e.kind() == io::ErrorKind::NotFound,
        }
    }
}

/// Whether a cache that recorded `found` may be used by a volume with the newest checkpoint `newest`. `entry` is that
/// checkpoint's entry in the checkpoint list, if it was loaded.
pub(crate) async fn is_of_volume(
    store: &Store,
    found: Option<CheckpointId>,
    newest: CheckpointId,
    entry: Option<&CatalogueEntry>,
) -> bool {
    let Some(found) = found else { return false };
    if found == newest {
        return true;
    }
    if found.cno >= newest.cno {
        return false;
    }
    let load = async |id: CheckpointId| {
        let loaded = checkpoint_list::load_entry(store, id.cno).await;
        // A failure counts as no: emptying a cache without need only costs misses.
        loaded.is_ok_and(|entry| entry.and_then(|e| e.is_of(id)) == Some(true))
    };
    let is_recorded = async {
        match entry {
            Some(entry) => entry.is_of(newest) == Some(true),
            None => load(newest).await,
        }
    };
    let (is_recorded, is_earlier) = join!(is_recorded, load(found));
    is_recorded && is_earlier
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;

    fn id(cno: u64) -> CheckpointId {
        CheckpointId {
            cno,
            check: InodeCheck::from_bits(cno),
        }
    }

    #[test]
    fn what_was_noted_is_found_unless_the_machine_was_started_anew() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(CacheState::load(dir.path()).found(), None);
        let state = CacheState::load(dir.path());
        assert!(state.note(id(3), false) && state.note(id(4), false));
        assert_eq!(CacheState::load(dir.path()).found(), Some(id(4)), "killed");
        let text = fs::read_to_string(dir.path().join(NAME)).unwrap();
        let elsewhere = text.replace(&boot_id(), "another");
        fs::write(dir.path().join(NAME), &elsewhere).unwrap();
        assert_eq!(CacheState::load(dir.path()).found(), None, "a power cut");
        fs::write(dir.path().join(NAME), elsewhere.replace("false", "true")).unwrap();
        assert_eq!(CacheState::load(dir.path()).found(), Some(id(4)), "closed before");
        fs::write(dir.path().join(NAME), &text[..20]).unwrap();
        assert_eq!(CacheState::load(dir.path()).found(), None, "torn");
    }

    #[test]
    fn a_note_that_cannot_be_written_takes_the_one_before_away() {
        let dir = tempfile::tempdir().unwrap();
        let state = CacheState::load(dir.path());
        assert!(state.note(id(3), false));
        // A directory takes the place of the new file, so it cannot be written.
        fs::create_dir(dir.path().join(NEW_NAME)).unwrap();
        assert!(state.note(id(4), false));
        assert_eq!(CacheState::load(dir.path()).found(), None);
    }
}

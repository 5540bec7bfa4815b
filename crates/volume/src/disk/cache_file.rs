//! The file of a cache on a local disk: one, whatever room it has.
//!
//! foyer's device of a directory holds a file open for each 16 MiB, so that the usual 10 GiB took 640 descriptors.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use foyer::{Device, DeviceBuilder, FileDeviceBuilder};

/// The file.
pub(crate) const CACHE_FILE: &str = "foyer-storage-file";
/// What the files of earlier releases begin with. A number of eight digits or more follows.
const EARLIER_PREFIX: &str = "foyer-storage-direct-fs-";

/// Opens the file in `dir`, for this much room, and removes those of earlier releases. It is for its owner's eyes only.
///
/// # Errors
/// What the file system says.
pub(crate) fn open(dir: &Path, capacity_bytes: usize) -> io::Result<Arc<dyn Device>> {
    let earlier: Vec<String> = file_names(dir)?
        .into_iter()
        .filter(|name| is_earlier(name))
        .collect();
    let path = dir.join(CACHE_FILE);
    let options = fs::OpenOptions::new()
        .create(true)
        // An earlier release had the cache since: what is noted of the checkpoint says nothing of this file.
        .truncate(!earlier.is_empty())
        .write(true)
        .mode(0o600)
        .clone();
    options.open(&path)?;
    // After that, so that it is done again if this process ends in between.
    for name in &earlier {
        fs::remove_file(dir.join(name))?;
    }
    let device = FileDeviceBuilder::new(path).with_capacity(capacity_bytes);
    device.build().map_err(io::Error::other)
}

/// The unit in which a cache with this much room takes its disk and gives it back, in bytes. Each opening begins one, and the oldest goes
/// once all are taken: so a small cache has many small ones.
pub(crate) fn unit_bytes(capacity_bytes: usize) -> usize {
    (capacity_bytes / 64).next_power_of_two().clamp(1 << 20, 16 << 20)
}

/// Removes the file in `dir`, and those of earlier releases.
///
/// # Errors
/// What the file system says.
pub(crate) fn remove(dir: &Path) -> io::Result<()> {
    let mut names = file_names(dir)?.into_iter().filter(|name| is_of_cache(name));
    names.try_for_each(|name| fs::remove_file(dir.join(name)))
}

/// Whether a file of this name is a cache's.
pub(crate) fn is_of_cache(name: &str) -> bool {
    name == CACHE_FILE || is_earlier(name)
}

fn is_earlier(name: &str) -> bool {
    name.strip_prefix(EARLIER_PREFIX)
        .is_some_and(|number| number.len() >= 8 && number.bytes().all(|b| b.is_ascii_digit()))
}

/// The names of the files in a directory; none when there is no directory.
///
/// # Errors
/// What the file system says.
pub(crate) fn file_names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            names.extend(entry.file_name().into_string());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_has_many_units_and_a_large_one_has_large_ones() {
        for (room, units) in [(32, 32), (64, 64), (640, 40), (10 << 10, 640)] {
            let capacity_bytes = room << 20;
            assert_eq!(capacity_bytes / unit_bytes(capacity_bytes), units, "{room} MiB");
        }
    }

    #[test]
    fn whatever_room_a_cache_has_it_is_one_file_and_those_of_earlier_releases_go() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "foyer-storage-direct-fs-00000000",
            "foyer-storage-direct-fs-00065535",
            "notes",
        ] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        fs::write(dir.path().join(CACHE_FILE), "of before").unwrap();
        let room = 1 << 40;
        let device = open(dir.path(), room).unwrap();
        for _ in 0..100 {
            device.create_partition(16 << 20).unwrap();
        }
        let mut names = file_names(dir.path()).unwrap();
        names.sort();
        assert_eq!(names, [CACHE_FILE, "notes"]);
        let mut first = [1; 9];
        let file = fs::File::open(dir.path().join(CACHE_FILE)).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).unwrap();
        assert_eq!(first, [0; 9], "the earlier release may have emptied it");
        assert_eq!(
            fs::metadata(dir.path().join(CACHE_FILE)).unwrap().len(),
            room as u64
        );
    }
}

//! Which volume a buffer file's directory belongs to, and what becomes of the changes that an earlier server left in
//! it.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::file::{Found, Recovered, base, entries, find, give_room_back, make, put_header};
use super::format::{CHUNK_BYTES, CLAIMANTS_MAX, Header, VERSION, chunk_at};
use super::kept::Kept;
use super::left::describe;
use crate::base::checkpoint_id::NewestCheckpoint;
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::units::{MIB, format_size};
use crate::base::volume_id::VolumeId;
use crate::disk::check_writable;
use crate::meta::cache_state::boot_id;

pub(super) const FILE: &str = "buffer";
/// The file while it is being made.
const NEW_FILE: &str = "buffer.new";
/// Differs from the names of the locks in other directories of this program.
pub(super) const LOCK: &str = "buffer.lock";
/// The prefix of the names of files that were set aside.
pub(super) const SET_ASIDE: &str = "set-aside-";

/// How long a start waits for the lock of a server that was killed: the kernel takes a while to free its memory.
const LOCK_WAIT: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 5000 });
const LOCK_POLL: Duration = Duration::from_millis(10);

/// Space besides 5/4 of the write buffer: for the largest request, and for entries without data.
const SPARE_BYTES: u64 = 80 * MIB;

/// The number of chunks of a file for a write buffer of this size. The file is larger than the buffer, because a block
/// that is written again and again takes space in the file each time until its generation is published.
fn chunks_for(write_buffer_bytes: u64) -> u32 {
    let bytes = write_buffer_bytes + write_buffer_bytes / 4 + SPARE_BYTES;
    u32::try_from(bytes.div_ceil(CHUNK_BYTES)).unwrap_or(u32::MAX)
}

/// The directory of a buffer file, locked against every other server.
#[derive(Debug)]
pub(crate) struct BufferDir {
    path: PathBuf,
    volume_id: VolumeId,
    url: String,
    chunks: u32,
    /// Token of the lease that this server is about to take.
    token: String,
    found: Option<Found>,
    lock: File,
}

/// Whether servers have used this directory, and none of them has left a file in it. One that is not there, or not to be seen from here,
/// says nothing.
pub(crate) fn is_left_empty(dir: &Path) -> bool {
    dir.join(LOCK).exists() && matches!(dir.join(FILE).try_exists(), Ok(false))
}

impl BufferDir {
    /// Checks, without changing anything, whether a server with this directory and write buffer could start.
    ///
    /// # Errors
    /// [`VolumeError::BufferFile`] for a directory that cannot be used, or has too little room.
    pub fn check(path: &Path, url: &str, write_buffer_bytes: u64) -> Result<(), VolumeError> {
        let checked = || {
            let place = path.ancestors().find(|place| place.is_dir());
            let place = place.ok_or_else(|| io::Error::other("there is no directory above it"))?;
            check_writable(place)?;
            if place == path {
                check_private(path)?;
                if path.join(LOCK).exists() {
                    lock(path)?;
                }
                check_place(path, find(&path.join(FILE))?.as_ref(), url)?;
            }
            let wanted = chunk_at(chunks_for(write_buffer_bytes));
            let has = fs::metadata(path.join(FILE)).map_or(0, |file| file.blocks() * 512);
            check_room(place, wanted.saturating_sub(has), write_buffer_bytes)
        };
        checked().map_err(|e| unusable(path, &e))
    }

    /// Locks the directory, and makes it where there is none. Must be called before the lease is taken, with the token
    /// that the lease will have.
    ///
    /// # Errors
    /// [`VolumeError::BufferFile`]: another server uses the directory, it belongs to somebody else, or the file system
    /// fails.
    pub fn claim(
        path: &Path,
        volume_id: VolumeId,
        url: &str,
        write_buffer_bytes: u64,
        token: &str,
    ) -> Result<Self, VolumeError> {
        let claimed = || {
            match DirBuilder::new().mode(0o700).recursive(true).create(path) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
                _ => check_private(path)?,
            }
            let lock = lock(path)?;
            let found = find(&path.join(FILE))?;
            check_place(path, found.as_ref(), url)?;
            Ok(Self {
                path: path.to_owned(),
                volume_id,
                url: url.to_owned(),
                chunks: chunks_for(write_buffer_bytes),
                token: token.to_owned(),
                found,
                lock,
            })
        };
        claimed().map_err(|e| unusable(path, &e))
    }

    /// Records, before the lease is stored, that it is to replace `predecessor`'s lease. If this server is killed right
    /// afterwards, or never gets the store's answer, the next server must know that nothing was written to the volume
    /// in between.
    ///
    /// # Errors
    /// [`VolumeError::BufferFile`].
    pub fn about_to_replace(&mut self, predecessor: Option<&str>) -> Result<(), VolumeError> {
        let Some(Found {
            file,
            count,
            header: Ok(header),
        }) = &mut self.found
        else {
            return Ok(());
        };
        let Some(predecessor) = predecessor.filter(|token| is_known(header, token)) else {
            // These changes will not be applied, so this token must not be recorded among those that may apply them.
            return Ok(());
        };
        if header.owner != predecessor {
            // The predecessor's lease is stored, so no write that was to replace an earlier lease can succeed any more.
            predecessor.clone_into(&mut header.owner);
            header.claimants.clear();
        }
        // The same server may ask for the lease several times.
        if !header.claimants.contains(&self.token) {
            let known = header.claimants.len();
            header
                .claimants
                .drain(..(known + 1).saturating_sub(CLAIMANTS_MAX));
            header.claimants.push(self.token.clone());
        }
        put_header(file, header, count).map_err(|e| unusable(&self.path, &e))
    }

    /// Called once the lease is taken. Returns the changes that are to be applied. `predecessor` is the token of the
    /// lease that this server's lease replaced, if there was one. Changes that are not to be applied are set aside, and
    /// a line in the log says so.
    /// # Errors
    /// [`VolumeError::BufferFile`].
    pub fn settle(&mut self, predecessor: Option<&str>) -> Result<Option<Recovered>, VolumeError> {
        self.settle_found(predecessor)
            .map_err(|e| unusable(&self.path, &e))
    }

    fn settle_found(&mut self, predecessor: Option<&str>) -> io::Result<Option<Recovered>> {
        let Some(found) = &mut self.found else {
            return Ok(None);
        };
        let path = self.path.join(FILE);
        let reason = match &mut found.header {
            Err(damage) => damage.clone(),
            Ok(header) => {
                // What a disk could not take is told by a sync alone, and an entry that it lost looks like one that was not answered.
                let lost = found.file.sync_data().err();
                let entries = entries(&found.file, header)?;
                if entries.is_empty() && lost.is_none() {
                    return Ok(None);
                }
                match lost
                    .map(|e| format!("the disk has lost some of them: {e}"))
                    .or_else(|| not_for(header, self.volume_id, predecessor))
                {
                    Some(reason) => reason,
                    None => {
                        header.owner.clone_from(&self.token);
                        header.claimants.clear();
                        put_header(&found.file, header, &mut found.count)?;
                        let file = found.file.try_clone()?;
                        let base = base(&file, header)?;
                        return Ok(Some(Recovered {
                            path,
                            file,
                            base,
                            entries,
                        }));
                    }
                }
            }
        };
        self.set_aside(&reason)?;
        Ok(None)
    }

    /// Sets aside the changes that [`Self::settle`] returned, because the volume does not have the checkpoint on top of
    /// which they were made.
    /// # Errors
    /// [`VolumeError::BufferFile`].
    pub fn refuse(&mut self, recovered: Recovered) -> Result<(), VolumeError> {
        drop(recovered);
        let reason = "the volume does not have the checkpoint that they were made upon: it was restored from a backup, rolled back \
                      by another tool, or made anew";
        self.set_aside(reason).map_err(|e| unusable(&self.path, &e))
    }

    fn set_aside(&mut self, reason: &str) -> io::Result<()> {
        let Some(found) = self.found.take() else {
            return Ok(());
        };
        // A rename would replace what was set aside within the same millisecond. The directory is locked: nobody else names files.
        let mut time_ms = now_ms();
        let to = loop {
            let path = self.path.join(format!("{SET_ASIDE}{time_ms}"));
            if !path.try_exists()? {
                break path;
            }
            time_ms += 1;
        };
        let left = describe(&to, &found.file, &found.header, true);
        // Unused chunks give their space back, as far as the file system can do that.
        if let Ok(header) = &found.header {
            give_room_back(&found.file, header);
        }
        fs::rename(self.path.join(FILE), &to)?;
        log::warn!(
            "the write buffer's file holds {} changes of {} that were answered and not flushed, and they are not applied, \
             because {reason}; they are set aside in {}",
            left.changes,
            format_size(left.bytes),
            to.display()
        );
        Ok(())
    }

    /// Begins a new use of the file, for this owner's changes. All changes that were recovered from it must be
    /// published.
    ///
    /// # Errors
    /// [`VolumeError::BufferFile`].
    pub fn begin(self, newest: NewestCheckpoint) -> Result<Kept, VolumeError> {
        let path = self.path.clone();
        self.begin_anew(newest).map_err(|e| unusable(&path, &e))
    }

    fn begin_anew(self, newest: NewestCheckpoint) -> io::Result<Kept> {
        let path = self.path.join(FILE);
        let header = Header {
            version: VERSION,
            volume_id: self.volume_id,
            url: self.url.clone(),
            boot_id: boot_id(),
            owner: self.token.clone(),
            claimants: Vec::new(),
            base: newest.get(),
            nonce: fastrand::u64(1..),
            chunks: self.chunks,
        };
        let fits = |found: &Found| found.header.as_ref().is_ok_and(|old| old.chunks == self.chunks);
        let file = match self.found {
            Some(mut found) if fits(&found) => {
                put_header(&found.file, &header, &mut found.count)?;
                found.file
            }
            old => {
                if old.is_some() {
                    fs::remove_file(&path)?;
                }
                let new = self.path.join(NEW_FILE);
                let made = make(&new, &header).and_then(|file| fs::rename(&new, &path).map(|()| file));
                if made.is_err() {
                    let _ = fs::remove_file(&new);
                }
                made.map_err(|e| match e.kind() {
                    ErrorKind::StorageFull => io::Error::other(format!(
                        "{} are needed, and there is less room ({e}); give up what was set aside there with hypernbd buffer \
                         discard {}, make room, name another directory, or set a smaller write_buffer",
                        format_size(chunk_at(self.chunks)),
                        self.path.display()
                    )),
                    _ => e,
                })?
            }
        };
        Ok(Kept::new(
            &path,
            file,
            self.lock,
            header.nonce,
            self.chunks,
            newest,
        ))
    }
}

/// Returns the reason if the changes must not be applied to this volume, after the lease of this predecessor.
fn not_for(header: &Header, volume_id: VolumeId, predecessor: Option<&str>) -> Option<String> {
    if header.volume_id != volume_id {
        return Some(format!(
            "they were made to volume {}, and this is volume {volume_id}",
            header.volume_id
        ));
    }
    let boot_id = boot_id();
    if boot_id.is_empty() || header.boot_id != boot_id {
        return Some("the machine was started anew since then, and not all of them may be there".to_owned());
    }
    match predecessor.is_some_and(|token| is_known(header, token)) {
        true => None,
        false => Some("another server has had the volume since then".to_owned()),
    }
}

pub(super) fn lock(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        // A name that is not a regular file must not make the open wait.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .mode(0o600)
        .open(path.join(LOCK))?;
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(e)) => return Err(e),
            Err(TryLockError::WouldBlock) if Instant::now() >= until => {
                return Err(io::Error::other(
                    "another server uses it; give each volume a directory of its own, or stop that server",
                ));
            }
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_POLL),
        }
    }
}

/// Whether the lease with this token was the owner's, or came right after it without any write to the volume.
fn is_known(header: &Header, token: &str) -> bool {
    header.owner == token || header.claimants.iter().any(|claimant| claimant == token)
}

/// Refuses changes of a volume at another URL, because they are still wanted there.
fn check_place(path: &Path, found: Option<&Found>, url: &str) -> io::Result<()> {
    let Some(Found {
        file,
        header: Ok(header),
        ..
    }) = found
    else {
        return Ok(());
    };
    if header.url == url || entries(file, header)?.is_empty() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "it holds what a server of {} answered and did not publish: give each volume a directory of its own, or give that up with \
         hypernbd buffer discard {}",
        header.url,
        path.display()
    )))
}

/// Refuses a directory that others may write to: its contents may not be what was answered.
fn check_private(path: &Path) -> io::Result<()> {
    let mode = fs::metadata(path)?.mode();
    match mode & 0o022 {
        0 => Ok(()),
        _ => Err(io::Error::other(format!(
            "others may write to it (its mode is {:o}): name a directory of its own in it, which will be made, or remove that \
             permission",
            mode & 0o7777
        ))),
    }
}

fn check_room(place: &Path, wanted_bytes: u64, write_buffer_bytes: u64) -> io::Result<()> {
    let stat = rustix::fs::statvfs(place)?;
    let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    match wanted_bytes <= free_bytes {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "{} are needed for a write buffer of {}, and its file system has {} free; make room, name another directory, or set a \
             smaller write_buffer",
            format_size(wanted_bytes),
            format_size(write_buffer_bytes),
            format_size(free_bytes)
        ))),
    }
}

pub(super) fn unusable(path: &Path, reason: &io::Error) -> VolumeError {
    VolumeError::BufferFile {
        path: path.display().to_string(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

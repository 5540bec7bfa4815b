//! What is in a store's directory, and how it is made and goes again.
//!
//! ```text
//! <root>/hypernbd-store   says that this is a store, and of which layout (version 1); while it is being made, the same
//!                         text is in <root>/hypernbd-store.new
//! <root>/lock             flock(2) held around every "check the condition, then change the name"
//! <root>/objects/<name>   one file an object, see `object_file`
//! <root>/objects/.hypernbd-objects   says that these are the objects, and not an empty place where they are mounted
//! <root>/objects/.hypernbd-try       there for a moment, while the file system is tried
//! <root>/scratch/<id>/    temporary files and open multipart uploads of one running process, see `scratch`
//! ```

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::scratch::{self, Scratch};
use crate::disk::fitness::{check_files, is_unfit, sync_dir, sync_file};
use crate::disk::{Disk, make_dirs, remove_dirs};

pub(crate) const MARKER: &str = "hypernbd-store";
pub(crate) const MARKER_TEXT: &str =
    "Objects of a hypernbd volume, layout 1. Do not change anything in this directory by hand.\n";
const NEW_MARKER: &str = "hypernbd-store.new";
/// No object has such a name.
pub(crate) const OBJECTS_MARKER: &str = ".hypernbd-objects";
const TRIED: &str = ".hypernbd-try";
pub(crate) const LOCK: &str = "lock";
pub(crate) const OBJECTS: &str = "objects";
pub(crate) const SCRATCH: &str = "scratch";

/// Whether a name in `objects/` is one of those that the store has there beside its objects.
pub(crate) fn is_no_object(name: &str) -> bool {
    [OBJECTS_MARKER, TRIED].contains(&name)
}

/// Makes the directory (and its parents) a store, durably. The directories that were missing; `None` where there is a
/// store already.
///
/// # Errors
/// `DirectoryNotEmpty` when the directory holds anything else; `Unsupported` when its file system is not fit for a store,
/// and then nothing is left of it.
pub(crate) fn make(root: &Path, disk: &dyn Disk) -> io::Result<Option<Vec<PathBuf>>> {
    if root.join(MARKER).exists() {
        return Ok(None);
    }
    let mut made = Vec::new();
    let done = make_dirs(root, disk, &mut made).and_then(|()| {
        check_unused(root)?;
        fill(root, disk).inspect_err(|e| {
            if is_unfit(e) {
                undo(root, clear(root));
            }
        })
    });
    if done.as_ref().is_err_and(is_unfit) {
        undo(root, remove_dirs(&made));
    }
    done.map(|()| Some(made))
}

fn undo(root: &Path, undone: io::Result<()>) {
    if let Err(e) = undone {
        log::warn!(
            "a store that could not be made is left in {}: {e}",
            root.display()
        );
    }
}

/// Makes a store of an empty directory. What another interrupted call made is taken as it is.
fn fill(root: &Path, disk: &dyn Disk) -> io::Result<()> {
    let handle = File::open(root)?;
    // First what tells that the rest is ours, should this be interrupted.
    write_marker(&root.join(NEW_MARKER), disk)?;
    sync_dir(disk, &handle, root)?;
    for name in [OBJECTS, SCRATCH] {
        match DirBuilder::new().mode(0o700).create(root.join(name)) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    mark_objects(root, disk)?;
    File::options().create(true).append(true).open(root.join(LOCK))?;
    try_out(root, disk)?;
    sync_dir(disk, &handle, root)?;
    // The marker last: a directory that has it has everything else.
    match disk.rename(&root.join(NEW_MARKER), &root.join(MARKER)) {
        // Somebody else made it at the same time.
        Err(e) if e.kind() == ErrorKind::NotFound && root.join(MARKER).exists() => {}
        renamed => renamed?,
    }
    sync_dir(disk, &handle, root)
}

/// Tries whether the file system does what a store rests on.
///
/// # Errors
/// `Unsupported` when it does not.
pub(crate) fn try_out(root: &Path, disk: &dyn Disk) -> io::Result<()> {
    let scratch = Scratch::open(root, disk)?;
    let _exclusive = scratch.exclusive()?;
    check_files(disk, scratch.dir(), &root.join(OBJECTS), TRIED)
}

/// Makes the marker of `objects/`, durably.
///
/// # Errors
/// What the file system says.
pub(crate) fn mark_objects(root: &Path, disk: &dyn Disk) -> io::Result<()> {
    let objects = root.join(OBJECTS);
    write_marker(&objects.join(OBJECTS_MARKER), disk)?;
    sync_dir(disk, &File::open(&objects)?, &objects)
}

fn write_marker(path: &Path, disk: &dyn Disk) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(MARKER_TEXT.as_bytes())?;
    sync_file(disk, &file, path)
}

/// Removes the store, but not its directory, if that is wanted of one that has objects or none. Whether it was removed.
///
/// # Errors
/// What the file system says.
pub(crate) fn remove(root: &Path, is_wanted: impl FnOnce(bool) -> bool) -> io::Result<bool> {
    let lock = File::options().append(true).open(root.join(LOCK))?;
    lock.lock()?;
    let mut is_empty = true;
    for entry in fs::read_dir(root.join(OBJECTS))? {
        is_empty &= entry?.file_name().to_str().is_some_and(is_no_object);
    }
    if !is_wanted(is_empty) {
        return Ok(false);
    }
    // From here on as a store half made: an interruption leaves what a creation takes up.
    fs::rename(root.join(MARKER), root.join(NEW_MARKER))?;
    clear(root)?;
    Ok(true)
}

/// Removes what a creation has made so far.
fn clear(root: &Path) -> io::Result<()> {
    let absent_is_done = |done: io::Result<()>| match done {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    };
    let objects = root.join(OBJECTS);
    for name in [OBJECTS_MARKER, TRIED] {
        absent_is_done(fs::remove_file(objects.join(name)))?;
    }
    absent_is_done(fs::remove_dir(objects))?;
    absent_is_done(scratch::remove(&root.join(SCRATCH)))?;
    absent_is_done(fs::remove_file(root.join(LOCK)))?;
    absent_is_done(fs::remove_file(root.join(NEW_MARKER)))
}

/// A directory with things of others in it is not made a store: names prove nothing. What an interrupted [`make`] left is
/// known by the text of its first file, before which there is nothing else; a file system's `lost+found` does not count.
fn check_unused(root: &Path) -> io::Result<()> {
    let begun = fs::read(root.join(NEW_MARKER)).ok();
    let text = MARKER_TEXT.as_bytes();
    for entry in fs::read_dir(root)? {
        let name = entry?.file_name();
        let is_made = match &begun {
            Some(whole) if whole == text => [OBJECTS, SCRATCH, LOCK, NEW_MARKER]
                .iter()
                .any(|ours| name == *ours),
            // Killed while it was written.
            Some(torn) => name == NEW_MARKER && text.starts_with(torn),
            None => false,
        };
        if !is_made && name != "lost+found" {
            let what = format!("the directory is not empty (it holds {name:?}); name a new or an empty one");
            return Err(io::Error::new(ErrorKind::DirectoryNotEmpty, what));
        }
    }
    Ok(())
}

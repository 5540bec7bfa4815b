//! Multipart uploads of the `file://` store: parts are files of the scratch directory until they become an object.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use s3s::dto::CompletedPart;
use s3s::{S3Result, s3_error};
use uuid::Uuid;

use super::object_dir::{Condition, ObjectDir, copy_exactly, disk_error, write_all};
use super::object_file::ObjectHeader;
use super::scratch::{Part, TempFile, Upload};

/// S3's least size of a part other than the last.
const PART_LEN_MIN_BYTES: u64 = 5 << 20;

/// Stores a part and tells its ETag. It is not synced: the object that it becomes part of will be.
pub(crate) fn store_part(
    dir: &ObjectDir,
    upload_id: &str,
    key: &str,
    number: i32,
    body: &[Bytes],
) -> S3Result<String> {
    let scratch = dir.scratch()?;
    let is_open = |uploads: &HashMap<String, Upload>| uploads.get(upload_id).is_some_and(|u| u.key == key);
    if !is_open(&scratch.uploads.lock()) {
        return Err(s3_error!(NoSuchUpload));
    }
    let fail = |error| disk_error("write in", scratch.dir(), error);
    let mut temp = TempFile::create(scratch.dir()).map_err(fail)?;
    let len_bytes = write_all(&mut temp.file, body).map_err(fail)?;
    let etag = Uuid::new_v4().simple().to_string();
    let mut uploads = scratch.uploads.lock();
    let Some(upload) = uploads.get_mut(upload_id) else {
        return Err(s3_error!(NoSuchUpload));
    };
    let part = Part {
        etag: etag.clone(),
        len_bytes,
        path: temp.keep(),
    };
    if let Some(replaced) = upload.parts.insert(number, part) {
        remove_file(&replaced.path);
    }
    Ok(etag)
}

/// Makes the parts an object. The upload stays open unless this succeeds, as S3 has it.
pub(crate) fn complete(
    dir: &ObjectDir,
    upload_id: &str,
    key: &str,
    named: Vec<CompletedPart>,
    condition: &Condition,
) -> S3Result<ObjectHeader> {
    let scratch = dir.scratch()?;
    let upload = scratch
        .uploads
        .lock()
        .get(upload_id)
        .filter(|upload| upload.key == key)
        .cloned();
    let upload = upload.ok_or_else(|| s3_error!(NoSuchUpload))?;
    let parts = chosen_parts(&upload, &named)?;
    let header = dir.put(key, upload.metadata.clone(), condition, |to| {
        let mut data_len_bytes = 0;
        for part in &parts {
            data_len_bytes += copy_exactly(File::open(&part.path)?, to, part.len_bytes)?;
        }
        Ok(data_len_bytes)
    })?;
    if let Some(upload) = scratch.uploads.lock().remove(upload_id) {
        remove_parts(&upload);
    }
    Ok(header)
}

/// The parts a CompleteMultipartUpload names, checked.
fn chosen_parts<'a>(upload: &'a Upload, named: &[CompletedPart]) -> S3Result<Vec<&'a Part>> {
    let mut parts: Vec<&Part> = Vec::with_capacity(named.len());
    let mut last_number = 0;
    for part in named {
        let number = part.part_number.ok_or_else(|| s3_error!(MalformedXML))?;
        if number <= last_number {
            return Err(s3_error!(InvalidPartOrder));
        }
        last_number = number;
        let stored = upload.parts.get(&number).filter(|stored| {
            part.e_tag
                .as_ref()
                .is_some_and(|etag| etag.value() == stored.etag)
        });
        parts.push(stored.ok_or_else(|| s3_error!(InvalidPart))?);
    }
    let Some((_, inner)) = parts.split_last() else {
        return Err(s3_error!(MalformedXML));
    };
    if inner.iter().any(|part| part.len_bytes < PART_LEN_MIN_BYTES) {
        return Err(s3_error!(EntityTooSmall));
    }
    Ok(parts)
}

/// Ends an upload without an object.
pub(crate) fn abort(dir: &ObjectDir, upload_id: &str) -> S3Result<()> {
    let upload = dir
        .scratch()?
        .uploads
        .lock()
        .remove(upload_id)
        .ok_or_else(|| s3_error!(NoSuchUpload))?;
    remove_parts(&upload);
    Ok(())
}

fn remove_parts(upload: &Upload) {
    upload.parts.values().for_each(|part| remove_file(&part.path));
}

/// Removes a file of the scratch directory, which goes as a whole should this fail.
fn remove_file(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        log::warn!("cannot remove {}: {error}", path.display());
    }
}

//! Damaged and missing objects are put back from the versions that the bucket keeps of them.
//!
//! A version is put back only when its check values show that it is whole, and something else shows that it is the write that was lost.
//! The same key may have held an object of a volume that was deleted before this one was made, or one that a failed publish left. So
//! the mark of the write is known, from the check values beside the container or from what is left of the object; or the bucket has
//! versions of one write alone, none of them from before the volume had its label. What lies beside the container is put back as far as
//! it says of itself what it is.

use std::time::SystemTime;

use async_trait::async_trait;
use futures::stream::{self, StreamExt, TryStreamExt};

use super::{How, LeftOf, Look, Mend, Outcome, READ_BYTES, READS_AT_ONCE, Repaired, left_of, own_object};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::control::{Control, Phase};
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::url::VolumeUrl;
use crate::check::{Kind, Problem};
use crate::engine::{checkpoint_stored, parents};
use crate::format::object_names::name_of;
use crate::lease::Holding;
use crate::meta::checkpoint_list::{CatalogueEntry, ENTRIES, entry_name};
use crate::meta::label;
use crate::options::StoreOptions;
use crate::replicate::Copies;
use crate::store::interceptors::window_checksums::has_checksums;
use crate::store::sums::{self, Sums};
use crate::store::versions::Versions;
use crate::store::{ObjectInfo, Store};

/// Checks a volume in a bucket that keeps versions, and puts back what one of them is.
///
/// # Errors
/// [`VolumeError::InvalidInput`] for a volume in a directory; what [`check()`](crate::check::check) returns; a store that fails, or that
/// does not allow to list or read versions.
pub async fn from_versions(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    how: How,
    control: &Control,
) -> Result<Repaired, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    if !store.may_keep_versions() {
        return Err(VolumeError::InvalidInput(format!(
            "{url} is in a directory, which keeps no versions: repair it from a replica (--from)"
        )));
    }
    // Before anything that is said of the volume: another one that is made there meanwhile is not repaired by it.
    let holding = Holding::by_label(&store).await?;
    let since = since(&store.versions_of(&store.meta_key(label::NAME)).await?);
    let look = Look {
        url,
        store_options,
        is_data: how.is_data,
        control,
    };
    let problems = look.problems().await?;
    control.begin(Phase::Copying, 0);
    let way = FromVersions {
        store: &store,
        control,
        holding,
        since,
        is_written: how.is_written,
    };
    look.mend_all(problems, &way, "the bucket's versions".to_owned())
        .await
}

/// Since when a volume has been at its place, by the store's clock: what the bucket keeps of its label since that was deleted last, with
/// the volume that was there before.
fn since(label: &Versions) -> Option<SystemTime> {
    let deleted = label.deleted.iter().max();
    let kept = label.kept.iter().map(|version| version.last_modified);
    kept.filter(|written| deleted.is_none_or(|deleted| written > deleted))
        .min()
}

/// A version that may be put back.
#[derive(Debug)]
struct Candidate {
    id: String,
    info: ObjectInfo,
    /// When it was written, by the store's clock.
    written: SystemTime,
}

impl Candidate {
    fn is_write(&self, mark: &str) -> bool {
        sums::has_mark(&self.info) && sums::write_of(&self.info) == mark
    }
}

/// Those of the candidates, the newest first, that are of the write that was lost: of the one with this mark, where it is known. The
/// error is why nothing says which they are.
fn of_the_write<'a>(
    candidates: &'a [Candidate],
    mark: Option<&str>,
    since: Option<SystemTime>,
) -> Result<Vec<&'a Candidate>, String> {
    if let Some(mark) = mark {
        let of: Vec<_> = candidates.iter().filter(|one| one.is_write(mark)).collect();
        return match of.is_empty() {
            false => Ok(of),
            true => Err("the bucket keeps no other version of this write of it".to_owned()),
        };
    }
    let Some(since) = since else {
        return Err(
            "nothing says since when the volume has been here, so that a version may be of another one"
                .to_owned(),
        );
    };
    // Without a mark it is none of the engine's writes.
    let marked: Vec<_> = candidates
        .iter()
        .filter(|one| sums::has_mark(&one.info))
        .collect();
    let own: Vec<_> = marked.iter().copied().filter(|one| one.written > since).collect();
    let Some(first) = own.first() else {
        return Err(match marked.is_empty() {
            true => "the bucket keeps no other version of it".to_owned(),
            false => "the bucket's versions of it are from before the volume had its label, and may be of another volume".to_owned(),
        });
    };
    let mark = sums::write_of(&first.info);
    match own.iter().all(|one| one.is_write(&mark)) {
        true => Ok(own),
        // A failed publish may have left the other one.
        false => Err(
            "the bucket keeps versions of several writes of it, and nothing says which one the volume needs"
                .to_owned(),
        ),
    }
}

/// What lies beside the container and says of itself what it is.
enum Beside {
    /// An entry of the list of checkpoints, of this number.
    Entry(u64),
    /// Check values of the object of this name.
    Sums(String),
}

struct FromVersions<'a> {
    store: &'a Store,
    control: &'a Control,
    holding: Holding<'a>,
    since: Option<SystemTime>,
    is_written: bool,
}

#[async_trait]
impl Mend for FromVersions<'_> {
    async fn mend(&self, problem: &Problem) -> Result<Outcome, VolumeError> {
        if let Some(beside) = self.beside(&problem.object) {
            return self.mend_beside(problem, &beside).await;
        }
        match own_object(self.store, problem) {
            Ok(object) => self.mend_object(object).await,
            Err(reason) => Ok(Outcome::Left(format!(
                "{reason}, and of what changes nothing says which version is the right one"
            ))),
        }
    }
}

impl FromVersions<'_> {
    async fn mend_object(&self, object: u64) -> Result<Outcome, VolumeError> {
        let left = |reason: String| Ok(Outcome::Left(reason));
        let name = name_of(object);
        let key = self.store.data_key(&name);
        let there = left_of(self.store, &key).await?;
        let of_there = match &there {
            LeftOf::Object(info) if sums::has_mark(info) => Some(sums::write_of(info)),
            _ => None,
        };
        // Only a mark says which write it was: an ETag is that of what is stored now.
        let of_sums = self.store.stored_sums(&name).await?.map(|sums| sums.write);
        let of_sums = of_sums.filter(|write| !write.starts_with("etag "));
        if of_there.is_some() && of_sums.is_some() && of_there != of_sums {
            return left(
                "what is there now is another write than the check values beside the container are of"
                    .to_owned(),
            );
        }
        let mark = of_sums.or(of_there);
        let candidates = self.candidates(&key).await?;
        let of = match of_the_write(&candidates, mark.as_deref(), self.since) {
            Ok(of) => of,
            Err(reason) => return left(reason),
        };
        let mut chosen = None;
        for one in of {
            if self.is_whole(&key, one).await? {
                chosen = Some(one);
                break;
            }
        }
        let Some(chosen) = chosen else {
            return left("none of the bucket's versions of it is whole by its check values".to_owned());
        };
        if !self.is_written {
            return Ok(Outcome::Possible);
        }
        let over = there.over();
        let copies = Copies {
            from: self.store,
            to: self.store,
            control: self.control,
            holding: self.holding,
        };
        copies
            .put_back_version(object, &chosen.id, &chosen.info, over)
            .await?;
        Ok(Outcome::Mended)
    }

    /// The versions of an object, the newest first, but for what it is now. All of them: nothing here is written often.
    async fn candidates(&self, key: &str) -> Result<Vec<Candidate>, VolumeError> {
        let versions = self.store.versions_of(key).await?;
        let mut candidates = Vec::new();
        for version in versions.kept.into_iter().filter(|version| !version.is_latest) {
            if let Some(info) = self.store.head_version(key, &version.id).await? {
                candidates.push(Candidate {
                    id: version.id,
                    info,
                    written: version.last_modified,
                });
            }
        }
        Ok(candidates)
    }

    /// Whether a version has check values, and is what they are of: all of it is read.
    async fn is_whole(&self, key: &str, of: &Candidate) -> Result<bool, VolumeError> {
        if !has_checksums(&of.info) && self.store.sums_of(key, &of.info).await?.is_none() {
            return Ok(false);
        }
        let len_bytes = of.info.size_bytes;
        let reads = (0..len_bytes)
            .step_by(READ_BYTES as usize)
            .map(|start| async move {
                let len = READ_BYTES.min(len_bytes - start);
                let read = self.store.get_version(key, &of.id, start, len).await?;
                self.control.add_data(len);
                Ok::<_, StoreError>(read.is_some_and(|(bytes, _)| bytes.len() as u64 == len))
            });
        // Made first and then run: mapped inside the stream, the future would not be seen to be `Send`.
        let reads: Vec<_> = reads.collect();
        let mut reads = stream::iter(reads).buffer_unordered(READS_AT_ONCE);
        loop {
            match reads.try_next().await {
                Ok(None) => return Ok(true),
                Ok(Some(true)) => {}
                Ok(Some(false)) => return Ok(false),
                Err(e) if e.kind == StoreErrorKind::Corrupt => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn beside(&self, key: &str) -> Option<Beside> {
        let name = key.strip_prefix(&self.store.meta_key(""))?;
        if let Some(number) = name.strip_prefix(ENTRIES) {
            let cno: u64 = number.parse().ok()?;
            return (entry_name(cno) == name).then_some(Beside::Entry(cno));
        }
        let of = key.strip_prefix(&sums::key(self.store, ""))?;
        Some(Beside::Sums(of.to_owned()))
    }

    /// What is damaged is replaced, on condition that it is still that. What is missing may have been removed, and stays so.
    async fn mend_beside(&self, problem: &Problem, beside: &Beside) -> Result<Outcome, VolumeError> {
        let left = |reason: &str| Ok(Outcome::Left(reason.to_owned()));
        let key = &problem.object;
        if problem.kind != Kind::Damaged {
            return left(
                "only what is damaged of it is put back: an entry that is missing is written by --rebuild-list",
            );
        }
        let LeftOf::Object(there) = left_of(self.store, key).await? else {
            return left("it went meanwhile");
        };
        for one in self.candidates(key).await? {
            if !has_checksums(&one.info) || !(1..=READ_BYTES).contains(&one.info.size_bytes) {
                continue;
            }
            let body = match self.store.get_version(key, &one.id, 0, READ_BYTES).await {
                Ok(Some((body, _))) => body,
                Ok(None) => continue,
                Err(e) if e.kind == StoreErrorKind::Corrupt => continue,
                Err(e) => return Err(e.into()),
            };
            if !self.is_proved(beside, &body).await? {
                continue;
            }
            if !self.is_written {
                return Ok(Outcome::Possible);
            }
            self.holding.ensure(self.store).await?;
            match self.store.put_if_match(key, body, &there.etag).await {
                Ok(_) => {}
                Err(e)
                    if matches!(
                        e.kind,
                        StoreErrorKind::PreconditionFailed | StoreErrorKind::NotFound
                    ) =>
                {
                    return left("it was changed or removed meanwhile");
                }
                Err(e) => return Err(e.into()),
            }
            if let Beside::Sums(name) = beside {
                self.store.forget_sums(name);
            }
            return Ok(Outcome::Mended);
        }
        left("none of the bucket's versions of it is whole and agrees with the container")
    }

    /// Whether these bytes are what belongs there, by what the container has.
    async fn is_proved(&self, beside: &Beside, body: &[u8]) -> Result<bool, VolumeError> {
        match beside {
            Beside::Entry(cno) => {
                let Some((entry, check)) = CatalogueEntry::decode(body)
                    .ok()
                    .filter(|entry| entry.cno == *cno)
                    .and_then(|entry| Some((entry.cno, entry.check?)))
                else {
                    return Ok(false);
                };
                match checkpoint_stored(self.store, entry).await {
                    Ok(stored) => Ok(stored == Some(CheckpointId { cno: entry, check })),
                    Err(e) if e.kind() == ErrorKind::Corrupt => Ok(false),
                    Err(e) => Err(e),
                }
            }
            Beside::Sums(name) => {
                let (Ok(sums), LeftOf::Object(of)) = (
                    Sums::decode(body),
                    left_of(self.store, &self.store.data_key(name)).await?,
                ) else {
                    return Ok(false);
                };
                let is_of_write = sums::has_mark(&of) && sums.write == sums::write_of(&of);
                Ok(is_of_write && sums.object_bytes == of.size_bytes)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Duration;

    use super::*;
    use crate::store::ETag;
    use crate::store::versions::Version;

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(second)
    }

    fn candidate(id: &str, mark: Option<&str>, written: u64) -> Candidate {
        let mark = mark.map(|mark| ("hf-write".to_owned(), mark.to_owned()));
        Candidate {
            id: id.to_owned(),
            info: ObjectInfo {
                size_bytes: 1,
                etag: ETag(id.to_owned()),
                last_modified: at(written),
                metadata: mark.into_iter().collect::<HashMap<_, _>>(),
            },
            written: at(written),
        }
    }

    fn ids(of: Result<Vec<&Candidate>, String>) -> Result<Vec<String>, String> {
        of.map(|of| of.into_iter().map(|one| one.id.clone()).collect())
    }

    fn label(kept: &[u64], deleted: &[u64]) -> Versions {
        let version = |second: &u64| Version {
            id: second.to_string(),
            is_latest: false,
            last_modified: at(*second),
            size_bytes: 1,
        };
        Versions {
            kept: kept.iter().map(version).collect(),
            deleted: deleted.iter().copied().map(at).collect(),
        }
    }

    #[test]
    fn a_volume_is_as_old_as_its_label_since_the_last_deletion() {
        assert_eq!(since(&label(&[9, 5], &[])), Some(at(5)));
        assert_eq!(since(&label(&[9, 8, 3], &[4])), Some(at(8)));
        assert_eq!(since(&label(&[9, 8, 3], &[8, 4])), Some(at(9)));
        assert_eq!(since(&label(&[3], &[4])), None);
        assert_eq!(since(&label(&[], &[])), None);
    }

    #[test]
    fn a_known_write_alone_is_taken() {
        let candidates = [
            candidate("c", Some("other"), 30),
            candidate("b", Some("own"), 20),
            candidate("a", Some("own"), 10),
            candidate("0", None, 5),
        ];
        let of = |mark| ids(of_the_write(&candidates, Some(mark), None));
        assert_eq!(of("own").unwrap(), ["b", "a"]);
        assert_eq!(of("other").unwrap(), ["c"]);
        assert!(of("none").unwrap_err().contains("no other version"));
        // What stands for a write without a mark is never one.
        assert!(of("etag 0").is_err());
    }

    #[test]
    fn without_a_mark_there_is_one_write_and_it_is_of_this_volume() {
        let own = [
            candidate("b", Some("w"), 20),
            candidate("a", Some("w"), 10),
            candidate("0", None, 15),
        ];
        let of =
            |candidates: &[Candidate], since: Option<u64>| ids(of_the_write(candidates, None, since.map(at)));
        assert_eq!(of(&own, Some(5)).unwrap(), ["b", "a"]);
        assert!(of(&own, None).unwrap_err().contains("since when"));
        // Of a volume that was there before, in the very second too.
        assert!(of(&own, Some(20)).unwrap_err().contains("another volume"));
        assert!(of(&own[2..], Some(5)).unwrap_err().contains("no other version"));
        let two = [candidate("b", Some("w"), 20), candidate("a", Some("v"), 10)];
        assert!(of(&two, Some(5)).unwrap_err().contains("several writes"));
        assert_eq!(
            of(&two, Some(10)).unwrap(),
            ["b"],
            "the other one is of a volume before"
        );
    }
}

//! Copies of objects, with what lies beside each: its check values, and where its blocks were written first.

use std::collections::HashSet;

use futures::stream::{self, StreamExt, TryStreamExt};
use futures::try_join;
use serde::Serialize;

use super::original::Needed;
use super::stopped;
use crate::base::control::{Control, Phase};
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::format::object_names::{cno_of, is_summary, name_of};
use crate::index::{checksums, origins};
use crate::lease::Holding;
use crate::store::copy::{Copied, Over};
use crate::store::interceptors::window_checksums::has_checksums;
use crate::store::sums::{self, Sums};
use crate::store::{ObjectInfo, Store};

/// Objects looked at at once.
const LOOKS_AT_ONCE: usize = 32;
/// Objects copied at once.
const COPIES_AT_ONCE: usize = 8;

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// Objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that passed through here and were compared with their check values.
    pub verified_bytes: u64,
    /// Bytes that passed through here and have no check values: their objects are as long as their originals.
    pub unverified_bytes: u64,
    /// Bytes that the store copied itself, with their check values; each copy is of the very write that was looked at.
    pub copied_by_store_bytes: u64,
}

impl Amount {
    pub(super) fn add(&mut self, other: &Self) {
        self.objects += other.objects;
        self.bytes += other.bytes;
        self.verified_bytes += other.verified_bytes;
        self.unverified_bytes += other.unverified_bytes;
        self.copied_by_store_bytes += other.copied_by_store_bytes;
    }
}

/// What was copied, and how that ended.
pub(super) struct Outcome {
    pub amount: Amount,
    pub end: Result<(), VolumeError>,
}

/// Copies from one container to another, under the same names.
pub(crate) struct Copies<'a> {
    pub from: &'a Store,
    pub to: &'a Store,
    pub control: &'a Control,
    pub holding: Holding<'a>,
}

/// An object that was looked at in both places.
struct Seen {
    object: u64,
    original: ObjectInfo,
    /// What is in the replica's place.
    there: Option<ObjectInfo>,
}

impl Copies<'_> {
    /// Copies what is not there yet.
    pub(super) async fn all(&self, needed: &Needed) -> Outcome {
        let mut amount = Amount::default();
        let end = self.each(needed, &mut amount).await;
        Outcome { amount, end }
    }

    async fn each(&self, needed: &Needed, amount: &mut Amount) -> Result<(), VolumeError> {
        let looks = stream::iter(needed.objects.iter().copied()).map(|object| self.look_at(object));
        let mut seen: Vec<Seen> = looks.buffer_unordered(LOOKS_AT_ONCE).try_collect().await?;
        let firsts = stream::iter(needed.first_objects.iter()).map(|firsts| self.look_at_first(firsts));
        let firsts: Vec<Option<Seen>> = firsts.buffer_unordered(LOOKS_AT_ONCE).try_collect().await?;
        let known: HashSet<u64> = seen.iter().map(|seen| seen.object).collect();
        seen.extend(
            firsts
                .into_iter()
                .flatten()
                .filter(|seen| !known.contains(&seen.object)),
        );
        let with_origins = self.with_origins(&seen).await?;
        let total_bytes = seen.iter().map(|seen| seen.original.size_bytes).sum();
        self.control.begin(Phase::Copying, total_bytes);
        let copies = stream::iter(seen).map(|seen| {
            let has_origins = with_origins.contains(&seen.object);
            self.copy(seen, has_origins)
        });
        let mut copies = copies.buffer_unordered(COPIES_AT_ONCE);
        let mut settled_bytes = 0;
        while let Some((len_bytes, one)) = copies.try_next().await? {
            amount.add(&one);
            settled_bytes += len_bytes;
            self.control.settle(settled_bytes);
            self.control.add_data(one.bytes);
        }
        Ok(())
    }

    async fn look_at(&self, object: u64) -> Result<Seen, VolumeError> {
        let seen = self.look_for(object).await?;
        seen.ok_or_else(|| self.wrong(object, "the object is missing"))
    }

    async fn look_at_first(&self, objects: &[u64; 2]) -> Result<Option<Seen>, VolumeError> {
        for object in objects.iter().rev() {
            if let Some(seen) = self.look_for(*object).await? {
                return Ok(Some(seen));
            }
        }
        Ok(None)
    }

    /// Looks at an object in both places.
    async fn look_for(&self, object: u64) -> Result<Option<Seen>, VolumeError> {
        stopped(self.control)?;
        let (holder, name) = (self.from.holder_of(cno_of(object)), name_of(object));
        let (source, target) = (holder.data_key(&name), self.to.data_key(&name));
        let (original, there) = try_join!(holder.head(&source), self.to.head(&target))?;
        Ok(original.map(|original| Seen {
            object,
            original,
            there,
        }))
    }

    /// Which of the objects have origins that are not there yet.
    async fn with_origins(&self, seen: &[Seen]) -> Result<HashSet<u64>, VolumeError> {
        if !seen.iter().any(|seen| origins::may_have(seen.object)) {
            return Ok(HashSet::new());
        }
        let mut listed = origins::listed(self.from).await?;
        for part in self.from.lineage().inherited() {
            listed.extend(origins::listed(&part.store).await?);
        }
        let there = origins::listed(self.to).await?;
        listed.retain(|object| !there.contains(object));
        Ok(listed)
    }

    /// Copies an object, unless it is there. Returns its length and what was copied. What was seen there may be of long ago, so nothing is
    /// replaced, and nothing put once the place is somebody else's.
    async fn copy(&self, seen: Seen, has_origins: bool) -> Result<(u64, Amount), VolumeError> {
        stopped(self.control)?;
        let Seen {
            object,
            original,
            there,
        } = seen;
        let len_bytes = original.size_bytes;
        let (holder, name) = (self.from.holder_of(cno_of(object)), name_of(object));
        let (source, target) = (holder.data_key(&name), self.to.data_key(&name));
        let mut amount = Amount::default();
        let sums = holder.sums_of(&source, &original).await?;
        let copied = match there {
            Some(copy) if sums::may_be_copies(&original, &copy) => Copied { original, copy },
            Some(_) => return Err(self.other(object)),
            None => {
                amount = self.amount_of(&holder, &original, sums.is_some());
                self.holding.ensure(self.to).await?;
                let copied = self
                    .to
                    .copy_known(&holder, &source, &target, original, Over::Nothing)
                    .await;
                match copied {
                    Err(e) if e.kind == StoreErrorKind::PreconditionFailed => {
                        self.holding.ensure(self.to).await?;
                        // Otherwise it is the original that was put back meanwhile, by a repair.
                        return match self.to.head(&target).await? {
                            Some(_) => Err(self.other(object)),
                            None => Err(e.into()),
                        };
                    }
                    copied => copied?,
                }
            }
        };
        self.put_beside(object, &copied, sums.as_deref(), has_origins)
            .await?;
        Ok((len_bytes, amount))
    }

    /// Copies an object that is damaged or missing there, with what lies beside it.
    pub async fn put_back(&self, object: u64, original: ObjectInfo, over: Over) -> Result<(), VolumeError> {
        let (holder, name) = (self.from.holder_of(cno_of(object)), name_of(object));
        let (source, target) = (holder.data_key(&name), self.to.data_key(&name));
        let sums = holder.sums_of(&source, &original).await?;
        // To look at the original may have taken long.
        self.holding.ensure(self.to).await?;
        let copied = self
            .to
            .copy_known(&holder, &source, &target, original, over)
            .await?;
        self.put_beside(object, &copied, sums.as_deref(), origins::may_have(object))
            .await
    }

    /// Makes a version of an object of `to`, which is `from` too, the newest one again, with what lies beside it.
    pub async fn put_back_version(
        &self,
        object: u64,
        version: &str,
        original: &ObjectInfo,
        over: Over,
    ) -> Result<(), VolumeError> {
        let key = self.to.data_key(&name_of(object));
        let sums = self.to.sums_of(&key, original).await?;
        // To look at the version may have taken long.
        self.holding.ensure(self.to).await?;
        let copied = self.to.copy_version(&key, version, original, over).await?;
        self.put_beside(object, &copied, sums.as_deref(), false).await
    }

    /// Puts beside a copy what lies beside its original.
    async fn put_beside(
        &self,
        object: u64,
        copied: &Copied,
        sums: Option<&Sums>,
        has_origins: bool,
    ) -> Result<(), VolumeError> {
        let (holder, name) = (self.from.holder_of(cno_of(object)), name_of(object));
        if let Some(sums) = sums {
            let sums = Sums {
                write: sums::write_of(&copied.copy),
                ..sums.clone()
            };
            self.holding
                .put(self.to, &sums::key(self.to, &name), sums.encode())
                .await?;
            self.to.forget_sums(&name);
        }
        if is_summary(object) {
            let (of, copy) = (&copied.original.etag, &copied.copy.etag);
            if let Some(body) = checksums::carried(&holder, &name, of, copy).await? {
                self.holding
                    .put(self.to, &checksums::key(self.to, &name), body)
                    .await?;
            }
        }
        if has_origins && let Some((body, _)) = holder.get(&origins::key(&holder, object)).await? {
            self.holding
                .put(self.to, &origins::key(self.to, object), body)
                .await?;
        }
        Ok(())
    }

    fn amount_of(&self, holder: &Store, original: &ObjectInfo, has_sums: bool) -> Amount {
        let bytes = original.size_bytes;
        let mut amount = Amount {
            objects: 1,
            bytes,
            ..Amount::default()
        };
        let of_its_kind = match (self.to.copies_itself(holder), has_checksums(original) || has_sums) {
            (true, _) => &mut amount.copied_by_store_bytes,
            (false, true) => &mut amount.verified_bytes,
            (false, false) => &mut amount.unverified_bytes,
        };
        *of_its_kind = bytes;
        amount
    }

    fn other(&self, object: u64) -> VolumeError {
        let reason = format!(
            "what {} has of this name is another object: it is of another history of the volume; replicate into another place, or delete \
             the replica first",
            self.to.url
        );
        self.wrong(object, &reason)
    }

    fn wrong(&self, object: u64, reason: &str) -> VolumeError {
        VolumeError::Corrupt {
            what: format!("the object {} of {}", name_of(object), self.from.url),
            reason: reason.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;
    use crate::base::url::VolumeUrl;
    use crate::meta::label;
    use crate::options::StoreOptions;
    use crate::store::interceptors::window_checksums::CheckValues;
    use crate::store::{Frames, connect_for_create};

    const BYTES: &[u8] = b"of the original";
    /// The second part of checkpoint 7.
    const OBJECT: u64 = 7 << 32 | 2;

    async fn store(dir: &tempfile::TempDir, name: &str) -> Store {
        let url = VolumeUrl::parse(&format!("file://{}/{name}/", dir.path().display())).unwrap();
        connect_for_create(&url, &StoreOptions::default()).await.unwrap()
    }

    fn is_interfered<R>(result: Result<R, VolumeError>) -> bool {
        matches!(result, Err(VolumeError::Interfered { .. }))
    }

    /// The replica is deleted, and another volume made there, between the look at an object and its copy, or between the copy and what
    /// lies beside it.
    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_is_put_into_a_volume_that_was_made_there_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (store(&dir, "from").await, store(&dir, "to").await);
        let name = name_of(OBJECT);
        from.put(&from.data_key(&name), BYTES).await.unwrap();
        label::make(&to, InodeCheck::from_bits(1)).await.unwrap();
        let control = Control::default();
        let copies = Copies {
            from: &from,
            to: &to,
            control: &control,
            holding: Holding::by_label(&to).await.unwrap(),
        };
        let look = async || copies.look_for(OBJECT).await.unwrap().unwrap();
        let (before, again) = (look().await, look().await);
        copies.copy(before, false).await.unwrap();
        let original = again.original.clone();
        let copied = Copied {
            copy: to.head(&to.data_key(&name)).await.unwrap().unwrap(),
            original,
        };
        let sums = Sums {
            write: "w".into(),
            object_bytes: BYTES.len() as u64,
            values: CheckValues::of(&Frames::take(BYTES)),
        };
        let beside = async || copies.put_beside(OBJECT, &copied, Some(&sums), false).await;
        // Over nothing, and over what is the replica's own.
        beside().await.unwrap();
        beside().await.unwrap();
        for key in [to.data_key(&name), to.meta_key(label::NAME)] {
            to.delete(&key).await.unwrap();
        }
        label::make(&to, InodeCheck::from_bits(2)).await.unwrap();
        let key = sums::key(&to, &name);
        to.put(&key, &b"of the other volume"[..]).await.unwrap();
        assert!(is_interfered(copies.copy(again, false).await));
        assert!(to.head(&to.data_key(&name)).await.unwrap().is_none());
        assert!(is_interfered(beside().await));
        assert_eq!(to.get(&key).await.unwrap().unwrap().0, "of the other volume");
    }
}

//! The objects of a container, copied to where another one has them.

use std::collections::{BTreeMap, BTreeSet};

use futures::stream::{self, StreamExt, TryStreamExt};
use futures::try_join;
use log::info;

use crate::base::control::Control;
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::format::object_names::{cno_of, is_summary, name_of};
use crate::index::checksums;
use crate::lease::Holding;
use crate::meta::label;
use crate::read::read_path::Reads;
use crate::store::Store;
use crate::store::copy::{Copied, Over};
use crate::store::sums::{self, Sums};

/// Objects copied at once.
const COPIES_AT_ONCE: usize = 16;
/// Objects copied at once while clients are served.
const BESIDE_AT_ONCE: usize = 2;

/// How copies are made.
#[derive(Clone, Copy)]
pub(crate) struct Manner<'a> {
    /// What the place of the copies is held by.
    pub holding: Holding<'a>,
    /// Reads of clients, which go before the copies.
    pub beside: Option<&'a Reads>,
    /// Ends it between two objects.
    pub control: &'a Control,
}

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    /// Objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Copies these objects, which the container of `from` has or has inherited, to the container of `to`, under the same names and with
/// their check values. One that is there and carries the original's mark was copied before. What comes to be there meanwhile is never
/// replaced: this may be stopped for long, and another volume be made at that place. With the lease of `to`, what was there before is
/// replaced, as long as the lease is held; with a label nothing more is copied once that is gone. What lies beside the copies is put so, too.
///
/// # Errors
/// When a store fails; when an object is missing; [`VolumeError::Closed`] when it was told to stop; [`VolumeError::Interfered`] when something is there that was not copied here.
pub(crate) async fn copy_objects(
    from: &Store,
    objects: &BTreeSet<u64>,
    to: &Store,
    manner: Manner<'_>,
) -> Result<Amount, VolumeError> {
    let listed = to.list(&to.data_key("")).await?;
    let there: BTreeMap<String, u64> = listed
        .into_iter()
        .map(|entry| (entry.key, entry.size_bytes))
        .collect();
    let copies: Vec<_> = objects
        .iter()
        .map(|&object| copy_in_turn(from, object, to, &there, manner))
        .collect();
    let at_once = match manner.beside {
        Some(_) => BESIDE_AT_ONCE,
        None => COPIES_AT_ONCE,
    };
    let copied: Vec<Amount> = stream::iter(copies)
        .buffer_unordered(at_once)
        .try_collect()
        .await?;
    let all = copied.into_iter().fold(Amount::default(), |all, one| Amount {
        objects: all.objects + one.objects,
        bytes: all.bytes + one.bytes,
    });
    info!(
        "copied {} objects with {} bytes to {}",
        all.objects, all.bytes, to.url
    );
    Ok(all)
}

async fn copy_in_turn(
    from: &Store,
    object: u64,
    to: &Store,
    there: &BTreeMap<String, u64>,
    manner: Manner<'_>,
) -> Result<Amount, VolumeError> {
    let turn = match manner.beside {
        Some(reads) => Some(reads.background_turn().await),
        None => None,
    };
    if manner.control.is_stopped() {
        return Err(VolumeError::Closed);
    }
    let copied = copy_object(from, object, to, there, manner.holding).await;
    drop(turn);
    copied
}

async fn copy_object(
    from: &Store,
    object: u64,
    to: &Store,
    there: &BTreeMap<String, u64>,
    holding: Holding<'_>,
) -> Result<Amount, VolumeError> {
    let holder = from.holder_of(cno_of(object));
    let name = name_of(object);
    let (source, target) = (holder.data_key(&name), to.data_key(&name));
    let missing = || VolumeError::Corrupt {
        what: format!("the object {name} of {}", holder.url),
        reason: "the object is missing".into(),
    };
    let (copied, amount) = match copied_before(&holder, &source, to, &target, there).await? {
        Some(copied) => (copied, Amount::default()),
        None => {
            let original = holder.head(&source).await?.ok_or_else(missing)?;
            let over = match holding {
                Holding::Lease(_) if there.contains_key(&target) => Over::Anything,
                Holding::Lease(_) | Holding::Label(_) => Over::Nothing,
            };
            // Over nothing a lease need not be looked at: it is before the copies are made use of.
            if over == Over::Anything || matches!(holding, Holding::Label(_)) {
                holding.ensure(to).await?;
            }
            let copied = to.copy_known(&holder, &source, &target, original, over).await;
            let copied = copied.map_err(|e| match e.kind {
                StoreErrorKind::PreconditionFailed if over == Over::Nothing => label::interfered(to),
                _ => e.into(),
            })?;
            let bytes = copied.original.size_bytes;
            (copied, Amount { objects: 1, bytes })
        }
    };
    let Copied { original, copy } = &copied;
    if let Some(sums) = holder.sums_of(&source, original).await? {
        let sums = Sums {
            write: sums::write_of(copy),
            ..(*sums).clone()
        };
        holding.put(to, &sums::key(to, &name), sums.encode()).await?;
        to.forget_sums(&name);
    }
    if is_summary(object)
        && let Some(body) = checksums::carried(&holder, &name, &original.etag, &copy.etag).await?
    {
        holding.put(to, &checksums::key(to, &name), body).await?;
    }
    Ok(amount)
}

/// A copy that is there since an attempt before this one.
async fn copied_before(
    holder: &Store,
    source: &str,
    to: &Store,
    target: &str,
    there: &BTreeMap<String, u64>,
) -> Result<Option<Copied>, VolumeError> {
    if !there.contains_key(target) {
        return Ok(None);
    }
    let (original, copy) = try_join!(holder.head(source), to.head(target))?;
    let both = original.zip(copy);
    let both = both.filter(|(original, copy)| sums::is_copy(original, copy));
    Ok(both.map(|(original, copy)| Copied { original, copy }))
}

//! What changed between two checkpoints, in bytes.

use futures::{join, try_join};
use serde::Serialize;

use super::At;
use super::list::{Point, find};
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::engine::parents;
use crate::index::diff;
use crate::options::StoreOptions;
use crate::retention::Reading;
use crate::store::Store;

/// What a changed range holds at the later of two checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangeKind {
    /// Data.
    Data,
    /// Zeros.
    Zero,
}

/// A range that reads differently at two checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Changed {
    /// Where it starts, in bytes from the volume's start.
    pub offset_bytes: u64,
    /// Its length in bytes, never 0.
    pub len_bytes: u64,
    /// What it holds at the second checkpoint.
    pub kind: ChangeKind,
}

/// The ranges, in whole blocks, that read differently at `to` than at `from`, ascending. They may include blocks that
/// were moved without being changed, and they include every block that differs. Bytes past the size of `to` are left
/// out.
///
/// # Errors
/// As [`find`]; when an index cannot be read.
pub async fn diff(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    from: &At,
    to: &At,
) -> Result<Vec<Changed>, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let (from, to) = try_join!(find(&store, Some(from)), find(&store, Some(to)))?;
    between(&store, &from, &to).await
}

/// As [`diff`], for checkpoints that were already found.
///
/// # Errors
/// As [`diff`].
pub(crate) async fn between(store: &Store, from: &Point, to: &Point) -> Result<Vec<Changed>, VolumeError> {
    let readings = try_join!(Reading::begin(store, from.id()), Reading::begin(store, to.id()))?;
    let changed = compare(store, from, to).await;
    join!(readings.0.end(), readings.1.end());
    changed
}

async fn compare(store: &Store, from: &Point, to: &Point) -> Result<Vec<Changed>, VolumeError> {
    let block_size = u64::from(to.block_size_bytes);
    let size_bytes = to.size_bytes();
    let mut changed = Vec::new();
    let compared = diff::changes(store, &from.state, &to.state, |blocks, is_data| {
        let (start, end) = (
            blocks.start * block_size,
            (blocks.end * block_size).min(size_bytes),
        );
        if start < end {
            changed.push(Changed {
                offset_bytes: start,
                len_bytes: end - start,
                kind: if is_data {
                    ChangeKind::Data
                } else {
                    ChangeKind::Zero
                },
            });
        }
    });
    compared
        .await
        .map_err(|e| VolumeError::engine(format!("comparing checkpoints of {}", store.url), e))?;
    Ok(changed)
}

//! Reads a container's inode. It is checked, and refused when no writer can have made it.

use hyperfile::config::HyperFileMetaConfig;
use hyperfile::ondisk::InodeRaw;

use super::node;
use super::stored_state::StateId;
use crate::base::error::VolumeError;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::store::{ObjectInfo, Store};

/// Name of the inode's object.
pub(crate) const NAME: &str = "inode";
/// What stands in the place of an inode that was given up, so that whoever was making it cannot end that. There is no volume then.
pub(crate) const GIVEN_UP: &[u8] =
    b"This volume was given up before it was made. hypernbd delete removes what is left.\n";
const NS_A_SECOND: u32 = 1_000_000_000;
/// The largest size of a volume in bytes, because NBD counts in signed 64 bits.
const SIZE_MAX_BYTES: u64 = i64::MAX as u64;
/// The end of the last year with four digits, in seconds since 1970-01-01 UTC.
const YEAR_9999_S: u64 = 253_402_300_799;

/// Loads the stored inode, and what the store knows of its object.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is none, [`VolumeError::Corrupt`] when it is damaged.
pub(crate) async fn load(store: &Store) -> Result<(InodeRaw, ObjectInfo), VolumeError> {
    let key = store.data_key(NAME);
    let got = store.get_with_info(&key).await.map_err(|e| damaged(store, e))?;
    let Some((body, info)) = got.filter(|(body, _)| body != GIVEN_UP) else {
        return Err(VolumeError::NotFound {
            url: store.url.to_string(),
        });
    };
    let raw = decode(&body).map_err(|reason| corrupt(store, reason))?;
    Ok((raw, info))
}

/// Decodes the inode from an object's bytes.
///
/// # Errors
/// A text that says what is wrong.
pub(crate) fn decode(body: &[u8]) -> Result<InodeRaw, String> {
    let mut raw = InodeRaw::default();
    let slot = raw.as_mut_u8_slice();
    if body.len() != slot.len() {
        return Err(format!("it has {} bytes instead of {}", body.len(), slot.len()));
    }
    slot.copy_from_slice(body);
    check(&raw)?;
    Ok(raw)
}

/// When the inode was last written, in milliseconds since 1970-01-01 UTC, by its writer's clock.
pub(crate) fn modified_ms(raw: &InodeRaw) -> u64 {
    StateId::of_inode(raw).modified_ms()
}

/// Size of a data block, in bytes.
///
/// # Errors
/// When the inode names no known format.
pub(crate) fn block_size_bytes(raw: &InodeRaw) -> Result<u32, String> {
    let meta = HyperFileMetaConfig::try_from_u32(raw.i_meta_config).map_err(|e| e.to_string())?;
    u32::try_from(meta.data_block_size).map_err(|e| e.to_string())
}

fn check(raw: &InodeRaw) -> Result<(), String> {
    HyperFileMetaConfig::try_from_u32(raw.i_meta_config).map_err(|e| e.to_string())?;
    raw.check_counters().map_err(|e| e.to_string())?;
    if raw.is_inline() {
        return Err("it is that of a small file, which has no blocks".into());
    }
    if raw.i_size > SIZE_MAX_BYTES {
        return Err(format!("it claims a size of {} bytes", raw.i_size));
    }
    for ns in [raw.i_atime_nsec, raw.i_ctime_nsec, raw.i_mtime_nsec] {
        if ns >= NS_A_SECOND {
            return Err(format!("one of its times has {ns} nanoseconds"));
        }
    }
    // Code that converts these times, for instance to milliseconds, relies on this range.
    if raw.i_mtime > YEAR_9999_S {
        return Err(format!("it was changed {} s after 1970", raw.i_mtime));
    }
    node::check_root(&raw.i_bmap)
        .map_err(|reason| format!("the root of the index in it is damaged: {reason}"))
}

fn corrupt(store: &Store, reason: String) -> VolumeError {
    VolumeError::Corrupt {
        what: format!("the inode of the volume at {}", store.url),
        reason,
    }
}

fn damaged(store: &Store, e: StoreError) -> VolumeError {
    match e.kind {
        StoreErrorKind::Corrupt => corrupt(store, e.detail),
        _ => e.into(),
    }
}

#[cfg(test)]
mod tests {
    use hyperfile::config::HyperFileMetaConfig;

    use super::*;

    #[test]
    fn an_inode_that_no_writer_makes_is_refused() {
        let good = InodeRaw {
            i_meta_config: HyperFileMetaConfig::default().as_u32(),
            i_size: 1 << 40,
            i_last_seq: 9,
            i_last_cno: 8,
            ..InodeRaw::default()
        };
        assert!(decode(good.as_u8_slice()).is_ok());
        type Damage = fn(&mut InodeRaw);
        let wrong: [(&str, Damage); 8] = [
            ("format", |raw| raw.i_meta_config ^= 0xFF),
            ("past", |raw| raw.i_last_cno = 10),
            ("counter", |raw| raw.i_last_seq |= 1 << 40),
            ("small file", |raw| raw.i_flags |= InodeRaw::FLAG_INLINE),
            ("size", |raw| raw.i_size |= 1 << 63),
            ("nanoseconds", |raw| raw.i_mtime_nsec = 1 << 31),
            ("after 1970", |raw| raw.i_mtime |= 1 << 62),
            ("root", |raw| raw.i_bmap[0..2].fill(0xFF)),
        ];
        for (why, damage) in wrong {
            let mut raw = good;
            damage(&mut raw);
            let found = decode(raw.as_u8_slice()).unwrap_err();
            assert!(found.contains(why), "{found}");
        }
        assert!(
            decode(&good.as_u8_slice()[1..])
                .unwrap_err()
                .contains("159 bytes")
        );
    }
}

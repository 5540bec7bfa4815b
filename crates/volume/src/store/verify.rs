//! Reads a part of an object, and tells what of it cannot be used, as closely as its check values tell that.

use std::ops::Range;

use super::Store;
use super::interceptors::window_checksums::{WIDE_WINDOW_BYTES, WINDOW_BYTES, has_checksums};
use crate::base::store_error::{StoreError, StoreErrorKind};

/// Bytes to verify with one request, whole windows.
pub(crate) const READ_BYTES: u64 = 32 * WIDE_WINDOW_BYTES;

/// What is wrong with a part of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// The object is not there.
    Missing,
    /// The object ends before the part does.
    Short,
    /// It is not what was written, or is of another object.
    Damaged,
}

/// A part of an object that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BadPart {
    /// Which part, in bytes of the object.
    pub bytes: Range<u64>,
    /// What is wrong with it.
    pub wrong: Wrong,
    /// The same in words.
    pub reason: String,
}

/// What came of verifying a part of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verified {
    /// Whether there are check values to compare with.
    pub is_checked: bool,
    /// What of it cannot be used, ascending.
    pub bad: Vec<BadPart>,
}

/// What came of one request: whether there are check values, and what is wrong.
type Attempt = (bool, Option<(Wrong, String)>);

impl Store {
    /// Reads a part of an object, which begins at a whole window and holds whole windows as far as the object reaches, and compares it
    /// with its check values; where something is wrong with it, window by window. Nothing is remembered of the bytes.
    ///
    /// # Errors
    /// When the store fails. What is wrong with the object is no error.
    pub(crate) async fn verify(&self, key: &str, bytes: &Range<u64>) -> Result<Verified, StoreError> {
        let (is_checked, wrong) = self.verify_once(key, bytes).await?;
        let mut bad = Vec::new();
        match wrong {
            None => {}
            Some((Wrong::Missing, reason)) => bad.push(BadPart {
                bytes: bytes.clone(),
                wrong: Wrong::Missing,
                reason,
            }),
            Some(_) => bad = self.bad_windows(key, bytes).await?,
        }
        Ok(Verified { is_checked, bad })
    }

    async fn bad_windows(&self, key: &str, bytes: &Range<u64>) -> Result<Vec<BadPart>, StoreError> {
        let mut bad = Vec::new();
        // Objects of earlier releases have wide windows.
        for window_bytes in [WINDOW_BYTES, WIDE_WINDOW_BYTES] {
            for start in bytes.clone().step_by(window_bytes as usize) {
                let window = start..bytes.end.min(start + window_bytes);
                if let (_, Some((wrong, reason))) = self.verify_once(key, &window).await? {
                    bad.push(BadPart {
                        bytes: window,
                        wrong,
                        reason,
                    });
                }
            }
            if !bad.is_empty() {
                break;
            }
        }
        Ok(merged(bad))
    }

    async fn verify_once(&self, key: &str, bytes: &Range<u64>) -> Result<Attempt, StoreError> {
        let len_bytes = bytes.end - bytes.start;
        match self.get_within_info(key, bytes.start, len_bytes).await {
            Ok(Some((got, info))) => {
                let is_whole = got.len() as u64 == len_bytes;
                let short = || {
                    (
                        Wrong::Short,
                        format!("it ends within the bytes {} to {}", bytes.start, bytes.end - 1),
                    )
                };
                let is_checked = has_checksums(&info) || self.sums_of(key, &info).await?.is_some();
                Ok((is_checked, (!is_whole).then(short)))
            }
            Ok(None) => Ok((false, Some((Wrong::Missing, "it is not there".to_owned())))),
            Err(e) if e.kind == StoreErrorKind::Corrupt => Ok((true, Some((Wrong::Damaged, e.detail)))),
            Err(e) => Err(e),
        }
    }
}

/// Neighbours that are damaged in one way as one.
fn merged(bad: Vec<BadPart>) -> Vec<BadPart> {
    let mut all: Vec<BadPart> = Vec::new();
    for part in bad {
        match all.last_mut() {
            Some(before) if before.bytes.end == part.bytes.start && before.wrong == part.wrong => {
                before.bytes.end = part.bytes.end;
            }
            _ => all.push(part),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_are_damaged_in_one_way_are_one() {
        let part = |bytes: Range<u64>, wrong| BadPart {
            bytes,
            wrong,
            reason: "r".into(),
        };
        let bad = vec![
            part(0..16, Wrong::Damaged),
            part(16..32, Wrong::Damaged),
            part(32..48, Wrong::Short),
            part(64..80, Wrong::Short),
        ];
        let bytes: Vec<Range<u64>> = merged(bad).into_iter().map(|part| part.bytes).collect();
        assert_eq!(bytes, [0..32, 32..48, 64..80]);
    }
}

//! A volume as an image.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{Image, Port, Run, TransferError};
use crate::base::units::GIB;
use crate::volume::{ExtentKind, Volume};

/// How much of a volume is asked for at once what it has.
const EXTENTS_BYTES: u64 = 4 * GIB;

/// A volume as an image: the newest state of one that is open for writing, or what was opened of its past.
pub struct VolumeImage {
    volume: Arc<Volume>,
    /// Runs that are known, ascending.
    known: Mutex<std::collections::VecDeque<Run>>,
}

impl VolumeImage {
    /// Of this volume.
    pub fn new(volume: Arc<Volume>) -> Self {
        Self {
            volume,
            known: Mutex::default(),
        }
    }
}

impl Image for VolumeImage {
    fn size_bytes(&self) -> u64 {
        self.volume.size_bytes()
    }

    fn run_at(&self, offset_bytes: u64) -> Result<Run, TransferError> {
        let mut known = self.known.lock();
        while known.front().is_some_and(|run| run.end_bytes <= offset_bytes) {
            known.pop_front();
        }
        if known.is_empty() {
            let len_bytes = EXTENTS_BYTES.min(self.volume.size_bytes() - offset_bytes);
            for extent in self.volume.extents(offset_bytes, len_bytes, false)? {
                let run = Run {
                    end_bytes: extent.offset_bytes + extent.len_bytes,
                    is_data: extent.kind == ExtentKind::Data,
                };
                match known.back_mut() {
                    Some(last) if last.is_data == run.is_data => *last = run,
                    _ => known.push_back(run),
                }
            }
        }
        // It always tells something; if it did not, the bytes would be read.
        Ok(known.front().copied().unwrap_or(Run {
            end_bytes: u64::MAX,
            is_data: true,
        }))
    }

    fn port(&self) -> Result<Box<dyn Port + '_>, TransferError> {
        Ok(Box::new(VolumePort(&self.volume)))
    }
}

struct VolumePort<'a>(&'a Volume);

impl Port for VolumePort<'_> {
    fn read(&mut self, offset_bytes: u64, out: &mut [u8]) -> Result<(), TransferError> {
        Ok(self.0.read(offset_bytes, out)?)
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), TransferError> {
        Ok(self.0.write(offset_bytes, bytes, false)?)
    }

    fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), TransferError> {
        Ok(self.0.zero(offset_bytes, len_bytes, false)?)
    }
}

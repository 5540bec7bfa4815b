//! The kernel's NBD devices as files.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::error::AttachError;

const SETTLE_MAX: Duration = Duration::from_secs(10);
const SETTLE_POLL: Duration = Duration::from_millis(20);

/// The number of `/dev/nbd3`, `nbd3` or a link to it.
pub(crate) fn index(device: &str) -> Result<u32, AttachError> {
    let target = fs::canonicalize(device).ok();
    let target = target.as_deref().and_then(Path::to_str).unwrap_or(device);
    number(target.trim_start_matches("/dev/")).ok_or_else(|| AttachError::Device(device.to_owned()))
}

/// The number of `nbd3`. A partition is no device of its own here.
pub(crate) fn number(name: &str) -> Option<u32> {
    name.strip_prefix("nbd")?.parse().ok()
}

/// Its file.
pub(crate) fn path(index: u32) -> String {
    format!("/dev/nbd{index}")
}

/// The task that made it, if the kernel has a server for it: of a process that lives, or that is gone.
pub(crate) fn maker(index: u32) -> Option<u32> {
    let of = fs::read_to_string(format!("/sys/block/nbd{index}/pid")).ok()?;
    of.trim().parse().ok()
}

/// How many bytes the kernel says it has.
pub(crate) fn size(index: u32) -> Option<u64> {
    const UNIT: u64 = 512;
    let of = fs::read_to_string(format!("/sys/block/nbd{index}/size")).ok()?;
    of.trim().parse::<u64>().ok()?.checked_mul(UNIT)
}

/// Whether the kernel has a server for it.
pub(crate) fn is_connected(index: u32) -> bool {
    Path::new(&format!("/sys/block/nbd{index}/pid")).exists()
}

/// Keeps everybody else from mounting it, unless somebody has.
pub(crate) fn claim(index: u32) -> Result<File, AttachError> {
    let device = path(index);
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(&device);
    opened.map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => AttachError::InUse(device),
        _ => AttachError::File {
            path: device.into(),
            error,
        },
    })
}

/// Waits until the device is there, or is away.
pub(crate) fn settle(index: u32, is_there: bool) -> bool {
    let until = Instant::now() + SETTLE_MAX;
    while is_connected(index) != is_there || (is_there && !Path::new(&path(index)).exists()) {
        if Instant::now() >= until {
            return false;
        }
        thread::sleep(SETTLE_POLL);
    }
    true
}

/// Has udev look at it again, now that its state is written.
pub(crate) fn announce(index: u32) {
    if let Err(error) = fs::write(format!("/sys/block/nbd{index}/uevent"), "change") {
        log::warn!("udev cannot be told of {}: {error}", path(index));
    }
}

/// The block size for the kernel: the export's, as far as the kernel takes it.
pub(crate) fn block_size(
    blocks: Option<(u32, u32, u32)>,
    size: u64,
    wanted: Option<u32>,
) -> Result<u64, String> {
    const LEAST: u32 = 512;
    const MOST: u32 = 4096;
    let (least, best, _) = blocks.unwrap_or((1, LEAST, u32::MAX));
    if least > MOST {
        return Err(format!(
            "the server takes no blocks below {least} bytes, and the kernel uses none above {MOST}"
        ));
    }
    let chosen = match wanted {
        Some(wanted) if !wanted.is_power_of_two() || !(LEAST..=MOST).contains(&wanted) => {
            return Err(format!("a block size of {wanted} is not 512, 1024, 2048 or 4096"));
        }
        Some(wanted) if wanted < least => {
            return Err(format!("the server takes no blocks below {least} bytes"));
        }
        Some(wanted) => wanted,
        None => best.clamp(LEAST, MOST),
    };
    // What a last piece of a block holds would be out of reach.
    let fits = |block: u32| size.is_multiple_of(block.into());
    match (fits(chosen), wanted, fits(LEAST.max(least))) {
        (true, ..) => Ok(chosen.into()),
        (false, None, true) => Ok(LEAST.max(least).into()),
        _ => Err(format!("its {size} bytes are no multiple of the block size")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_understood() {
        assert_eq!(index("/dev/nbd12").unwrap(), 12);
        assert_eq!(index("nbd0").unwrap(), 0);
        for other in ["/dev/sda", "/dev/nbd0p1", "nbd", "0"] {
            assert!(index(other).is_err(), "{other}");
        }
    }

    #[test]
    fn the_block_size_is_the_exports_as_far_as_it_may_be() {
        let sizes = |least, best| Some((least, best, 1 << 25));
        assert_eq!(block_size(sizes(1, 65536), 1 << 20, None), Ok(4096));
        assert_eq!(block_size(sizes(1, 1), 1 << 20, None), Ok(512));
        assert_eq!(block_size(None, 1 << 20, None), Ok(512));
        assert_eq!(block_size(sizes(1, 4096), 4096 * 5 + 512, None), Ok(512));
        assert_eq!(block_size(sizes(1, 4096), 1 << 20, Some(512)), Ok(512));
        assert!(block_size(sizes(65536, 65536), 1 << 20, None).is_err());
        assert!(block_size(sizes(4096, 4096), 1 << 20, Some(512)).is_err());
        assert!(block_size(None, 1 << 20, Some(8192)).is_err());
        assert!(block_size(None, 100, None).is_err());
    }
}

//! What is known of a device while its relay lives: its link, and its size, which grows with the export's.

use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::error::AttachError;
use crate::relay::Owner;
use crate::state::{Attached, Directory, now};

pub(crate) const STACK_BYTES: usize = 256 << 10;

/// Gives a device a size in bytes; an error is what hinders that, in words.
pub(crate) type Resize = dyn Fn(&Attached, u64) -> Result<(), String> + Send + Sync;

/// What is known of the device and of its link, each of which a thread of its own hears of first.
struct Entry {
    dir: Directory,
    attached: Option<Attached>,
    /// Why there is no link.
    lost: Option<String>,
    looks: u64,
    block_size: u64,
    /// What the export has, in whole blocks.
    export_size: u64,
    /// Whether a thread gives the device another size.
    is_growing: bool,
}

impl Entry {
    fn write(&mut self) -> Result<(), AttachError> {
        let Some(attached) = &mut self.attached else {
            return Ok(());
        };
        attached.note_link(self.lost.as_deref(), now());
        attached.export_size = Some(self.export_size);
        attached.looks = self.looks;
        self.dir.write(attached)
    }

    fn write_or_say(&mut self) {
        if let Err(error) = self.write() {
            log::warn!("{error}");
        }
    }

    /// The device that is smaller than its export, and the size for it.
    fn growth(&self) -> Option<(Attached, u64)> {
        let attached = self.attached.as_ref()?;
        (attached.size < Some(self.export_size)).then(|| (attached.clone(), self.export_size))
    }

    /// The device has another size, or none of it.
    fn has_grown(&mut self, size: u64, grown: Result<(), String>) {
        let Some(attached) = &mut self.attached else {
            return;
        };
        match grown {
            Ok(()) => {
                log::warn!("{} has {size} bytes now", attached.device);
                (attached.size, attached.not_grown) = (Some(size), None);
            }
            Err(why) => {
                log::error!(
                    "{} does not grow to the {size} bytes of its export: {why}",
                    attached.device
                );
                attached.not_grown = Some(why);
            }
        }
        self.write_or_say();
    }
}

/// Keeps the file of a device, has it grow, and detaches it when told to end.
#[derive(Clone)]
pub(crate) struct DeviceOwner {
    entry: Arc<Mutex<Entry>>,
    resize: Arc<Resize>,
}

impl DeviceOwner {
    /// Knows of no device yet: of an export of this size alone, and of the device's blocks.
    pub(crate) fn new(dir: Directory, size: u64, block_size: u64, resize: Arc<Resize>) -> Self {
        let entry = Entry {
            dir,
            attached: None,
            lost: None,
            looks: 0,
            block_size,
            export_size: size - size % block_size,
            is_growing: false,
        };
        Self {
            entry: Arc::new(Mutex::new(entry)),
            resize,
        }
    }

    fn known(&self) -> MutexGuard<'_, Entry> {
        self.entry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device is there. Its link may have been lost, and its export grown, before.
    pub(crate) fn begin(&self, attached: Attached) -> Result<(), AttachError> {
        let mut entry = self.known();
        entry.attached = Some(attached);
        entry.write()?;
        self.grow(&mut entry);
        Ok(())
    }

    /// The device is gone: its file is not written any more.
    pub(crate) fn end(&self) {
        self.known().attached = None;
    }

    /// The export's size was seen, or this hinders it. What the kernel refused is tried again.
    fn seen(&self, entry: &mut Entry, obstacle: Option<&str>) {
        entry.looks += 1;
        if let Some(attached) = &mut entry.attached {
            attached.not_grown = obstacle.map(str::to_owned);
        }
        entry.write_or_say();
        self.grow(entry);
    }

    /// Has a device grow that is smaller than its export: in a thread of its own, for the kernel may wait until all that is under way on the
    /// device is answered, which takes this relay. One at a time, so that an earlier size never comes after a later one.
    fn grow(&self, entry: &mut Entry) {
        let Some((_, size)) = entry.growth().filter(|_| !entry.is_growing) else {
            return;
        };
        let owner = self.clone();
        let thread = thread::Builder::new()
            .name("grow".to_owned())
            .stack_size(STACK_BYTES);
        match thread.spawn(move || owner.grow_on()) {
            Ok(_) => entry.is_growing = true,
            Err(error) => entry.has_grown(size, Err(format!("no thread can be started: {error}"))),
        }
    }

    /// Until there is nothing to do, or the kernel refuses. The next link tries again.
    fn grow_on(&self) {
        loop {
            let mut entry = self.known();
            let Some((attached, size)) = entry.growth() else {
                entry.is_growing = false;
                return;
            };
            drop(entry);
            let grown = (self.resize)(&attached, size);
            let mut entry = self.known();
            entry.is_growing = grown.is_ok();
            entry.has_grown(size, grown);
            if !entry.is_growing {
                return;
            }
        }
    }
}

impl Owner for DeviceOwner {
    fn link(&mut self, lost: Option<&str>) {
        let mut entry = self.known();
        entry.lost = lost.map(str::to_owned);
        match lost {
            None => self.seen(&mut entry, None),
            Some(_) => entry.write_or_say(),
        }
    }

    fn grown(&mut self, size: u64) {
        let mut entry = self.known();
        entry.export_size = entry.export_size.max(size - size % entry.block_size);
        self.grow(&mut entry);
    }

    fn looked(&mut self, obstacle: Option<&str>) {
        self.seen(&mut self.known(), obstacle);
    }

    /// By a process of its own, since that reads and writes the device, which only this one makes possible.
    fn told_to_end(&mut self) -> bool {
        let device = self
            .known()
            .attached
            .as_ref()
            .map(|attached| attached.device.clone());
        let Some(device) = device else { return true };
        log::info!("told to end: detaching {device}");
        let told = thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
            // This program, though its file may have been replaced since.
            let detach = Command::new("/proc/self/exe").args(["detach", &device]).output();
            match detach {
                Ok(output) if output.status.success() => {}
                Ok(output) => {
                    log::error!(
                        "the relay stays: {}",
                        String::from_utf8_lossy(&output.stderr).trim()
                    );
                }
                Err(error) => log::error!("the relay stays: 'hypernbd detach' cannot be run: {error}"),
            }
        });
        if let Err(error) = told {
            log::error!("the relay stays: {error}");
        }
        false
    }
}

/// Has nothing to keep.
pub(crate) struct SocketOwner;

impl Owner for SocketOwner {
    fn link(&mut self, _lost: Option<&str>) {}

    /// There is no device. Who stands for the kernel may use what is there now.
    fn grown(&mut self, size: u64) {
        log::warn!("the export has {size} bytes now");
    }

    fn looked(&mut self, _obstacle: Option<&str>) {}

    fn told_to_end(&mut self) -> bool {
        true
    }
}

#[cfg(test)]
#[path = "owner_tests.rs"]
mod tests;

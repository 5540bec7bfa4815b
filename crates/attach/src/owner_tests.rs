//! What stands in a device's file, and when the kernel is told of another size.

use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::*;

const BLOCK: u64 = 4096;

fn owner(
    dir: &Path,
    resize: impl Fn(&Attached, u64) -> Result<(), String> + Send + Sync + 'static,
) -> DeviceOwner {
    DeviceOwner::new(Directory::open(dir).unwrap(), BLOCK, BLOCK, Arc::new(resize))
}

fn attached() -> Attached {
    Attached {
        device: "/dev/nbd0".to_owned(),
        uri: "nbd://h".to_owned(),
        lock: "relay-1".to_owned(),
        size: Some(BLOCK),
        ..Attached::default()
    }
}

/// What the file says, once nobody gives the device another size.
fn settled(owner: &DeviceOwner) -> Attached {
    let until = Instant::now() + Duration::from_secs(60);
    while owner.known().is_growing {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(5));
    }
    owner.known().dir.list().remove(0)
}

/// The link may be lost before the kernel has said which device it made.
#[test]
fn what_is_known_first_of_a_link_stands_in_the_file_of_its_device() {
    let root = tempfile::tempdir().unwrap();
    let mut owner = owner(root.path(), |_, _| Err("it must not grow".to_owned()));
    owner.link(Some("killed"));
    owner.begin(attached()).unwrap();
    assert_eq!(settled(&owner).lost.as_deref(), Some("killed"));
    owner.link(None);
    let now = settled(&owner);
    assert_eq!((now.lost, now.looks, now.not_grown), (None, 1, None));
    // Its file is not made anew.
    owner.end();
    std::fs::remove_file(root.path().join("nbd0")).unwrap();
    owner.link(Some("killed"));
    assert!(owner.known().dir.list().is_empty());
}

#[test]
fn a_device_grows_by_whole_blocks_also_if_its_export_grew_before_it_was_there() {
    let root = tempfile::tempdir().unwrap();
    let mut owner = owner(root.path(), |attached, size| {
        assert_eq!((&*attached.device, size), ("/dev/nbd0", 3 * BLOCK));
        Ok(())
    });
    owner.grown(3 * BLOCK + 512);
    owner.begin(attached()).unwrap();
    let now = settled(&owner);
    assert_eq!((now.size, now.export_size), (Some(3 * BLOCK), Some(3 * BLOCK)));
}

#[test]
fn what_the_kernel_refuses_is_tried_again_with_the_next_link() {
    let root = tempfile::tempdir().unwrap();
    let tries = Mutex::new(0);
    let mut owner = owner(root.path(), move |_, _| {
        let mut tries = tries.lock().unwrap();
        *tries += 1;
        match *tries {
            1 => Err("it is\nbusy".to_owned()),
            _ => Ok(()),
        }
    });
    owner.begin(attached()).unwrap();
    owner.grown(2 * BLOCK);
    let now = settled(&owner);
    assert_eq!((now.size, now.export_size), (Some(BLOCK), Some(2 * BLOCK)));
    assert_eq!(now.not_grown.as_deref(), Some("it is busy"));
    owner.link(None);
    let now = settled(&owner);
    assert_eq!((now.size, now.not_grown), (Some(2 * BLOCK), None));
    // Looks are counted, also those that see nothing.
    owner.looked(Some("away"));
    let now = settled(&owner);
    assert_eq!((now.looks, now.not_grown.as_deref()), (2, Some("away")));
    owner.looked(None);
    let now = settled(&owner);
    assert_eq!((now.looks, now.not_grown), (3, None));
}

/// An earlier size that came later would cut off what a file system has made of the later one.
#[test]
fn sizes_are_given_one_after_the_other() {
    let root = tempfile::tempdir().unwrap();
    let (begun, begins) = channel();
    let (go, goes) = channel::<()>();
    let goes = Mutex::new(goes);
    let mut owner = owner(root.path(), move |_, size| {
        begun.send(size).unwrap();
        goes.lock().unwrap().recv().unwrap();
        Ok(())
    });
    owner.begin(attached()).unwrap();
    owner.grown(2 * BLOCK);
    let limit = Duration::from_secs(60);
    assert_eq!(begins.recv_timeout(limit), Ok(2 * BLOCK));
    // The relay goes on meanwhile.
    owner.grown(3 * BLOCK);
    owner.grown(4 * BLOCK);
    owner.link(None);
    assert!(begins.try_recv().is_err());
    go.send(()).unwrap();
    assert_eq!(begins.recv_timeout(limit), Ok(4 * BLOCK));
    go.send(()).unwrap();
    assert_eq!(settled(&owner).size, Some(4 * BLOCK));
    assert!(begins.try_recv().is_err());
}

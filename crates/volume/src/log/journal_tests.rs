//! The journal over a real directory: torn tails, damage, full disks' stand-ins, and what was recycled.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::log::record::{Content, Entry};

struct Fixture {
    dir: tempfile::TempDir,
    volume_id: Uuid,
}

impl Fixture {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            volume_id: Uuid::from_u128(42),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("deep/journal")
    }

    fn open(&self) -> Result<Journal, VolumeError> {
        Journal::open_blocking(self.path(), self.volume_id, None)
    }

    fn group(&self, sequence: u64, generation: u64, len: usize) -> EncodedGroup {
        let group = Group {
            is_seal: false,
            entries: vec![Entry {
                generation,
                offset_bytes: sequence * 10,
                content: Content::Data(vec![sequence as u8; len].into()),
            }],
            ..Group::seal(self.volume_id, 1, sequence)
        };
        EncodedGroup {
            sequence,
            newest_generation: generation,
            bytes: group.encode(),
        }
    }

    fn segment(&self, number: u64) -> PathBuf {
        self.path().join(format!("{number:010}.{SUFFIX}"))
    }

    /// Changes a byte of the segment.
    fn damage(&self, number: u64, at: u64) {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.segment(number))
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
}

fn sequences(journal: &Journal) -> Vec<u64> {
    journal.found.iter().map(|id| id.sequence).collect()
}

#[test]
fn records_are_found_again_in_order_and_their_numbers_go_on() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    assert_eq!(journal.first_sequence, 1);
    for n in 1..=5 {
        journal.inner.append(&f.group(n, n, 5000)).unwrap();
    }
    let id = journal.id().to_owned();
    drop(journal);
    let journal = f.open().unwrap();
    assert_eq!(journal.id(), id);
    assert_eq!(sequences(&journal), [1, 2, 3, 4, 5]);
    assert_eq!(journal.first_sequence, 6);
    let place = journal.places[&journal.found[2]];
    let Content::Data(bytes) = &journal.inner.read(place).unwrap().entries[0].content else {
        panic!("data")
    };
    assert_eq!(bytes[..], [3; 5000]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&f.path()), mode(&f.segment(1))), (0o700, 0o600));
}

#[test]
fn a_torn_tail_is_not_replayed_and_is_no_error() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    for n in 1..=3 {
        journal.inner.append(&f.group(n, 1, 5000)).unwrap();
    }
    drop(journal);
    f.damage(1, 2 * 8192 + 3000);
    assert_eq!(sequences(&f.open().unwrap()), [1, 2]);
    // Its header may be torn, too.
    f.damage(1, 2 * 8192 + 10);
    assert_eq!(sequences(&f.open().unwrap()), [1, 2]);
}

#[test]
fn damage_before_a_good_record_is_corruption() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    for n in 1..=3 {
        journal.inner.append(&f.group(n, 1, 5000)).unwrap();
    }
    drop(journal);
    f.damage(1, 8192 + 100);
    let error = f.open().unwrap_err();
    assert!(matches!(error, VolumeError::Corrupt { .. }));
    let text = error.to_string();
    assert!(
        text.contains("record 3") && text.contains("0000000001.log at byte 16384"),
        "{text}"
    );
}

#[test]
fn published_segments_are_written_again_and_a_full_journal_says_so() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    let group_bytes = 7 << 20;
    let mut next = 1;
    let full = loop {
        match journal.inner.append(&f.group(next, next, group_bytes)) {
            Ok(()) => next += 1,
            Err(e) => break e,
        }
    };
    assert!(
        full.to_string().contains("full until the next checkpoint"),
        "{full}"
    );
    assert_eq!(next, 2 * SEGMENTS_MAX as u64 + 1, "two to a segment");
    // The first two segments are published.
    journal.inner.segments.lock().trimmed = 4;
    journal.inner.append(&f.group(next, next, 3 << 20)).unwrap();
    drop(journal);
    let journal = f.open().unwrap();
    assert_eq!(journal.first_sequence, next + 1);
    assert!(!sequences(&journal).contains(&1), "written over");
    assert!(
        !sequences(&journal).contains(&2),
        "left over, with a lower number"
    );
    assert!(sequences(&journal).contains(&5));
    assert_eq!(fs::read_dir(f.path()).unwrap().count(), SEGMENTS_MAX + 1);
}

#[test]
fn a_torn_record_at_the_start_of_a_segment_written_again_is_no_error() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    for n in 1..=5 {
        journal.inner.append(&f.group(n, n, 7 << 20)).unwrap();
    }
    journal.inner.segments.lock().trimmed = 2;
    journal.inner.segments.lock().all[2].is_broken = true;
    journal.inner.append(&f.group(6, 6, 5000)).unwrap();
    drop(journal);
    f.damage(1, 300);
    let journal = f.open().unwrap();
    assert_eq!(sequences(&journal), [3, 4, 5]);
    assert_eq!(journal.first_sequence, 6);
}

#[test]
fn a_segment_that_failed_is_not_written_to_again() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    journal.inner.append(&f.group(1, 1, 1000)).unwrap();
    // A file that takes no writes, as a disk that fails.
    journal.inner.segments.lock().all[0].file = File::open(f.segment(1)).unwrap();
    assert!(journal.inner.append(&f.group(2, 1, 1000)).is_err());
    journal.inner.append(&f.group(2, 1, 1000)).unwrap();
    drop(journal);
    assert_eq!(sequences(&f.open().unwrap()), [1, 2]);
    assert!(f.segment(2).exists());
}

#[test]
fn a_segment_cut_short_while_it_was_made_is_passed_over() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    journal.inner.append(&f.group(1, 1, 1000)).unwrap();
    drop(journal);
    fs::write(f.segment(2), vec![0; 12345]).unwrap();
    let journal = f.open().unwrap();
    assert_eq!(sequences(&journal), [1]);
    journal.inner.append(&f.group(2, 2, 1000)).unwrap();
    assert!(f.segment(3).exists());
}

/// A disk's root has a directory of its own, and a server may have been killed while it made the label.
#[test]
fn a_journal_is_made_beside_what_is_nobodys() {
    let f = Fixture::new();
    fs::create_dir_all(f.path().join("lost+found")).unwrap();
    fs::write(f.path().join(NEW_LABEL), "{\"vers").unwrap();
    f.open().unwrap();
    f.open().unwrap();
}

#[test]
fn only_the_right_journal_is_opened() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    let text = f.open().unwrap_err().to_string();
    assert!(text.contains("another server has it open"), "{text}");
    let id = journal.id().to_owned();
    drop(journal);
    let other = Journal::open_blocking(f.path(), Uuid::from_u128(43), None)
        .unwrap_err()
        .to_string();
    assert!(
        other.contains(&Uuid::from_u128(42).to_string()) && other.contains(&Uuid::from_u128(43).to_string()),
        "{other}"
    );
    assert!(Journal::open_blocking(f.path(), f.volume_id, Some("another".into())).is_err());
    Journal::open_blocking(f.path(), f.volume_id, Some(id)).unwrap();
    let elsewhere = f.dir.path().join("elsewhere");
    assert!(Journal::open_blocking(elsewhere.clone(), f.volume_id, Some("x".into())).is_err());
    assert!(!elsewhere.exists(), "nothing is made where a journal should be");
    let error = Journal::open_blocking(f.dir.path().to_path_buf(), f.volume_id, None).unwrap_err();
    assert!(error.to_string().contains("other files"), "{error}");
}

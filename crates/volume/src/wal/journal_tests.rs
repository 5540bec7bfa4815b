//! The journal in a real directory: torn tails, damage, simulated full disks, and segments that are used again.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use super::*;
use crate::disk::tests::{Lack, Lacking, Noting};
use crate::wal::journal_label::NEW_LABEL;
use crate::wal::record::{Content, Entry, NONE_ACKNOWLEDGED};
use crate::wal::replay::Replay;

const LIMIT: Duration = Duration::from_secs(30);

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
        once_free(|| self.open_at_once())
    }

    fn open_at_once(&self) -> Result<Journal, VolumeError> {
        Journal::open_blocking(self.path(), self.volume_id, None, &RealDisk)
    }

    fn group(&self, sequence: u64, generation: u64, len: usize) -> EncodedGroup {
        let group = Record {
            is_seal: false,
            entries: vec![Entry {
                generation,
                offset_bytes: sequence * 10,
                content: Content::Data(vec![sequence as u8; len].into()),
            }],
            ..Record::seal(self.volume_id, 1, sequence)
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

/// What `open` gives once no other has the journal open. The processes that other tests start have the locks of this one until
/// they run a program of their own.
fn once_free(open: impl Fn() -> Result<Journal, VolumeError>) -> Result<Journal, VolumeError> {
    let started = Instant::now();
    loop {
        match open() {
            Err(e) if e.to_string().contains("another server has it open") && started.elapsed() < LIMIT => {
                std::thread::sleep(Duration::from_millis(1));
            }
            opened => return opened,
        }
    }
}

fn suspects(journal: &Journal) -> Vec<u64> {
    let suspects = journal.found.iter().filter(|id| journal.is_suspect(**id));
    suspects.map(|id| id.sequence).collect()
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
    let journal = f.open().unwrap();
    assert_eq!((sequences(&journal), suspects(&journal)), (vec![1, 3], vec![3]));
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
    journal.inner.trim(4, 5);
    journal.inner.append(&f.group(next, next, 3 << 20)).unwrap();
    drop(journal);
    let journal = f.open().unwrap();
    assert_eq!(journal.first_sequence, next + 1);
    assert!(!sequences(&journal).contains(&1), "written over");
    assert_eq!(suspects(&journal), [2], "left over, with a lower number");
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
    journal.inner.trim(2, 5);
    for segment in &mut journal.inner.segments.lock().all {
        segment.used_bytes = SEGMENT_BYTES;
    }
    journal.inner.append(&f.group(6, 6, 5000)).unwrap();
    drop(journal);
    f.damage(1, 300);
    let journal = f.open().unwrap();
    assert_eq!(sequences(&journal), [2, 3, 4, 5]);
    assert_eq!(suspects(&journal), [2]);
    assert_eq!(journal.first_sequence, 6);
}

/// Every record is published.
#[test]
fn a_torn_record_over_the_only_segment_is_no_error() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    for n in 1..=2 {
        journal.inner.append(&f.group(n, n, 7 << 20)).unwrap();
    }
    journal.inner.trim(2, 3);
    journal.inner.append(&f.group(3, 3, 5 << 20)).unwrap();
    drop(journal);
    f.damage(1, 300);
    let journal = f.open().unwrap();
    assert_eq!((sequences(&journal), suspects(&journal)), (vec![2], vec![2]));
}

#[test]
fn records_written_at_once_have_segments_of_their_own_and_numbers_ascend_in_each() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    let places = |n: u64| {
        let place = journal.inner.reserve(&f.group(n, 1, 100)).unwrap();
        (place.number, place.file, place.at)
    };
    let done = |number: u64| {
        let mut segments = journal.inner.segments.lock();
        let segment = segments.all.iter_mut().find(|s| s.number == number).unwrap();
        segment.is_busy = false;
    };
    let (a, _, at) = places(1);
    let (b, _, _) = places(2);
    assert_eq!((a, b, at), (1, 2, 0));
    done(b);
    assert_eq!((places(3).0, places(4).0), (2, 3));
    done(a);
    done(3);
    // Record 1 is tried again after records 2, 3 and 4.
    assert_eq!(places(5).0, 1);
    assert_eq!(places(1).0, 4);
}

#[test]
fn a_segment_that_failed_is_not_written_to_again() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    journal.inner.append(&f.group(1, 1, 1000)).unwrap();
    // A file that cannot be written stands for a disk that fails.
    journal.inner.segments.lock().all[0].file = Arc::new(File::open(f.segment(1)).unwrap());
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

/// The root of a file system has a directory `lost+found`, and a server may have been killed while it made the label.
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
    let text = f.open_at_once().unwrap_err().to_string();
    assert!(text.contains("another server has it open"), "{text}");
    let id = journal.id().to_owned();
    drop(journal);
    let open = |volume_id, expected_id: Option<&str>| {
        once_free(|| Journal::open_blocking(f.path(), volume_id, expected_id.map(String::from), &RealDisk))
    };
    let other = open(Uuid::from_u128(43), None).unwrap_err().to_string();
    assert!(
        other.contains(&Uuid::from_u128(42).to_string()) && other.contains(&Uuid::from_u128(43).to_string()),
        "{other}"
    );
    assert!(open(f.volume_id, Some("another")).is_err());
    open(f.volume_id, Some(id.as_str())).unwrap();
    let elsewhere = f.dir.path().join("elsewhere");
    assert!(Journal::open_blocking(elsewhere.clone(), f.volume_id, Some("x".into()), &RealDisk).is_err());
    assert!(!elsewhere.exists(), "nothing is made where a journal should be");
    let error = Journal::open_blocking(f.dir.path().to_path_buf(), f.volume_id, None, &RealDisk).unwrap_err();
    assert!(error.to_string().contains("other files"), "{error}");
}

#[test]
fn no_journal_is_made_or_opened_on_a_file_system_that_is_not_fit_for_one() {
    for lack in [
        Lack::Exclusion,
        Lack::Locks,
        Lack::DirSync,
        Lack::FileSync,
        Lack::Renaming,
    ] {
        let f = Fixture::new();
        let open = || once_free(|| Journal::open_blocking(f.path(), f.volume_id, None, &Lacking(lack)));
        let refused = |text: String| {
            assert!(text.contains("the file system of "), "{lack:?}: {text}");
            assert!(text.contains("another file system"), "{lack:?}: {text}");
        };
        refused(open().unwrap_err().to_string());
        assert_eq!(
            fs::read_dir(f.dir.path()).unwrap().count(),
            0,
            "{lack:?}: something was made"
        );
        // Every fault that can be found without making anything is reported on the terminal.
        let is_told = check_claimable(&f.path(), &Lacking(lack)).is_err();
        assert_eq!(
            is_told,
            !matches!(lack, Lack::FileSync | Lack::Renaming),
            "{lack:?}"
        );
        if lack == Lack::Renaming {
            continue;
        }
        let id = f.open().unwrap().id().to_owned();
        refused(open().unwrap_err().to_string());
        assert_eq!(f.open().unwrap().id(), id, "{lack:?}: what was there was changed");
    }
}

#[test]
fn a_label_that_names_no_volume_is_refused() {
    let f = Fixture::new();
    drop(f.open().unwrap());
    let label = f.path().join(LABEL);
    let text = fs::read_to_string(&label).unwrap();
    for wrong in ["", "../x", "/etc", "\\u001b[2J"] {
        fs::write(&label, text.replace(&f.volume_id.to_string(), wrong)).unwrap();
        let refused = f.open().unwrap_err().to_string();
        assert!(refused.contains("is no volume id"), "{refused}");
        assert!(!refused.contains('\u{1b}'), "{refused:?}");
    }
}

/// A server was killed after it made the directory and before it synced the parent directory.
#[test]
fn a_new_journal_in_a_directory_that_is_there_is_durable_with_its_parents() {
    let f = Fixture::new();
    fs::create_dir_all(f.path()).unwrap();
    let disk = Noting::default();
    Journal::open_blocking(f.path(), f.volume_id, None, &disk).unwrap();
    for parent in [f.dir.path().join("deep"), f.dir.path().to_path_buf()] {
        assert!(disk.has_synced(&parent), "{}", parent.display());
    }
}

/// On a network file system a lock on a directory may keep out only processes of this machine.
#[test]
fn the_label_is_locked_as_the_directory_is() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    let label = File::options().write(true).open(f.path().join(LABEL)).unwrap();
    label.try_lock().unwrap_err();
    drop(journal);
    let started = Instant::now();
    while label.try_lock().is_err() {
        assert!(started.elapsed() < LIMIT, "the label stays locked");
        std::thread::sleep(Duration::from_millis(1));
    }
    let refused = f.open_at_once().unwrap_err().to_string();
    assert!(refused.contains("another server has it open"), "{refused}");
    check_claimable(&f.path(), &RealDisk).unwrap_err();
    drop(label);
    f.open().unwrap();
}

#[test]
fn without_room_for_another_segment_records_follow_one_another() {
    let f = Fixture::new();
    let journal = Arc::new(f.open().unwrap());
    let number = journal.inner.reserve(&f.group(1, 1, 100)).unwrap().number;
    journal.inner.segments.lock().is_disk_full = true;
    let second = std::thread::spawn({
        let (inner, group) = (journal.inner.clone(), f.group(2, 1, 100));
        move || inner.reserve(&group).map(|place| (place.number, place.at))
    });
    // The result does not depend on how long it has waited by then.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(journal.inner.segments.lock().all.len(), 1);
    journal.inner.segments.lock().all[0].is_busy = false;
    journal.inner.appended.notify_all();
    assert_eq!(second.join().unwrap().unwrap(), (number, ALIGN_BYTES));
    // When no write is in progress to wait for, another segment is tried.
    journal.inner.segments.lock().all[0].is_busy = false;
    journal.inner.append(&f.group(3, 1, 9 << 20)).unwrap();
    journal.inner.append(&f.group(4, 1, 9 << 20)).unwrap();
    assert_eq!(journal.inner.segments.lock().all.len(), 2);
}

/// The numbers come in any order, and a checkpoint makes room for each of them.
#[test]
fn on_the_smallest_disk_a_record_overtaken_by_a_later_one_finds_its_place() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    journal.inner.append(&f.group(2, 1, 100)).unwrap();
    // A directory takes the place of the next segment, so none can be made.
    fs::create_dir(f.segment(2)).unwrap();
    assert!(journal.inner.append(&f.group(1, 1, 100)).is_err());
    journal.inner.trim(1, 0);
    journal.inner.append(&f.group(1, 1, 100)).unwrap();
    assert_eq!(journal.inner.segments.lock().all.len(), 1);
}

#[test]
fn the_last_record_that_was_acknowledged_stays_while_there_is_room() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    journal.inner.append(&f.group(1, 1, 10 << 20)).unwrap();
    journal.inner.trim(1, 1);
    journal.inner.append(&f.group(2, 2, 10 << 20)).unwrap();
    assert!(f.segment(2).exists(), "not over the first");
    journal.inner.trim(2, 2);
    journal.inner.append(&f.group(3, 3, 10 << 20)).unwrap();
    assert!(!f.segment(3).exists(), "over the first");
}

#[test]
fn segments_that_failed_are_given_back_once_they_are_published() {
    let f = Fixture::new();
    let journal = f.open().unwrap();
    for n in 1..=3 {
        journal.inner.append(&f.group(n, n, 100)).unwrap();
        journal.inner.segments.lock().all.last_mut().unwrap().is_broken = true;
    }
    journal.inner.trim(1, 3);
    assert!(
        !f.segment(1).exists() && f.segment(2).exists(),
        "2 is not published"
    );
    journal.inner.trim(3, 3);
    assert!(!f.segment(2).exists() && f.segment(3).exists(), "3 is the anchor");
}

#[test]
fn nothing_is_made_in_a_journal_that_was_removed() {
    let f = Fixture::new();
    let journal = Arc::new(f.open().unwrap());
    journal.inner.append(&f.group(1, 1, 100)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(journal.clear(false)).unwrap();
    assert!(journal.inner.append(&f.group(2, 1, 100)).is_err());
    assert_eq!(fs::read_dir(f.path()).unwrap().count(), 0);
}

/// A record in flight: the place where it is being written, and whether it is durable.
type OnWay = (EncodedGroup, (u64, Arc<File>, u64), bool);

/// Up to [`APPENDS_AT_ONCE`] records are in flight and are acknowledged in order. Now and then a generation is
/// published. Then the machine stops, and each record in flight is there, torn or missing. Every record that was
/// acknowledged and is not published must be replayed, and the opening must not be refused.
#[test]
fn after_a_crash_at_any_moment_all_that_was_acknowledged_is_replayed() {
    for seed in 1..=40 {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(seed);
        let mut below = |limit: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % limit
        };
        let f = Fixture::new();
        let (mut watermark, mut acknowledged, mut generation) = (0, 0, 1);
        let mut generations = vec![0];
        for life in 1..=3u64 {
            let journal = f.open().unwrap();
            let first = journal.first_sequence;
            generations.resize(first as usize, 0);
            acknowledged = acknowledged.max(first - 1);
            let mut next = first;
            let mut on_way: Vec<OnWay> = Vec::new();
            let mut newest_before = 0;
            for _ in 0..below(40) {
                if on_way.len() < APPENDS_AT_ONCE && below(2) == 0 {
                    generation += u64::from(below(3) == 0);
                    let len = 1 + if below(6) == 0 {
                        below(14 << 20)
                    } else {
                        below(9000)
                    };
                    let unacknowledged = if acknowledged < first {
                        NONE_ACKNOWLEDGED
                    } else {
                        (next - 1 - acknowledged) as u32
                    };
                    let group = Record {
                        is_seal: false,
                        after_generation: newest_before,
                        unacknowledged,
                        entries: vec![Entry {
                            generation,
                            offset_bytes: next,
                            content: Content::Data(vec![next as u8; len as usize].into()),
                        }],
                        ..Record::seal(f.volume_id, life, next)
                    };
                    let group = EncodedGroup {
                        sequence: next,
                        newest_generation: generation,
                        bytes: group.encode(),
                    };
                    let place = journal.inner.reserve(&group).unwrap();
                    on_way.push((group, (place.number, place.file, place.at), false));
                    generations.push(generation);
                    newest_before = generation;
                    next += 1;
                } else if !on_way.is_empty() {
                    // Any of them may end first.
                    let nth = below(on_way.len() as u64) as usize;
                    let (group, (number, file, at), is_durable) = &mut on_way[nth];
                    if !*is_durable {
                        file.write_all_at(&group.bytes, *at).unwrap();
                        *is_durable = true;
                        let mut segments = journal.inner.segments.lock();
                        let segment = segments.all.iter_mut().find(|s| s.number == *number).unwrap();
                        segment.is_busy = false;
                    }
                    while on_way.first().is_some_and(|(_, _, is_durable)| *is_durable) {
                        acknowledged = on_way.remove(0).0.sequence;
                    }
                }
                if below(8) == 0 && acknowledged >= first {
                    watermark = watermark.max(generations[acknowledged as usize].saturating_sub(below(2)));
                    journal.inner.trim(watermark, acknowledged);
                }
            }
            for (group, (_, file, at), is_durable) in &on_way {
                match below(3) {
                    _ if *is_durable => {}
                    0 => {}
                    1 => file.write_all_at(&group.bytes, *at).unwrap(),
                    _ => {
                        let len = below(group.bytes.len() as u64) as usize;
                        file.write_all_at(&group.bytes[..len], *at).unwrap();
                    }
                }
            }
            drop(on_way);
            drop(journal);
            let journal = f.open().unwrap();
            let mut replay = Replay::new(watermark);
            let mut replayed = BTreeMap::new();
            for id in &journal.found {
                let group = journal.inner.read(journal.places[id]).unwrap();
                assert!(
                    !journal.is_suspect(*id) || group.newest_generation() <= watermark,
                    "seed {seed}, life {life}: {id:?}"
                );
                let entries = replay.next(*id, group);
                let entries = entries.unwrap_or_else(|e| panic!("seed {seed}, life {life}: {e}"));
                replayed.extend(entries.into_iter().map(|e| (e.offset_bytes, e.generation)));
            }
            for sequence in first..=acknowledged {
                let generation = generations[sequence as usize];
                assert!(
                    generation <= watermark || replayed.get(&sequence) == Some(&generation),
                    "seed {seed}, life {life}: {sequence} was acknowledged"
                );
            }
            // The replayed generations are published, and some beyond them.
            generation = replay.newest_generation().max(generation) + 3;
            watermark = generation;
        }
    }
}

use super::*;
use crate::base::checkpoint_id::{CheckpointId, InodeCheck};
use crate::buffer_file::format::{DATA_BYTES, Kind};
use crate::buffer_file::kept::{Kept, NoRoom};
use crate::buffer_file::left::{discard, is_kept, look};

const URL: &str = "s3://bucket/vol/";

fn checkpoint(cno: u64) -> CheckpointId {
    let check = InodeCheck::from_bits(cno);
    CheckpointId { cno, check }
}

/// A change as a test makes it. All bytes of a write have the same value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Made {
    kind: Kind,
    offset_bytes: u64,
    len_bytes: u64,
    byte: u8,
}

fn write(offset_bytes: u64, len_bytes: u64, byte: u8) -> Made {
    Made {
        kind: Kind::Write,
        offset_bytes,
        len_bytes,
        byte,
    }
}

fn zero(offset_bytes: u64, len_bytes: u64) -> Made {
    Made {
        kind: Kind::Zero,
        offset_bytes,
        len_bytes,
        byte: 0,
    }
}

struct Place {
    root: tempfile::TempDir,
    volume_id: VolumeId,
}

impl Place {
    fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
            volume_id: VolumeId::from_uuid(uuid::Uuid::new_v4()),
        }
    }

    fn path(&self) -> PathBuf {
        self.root.path().join("a/b")
    }

    /// Claims the directory for a file with this many chunks.
    fn claim(&self, token: &str, chunks: u32) -> BufferDir {
        let mut dir = BufferDir::claim(&self.path(), self.volume_id, URL, 16 << 20, token).unwrap();
        dir.chunks = chunks;
        dir
    }

    /// A server that is killed right after it replaced another lease with its own.
    fn claim_over(&self, token: &str, predecessor: &str) {
        self.claim(token, 4).about_to_replace(Some(predecessor)).unwrap();
    }

    /// A server that takes the volume after `predecessor` and keeps changes. It must have nothing to recover.
    fn begin(&self, token: &str, predecessor: Option<&str>, chunks: u32) -> Kept {
        let mut dir = self.claim(token, chunks);
        assert!(dir.settle(predecessor).unwrap().is_none());
        dir.begin(NewestCheckpoint::new(checkpoint(1))).unwrap()
    }

    /// The changes that a server recovers.
    fn recover(&self, token: &str, predecessor: Option<&str>) -> Option<Vec<Made>> {
        let recovered = self.claim(token, 4).settle(predecessor).unwrap();
        recovered.map(|recovered| read_back(&recovered))
    }

    /// The names in the directory that have this prefix.
    fn names(&self, start: &str) -> Vec<String> {
        let names = fs::read_dir(self.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(start)).collect()
    }
}

fn read_back(recovered: &Recovered) -> Vec<Made> {
    let mut all = Vec::new();
    recovered
        .each(|change| {
            let byte = change.data.first().copied().unwrap_or(0);
            assert!(change.data.iter().all(|b| *b == byte));
            if change.kind == Kind::Write {
                assert_eq!(change.data.len() as u64, change.len_bytes);
            }
            all.push(Made {
                kind: change.kind,
                offset_bytes: change.offset_bytes,
                len_bytes: change.len_bytes,
                byte,
            });
            Ok(())
        })
        .unwrap();
    all
}

/// Makes a change and answers it.
fn make(kept: &Kept, made: Made) -> Result<(), NoRoom> {
    let ticket = kept.reserve(made.kind, made.offset_bytes, made.len_bytes)?;
    let data = match made.kind {
        Kind::Write => vec![made.byte; made.len_bytes as usize],
        Kind::Zero | Kind::Trim => Vec::new(),
    };
    kept.store(ticket, &data).unwrap();
    Ok(())
}

/// Joins the parts of a change.
fn joined(parts: Vec<Made>) -> Vec<Made> {
    let mut whole: Vec<Made> = Vec::new();
    for part in parts {
        match whole.last_mut() {
            Some(last)
                if last.kind == Kind::Write
                    && part.kind == Kind::Write
                    && part.byte == last.byte
                    && part.offset_bytes == last.offset_bytes + last.len_bytes =>
            {
                last.len_bytes += part.len_bytes;
            }
            _ => whole.push(part),
        }
    }
    whole
}

#[test]
fn what_was_answered_comes_back_in_order() {
    let place = Place::new();
    let made = [
        write(0, 4096, 1),
        zero(8192, 1 << 40),
        // Larger than a chunk.
        write(100, 2 * u64::from(DATA_BYTES) + 5, 2),
        write(0, 512, 3),
        Made {
            kind: Kind::Trim,
            ..zero(0, 1 << 30)
        },
    ];
    let kept = place.begin("one", None, 4);
    for made in made {
        make(&kept, made).unwrap();
    }
    drop(kept);
    assert_eq!(joined(place.recover("two", Some("one")).unwrap()), made);
    // The server is killed before anything is published: the next one recovers exactly these changes.
    assert_eq!(joined(place.recover("three", Some("two")).unwrap()), made);
    // Servers are killed between storing the lease and recording it, twice, so that it is not known which lease was
    // stored.
    place.claim_over("four", "three");
    place.claim_over("five", "four");
    place.claim_over("five and a half", "four");
    assert_eq!(joined(place.recover("six", Some("five")).unwrap()), made);
    // The new use of the file holds nothing of the old one.
    let mut dir = place.claim("seven", 4);
    assert!(dir.settle(Some("six")).unwrap().is_some());
    drop(dir.begin(NewestCheckpoint::default()).unwrap());
    assert_eq!(place.recover("eight", Some("seven")), None);
    assert!(place.names(SET_ASIDE).is_empty());
}

#[test]
fn what_another_owner_has_gone_on_from_is_set_aside() {
    for (case, predecessor) in [("another's lease", Some("stranger")), ("no lease", None)] {
        let place = Place::new();
        make(&place.begin("one", None, 4), write(0, 4096, 1)).unwrap();
        assert_eq!(place.recover("two", predecessor), None, "{case}");
        assert_eq!(place.names(SET_ASIDE).len(), 1, "{case}");
        // The changes are set aside for good, and a new file takes their place.
        make(&place.begin("three", Some("two"), 4), write(0, 4096, 2)).unwrap();
        assert_eq!(
            place.recover("four", Some("three")),
            Some(vec![write(0, 4096, 2)]),
            "{case}"
        );
        let left = look(&place.path()).unwrap();
        assert_eq!(left.len(), 2, "{case}");
        assert!(left.iter().all(|left| (left.changes, left.bytes) == (1, 4096)));
        assert_eq!(left.iter().filter(|left| left.is_set_aside).count(), 1);
        assert_eq!(discard(&place.path()).unwrap(), left);
        assert!(look(&place.path()).unwrap().is_empty());
    }
}

/// A server stored its lease in place of another owner's and was then killed. That does not prove that there was no
/// other owner.
#[test]
fn a_claim_over_another_owners_lease_counts_for_nothing() {
    let place = Place::new();
    make(&place.begin("one", None, 4), write(0, 4096, 1)).unwrap();
    place.claim_over("two", "one");
    place.claim_over("three", "stranger");
    place.claim_over("four", "three");
    assert_eq!(place.recover("five", Some("four")), None);
    assert_eq!(place.names(SET_ASIDE).len(), 1);
}

/// A store that loses every answer: any of the attempts may be the one that it carried out.
#[test]
fn many_tries_to_take_the_lease_are_known() {
    let place = Place::new();
    make(&place.begin("one", None, 4), write(0, 4096, 1)).unwrap();
    for token in 0..CLAIMANTS_MAX {
        place.claim_over(&format!("{token:032}"), "one");
    }
    let first = format!("{:032}", 0);
    assert_eq!(place.recover("two", Some(&first)), Some(vec![write(0, 4096, 1)]));
}

#[test]
fn changes_tell_the_checkpoint_that_they_were_made_upon() {
    for publishes in 0..4 {
        let place = Place::new();
        let newest = NewestCheckpoint::new(checkpoint(10));
        let mut dir = place.claim("one", 4);
        assert!(dir.settle(None).unwrap().is_none());
        let kept = dir.begin(newest.clone()).unwrap();
        for number in 0..publishes {
            make(&kept, write(0, 4096, 9)).unwrap();
            kept.freeze();
            newest.set(checkpoint(11 + number));
            kept.drop_oldest();
        }
        make(&kept, write(0, 4096, 1)).unwrap();
        drop(kept);
        let mut dir = place.claim("two", 4);
        let recovered = dir.settle(Some("one")).unwrap().unwrap();
        assert_eq!(recovered.base(), Some(checkpoint(10 + publishes)));
        assert_eq!(read_back(&recovered), [write(0, 4096, 1)]);
        dir.refuse(recovered).unwrap();
        assert_eq!(place.names(SET_ASIDE).len(), 1);
    }
}

/// Files are named after the time: every name of the next moments is taken.
#[test]
fn what_was_set_aside_before_is_not_replaced() {
    let place = Place::new();
    make(&place.begin("one", None, 4), write(0, 4096, 1)).unwrap();
    let taken: Vec<_> = (now_ms()..)
        .take(20_000)
        .map(|time| place.path().join(format!("{SET_ASIDE}{time}")))
        .collect();
    for path in &taken {
        fs::write(path, "earlier").unwrap();
    }
    assert_eq!(place.recover("two", Some("stranger")), None);
    for path in &taken {
        assert_eq!(fs::read(path).unwrap(), b"earlier");
    }
    assert_eq!(place.names(SET_ASIDE).len(), taken.len() + 1);
}

#[test]
fn a_file_that_was_cut_short_is_set_aside() {
    let place = Place::new();
    make(&place.begin("one", None, 4), write(0, 4096, 1)).unwrap();
    let file = OpenOptions::new()
        .write(true)
        .open(place.path().join(FILE))
        .unwrap();
    file.set_len(chunk_at(1)).unwrap();
    assert_eq!(place.recover("two", Some("one")), None);
    assert_eq!(place.names(SET_ASIDE).len(), 1);
}

#[test]
fn changes_to_another_volume_are_set_aside() {
    let mut place = Place::new();
    make(&place.begin("one", None, 4), write(0, 4096, 1)).unwrap();
    place.volume_id = VolumeId::from_uuid(uuid::Uuid::new_v4());
    assert_eq!(place.recover("two", Some("one")), None);
    assert_eq!(place.names(SET_ASIDE).len(), 1);
}

#[test]
fn the_changes_of_a_volume_elsewhere_are_in_the_way() {
    let place = Place::new();
    make(&place.begin("one", None, 4), write(0, 4096, 1)).unwrap();
    let other = "s3://bucket/other/";
    let claimed = BufferDir::claim(&place.path(), place.volume_id, other, 16 << 20, "two");
    for error in [
        claimed.unwrap_err(),
        BufferDir::check(&place.path(), other, 16 << 20).unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(error.contains(URL) && error.contains("buffer discard"), "{error}");
    }
    assert_eq!(place.recover("three", Some("one")), Some(vec![write(0, 4096, 1)]));
}

#[test]
fn changes_from_before_the_machine_was_started_are_set_aside() {
    let place = Place::new();
    make(&place.begin("one", None, 4), write(0, 4096, 1)).unwrap();
    let mut found = find(&place.path().join(FILE)).unwrap().unwrap();
    let mut header = found.header.clone().unwrap();
    header.boot_id.push('x');
    put_header(&found.file, &header, &mut found.count).unwrap();
    assert_eq!(place.recover("two", Some("one")), None);
    assert_eq!(place.names(SET_ASIDE).len(), 1);
}

#[test]
fn a_damaged_header_is_set_aside_and_a_foreign_file_is_left_alone() {
    let place = Place::new();
    make(&place.begin("one", None, 4), write(0, 4096, 1)).unwrap();
    let file = place.path().join(FILE);
    let mut bytes = fs::read(&file).unwrap();
    bytes[64..6400].fill(7);
    fs::write(&file, &bytes).unwrap();
    assert_eq!(place.recover("two", Some("one")), None);
    assert_eq!(place.names(SET_ASIDE).len(), 1);
    assert!(look(&place.path()).unwrap()[0].damage.is_some());

    fs::write(&file, "a person's own").unwrap();
    let error = BufferDir::claim(&place.path(), place.volume_id, URL, 16 << 20, "three").unwrap_err();
    assert!(
        error.to_string().contains("not the file of a write buffer"),
        "{error}"
    );
    discard(&place.path()).unwrap_err();
    assert!(is_kept(&place.path()).unwrap());
    assert_eq!(fs::read_to_string(&file).unwrap(), "a person's own");
}

#[test]
fn damaged_data_is_not_applied() {
    let place = Place::new();
    make(&place.begin("one", None, 4), write(0, 4096, 1)).unwrap();
    let file = place.path().join(FILE);
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.iter().rposition(|b| *b == 1).unwrap();
    bytes[at] = 2;
    fs::write(&file, &bytes).unwrap();
    let recovered = place.claim("two", 4).settle(Some("one")).unwrap().unwrap();
    let error = recovered
        .each(|_| panic!("nothing is applied"))
        .unwrap_err()
        .to_string();
    let remedy = format!("buffer discard {}", place.path().display());
    assert!(error.contains("damaged") && error.ends_with(&remedy), "{error}");
}

/// A change that was not answered hides no answered change.
#[test]
fn what_was_not_answered_is_passed_over() {
    let place = Place::new();
    let kept = place.begin("one", None, 4);
    make(&kept, write(0, 4096, 1)).unwrap();
    let on_its_way = kept.reserve(Kind::Write, 0, 4096).unwrap();
    make(&kept, write(4096, 4096, 3)).unwrap();
    drop(on_its_way);
    drop(kept);
    assert_eq!(
        place.recover("two", Some("one")),
        Some(vec![write(0, 4096, 1), write(4096, 4096, 3)])
    );
}

#[test]
fn a_full_file_takes_nothing_until_a_generation_is_published() {
    let place = Place::new();
    let kept = place.begin("one", None, 3);
    let chunk = u64::from(DATA_BYTES);
    make(&kept, write(0, 2 * chunk, 1)).unwrap();
    kept.freeze();
    assert!(kept.has_room(chunk) && !kept.has_room(chunk + 1));
    assert_eq!(make(&kept, write(0, chunk + 1, 2)), Err(NoRoom));
    make(&kept, write(0, chunk, 3)).unwrap();
    assert_eq!(make(&kept, write(0, 1, 4)), Err(NoRoom));
    assert_eq!(make(&kept, zero(0, 1)), Err(NoRoom));
    kept.drop_oldest();
    make(&kept, write(0, 2 * chunk, 5)).unwrap();
    drop(kept);
    assert_eq!(
        joined(place.recover("two", Some("one")).unwrap()),
        [write(0, chunk, 3), write(0, 2 * chunk, 5)]
    );
}

/// Any order of changes, freezes and publishes, in a file so small that chunks are used again and again: exactly the
/// answered changes of the unpublished generations are recovered, in their order.
#[test]
fn random_lives_leave_what_was_not_published() {
    let seed = std::env::var("HYPERNBD_SEED").map_or(20, |seed| seed.parse().unwrap());
    for seed in seed..seed + 60 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let place = Place::new();
        let mut generations = vec![Vec::new()];
        let kept = place.begin("one", None, rng.u32(2..6));
        for step in 0..rng.usize(1..400) {
            match rng.u8(0..20) {
                0 if generations.len() < 3 => {
                    kept.freeze();
                    generations.push(Vec::new());
                }
                1 if generations.len() > 1 => {
                    kept.drop_oldest();
                    generations.remove(0);
                }
                n => {
                    let len_bytes = rng.u64(1..200_000);
                    let made = match n {
                        2 => zero(rng.u64(..1 << 40), len_bytes),
                        _ => write(rng.u64(..1 << 40), len_bytes, (step % 255) as u8 + 1),
                    };
                    if n == 3 {
                        drop(kept.reserve(made.kind, made.offset_bytes, made.len_bytes));
                    } else if make(&kept, made).is_ok() {
                        generations.last_mut().unwrap().push(made);
                    }
                }
            }
        }
        drop(kept);
        let expected: Vec<Made> = generations.concat();
        let recovered = place.recover("two", Some("one")).unwrap_or_default();
        assert_eq!(joined(recovered), expected, "HYPERNBD_SEED={seed}");
    }
}

#[test]
fn a_file_that_cannot_be_written_is_removed_and_changes_go_on() {
    let place = Place::new();
    drop(place.begin("one", None, 4));
    let file = place.path().join(FILE);
    let lock = File::open(place.path().join(LOCK)).unwrap();
    let kept = Kept::new(
        &file,
        File::open(&file).unwrap(),
        lock,
        1,
        4,
        NewestCheckpoint::default(),
    );
    make(&kept, write(0, 4096, 1)).unwrap();
    assert!(!file.exists(), "what it holds is incomplete");
    let used = File::open(place.path().join(LOCK)).unwrap();
    used.lock().unwrap();
    assert!(!is_kept(&place.path()).unwrap(), "a kill would lose it");
    drop(used);
    assert!(is_kept(&place.path()).unwrap(), "nobody uses it");
    make(&kept, write(0, 4096, 1)).unwrap();
    kept.freeze();
    kept.drop_oldest();
    assert!(kept.has_room(1 << 40));
}

#[test]
fn a_directory_is_one_servers_and_private() {
    let place = Place::new();
    let kept = place.begin("one", None, 4);
    let error = BufferDir::claim(&place.path(), place.volume_id, URL, 16 << 20, "two").unwrap_err();
    assert!(error.to_string().contains("another server uses it"), "{error}");
    BufferDir::check(&place.path(), URL, 16 << 20).unwrap_err();
    let error = discard(&place.path()).unwrap_err().to_string();
    assert!(error.contains("stop that server"), "{error}");
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&place.path()), 0o700);
    assert_eq!(mode(&place.path().join(FILE)), 0o600);
    kept.close();
    drop(kept);
    assert!(!place.path().join(FILE).exists());

    fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    for error in [
        BufferDir::check(&place.path(), URL, 16 << 20).unwrap_err(),
        BufferDir::claim(&place.path(), place.volume_id, URL, 16 << 20, "two").unwrap_err(),
    ] {
        assert!(error.to_string().contains("others may write to it"), "{error}");
    }
}

#[test]
fn too_little_room_is_said_with_the_number() {
    let place = Place::new();
    let error = BufferDir::check(&place.path(), URL, 1 << 50)
        .unwrap_err()
        .to_string();
    for part in ["1.25 PiB are needed", "of 1 PiB", "free"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!place.path().exists());
    BufferDir::check(&place.path(), URL, 16 << 20).unwrap();
}

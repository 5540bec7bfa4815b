//! What becomes of a flipped bit in every kind of stored object: docs/operations.md states these outcomes.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::primitives::ByteStream;
use hyperfile::ondisk::SegmentHeader;
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Beside, Engine};
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::options::VolumeOptions;
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::store::Store;
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;
use hypernbd_volume::{ErrorKind, Volume, VolumeError, admin};

use super::faults::LIMIT;
use super::fixture::{Fixture, pattern};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;

/// What a reader of the whole volume gets.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Outcome {
    /// The right bytes: what is damaged is not used.
    Right,
    /// An error.
    Refused,
    /// Other bytes than were written, and no error.
    Wrong,
}

/// One object of a volume, to be damaged again and again, in its file.
struct Victim<'a> {
    fixture: &'a Fixture,
    store: Store,
    key: String,
    body: Vec<u8>,
    has_checksums: bool,
    expected: Vec<u8>,
}

impl<'a> Victim<'a> {
    fn new(fixture: &'a Fixture, name: &str, expected: &[u8]) -> Self {
        let store = fixture.store().unwrap();
        let key = store.data_key(name);
        let (body, info) = fixture.run(store.get_with_info(&key)).unwrap().unwrap();
        Self {
            fixture,
            store,
            key,
            body: body.to_vec(),
            has_checksums: info.metadata.contains_key("hypernbd-crc32c"),
            expected: expected.to_vec(),
        }
    }

    /// As another program would have stored it: without check values.
    fn made_elsewhere(mut self) -> Self {
        let request = self.store.client.put_object();
        let request = request.bucket(&self.store.bucket).key(&self.key);
        let sent = request
            .body(ByteStream::from(self.body.clone()))
            .customize()
            .mutate_request(|request| {
                request.headers_mut().remove("x-amz-meta-hypernbd-crc32c");
            })
            .send();
        self.fixture.run(sent).unwrap();
        self.has_checksums = false;
        self
    }

    /// Changes the object's bytes where they are stored, behind the store's back.
    fn overwrite(&self, at: usize, bytes: &[u8]) {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(self.fixture.object_file(&self.key));
        file.unwrap().write_all_at(bytes, at as u64).unwrap();
    }

    fn with_bit_flipped(&self, at: usize) -> Outcome {
        // Another bit at each place, so that all are tried.
        self.overwrite(at, &[self.body[at] ^ 1 << (at * 7 % 8)]);
        let read = catch_unwind(AssertUnwindSafe(|| self.fixture.run(read_all(&self.store))));
        self.overwrite(at, &self.body[at..=at]);
        match read.unwrap_or_else(|_| panic!("a panic got out, with byte {at} of {} flipped", self.key)) {
            Ok(bytes) if bytes == self.expected => Outcome::Right,
            Ok(_) => Outcome::Wrong,
            Err(_) => Outcome::Refused,
        }
    }

    /// How many of the bytes tried had each outcome: right, refused, wrong.
    fn tally(&self, places: impl Iterator<Item = usize>) -> [usize; 3] {
        let mut tally = [0; 3];
        for at in places {
            tally[self.with_bit_flipped(at) as usize] += 1;
        }
        tally
    }

    /// Where header and summary, index nodes, and data lie.
    fn layout(&self) -> (Range<usize>, Range<usize>, Range<usize>) {
        let header = SegmentHeader::from_slice(&self.body[..SegmentHeader::size()]);
        let index = header.aligned_ss_bytes();
        let data = index + ((header.s_nmetablk as usize) << header.s_meta_blk_shift);
        (0..header.s_bytes as usize, index..data, data..self.body.len())
    }
}

async fn read_all(store: &Store) -> Result<Vec<u8>, VolumeError> {
    let (engine, _) = HyperEngine::open(store, IndexCache::default(), ReadCache::none(), true).await?;
    // A size that nobody has: read as far as anybody would.
    let len = engine.geometry().size_bytes().min(16 * MIB);
    let mut bytes = vec![0; len as usize];
    let read = engine.read(0, &mut bytes).await;
    engine.close().await;
    read.map(|()| bytes)
}

/// A volume of 12 MiB with these writes, each a checkpoint.
fn volume(writes: &[(u64, usize)]) -> (Fixture, Vec<u8>) {
    let f = Fixture::new();
    f.create(12 * MIB, BLOCK as u32);
    let mut expected = vec![0; 12 << 20];
    let v = f.open();
    for (number, (offset, len)) in writes.iter().enumerate() {
        let data = pattern(number as u64 + 1, *len);
        v.write(*offset, &data, true).unwrap();
        expected[*offset as usize..][..*len].copy_from_slice(&data);
    }
    v.close(Duration::from_secs(30)).unwrap();
    (f, expected)
}

#[test]
fn every_flipped_bit_in_an_inode_is_found() {
    let (f, expected) = volume(&[(0, 1 << 20)]);
    let inode = Victim::new(&f, "inode", &expected);
    assert!(inode.has_checksums);
    for at in 0..inode.body.len() {
        assert_eq!(inode.with_bit_flipped(at), Outcome::Refused, "byte {at}");
    }
    // And it is said what is wrong, by whoever looks.
    inode.overwrite(100, &[!inode.body[100]]);
    let e = f.run(admin::info(&f.url, &f.store_options)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt);
    assert!(
        e.to_string().contains("inode") && e.to_string().contains("not those that were written"),
        "{e}"
    );
    assert_eq!(f.try_open().err().unwrap().kind(), ErrorKind::Corrupt);
}

#[test]
fn every_flipped_bit_in_an_index_put_in_one_piece_is_found() {
    let (f, expected) = volume(&[(0, 4 << 20), (MIB, 8192)]);
    for name in ["0000000001.0", "0000000002.0"] {
        let segment = Victim::new(&f, name, &expected);
        assert!(segment.has_checksums);
        let (summary, index, data) = segment.layout();
        assert!(!index.is_empty(), "{name} has no index");
        // The summary, and nodes that no checkpoint has any more, are needed by nobody.
        let [_, _, wrong] = segment.tally(summary.step_by(397));
        assert_eq!(wrong, 0, "summary of {name}");
        let [_, refused, wrong] = segment.tally(index.clone().step_by(131));
        assert!(
            refused > 20 && wrong == 0,
            "index of {name}: {refused} refused, {wrong} wrong"
        );
        if !data.is_empty() {
            assert_all_refused(&segment, data.step_by(100_009));
        }
    }
}

fn assert_all_refused(segment: &Victim<'_>, places: impl Iterator<Item = usize>) {
    let [right, refused, wrong] = segment.tally(places);
    assert!(
        refused > 0 && (right, wrong) == (0, 0),
        "{}: {right} right, {wrong} wrong",
        segment.key
    );
}

/// Whatever is read of it, and however it was uploaded: what shares the checked piece of the object is refused, all else is right.
#[test]
fn a_flipped_bit_in_data_costs_what_is_beside_it_alone() {
    let (f, expected) = volume(&[(0, 10 << 20), (11 << 20, 600_000)]);
    let store = f.store().unwrap();
    for (name, from) in [("0000000001.0", 0), ("0000000002.0", 11 << 20)] {
        let segment = Victim::new(&f, name, &expected);
        let (_, _, data) = segment.layout();
        // The first bytes share a checked piece with the index.
        for at in [data.start + 17_000, data.start + 123_456, data.end - 1] {
            segment.overwrite(at, &[!segment.body[at]]);
            let hit = from + (at - data.start);
            let (mut right, mut refused) = (0, Vec::new());
            f.run(async {
                let (engine, _) = HyperEngine::open(&store, IndexCache::default(), ReadCache::none(), true)
                    .await
                    .unwrap();
                for block in (hit.saturating_sub(100_000) / 4096..(hit + 100_000) / 4096).take(60) {
                    let offset = block * 4096;
                    let mut bytes = vec![0xEE; 4096];
                    match engine.read(offset as u64, &mut bytes).await {
                        Ok(()) => {
                            assert!(
                                bytes == expected[offset..offset + 4096],
                                "block {block} of {name}"
                            );
                            right += 1;
                        }
                        Err(e) => {
                            assert_eq!(e.kind(), ErrorKind::Corrupt, "{}", e.chain());
                            assert!(e.chain().contains(name), "{}", e.chain());
                            refused.push(offset);
                        }
                    }
                }
                engine.close().await;
            });
            segment.overwrite(at, &segment.body[at..=at]);
            assert!(
                refused
                    .iter()
                    .any(|offset| (*offset..offset + 4096).contains(&hit)),
                "{name} at {at}"
            );
            // 16 KiB of an object are checked together.
            assert!(
                refused.len() <= 5 && right > 10,
                "{name} at {at}: {refused:?}, {right} right"
            );
        }
    }
}

/// An object uploaded in parts has no room for check values; they are put beside the container.
#[test]
fn every_flipped_bit_in_an_object_uploaded_in_parts_is_found() {
    let (f, expected) = volume(&[(0, 10 << 20), (MIB, 8192)]);
    assert_eq!(
        f.meta_objects("sums/").len(),
        1,
        "one for the object that needs it"
    );
    let segment = Victim::new(&f, "0000000001.0", &expected);
    assert!(!segment.has_checksums, "put in one piece");
    let (_, index, data) = segment.layout();
    let [_, refused, wrong] = segment.tally(index.step_by(331));
    assert!(refused > 100 && wrong == 0, "{refused} refused, {wrong} wrong");
    assert_all_refused(&segment, data.step_by(900_007));
    // They are of one write of the object, and say nothing of any other.
    let segment = segment.made_elsewhere();
    let [.., wrong] = segment.tally(segment.layout().1.step_by(331));
    assert!(
        wrong > 0,
        "an object put anew was judged by what is known of the one before"
    );
}

/// Without check values only the layout tells: what is measured here is in docs/operations.md.
#[test]
fn what_is_found_in_an_index_without_check_values() {
    let (f, expected) = volume(&[(0, 10 << 20)]);
    for key in f.meta_objects("sums/") {
        f.remove_meta(&key);
    }
    let segment = Victim::new(&f, "0000000001.0", &expected);
    assert!(!segment.has_checksums, "uploaded in parts");
    let (summary, index, data) = segment.layout();
    let [right, ..] = segment.tally(summary.clone().step_by(997));
    assert_eq!(right, summary.step_by(997).count(), "nobody reads the summary");
    // The header of a node: flags, level, number of entries; then its keys. (A flag is without meaning there.)
    for node in index.clone().step_by(BLOCK as usize) {
        assert_ne!(segment.with_bit_flipped(node), Outcome::Wrong);
        for at in [node + 1, node + 3] {
            assert_eq!(segment.with_bit_flipped(at), Outcome::Refused, "byte {at}");
        }
    }
    let keys = index
        .clone()
        .filter(|at| (8..2048).contains(&(at % BLOCK as usize)));
    let pointers = index
        .clone()
        .filter(|at| (2048..4088).contains(&(at % BLOCK as usize)));
    let keys = segment.tally(keys.step_by(211));
    let pointers = segment.tally(pointers.step_by(211));
    let data = segment.tally(data.step_by(900_007));
    println!("right, refused, wrong: keys {keys:?}, pointers {pointers:?}, data {data:?}");
    assert!(keys[1] * 10 > keys.iter().sum::<usize>() * 8, "keys: {keys:?}");
    assert!(pointers[1] > 0, "pointers: {pointers:?}");
    assert_eq!((data[0], data[1]), (0, 0), "data: {data:?}");
}

#[test]
fn what_is_found_in_an_inode_made_elsewhere() {
    let (f, expected) = volume(&[(0, 1 << 20)]);
    let inode = Victim::new(&f, "inode", &expected).made_elsewhere();
    let [right, refused, wrong] = inode.tally(0..inode.body.len());
    println!("right {right}, refused {refused}, wrong {wrong}");
    assert_eq!(right + refused + wrong, inode.body.len());
    assert!(refused >= 20, "{refused}");
}

/// A header that claims gigabytes is not believed, by nobody who reads it.
#[test]
fn a_garbled_segment_header_takes_nobody_down() {
    let (f, expected) = volume(&[(0, 2 << 20), (MIB, 8192)]);
    let segment = Victim::new(&f, "0000000001.0", &expected).made_elsewhere();
    segment.overwrite(0, &[0xFF; 256][..SegmentHeader::size().min(256)]);
    assert!(
        f.run(read_all(&segment.store)).unwrap() == expected,
        "reads do not need it"
    );
    // A writer changes the nodes of that checkpoint, and reads them for it.
    let v = f.open();
    v.write(300 * BLOCK, &pattern(9, 4096), true).unwrap();
    v.close(Duration::from_secs(30)).unwrap();
    let found = f.run(read_all(&segment.store)).unwrap();
    assert!(found[300 * BLOCK as usize..][..4096] == pattern(9, 4096));
}

/// A writer that meets a damaged node publishes nothing upon it, and keeps what it has.
#[test]
fn a_damaged_index_is_not_built_upon() {
    let (f, expected) = volume(&[(0, 2 << 20)]);
    let segment = Victim::new(&f, "0000000001.0", &expected);
    let (_, index, _) = segment.layout();
    f.run(async {
        let open = || HyperEngine::open(&segment.store, IndexCache::default(), ReadCache::none(), false);
        let write = |engine: &HyperEngine| {
            let mut generation = Generation::new(engine.geometry());
            generation.write(PreparedWrite::new(
                engine.geometry(),
                3 * BLOCK,
                &pattern(7, 4096),
            ));
            Arc::new(Frozen::new(generation))
        };
        let (engine, before) = open().await.unwrap();
        let at = index.start + 2100;
        segment.overwrite(at, &[segment.body[at] ^ 4]);
        let frozen = write(&engine);
        let e = engine
            .publish(frozen.clone(), Beside::default())
            .await
            .unwrap_err();
        assert!(e.chain().contains("damaged"), "{}", e.chain());
        engine.recover().await.unwrap();
        assert!(engine.publish(frozen.clone(), Beside::default()).await.is_err());
        // Mended, it goes on.
        segment
            .store
            .put(&segment.key, segment.body.clone())
            .await
            .unwrap();
        engine.recover().await.unwrap();
        assert!(
            engine
                .publish(frozen, Beside::default())
                .await
                .unwrap()
                .unwrap()
                .id
                .cno
                > before.newest.id.cno
        );
        engine.close().await;
    });
    let found = f.run(read_all(&segment.store)).unwrap();
    assert!(found[3 * BLOCK as usize..][..4096] == pattern(7, 4096));
}

/// What was written to a part of an unreadable block is kept, and holds up what came with it, until the client writes the whole block.
#[test]
fn a_damaged_block_is_healed_by_writing_all_of_it() {
    const BLOCK: usize = 64 << 10;
    let f = Fixture::new();
    f.create(12 << 20, BLOCK as u32);
    let mut expected = pattern(1, 12 << 20);
    let v = f.open();
    v.write(0, &expected[..1 << 20], true).unwrap();
    v.close(LIMIT).unwrap();
    expected[1 << 20..].fill(0);
    let segment = Victim::new(&f, "0000000001.0", &expected);
    let (_, _, data) = segment.layout();
    let hit = data.start + 3 * BLOCK + 40_000;
    segment.overwrite(hit, &[!segment.body[hit]]);

    let options = VolumeOptions {
        io_timeout: Duration::from_secs(10),
        ..VolumeOptions::default()
    };
    let v = f.run(Volume::open(&f.url, &f.store_options, &options)).unwrap();
    let mut write = |offset: usize, data: &[u8]| {
        v.write(offset as u64, data, false).unwrap();
        expected[offset..][..data.len()].copy_from_slice(data);
    };
    write(3 * BLOCK + 100, b"part");
    write(2 << 20, &pattern(2, 2 * BLOCK));
    write(5 * BLOCK + 100, b"part");
    let e = v.flush().unwrap_err();
    assert!(e.chain().contains("the 65536 bytes at 196608"), "{}", e.chain());
    write(3 * BLOCK, &pattern(3, BLOCK));
    v.flush().unwrap();
    v.close(LIMIT).unwrap();
    assert!(f.run(read_all(&segment.store)).unwrap() == expected);
}

//! Replay with a WAL on the in-process S3 server and an engine in memory: records in flight, missing records, and
//! records that are given up.

use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::base::checkpoint_id::{Checkpoint, InodeCheck};
use crate::base::geometry::Geometry;
use crate::engine::{Beside, Engine};
use crate::meta::checkpoint_list::{self, CatalogueEntry, Recorder, Watermarks};
use crate::open::history;
use crate::open::replay_wal::ReplayOptions;
use crate::testing::fault_engine::{Fault, FaultEngine};
use crate::testing::memory_engine::MemoryEngine;
use crate::wal::record::{Content, Entry, Record};
use crate::wal::{AppendError, EncodedGroup, RecordId};
use crate::write_buffer::overlay::Overlay;

const SIZE: u64 = 1 << 20;
const OPTIONS: ReplayOptions = ReplayOptions {
    write_buffer_bytes: 1 << 20,
    io_timeout: Duration::from_secs(5),
};

struct Fixture {
    _dir: tempfile::TempDir,
    volume: Store,
    wal: Store,
    volume_id: Uuid,
    engine: MemoryEngine,
}

impl Fixture {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = async |name: &str| {
            let url = VolumeUrl::parse(&format!("file://{}/{name}/", dir.path().display())).unwrap();
            store::connect_for_create(&url, &StoreOptions::default())
                .await
                .unwrap()
        };
        Self {
            volume: store("volume").await,
            wal: store("log").await,
            _dir: dir,
            volume_id: Uuid::from_u128(42),
            engine: MemoryEngine::new(Geometry::new(SIZE, 4096)),
        }
    }

    /// Does what [`begin`] does for a WAL on S3.
    async fn begin(&self, epoch: u64, is_discard_allowed: bool) -> (OpenWal, Arc<S3Wal>) {
        let wal = S3Wal::open(self.wal.clone(), self.volume_id, epoch, false)
            .await
            .unwrap();
        let wal = Arc::new(wal);
        let before = wal_marker::load(&self.volume).await.unwrap();
        let state = MarkerState {
            url: self.wal.url.to_string(),
            volume_id: VolumeId::from_uuid(self.volume_id),
            host: "here".into(),
            journal_id: None,
            epoch,
            opened_ms: 0,
            watermark: self.watermark().await,
            checkpoint: None,
            is_clean: false,
        };
        let marker = Marker::take(&self.volume, state, before.as_ref().map(|b| &b.1))
            .await
            .unwrap();
        let open = OpenWal {
            store: wal.clone(),
            marker: Arc::new(marker),
            url: self.wal.url.to_string(),
            is_discarded: false,
            is_discard_allowed,
        };
        (open, wal)
    }

    /// The history of a volume at checkpoint 3, with an entry for checkpoint 2.
    async fn history(&self) -> Seen {
        let newest = Checkpoint {
            id: base(3),
            size_bytes: SIZE,
            published_ms: 1,
        };
        history::look(&self.volume, newest, history::Known::default())
            .await
            .unwrap()
    }

    async fn watermark(&self) -> u64 {
        wal_marker::load(&self.volume)
            .await
            .unwrap()
            .map_or(0, |(m, _)| m.watermark)
    }

    /// Opens as the owner of this epoch. Returns its WAL and its first generation.
    async fn open(&self, epoch: u64) -> Result<(Arc<S3Wal>, u64), VolumeError> {
        self.open_with(epoch, false).await
    }

    async fn open_with(
        &self,
        epoch: u64,
        is_discard_allowed: bool,
    ) -> Result<(Arc<S3Wal>, u64), VolumeError> {
        let (open, wal) = self.begin(epoch, is_discard_allowed).await;
        let recorder = Watermarks::new(self.volume.clone(), epoch, open.marker.clone());
        // The engine in memory makes no checkpoints, so all watermarks go into the marker.
        let recorder = IntoMarker(recorder);
        let generation = open
            .replay(
                &self.engine,
                &recorder,
                self.watermark().await,
                &self.history().await,
                &OPTIONS,
            )
            .await?;
        Ok((wal, generation + 1))
    }

    /// A record with a write of this byte to the first block.
    fn group(
        &self,
        epoch: u64,
        sequence: u64,
        generation: u64,
        after_generation: u64,
        byte: u8,
    ) -> EncodedGroup {
        let written = vec![(0, vec![byte; 4096])];
        self.group_of(epoch, sequence, generation, after_generation, written)
    }

    /// A record with these writes, each at an offset.
    fn group_of(
        &self,
        epoch: u64,
        sequence: u64,
        generation: u64,
        after_generation: u64,
        written: Vec<(u64, Vec<u8>)>,
    ) -> EncodedGroup {
        let entry = |(offset_bytes, bytes): (u64, Vec<u8>)| Entry {
            generation,
            offset_bytes,
            content: Content::Data(bytes.into()),
        };
        let group = Record {
            is_seal: false,
            after_generation,
            entries: written.into_iter().map(entry).collect(),
            ..Record::seal(self.volume_id, epoch, sequence)
        };
        EncodedGroup {
            sequence,
            newest_generation: generation,
            bytes: group.encode(),
        }
    }

    async fn first_byte(&self) -> u8 {
        let mut out = [0; 4096];
        self.engine.read(0, &mut out).await.unwrap();
        assert!(out.iter().all(|b| *b == out[0]), "torn");
        out[0]
    }
}

fn base(cno: u64) -> CheckpointId {
    CheckpointId {
        cno,
        check: InodeCheck::from_bits(cno),
    }
}

struct IntoMarker(Watermarks);

#[async_trait::async_trait]
impl Recorder for IntoMarker {
    async fn published(&self, generation: u64, _: Option<Checkpoint>) -> Result<(), VolumeError> {
        self.0.published(generation, None).await
    }
}

/// Invariant L2. A write that nobody flushed was in flight when its server was killed. It arrives after the next server
/// has shown the volume without it. It must never come back, although nothing was published since.
#[tokio::test]
async fn what_arrives_after_the_opening_is_never_replayed() {
    let f = Fixture::new().await;
    let (older, generation) = f.open(1).await.unwrap();
    let first = older.first_sequence();
    older.append(&f.group(1, first, generation, 0, 1)).await.unwrap();
    // First that is replayed, then there is nothing to replay: late records arrive in both cases.
    f.open(2).await.unwrap();
    let late = f.group(1, first + 2, generation + 1, generation, 9);
    older.append(&late).await.unwrap();
    let (older, generation) = f.open(3).await.unwrap();
    let first = older.first_sequence();

    let (newer, newer_generation) = f.open(4).await.unwrap();
    assert_eq!(f.first_byte().await, 1);
    let late = f.group(3, first + 1, generation, generation, 2);
    older.append(&late).await.unwrap();
    // Two generations are frozen, and none of the three is recorded as published.
    let later = f.group(3, first + 2, generation + 2, generation, 3);
    older.append(&later).await.unwrap();
    let own = Record {
        is_seal: false,
        entries: vec![Entry {
            generation: newer_generation,
            offset_bytes: 8192,
            content: Content::Zero { len_bytes: 512 },
        }],
        ..Record::seal(f.volume_id, 4, newer.first_sequence())
    };
    let own = EncodedGroup {
        sequence: own.sequence,
        newest_generation: newer_generation,
        bytes: own.encode(),
    };
    newer.append(&own).await.unwrap();

    f.open(5).await.unwrap();
    assert_eq!(
        f.first_byte().await,
        1,
        "nobody saw the late writes, and none was flushed"
    );
}

/// Invariant L2: a record that somebody removed is noticed.
#[tokio::test]
async fn a_log_with_a_hole_is_refused_and_can_be_given_up() {
    let f = Fixture::new().await;
    let (wal, generation) = f.open(1).await.unwrap();
    let first = wal.first_sequence();
    for n in 0..12 {
        let after = if n == 0 { 0 } else { generation };
        wal.append(&f.group(1, first + n, generation, after, n as u8 + 1))
            .await
            .unwrap();
    }
    let gone = f.wal.data_key(&format!("0000000001/{:010}", first + 1));
    f.wal.delete(&gone).await.unwrap();
    let error = f.open(2).await.unwrap_err();
    let VolumeError::Wal { reason, advice, .. } = &error else {
        panic!("{error:?}")
    };
    assert!(
        reason.contains("is missing") && advice.contains("discard_wal=yes"),
        "{error}"
    );
    assert_eq!(f.first_byte().await, 0, "nothing was applied");

    f.open_with(3, true).await.unwrap();
    assert_eq!(f.first_byte().await, 0);
    assert!(
        f.watermark().await >= GENERATIONS_LEFT,
        "before anything was removed"
    );
    // The seal is still there, for a server that may only be paused.
    let seal = f.group(1, first + 12, generation, generation, 99);
    assert!(matches!(
        wal.append(&seal).await,
        Err(crate::wal::AppendError::Fenced(_))
    ));
    f.open(4).await.unwrap();
    assert_eq!(f.first_byte().await, 0);
}

/// The removal of published records can be interrupted anywhere. What remains is not taken for a gap.
#[tokio::test]
async fn a_removal_cut_short_is_no_hole() {
    let f = Fixture::new().await;
    let (wal, generation) = f.open(1).await.unwrap();
    let first = wal.first_sequence();
    for n in 0..20 {
        // Ten records of one generation, and ten of the next.
        let generation_of = |n: u64| generation + n / 10;
        let after = if n == 0 { 0 } else { generation_of(n - 1) };
        wal.append(&f.group(1, first + n, generation_of(n), after, n as u8 + 1))
            .await
            .unwrap();
    }
    let (open, _) = f.begin(1, false).await;
    open.marker.raise_watermark(generation).await.unwrap();
    for n in [1, 2, 5, 9] {
        let key = f.wal.data_key(&format!("0000000001/{:010}", first + n));
        f.wal.delete(&key).await.unwrap();
    }
    f.open(2).await.unwrap();
    assert_eq!(f.first_byte().await, 20);
}

/// An owner that was overtaken may still append to a part that is cleared and sealed. The marker's watermark, which may
/// be in no checkpoint, keeps its records from being replayed.
#[tokio::test]
async fn a_clean_end_leaves_the_watermark_behind() {
    let f = Fixture::new().await;
    let (open, _) = f.begin(1, false).await;
    open.finish(7, true).await.unwrap();
    let (state, _) = wal_marker::load(&f.volume).await.unwrap().unwrap();
    assert!(state.is_clean);
    assert_eq!(state.watermark, 7);
}

/// A WAL with one damaged record and an intact one behind it.
struct Damaged {
    group: Record,
    found: [RecordId; 1],
}

#[async_trait::async_trait]
impl WalStore for Damaged {
    fn found(&self) -> &[RecordId] {
        &self.found
    }

    fn is_suspect(&self, _: RecordId) -> bool {
        true
    }

    fn first_sequence(&self) -> u64 {
        self.group.sequence + 1
    }

    fn depth(&self) -> usize {
        1
    }

    fn capacity_bytes(&self) -> u64 {
        1 << 20
    }

    async fn read(&self, _: RecordId) -> Result<Record, VolumeError> {
        Ok(self.group.clone())
    }

    async fn append(&self, _: &EncodedGroup) -> Result<(), AppendError> {
        Ok(())
    }

    async fn trim(&self, _: u64, _: u64) -> Result<(), VolumeError> {
        Ok(())
    }

    async fn remove_found(&self) -> Result<(), VolumeError> {
        Ok(())
    }

    async fn clear(&self, _: bool) -> Result<(), VolumeError> {
        Ok(())
    }
}

#[tokio::test]
async fn what_lies_behind_damage_is_refused_unless_it_is_published() {
    let f = Fixture::new().await;
    let (mut open, _) = f.begin(1, false).await;
    let bytes = f.group(1, 3, 5, 0, 7).bytes;
    let (epoch, sequence) = (1, 3);
    open.store = Arc::new(Damaged {
        group: Record::decode(&bytes).unwrap(),
        found: [RecordId { epoch, sequence }],
    });
    let recorder = IntoMarker(Watermarks::new(f.volume.clone(), 1, open.marker.clone()));
    let refused = open
        .replay(&f.engine, &recorder, 4, &f.history().await, &OPTIONS)
        .await
        .unwrap_err();
    let text = refused.chain();
    assert!(
        text.contains("before record 3 of epoch 1 is damaged") && text.contains("discard_wal=yes"),
        "{text}"
    );
    assert_eq!(f.first_byte().await, 0);
    open.replay(&f.engine, &recorder, 5, &f.history().await, &OPTIONS)
        .await
        .unwrap();
    assert_eq!(f.first_byte().await, 0, "it was published");
}

/// Each row is a checkpoint that a record may name: the volume's newest, an earlier one, and one that it does not have.
#[tokio::test]
async fn records_that_continue_another_history_are_refused_and_nothing_is_applied() {
    let other = |cno| CheckpointId {
        cno,
        check: InodeCheck::from_bits(99),
    };
    for (base, is_refused) in [
        (base(3), false),
        (base(2), false),
        (base(4), true),
        (base(1), true),
        (other(3), true),
        (other(2), true),
    ] {
        let f = Fixture::new().await;
        for cno in [2, 3] {
            let entry = CatalogueEntry {
                cno,
                check: Some(InodeCheck::from_bits(cno)),
                published_ms: 0,
                size_bytes: SIZE,
                epoch: 1,
                generation: 0,
                is_repaired: false,
                kind: checkpoint_list::Kind::default(),
            };
            assert!(checkpoint_list::write_entry(&f.volume, &entry).await.unwrap());
        }
        let (wal, generation) = f.open(1).await.unwrap();
        for (n, base) in [(0, super::tests::base(3)), (1, base)] {
            let group = Record {
                base: Some(base),
                ..Record::decode(&f.group(1, wal.first_sequence() + n, generation, 0, 7).bytes).unwrap()
            };
            let group = EncodedGroup {
                sequence: group.sequence,
                newest_generation: generation,
                bytes: group.encode(),
            };
            wal.append(&group).await.unwrap();
        }
        let opened = f.open(2).await;
        match opened {
            Ok(_) => assert!(!is_refused, "{base}"),
            Err(e) => {
                assert!(is_refused, "{base}: {e}");
                let text = e.chain();
                assert!(
                    text.contains("does not have that one") && text.contains("discard_wal=yes"),
                    "{text}"
                );
                f.open_with(3, true).await.unwrap();
            }
        }
        assert_eq!(f.first_byte().await, if is_refused { 0 } else { 7 }, "{base}");
    }
}

/// A block of the volume that cannot be read says nothing of the log, and the log has what was flushed since.
#[tokio::test]
async fn a_log_is_not_given_up_for_damage_in_the_volume() {
    let f = Fixture::new().await;
    let (older, generation) = f.open(1).await.unwrap();
    let partial = Record {
        is_seal: false,
        entries: vec![Entry {
            generation,
            offset_bytes: 512,
            content: Content::Data(vec![7; 512].into()),
        }],
        ..Record::seal(f.volume_id, 1, older.first_sequence())
    };
    let partial = EncodedGroup {
        sequence: partial.sequence,
        newest_generation: generation,
        bytes: partial.encode(),
    };
    older.append(&partial).await.unwrap();
    let (open, wal) = f.begin(2, true).await;
    let recorder = IntoMarker(Watermarks::new(f.volume.clone(), 2, open.marker.clone()));
    let engine = FaultEngine::new(MemoryEngine::new(Geometry::new(SIZE, 4096)));
    engine.damage_reads(u32::MAX);
    let options = ReplayOptions {
        io_timeout: Duration::ZERO,
        ..OPTIONS
    };
    let (records, watermark) = (wal.list().await.unwrap(), f.watermark().await);
    let replayed = open
        .replay(&engine, &recorder, watermark, &f.history().await, &options)
        .await;
    let refused = replayed.unwrap_err();
    assert!(
        refused.chain().contains("the 4096 bytes at 0"),
        "{}",
        refused.chain()
    );
    assert!(refused.chain().contains("hypernbd repair"), "{}", refused.chain());
    assert_eq!(wal.list().await.unwrap(), records);
    assert_eq!(f.watermark().await, watermark);
}

/// Block 0 is damaged where it is stored. The log has a write to a part of it, more than is published at once, and perhaps a write to all of it.
#[tokio::test]
async fn a_log_that_writes_all_of_a_damaged_block_heals_it() {
    for is_healed in [false, true] {
        let f = Fixture::new().await;
        let before = Overlay::new(f.engine.geometry());
        before.write(0, &[5; 4096]);
        let published = f.engine.publish(before.freeze(), Beside::default()).await;
        published.expect("it is whole");
        f.engine.damage(0);
        let (wal, generation) = f.open(1).await.expect("there is no log");
        let first = wal.first_sequence();
        let much = OPTIONS.write_buffer_bytes as usize / 2 + 4096;
        let written = vec![(0, vec![6; 100]), (4096, vec![7; much])];
        let groups = [
            f.group_of(1, first, generation, 0, written),
            f.group(1, first + 1, generation + 1, generation, 8),
        ];
        for group in groups.iter().take(1 + usize::from(is_healed)) {
            wal.append(group).await.expect("it is appended");
        }
        match f.open(2).await {
            Ok(_) => assert!(is_healed),
            Err(e) => assert!(
                !is_healed && e.chain().contains("the 4096 bytes at 0"),
                "{}",
                e.chain()
            ),
        }
        if is_healed {
            assert_eq!(f.first_byte().await, 8);
            let mut last = [0];
            let read = f.engine.read(4096 + much as u64 - 1, &mut last).await;
            read.expect("it was replayed");
            assert_eq!(last, [7]);
        }
    }
}

/// What fails for a moment is tried again, the way back to what is stored too; a server that was overtaken gives up.
#[tokio::test]
async fn a_replay_outlasts_a_store_that_fails_for_a_moment() {
    for (second, is_replayed) in [(Fault::Refused, true), (Fault::Fenced, false)] {
        let f = Fixture::new().await;
        let (wal, generation) = f.open(1).await.expect("there is no log");
        let group = f.group(1, wal.first_sequence(), generation, 0, 8);
        wal.append(&group).await.expect("it is appended");
        let (open, _log) = f.begin(2, false).await;
        let recorder = IntoMarker(Watermarks::new(f.volume.clone(), 2, open.marker.clone()));
        let engine = FaultEngine::new(MemoryEngine::new(Geometry::new(SIZE, 4096)));
        engine.fail_publishes([Fault::Refused]);
        engine.fail_recoveries([Fault::Refused, second]);
        let watermark = f.watermark().await;
        let replayed = open
            .replay(&engine, &recorder, watermark, &f.history().await, &OPTIONS)
            .await;
        assert_eq!(replayed.is_ok(), is_replayed);
        let mut out = [0; 4096];
        engine.read(0, &mut out).await.expect("it reads");
        assert_eq!(out == [8; 4096], is_replayed);
    }
}

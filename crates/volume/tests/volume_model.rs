//! A whole volume (overlay, driver, state machine) over an engine that fails, against a flat model: every read sees the
//! newest write (R1, W1, W2), and after a crash every byte is as at the last successful flush or later (W4).

use std::sync::Arc;
use std::time::Duration;

use hypernbd_volume::geometry::Geometry;
use hypernbd_volume::meta::checkpoint_list::NoRecorder;
use hypernbd_volume::options::VolumeOptions;
use hypernbd_volume::testing::fault_engine::{Fault, FaultEngine};
use hypernbd_volume::testing::memory_engine::MemoryEngine;
use hypernbd_volume::{ErrorKind, ExtentKind, Volume};
use proptest::prelude::*;

const SIZE: u64 = 24 * 4096 + 777;
const LIMIT: Duration = Duration::from_secs(600);

#[derive(Debug, Clone)]
enum Op {
    Write {
        offset: u64,
        len: u64,
        value: u8,
        fua: bool,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Trim {
        offset: u64,
        len: u64,
    },
    Read {
        offset: u64,
        len: u64,
    },
    Flush,
    CheckpointSoon,
    Fail(Vec<Fault>),
    Crash,
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let edge = prop_oneof![0..=SIZE, (0..=24u64).prop_map(|b| b * 4096), Just(SIZE)];
    (edge.clone(), edge).prop_map(|(a, b)| (a.min(b), a.max(b) - a.min(b)))
}

fn op() -> impl Strategy<Value = Op> {
    let fault = prop_oneof![Just(Fault::Refused), Just(Fault::AnswerLost)];
    prop_oneof![
        8 => (range(), 1..=255u8, prop::bool::weighted(0.1)).prop_map(|((offset, len), value, fua)| Op::Write { offset, len, value, fua }),
        2 => range().prop_map(|(offset, len)| Op::Zero { offset, len }),
        2 => range().prop_map(|(offset, len)| Op::Trim { offset, len }),
        4 => range().prop_map(|(offset, len)| Op::Read { offset, len }),
        2 => Just(Op::Flush),
        1 => Just(Op::CheckpointSoon),
        1 => prop::collection::vec(fault, 1..3).prop_map(Op::Fail),
        1 => Just(Op::Crash),
    ]
}

struct World {
    runtime: tokio::runtime::Runtime,
    memory: MemoryEngine,
    faults: Arc<FaultEngine<MemoryEngine>>,
    volume: Volume,
    now: Vec<u8>,
    /// For each byte, every value it had since the last successful flush.
    since_flush: Vec<Vec<u8>>,
}

fn options() -> VolumeOptions {
    VolumeOptions {
        checkpoint_interval: Duration::from_millis(3),
        // Small enough that the writes of a case fill it many times.
        write_buffer_bytes: 16 * 4096,
        // A case may let many publishes fail, and each waits longer than the one before.
        io_timeout: LIMIT,
        ..VolumeOptions::default()
    }
}

impl World {
    fn new(block_size: u32) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let memory = MemoryEngine::new(Geometry::new(SIZE, block_size));
        let (faults, volume) = Self::open(&runtime, &memory);
        let now = vec![0; SIZE as usize];
        let since_flush = now.iter().map(|v| vec![*v]).collect();
        Self {
            runtime,
            memory,
            faults,
            volume,
            now,
            since_flush,
        }
    }

    fn open(
        runtime: &tokio::runtime::Runtime,
        memory: &MemoryEngine,
    ) -> (Arc<FaultEngine<MemoryEngine>>, Volume) {
        let _guard = runtime.enter();
        let faults = Arc::new(FaultEngine::new(memory.clone()));
        let volume = Volume::over(faults.clone(), Arc::new(NoRecorder), &options());
        (faults, volume)
    }

    fn set(&mut self, range: std::ops::Range<u64>, value: u8) {
        for at in range.start as usize..range.end as usize {
            self.now[at] = value;
            self.since_flush[at].push(value);
        }
    }

    fn flushed(&mut self) {
        for (history, now) in self.since_flush.iter_mut().zip(&self.now) {
            *history = vec![*now];
        }
    }

    fn read_all(&self) -> Vec<u8> {
        let mut out = vec![0xEE; SIZE as usize];
        self.volume.read(0, &mut out).unwrap();
        out
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Write {
                offset,
                len,
                value,
                fua,
            } => {
                self.volume
                    .write(offset, &vec![value; len as usize], fua)
                    .unwrap();
                self.set(offset..offset + len, value);
                if fua {
                    self.flushed();
                }
            }
            Op::Zero { offset, len } => {
                self.volume.zero(offset, len, false).unwrap();
                self.set(offset..offset + len, 0);
            }
            Op::Trim { offset, len } => {
                self.volume.trim(offset, len, false).unwrap();
                let bs = u64::from(self.volume.block_size_bytes());
                for b in Geometry::new(SIZE, bs as u32).whole_blocks(offset, len) {
                    self.set(b * bs..((b + 1) * bs).min(SIZE), 0);
                }
            }
            Op::Read { offset, len } => {
                let mut out = vec![0xEE; len as usize];
                self.volume.read(offset, &mut out).unwrap();
                assert!(
                    out == self.now[offset as usize..(offset + len) as usize],
                    "R1 at {offset}+{len}"
                );
                self.check_extents(offset, len);
            }
            Op::Flush => {
                self.volume.flush().unwrap();
                self.flushed();
            }
            Op::CheckpointSoon => self.volume.checkpoint_soon(),
            Op::Fail(faults) => self.faults.fail_publishes(faults),
            Op::Crash => {
                // The process dies: what is in memory is gone, what is published stays.
                self.runtime.block_on(self.faults.kill());
                let (faults, volume) = Self::open(&self.runtime, &self.memory);
                let crashed = std::mem::replace(&mut self.volume, volume);
                drop(crashed);
                self.faults = faults;
                let found = self.read_all();
                for (at, value) in found.iter().enumerate() {
                    assert!(
                        self.since_flush[at].contains(value),
                        "W4: byte {at} is {value}, since the last flush it was {:?}",
                        self.since_flush[at]
                    );
                }
                self.now = found;
                self.flushed();
            }
        }
    }

    /// Zero and hole extents are exact about reading as zeros; everything is covered once, in order.
    fn check_extents(&self, offset: u64, len: u64) {
        let mut at = offset;
        for e in self.volume.extents(offset, len, false).unwrap() {
            assert_eq!(e.offset_bytes, at);
            assert!(e.len_bytes > 0);
            at += e.len_bytes;
            assert!(at <= offset + len, "clipped");
            if e.kind != ExtentKind::Data {
                let bytes = &self.now[e.offset_bytes as usize..at as usize];
                assert!(bytes.iter().all(|b| *b == 0), "an extent of zeros holds data");
            }
        }
        assert_eq!(at, offset + len);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_volume_keeps_its_promises(ops in prop::collection::vec(op(), 1..60), block_size in prop::sample::select(vec![4096u32, 16384])) {
        let mut world = World::new(block_size);
        for op in ops {
            world.apply(op);
        }
        let found = world.read_all();
        prop_assert!(found == world.now);
        world.volume.close(LIMIT).unwrap();
        prop_assert!(world.runtime.block_on(async {
            use hypernbd_volume::engine::Engine;
            let mut out = vec![0; SIZE as usize];
            world.memory.read(0, &mut out).await.unwrap();
            out == world.now
        }), "all is published by a clean close");
    }
}

#[test]
fn failing_reads_and_recoveries_are_tried_again() {
    let mut world = World::new(16384);
    world.apply(Op::Write {
        offset: 0,
        len: 20_000,
        value: 7,
        fua: true,
    });
    world.faults.fail_reads(2);
    world.apply(Op::Read {
        offset: 0,
        len: 20_000,
    });
    // A part of a block, so that the publish reads too.
    world.faults.fail_reads(1);
    world.faults.fail_recoveries([Fault::Refused]);
    world.apply(Op::Write {
        offset: 5,
        len: 9,
        value: 8,
        fua: true,
    });
    world.apply(Op::Crash);
    assert!(world.read_all() == world.now);
}

/// What is damaged in the store is not read until the client gives up; what was damaged on the way comes with the next try.
#[test]
fn damage_is_believed_after_a_few_reads() {
    let mut world = World::new(16384);
    let write = Op::Write {
        offset: 0,
        len: 4096,
        value: 7,
        fua: true,
    };
    world.apply(write);
    world.faults.damage_reads(3);
    world.apply(Op::Read { offset: 0, len: 4096 });
    world.faults.damage_reads(u32::MAX);
    let failed = world.volume.read(0, &mut [0; 4096]).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Corrupt, "{failed}");
    world.faults.damage_reads(0);
    world.apply(Op::Read { offset: 0, len: 4096 });
}

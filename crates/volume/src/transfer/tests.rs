//! Copies between images in memory, files, pipes and volumes.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use parking_lot::Mutex;

use super::checksum::{Checksum, digests};
use super::*;
use crate::base::units::{KIB, MIB};

/// An image in memory, which knows what of it is data.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    data: Vec<std::ops::Range<u64>>,
    /// Bytes that were written, zeros that were asked for.
    written: Mutex<(u64, u64)>,
    fails_at: Option<u64>,
}

impl Memory {
    fn of(bytes: Vec<u8>, data: Vec<std::ops::Range<u64>>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            data,
            written: Mutex::default(),
            fails_at: None,
        }
    }

    fn filled(len: u64, byte: u8) -> Self {
        Self::of(vec![byte; len as usize], std::iter::once(0..len).collect())
    }
}

impl Image for Memory {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().len() as u64
    }

    fn run_at(&self, offset_bytes: u64) -> Result<Run, TransferError> {
        let next = self.data.iter().find(|range| range.end > offset_bytes);
        Ok(match next {
            Some(range) if range.start <= offset_bytes => Run {
                end_bytes: range.end,
                is_data: true,
            },
            next => Run {
                end_bytes: next.map_or(self.size_bytes(), |range| range.start),
                is_data: false,
            },
        })
    }

    fn port(&self) -> Result<Box<dyn Port + '_>, TransferError> {
        Ok(Box::new(self))
    }
}

impl Port for &Memory {
    fn read(&mut self, offset_bytes: u64, out: &mut [u8]) -> Result<(), TransferError> {
        let end = offset_bytes + out.len() as u64;
        if self.fails_at.is_some_and(|at| (offset_bytes..end).contains(&at)) {
            return Err(TransferError::Refused("a bad sector".into()));
        }
        out.copy_from_slice(&self.bytes.lock()[offset_bytes as usize..end as usize]);
        Ok(())
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), TransferError> {
        self.written.lock().0 += bytes.len() as u64;
        let at = offset_bytes as usize;
        self.bytes.lock()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), TransferError> {
        self.written.lock().1 += len_bytes;
        let at = offset_bytes as usize;
        self.bytes.lock()[at..at + len_bytes as usize].fill(0);
        Ok(())
    }
}

/// Random bytes with holes, and what of them is data; some of the data is zeros.
fn sparse(seed: u64, len: u64) -> Memory {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0_u8; len as usize];
    let mut data = Vec::new();
    let mut at = 0;
    while at < len {
        let start = at + rng.u64(0..2 * MIB);
        let end = (start + rng.u64(1..2 * MIB)).min(len);
        if start >= end {
            break;
        }
        if rng.u8(0..4) > 0 {
            rng.fill(&mut bytes[start as usize..end as usize]);
        }
        data.push(start..end);
        at = end + 1;
    }
    Memory::of(bytes, data)
}

fn job<'a>(source: Source<'a>, target: Target<'a>, size_bytes: u64) -> Copy<'a> {
    Copy {
        source,
        target,
        size_bytes,
        written_bytes: 0,
        zero_unit_bytes: 4 * KIB,
        threads: 5,
        pace: None,
        phase: Phase::Copying,
    }
}

fn checksum_of(bytes: &[u8]) -> String {
    let mut sum = Checksum::default();
    sum.add(&digests(0, bytes));
    sum.text()
}

fn pipe_of(bytes: Vec<u8>) -> (PipeReader, std::thread::JoinHandle<bool>) {
    let (read, mut write) = std::io::pipe().unwrap();
    let writer = std::thread::spawn(move || write.write_all(&bytes).is_ok());
    (PipeReader::new(OwnedFd::from(read), "a pipe"), writer)
}

#[test]
fn an_image_arrives_whole_with_its_checksum() {
    for seed in 0..4 {
        let len = 9 * MIB + seed * 1000;
        let source = sparse(seed, len);
        let expected = source.bytes.lock().clone();
        let larger = len + 3 * MIB;
        for is_blank in [true, false] {
            let target = Memory::filled(larger, if is_blank { 0 } else { 0xaa });
            let to = Target::Image {
                image: &target,
                is_blank,
            };
            let control = Control::default();
            let copied = copy(job(Source::Image(&source), to, larger), &control).unwrap();
            let got = target.bytes.lock();
            assert!(got[..len as usize] == expected[..], "seed {seed}");
            assert!(got[len as usize..].iter().all(|byte| *byte == 0));
            assert_eq!(copied.checksum, checksum_of(&expected));
            let (written, zeroed) = *target.written.lock();
            assert_eq!(written, copied.data_bytes);
            let zeros = if is_blank { 0 } else { larger - written };
            assert_eq!(zeroed, zeros, "zeros are written only where they are not there");
            assert_eq!(control.settled_bytes(), larger);
        }
    }
}

#[test]
fn what_was_written_before_is_read_and_not_written() {
    let source = Memory::filled(20 * MIB, 1);
    let target = Memory::filled(20 * MIB, 0xaa);
    let to = Target::Image {
        image: &target,
        is_blank: false,
    };
    let resumed = Copy {
        written_bytes: 8 * MIB,
        ..job(Source::Image(&source), to, 20 * MIB)
    };
    let copied = copy(resumed, &Control::default()).unwrap();
    let (source, target) = (source.bytes.lock(), target.bytes.lock());
    let from = 8 * MIB as usize;
    assert!(target[from..] == source[from..]);
    assert!(target[..from].iter().all(|byte| *byte == 0xaa));
    assert_eq!(copied.checksum, checksum_of(&source));
}

#[test]
fn pipes_at_both_ends() {
    for (len, room) in [(0, MIB), (10 * MIB + 17, 12 * MIB), (8 * MIB, 8 * MIB)] {
        let bytes = sparse(len, len.max(1)).bytes.into_inner();
        let bytes = bytes[..len as usize].to_vec();
        let (pipe, writer) = pipe_of(bytes.clone());
        let mut out = Vec::new();
        let both = job(Source::Pipe(pipe), Target::Pipe(Box::new(&mut out)), room);
        let copied = copy(both, &Control::default()).unwrap();
        assert!(writer.join().unwrap());
        assert_eq!(out.len() as u64, room);
        assert!(out[..len as usize] == bytes[..] && out[len as usize..].iter().all(|b| *b == 0));
        assert_eq!(copied.checksum, checksum_of(&bytes));
    }
}

#[test]
fn a_pipe_with_more_than_there_is_room_for_is_refused() {
    for more in [1, 5 * MIB] {
        let (pipe, writer) = pipe_of(vec![1; (4 * MIB + more) as usize]);
        let target = Memory::filled(4 * MIB, 0);
        let to = Target::Image {
            image: &target,
            is_blank: true,
        };
        let error = copy(job(Source::Pipe(pipe), to, 4 * MIB), &Control::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("--size"), "{error}");
        let _ = writer.join();
    }
}

#[test]
fn a_failure_ends_the_copy_and_is_told() {
    let mut source = Memory::filled(40 * MIB, 1);
    source.fails_at = Some(13 * MIB);
    let mut out = Vec::new();
    let piped = job(Source::Image(&source), Target::Pipe(Box::new(&mut out)), 40 * MIB);
    let control = Control::default();
    let error = copy(piped, &control).unwrap_err();
    assert_eq!(error.to_string(), "a bad sector");
    assert_eq!(out.len() as u64, control.settled_bytes());
    assert!(control.settled_bytes() <= 12 * MIB);
}

#[test]
fn a_copy_that_is_told_to_stop_stops() {
    let source = Memory::filled(8 * MIB, 1);
    let control = Control::default();
    control.stop();
    let stopped = copy(job(Source::Image(&source), Target::Nowhere, 8 * MIB), &control);
    assert!(stopped.unwrap_err().is_stopped());

    // Also one that waits for a pipe that brings nothing.
    let (read, write) = std::io::pipe().unwrap();
    let pipe = PipeReader::new(OwnedFd::from(read), "a pipe");
    let control = Control::default();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| copy(job(Source::Pipe(pipe), Target::Nowhere, MIB), &control));
        control.stop();
        assert!(waiting.join().unwrap().unwrap_err().is_stopped());
    });
    drop(write);
}

fn raw(path: &Path) -> RawImage {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    RawImage::of(file, path).unwrap()
}

#[test]
fn holes_of_a_file_are_found_and_left() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let size = 1 << 40;
    let file = std::fs::File::create(&from).unwrap();
    file.set_len(size).unwrap();
    let bytes: Vec<u8> = (0..100_000_u32).map(|n| (n % 255) as u8 + 1).collect();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 77 * MIB + 5).unwrap();
    std::fs::File::create(&to).unwrap().set_len(size).unwrap();
    let (source, target) = (raw(&from), raw(&to));
    let target_is = Target::Image {
        image: &target,
        is_blank: true,
    };
    let copied = copy(job(Source::Image(&source), target_is, size), &Control::default());
    let copied = copied.unwrap();
    assert!(copied.data_bytes <= 128 * KIB, "{copied:?}");
    let mut out = vec![0; 200_000];
    target.port().unwrap().read(77 * MIB, &mut out).unwrap();
    assert!(out[5..100_005] == bytes[..] && out[100_005..].iter().all(|b| *b == 0));
    assert!(std::fs::metadata(&to).unwrap().blocks() * 512 <= 256 * KIB);
    target.sync().unwrap();
    let read = verify("to", &target, size, &copied.checksum, &Control::default());
    read.unwrap();
    std::os::unix::fs::FileExt::write_all_at(target.file(), &[0xff], 5 << 30).unwrap();
    let read = verify("to", &target, size, &copied.checksum, &Control::default());
    assert!(matches!(read, Err(TransferError::Differs { .. })));
}

#[test]
fn a_file_is_zeroed_where_it_has_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, vec![7; 3 * MIB as usize]).unwrap();
    let image = raw(&path);
    image.port().unwrap().zero(MIB + 1, MIB).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let (start, end) = (MIB as usize + 1, 2 * MIB as usize + 1);
    assert!(bytes[start..end].iter().all(|b| *b == 0));
    assert_eq!(
        (bytes[start - 1], bytes[end], bytes.len()),
        (7, 7, 3 * MIB as usize)
    );
}

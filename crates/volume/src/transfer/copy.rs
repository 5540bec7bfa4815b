//! The copy itself: some threads that each take the next part, read it, and write it.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::checksum::{Checksum, PIECE_BYTES, PieceDigest, digests};
use super::plan::{Part, Plan, zero_runs};
use super::{Control, Image, Pace, Phase, PipeReader, Port, Run, TransferError};
use crate::base::units::MIB;

/// The largest part of data that one thread copies at once, in bytes, unless a block is larger.
const PART_BYTES: u64 = 4 * MIB;
/// How often a thread that waits for its turn looks whether the copy was stopped.
const LOOK: Duration = Duration::from_millis(100);

/// Where bytes come from.
pub enum Source<'a> {
    /// An image.
    Image(&'a dyn Image),
    /// A pipe, which may end before the copy's size.
    Pipe(PipeReader),
}

/// Where bytes go to.
pub enum Target<'a> {
    /// An image, which is large enough.
    Image {
        /// It.
        image: &'a dyn Image,
        /// It reads as zeros already: zeros need not be written.
        is_blank: bool,
    },
    /// A pipe: everything is written to it, in order.
    Pipe(Box<dyn Write + Send + 'a>),
    /// Nowhere: they are only read, for their checksum.
    Nowhere,
}

/// What is to be copied, and how.
pub struct Copy<'a> {
    /// Where bytes come from.
    pub source: Source<'a>,
    /// Where they go to.
    pub target: Target<'a>,
    /// How many bytes the copy has. What the source lacks of them is zeros.
    pub size_bytes: u64,
    /// The target has everything before this offset already: that is only read.
    pub written_bytes: u64,
    /// The unit of zeros, a power of two: where all of one is zero, it is not written as data. At least the block of a volume.
    pub zero_unit_bytes: u64,
    /// How many parts are under way at once.
    pub threads: usize,
    /// A limit to the rate of data.
    pub pace: Option<&'a Pace>,
    /// What is done, for whoever watches.
    pub phase: Phase,
}

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copied {
    /// Bytes of the source that are data: in units of zeros that are not all zero.
    pub data_bytes: u64,
    /// The checksum of the source.
    pub checksum: String,
    /// What came out of a pipe, in bytes.
    pub piped_bytes: Option<u64>,
}

/// Copies.
///
/// # Errors
/// The first failure of either side; [`TransferError::Stopped`] when `control` says so. Parts of the target are written then: at least
/// everything before what `control` has as settled.
pub fn copy(copy: Copy<'_>, control: &Control) -> Result<Copied, TransferError> {
    control.begin(copy.phase, copy.size_bytes);
    let unit_bytes = copy.zero_unit_bytes.max(PIECE_BYTES);
    let (source, source_image) = match copy.source {
        Source::Image(image) => (Feed::Image(image), Some(image)),
        Source::Pipe(pipe) => (
            Feed::Pipe {
                pipe,
                is_ended: false,
                got_bytes: 0,
            },
            None,
        ),
    };
    let (target, pipe) = match copy.target {
        Target::Image { image, is_blank } => (Some((image, is_blank)), None),
        Target::Pipe(pipe) => (None, Some(pipe)),
        Target::Nowhere => (None, None),
    };
    let shared = Shared {
        control,
        source: source_image,
        target,
        turn: pipe.map(|pipe| (Mutex::new(Turn { number: 0, pipe }), Condvar::new())),
        queue: Mutex::new(Queue {
            plan: Plan::new(copy.size_bytes, unit_bytes, PART_BYTES.max(unit_bytes)),
            feed: source,
            number: 0,
        }),
        done: Mutex::default(),
        failure: Mutex::default(),
        written_bytes: copy.written_bytes,
        zero_unit_bytes: copy.zero_unit_bytes as usize,
        pace: copy.pace,
    };
    std::thread::scope(|scope| {
        for _ in 0..copy.threads.max(1) {
            scope.spawn(|| {
                if let Err(e) = shared.work() {
                    shared.failure.lock().get_or_insert(e);
                }
            });
        }
    });
    if let Some(failure) = shared.failure.into_inner() {
        return Err(failure);
    }
    if control.is_stopped() {
        return Err(TransferError::Stopped);
    }
    let done = shared.done.into_inner();
    debug_assert!(done.waiting.is_empty());
    Ok(Copied {
        data_bytes: done.data_bytes,
        checksum: done.checksum.text(),
        piped_bytes: match shared.queue.into_inner().feed {
            Feed::Pipe { got_bytes, .. } => Some(got_bytes),
            Feed::Image(_) => None,
        },
    })
}

/// What is read next, and from what.
enum Feed<'a> {
    Image(&'a dyn Image),
    Pipe {
        pipe: PipeReader,
        is_ended: bool,
        got_bytes: u64,
    },
}

struct Queue<'a> {
    plan: Plan,
    feed: Feed<'a>,
    number: u64,
}

impl Queue<'_> {
    /// The next part with its number; what a pipe has of it is in `buffer` then.
    fn next(
        &mut self,
        buffer: &mut Vec<u8>,
        is_over: &dyn Fn() -> bool,
    ) -> Result<Option<(u64, Part)>, TransferError> {
        let Some(at) = self.plan.at() else {
            return self.check_end(is_over).map(|()| None);
        };
        let end_of_zeros = Run {
            end_bytes: u64::MAX,
            is_data: false,
        };
        let part = match &mut self.feed {
            Feed::Image(image) if at < image.size_bytes() => {
                let run = image.run_at(at)?;
                let reaches_end = !run.is_data && run.end_bytes >= image.size_bytes();
                self.plan.next(if reaches_end { end_of_zeros } else { run })
            }
            Feed::Pipe {
                pipe,
                is_ended,
                got_bytes,
            } if !*is_ended => {
                let part = self.plan.next(Run {
                    end_bytes: u64::MAX,
                    is_data: true,
                });
                buffer.resize((part.range.end - part.range.start) as usize, 0);
                let got = pipe.fill(buffer, is_over)?;
                *got_bytes += got as u64;
                *is_ended = got < buffer.len();
                buffer[got..].fill(0);
                part
            }
            Feed::Image(_) | Feed::Pipe { .. } => self.plan.next(end_of_zeros),
        };
        self.number += 1;
        Ok(Some((self.number - 1, part)))
    }

    /// Looks whether a pipe holds more than there is room for.
    fn check_end(&mut self, is_over: &dyn Fn() -> bool) -> Result<(), TransferError> {
        let Feed::Pipe { pipe, is_ended, .. } = &mut self.feed else {
            return Ok(());
        };
        if !*is_ended && pipe.fill(&mut [0], is_over)? > 0 {
            return Err(TransferError::Refused(format!(
                "{} has more than the volume has room for: give a larger --size, or resize the volume first",
                pipe.name()
            )));
        }
        *is_ended = true;
        Ok(())
    }
}

/// Who writes to a pipe next.
struct Turn<'a> {
    number: u64,
    pipe: Box<dyn Write + Send + 'a>,
}

/// What is done, brought into order.
#[derive(Default)]
struct Done {
    next: u64,
    checksum: Checksum,
    data_bytes: u64,
    /// Parts that were done before one ahead of them: where each ends, and its digests.
    waiting: BTreeMap<u64, (u64, Vec<PieceDigest>)>,
}

struct Shared<'a> {
    control: &'a Control,
    source: Option<&'a dyn Image>,
    target: Option<(&'a dyn Image, bool)>,
    turn: Option<(Mutex<Turn<'a>>, Condvar)>,
    queue: Mutex<Queue<'a>>,
    done: Mutex<Done>,
    failure: Mutex<Option<TransferError>>,
    written_bytes: u64,
    zero_unit_bytes: usize,
    pace: Option<&'a Pace>,
}

impl Shared<'_> {
    fn is_over(&self) -> bool {
        self.control.is_stopped() || self.failure.lock().is_some()
    }

    /// What each thread does.
    fn work(&self) -> Result<(), TransferError> {
        let mut reader = self.source.map(Image::port).transpose()?;
        let mut writer = match self.target {
            Some((image, is_blank)) => Some((image.port()?, is_blank)),
            None => None,
        };
        let mut buffer = Vec::new();
        while !self.is_over() {
            let Some((number, part)) = self.queue.lock().next(&mut buffer, &|| self.is_over())? else {
                return Ok(());
            };
            let len_bytes = part.range.end - part.range.start;
            let mut pieces = Vec::new();
            let mut data_bytes = 0;
            let mut runs = Vec::new();
            if part.is_data {
                if let Some(pace) = self.pace {
                    pace.wait(len_bytes, self.control);
                    if self.is_over() {
                        return Ok(());
                    }
                }
                if let (Some(reader), Some(image)) = (&mut reader, self.source) {
                    let there = part.range.end.min(image.size_bytes()) - part.range.start;
                    buffer.resize(len_bytes as usize, 0);
                    reader.read(part.range.start, &mut buffer[..there as usize])?;
                    buffer[there as usize..].fill(0);
                }
                pieces = digests(part.range.start, &buffer);
                runs = zero_runs(&buffer, self.zero_unit_bytes);
                let data = runs.iter().filter(|(_, is_zero)| !is_zero);
                data_bytes = data.map(|(run, _)| run.len() as u64).sum();
                self.control.add_data(len_bytes);
            }
            if let Some((writer, is_blank)) = &mut writer
                && part.range.end > self.written_bytes
            {
                put(writer.as_mut(), *is_blank, &part, &buffer, &runs)?;
            }
            if let Some(turn) = &self.turn {
                let data = part.is_data.then_some(&buffer[..]);
                if !self.put_in_turn(turn, number, &part.range, data)? {
                    return Ok(());
                }
            }
            self.settle(number, part.range.end, pieces, data_bytes);
        }
        Ok(())
    }

    /// Writes a part to a pipe once all before it are. `false` when the copy is over before that.
    fn put_in_turn(
        &self,
        (turn, is_next): &(Mutex<Turn<'_>>, Condvar),
        number: u64,
        range: &Range<u64>,
        data: Option<&[u8]>,
    ) -> Result<bool, TransferError> {
        let failed = |e| TransferError::io("cannot write to the pipe", e);
        let mut turn = turn.lock();
        while turn.number != number {
            is_next.wait_for(&mut turn, LOOK);
            if self.is_over() {
                return Ok(false);
            }
        }
        match data {
            Some(data) => turn.pipe.write_all(data).map_err(failed)?,
            None => {
                let zeros = vec![0; (range.end - range.start).min(MIB) as usize];
                let mut left = range.end - range.start;
                while left > 0 {
                    if self.is_over() {
                        return Ok(false);
                    }
                    let len = left.min(zeros.len() as u64);
                    turn.pipe.write_all(&zeros[..len as usize]).map_err(failed)?;
                    left -= len;
                }
            }
        }
        turn.number += 1;
        is_next.notify_all();
        Ok(true)
    }

    /// Notes that a part is done.
    fn settle(&self, number: u64, end_bytes: u64, pieces: Vec<PieceDigest>, data_bytes: u64) {
        let mut done = self.done.lock();
        done.data_bytes += data_bytes;
        done.waiting.insert(number, (end_bytes, pieces));
        loop {
            let next = done.next;
            let Some((end_bytes, pieces)) = done.waiting.remove(&next) else {
                return;
            };
            done.checksum.add(&pieces);
            done.next += 1;
            self.control.settle(end_bytes);
        }
    }
}

/// Writes a part to an image: its runs of data, and its zeros where they are not there yet.
fn put(
    writer: &mut dyn Port,
    is_blank: bool,
    part: &Part,
    bytes: &[u8],
    runs: &[(Range<usize>, bool)],
) -> Result<(), TransferError> {
    let start = part.range.start;
    if !part.is_data {
        return match is_blank {
            true => Ok(()),
            false => writer.zero(start, part.range.end - start),
        };
    }
    for (run, is_zero) in runs {
        let at = start + run.start as u64;
        match (is_zero, is_blank) {
            (true, true) => {}
            (true, false) => writer.zero(at, run.len() as u64)?,
            (false, _) => writer.write(at, &bytes[run.clone()])?,
        }
    }
    Ok(())
}

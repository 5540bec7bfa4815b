//! The bytes of a frozen generation, which the engine reads while it uploads them.

use std::io;
use std::sync::Arc;

use hyperfile::block_source::BlockSource;
use parking_lot::Mutex;

use crate::engine::NextMayBegin;
use crate::engine::container::IN_FLIGHT_BYTES;
use crate::write_buffer::overlay::Frozen;

/// Once only this many bytes are unread, the next publish may begin: the bytes of the pieces that are in flight at
/// once. The next publish is laid out while they are sent.
const UNREAD_AT_NEXT_BYTES: u64 = IN_FLIGHT_BYTES;

/// Reads a generation piece by piece, and signals when nearly all of it was read.
pub(super) struct FrozenSource {
    frozen: Arc<Frozen>,
    /// Steps of the publish before its first byte is read.
    steps_before: u64,
    len_bytes: u64,
    unread: Mutex<Unread>,
}

struct Unread {
    /// Bytes not read yet. A piece that is sent again is counted again, which only affects the signal and the progress.
    len_bytes: u64,
    next: Option<NextMayBegin>,
}

impl FrozenSource {
    /// A source of `len_bytes` that sends to `next` when nearly all of them were read. `steps_before` is the number of
    /// steps that the publish took before ([`Progress::reached`](crate::write_buffer::progress::Progress::reached)).
    pub(super) fn new(
        frozen: Arc<Frozen>,
        steps_before: u64,
        len_bytes: u64,
        next: Option<NextMayBegin>,
    ) -> Self {
        Self {
            frozen,
            steps_before,
            len_bytes,
            unread: Mutex::new(Unread { len_bytes, next }),
        }
    }

    fn note_read(&self, len_bytes: u64) {
        let mut unread = self.unread.lock();
        unread.len_bytes = unread.len_bytes.saturating_sub(len_bytes);
        let read = self.len_bytes - unread.len_bytes;
        self.frozen.progress().reached(self.steps_before + read);
        if unread.len_bytes <= UNREAD_AT_NEXT_BYTES
            && let Some(next) = unread.next.take()
        {
            // A failed send means that there is no next publish.
            let _ = next.send(());
        }
    }
}

impl BlockSource for FrozenSource {
    fn read_at(&self, off: u64, buf: &mut [u8]) -> io::Result<()> {
        if !self.frozen.with(|g| g.copy_complete(off, buf)) {
            return Err(io::Error::other(format!(
                "{} bytes at {off} were never written",
                buf.len()
            )));
        }
        self.note_read(buf.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::base::geometry::Geometry;
    use crate::write_buffer::generation::{Generation, PreparedWrite};

    const MIB: u64 = 1 << 20;

    fn source(len_bytes: u64, next: Option<NextMayBegin>) -> FrozenSource {
        let geometry = Geometry::new(64 * MIB, 65536);
        let mut generation = Generation::new(geometry);
        generation.write(PreparedWrite::new(geometry, 0, &vec![7; len_bytes as usize]));
        FrozenSource::new(Arc::new(Frozen::new(generation)), 0, len_bytes, next)
    }

    #[test]
    fn the_next_publish_may_begin_once_what_is_left_fits_in_flight() {
        let (next, mut may_begin) = oneshot::channel();
        let source = source(UNREAD_AT_NEXT_BYTES + 10 * MIB, Some(next));
        let mut piece = vec![0; 5 << 20];
        source.read_at(0, &mut piece).unwrap();
        assert!(piece.iter().all(|&b| b == 7));
        assert!(may_begin.try_recv().is_err(), "5 MiB too early");
        source.read_at(5 * MIB, &mut piece).unwrap();
        assert_eq!(may_begin.try_recv(), Ok(()));
        source.read_at(10 * MIB, &mut piece).unwrap();
    }

    #[test]
    fn what_was_never_written_is_refused_and_begins_nothing() {
        let (next, mut may_begin) = oneshot::channel();
        let source = source(MIB, Some(next));
        assert!(source.read_at(MIB, &mut [0; 65536]).is_err());
        assert!(may_begin.try_recv().is_err());
    }
}

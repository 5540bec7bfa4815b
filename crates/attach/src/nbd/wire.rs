//! Requests and replies as they stand on the wire. Pure, but for reading from a socket that does not block.

use std::io::{self, Read};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

/// How long a socket is left alone for which the system has no memory.
const NO_MEMORY_PAUSE: Duration = Duration::from_millis(50);

/// Whether a socket cannot go on for want of memory, for which no link and no device is given up. Waits a little then.
pub(crate) fn lacks_memory(error: &io::Error) -> bool {
    let lacks = matches!(Errno::from_io_error(error), Some(Errno::NOBUFS | Errno::NOMEM));
    if lacks {
        thread::sleep(NO_MEMORY_PAUSE);
    }
    lacks
}

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISCONNECT: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const WRITE_ZEROES: u16 = 6;

/// The flag of a request that is durable when it is answered.
pub(crate) const FUA: u16 = 1;

pub(crate) const EIO: u32 = 5;
pub(crate) const EINVAL: u32 = 22;
/// The server is about to end: what it refuses so is carried out by the next one.
pub(crate) const ESHUTDOWN: u32 = 108;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const REQUEST_BYTES: usize = 28;
pub(crate) const REPLY_BYTES: usize = 16;
/// The kernel's largest request; anything above is no request of its.
const PAYLOAD_MAX: usize = 64 << 20;

/// The bytes of a write or of a read's answer, shared by what keeps them and what sends them.
pub(crate) type Payload = Arc<Vec<u8>>;

/// A request in transmission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u32,
    pub(crate) payload: Payload,
}

impl Request {
    pub(crate) fn flush(cookie: u64) -> Self {
        Self {
            flags: 0,
            command: FLUSH,
            cookie,
            offset: 0,
            length: 0,
            payload: Payload::default(),
        }
    }

    /// Whether it changes what the export holds.
    pub(crate) fn is_change(&self) -> bool {
        matches!(self.command, WRITE | TRIM | WRITE_ZEROES)
    }

    /// Whether the two reach a byte in common and one of them changes it, so that their order matters.
    pub(crate) fn conflicts(&self, other: &Self) -> bool {
        (self.is_change() || other.is_change()) && self.offset < other.end() && other.offset < self.end()
    }

    /// Where it ends.
    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(self.length.into())
    }

    /// The part of it that lies there, which must be in it.
    pub(crate) fn cut(&self, place: std::ops::Range<u64>) -> Self {
        let payload = match self.command {
            WRITE => {
                let within = (place.start - self.offset) as usize..(place.end - self.offset) as usize;
                Payload::new(self.payload[within].to_vec())
            }
            _ => Payload::default(),
        };
        Self {
            offset: place.start,
            length: (place.end - place.start) as u32,
            payload,
            ..self.clone()
        }
    }

    /// What people call it.
    pub(crate) fn name(&self) -> &'static str {
        match self.command {
            READ => "read",
            WRITE => "write",
            FLUSH => "flush",
            TRIM => "trim",
            WRITE_ZEROES => "zeroing",
            _ => "request",
        }
    }

    /// Its header, with the cookie by which the other side answers it.
    pub(crate) fn header(&self) -> [u8; REQUEST_BYTES] {
        let mut header = [0; REQUEST_BYTES];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&self.flags.to_be_bytes());
        header[6..8].copy_from_slice(&self.command.to_be_bytes());
        header[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        header[16..24].copy_from_slice(&self.offset.to_be_bytes());
        header[24..].copy_from_slice(&self.length.to_be_bytes());
        header
    }

    /// Reads a header; what follows it is read later.
    pub(crate) fn parse(header: &[u8; REQUEST_BYTES]) -> Result<Self, String> {
        let magic = u32::from_be_bytes(part(header, 0));
        if magic != REQUEST_MAGIC {
            return Err(format!("a request begins with {magic:#x}"));
        }
        let request = Self {
            flags: u16::from_be_bytes(part(header, 4)),
            command: u16::from_be_bytes(part(header, 6)),
            cookie: u64::from_be_bytes(part(header, 8)),
            offset: u64::from_be_bytes(part(header, 16)),
            length: u32::from_be_bytes(part(header, 24)),
            payload: Payload::default(),
        };
        if request.payload_bytes() > PAYLOAD_MAX {
            return Err(format!("a request writes {} bytes", request.length));
        }
        Ok(request)
    }

    /// How many bytes follow its header.
    pub(crate) fn payload_bytes(&self) -> usize {
        match self.command {
            WRITE => self.length as usize,
            _ => 0,
        }
    }
}

/// A simple reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
    pub(crate) payload: Payload,
}

impl Reply {
    pub(crate) fn header(&self) -> [u8; REPLY_BYTES] {
        let mut header = [0; REPLY_BYTES];
        header[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
        header[4..8].copy_from_slice(&self.error.to_be_bytes());
        header[8..].copy_from_slice(&self.cookie.to_be_bytes());
        header
    }

    /// Reads a header; what follows it is read later.
    pub(crate) fn parse(header: &[u8; REPLY_BYTES]) -> Result<Self, String> {
        let magic = u32::from_be_bytes(part(header, 0));
        if magic != REPLY_MAGIC {
            return Err(format!("it sent {magic:#x} where a reply should begin"));
        }
        Ok(Self {
            error: u32::from_be_bytes(part(header, 4)),
            cookie: u64::from_be_bytes(part(header, 8)),
            payload: Payload::default(),
        })
    }
}

/// `N` bytes of a header, from `at` on.
pub(crate) fn part<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}

/// Cuts what a socket gives into messages: a header of `HEADER` bytes, and as many more as the header says.
pub(crate) struct Cutter<const HEADER: usize> {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// The message that the payload under way belongs to.
    header: Option<[u8; HEADER]>,
    payload: Vec<u8>,
    filled: usize,
}

const BUFFER_BYTES: usize = 64 << 10;

impl<const HEADER: usize> Cutter<HEADER> {
    pub(crate) fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER_BYTES],
            start: 0,
            end: 0,
            header: None,
            payload: Vec::new(),
            filled: 0,
        }
    }

    /// The next message, or none while the socket has no more. `payload_bytes` says how many bytes follow a header.
    pub(crate) fn next(
        &mut self,
        socket: &mut impl Read,
        payload_bytes: impl Fn(&[u8; HEADER]) -> Result<usize, String>,
    ) -> io::Result<Option<([u8; HEADER], Payload)>> {
        loop {
            if let Some(header) = self.header {
                let taken = (self.end - self.start).min(self.payload.len() - self.filled);
                self.payload[self.filled..self.filled + taken]
                    .copy_from_slice(&self.buffer[self.start..self.start + taken]);
                self.start += taken;
                self.filled += taken;
                if self.filled == self.payload.len() {
                    (self.header, self.filled) = (None, 0);
                    return Ok(Some((header, Arc::new(std::mem::take(&mut self.payload)))));
                }
            } else if self.end - self.start >= HEADER {
                let header = part(&self.buffer, self.start);
                self.start += HEADER;
                let bytes = payload_bytes(&header).map_err(io::Error::other)?;
                (self.header, self.payload, self.filled) = (Some(header), vec![0; bytes], 0);
                continue;
            }
            // What is left in the buffer is less than a header, or nothing.
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            // A long payload goes where it belongs at once.
            let missing = self.payload.len() - self.filled;
            let is_direct = self.header.is_some() && missing >= BUFFER_BYTES / 2;
            let room = match is_direct {
                true => &mut self.payload[self.filled..],
                false => &mut self.buffer[self.end..],
            };
            match socket.read(room) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) if is_direct => self.filled += read,
                Ok(read) => self.end += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if lacks_memory(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A socket that gives its bytes in pieces, and has none for now between them.
    struct Pieces(Vec<Vec<u8>>);

    impl Read for Pieces {
        fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
            let Some(piece) = self.0.first_mut() else {
                return Ok(0);
            };
            if piece.is_empty() {
                self.0.remove(0);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let taken = piece.len().min(room.len());
            room[..taken].copy_from_slice(&piece[..taken]);
            piece.drain(..taken);
            Ok(taken)
        }
    }

    proptest! {
        #[test]
        fn requests_come_through_however_they_are_cut(
            lengths in prop::collection::vec((any::<bool>(), 0..200_000_u32), 1..6),
            cuts in prop::collection::vec(1..90_000_usize, 1..8),
        ) {
            let requests: Vec<Request> = lengths.iter().zip(1..).map(|(&(is_write, length), cookie)| Request {
                flags: FUA,
                command: if is_write { WRITE } else { READ },
                cookie,
                offset: 512 * cookie,
                length,
                payload: Arc::new(if is_write { vec![cookie as u8; length as usize] } else { Vec::new() }),
            }).collect();
            let mut bytes: Vec<u8> =
                requests.iter().flat_map(|r| [&r.header()[..], &r.payload[..]].concat()).collect();
            let mut pieces = Vec::new();
            for cut in cuts {
                let rest = bytes.split_off(cut.min(bytes.len()));
                pieces.push(std::mem::replace(&mut bytes, rest));
            }
            pieces.push(bytes);
            let mut socket = Pieces(pieces);
            let mut cutter = Cutter::new();
            let mut seen = Vec::new();
            let error = loop {
                match cutter.next(&mut socket, |header| Ok(Request::parse(header)?.payload_bytes())) {
                    Ok(Some((header, payload))) => {
                        seen.push(Request { payload, ..Request::parse(&header).unwrap() });
                    }
                    Ok(None) => {}
                    Err(error) => break error,
                }
            };
            prop_assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            prop_assert_eq!(seen, requests);
        }
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        assert!(Reply::parse(&[0; REPLY_BYTES]).is_err());
        let reply = Reply {
            cookie: 7,
            error: EIO,
            payload: Payload::default(),
        };
        assert_eq!(Reply::parse(&reply.header()).unwrap(), reply);
    }
}

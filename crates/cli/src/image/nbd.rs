//! The part of an NBD client that speaks with a qemu-nbd of our own: one request at a time, simple replies.
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// Fixed newstyle, and no padding after the handshake.
const CLIENT_FLAGS: u32 = 0b11;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
/// Replies to options are short.
const OPTION_REPLY_MAX: u32 = 64 << 10;
/// The most that every server takes in one request, in bytes.
const REQUEST_MAX_BYTES: usize = 32 << 20;
/// A local program that answers nothing for so long hangs.
const ANSWER_MAX: Duration = Duration::from_secs(300);

#[derive(Clone, Copy)]
#[repr(u16)]
enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    size_bytes: u64,
    requests: u64,
}

impl Client {
    /// Connects to the server's only export.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        stream.set_write_timeout(Some(ANSWER_MAX))?;
        let mut client = Self {
            stream,
            size_bytes: 0,
            requests: 0,
        };
        client.size_bytes = client.negotiate()?;
        Ok(client)
    }

    /// Size of the image in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn negotiate(&mut self) -> io::Result<u64> {
        expect(self.u64()?, MAGIC, "greeting")?;
        expect(self.u64()?, OPTION_MAGIC, "greeting")?;
        self.u16()?;
        let mut go = CLIENT_FLAGS.to_be_bytes().to_vec();
        go.extend(OPTION_MAGIC.to_be_bytes());
        go.extend(OPTION_GO.to_be_bytes());
        // The default export's name, which is empty, and no questions.
        go.extend(6_u32.to_be_bytes());
        go.extend([0; 6]);
        self.stream.write_all(&go)?;
        let mut size_bytes = None;
        loop {
            expect(self.u64()?, OPTION_REPLY_MAGIC, "reply to an option")?;
            expect(self.u32()?.into(), OPTION_GO.into(), "reply to an option")?;
            let (kind, len) = (self.u32()?, self.u32()?);
            if len > OPTION_REPLY_MAX {
                return Err(wrong("reply to an option"));
            }
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data)?;
            match kind {
                REPLY_ACK => return size_bytes.ok_or_else(|| wrong("reply to an option")),
                REPLY_INFO if data.len() >= 12 && data[..2] == INFO_EXPORT.to_be_bytes() => {
                    let size: [u8; 8] = data[2..10].try_into().map_err(io::Error::other)?;
                    size_bytes = Some(u64::from_be_bytes(size));
                }
                kind if kind & REPLY_ERROR != 0 => {
                    return Err(io::Error::other(format!(
                        "refused: {}",
                        String::from_utf8_lossy(&data)
                    )));
                }
                _ => {}
            }
        }
    }

    /// Fills `out` with the bytes at `offset_bytes`.
    pub fn read(&mut self, offset_bytes: u64, out: &mut [u8]) -> io::Result<()> {
        let mut at = offset_bytes;
        for part in out.chunks_mut(REQUEST_MAX_BYTES) {
            self.send(Command::Read, at, part.len(), &[])?;
            self.reply()?;
            self.stream.read_exact(part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes `bytes` at `offset_bytes`.
    pub fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = offset_bytes;
        for part in bytes.chunks(REQUEST_MAX_BYTES) {
            self.send(Command::Write, at, part.len(), part)?;
            self.reply()?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes everything durable that was answered, on every connection.
    pub fn flush(&mut self) -> io::Result<()> {
        self.send(Command::Flush, 0, 0, &[])?;
        self.reply()
    }

    fn send(&mut self, command: Command, offset_bytes: u64, len: usize, data: &[u8]) -> io::Result<()> {
        self.requests += 1;
        let mut head = REQUEST_MAGIC.to_be_bytes().to_vec();
        head.extend(0_u16.to_be_bytes());
        head.extend((command as u16).to_be_bytes());
        head.extend(self.requests.to_be_bytes());
        head.extend(offset_bytes.to_be_bytes());
        head.extend((len as u32).to_be_bytes());
        self.stream.write_all(&head)?;
        self.stream.write_all(data)
    }

    fn reply(&mut self) -> io::Result<()> {
        expect(self.u32()?.into(), REPLY_MAGIC.into(), "reply")?;
        let error = self.u32()?;
        expect(self.u64()?, self.requests, "reply")?;
        match error {
            0 => Ok(()),
            // The protocol's numbers are Linux's.
            errno => Err(io::Error::from_raw_os_error(errno as i32)),
        }
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.bytes().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.bytes().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.bytes().map(u64::from_be_bytes)
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The server ends the connection either way.
        let _ = self.send(Command::Disconnect, 0, 0, &[]);
    }
}

fn expect(found: u64, wanted: u64, what: &str) -> io::Result<()> {
    match found == wanted {
        true => Ok(()),
        false => Err(wrong(what)),
    }
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("a {what} that is none of NBD's"),
    )
}

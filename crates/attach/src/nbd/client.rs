//! A client that has one request under way at a time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::handshake::{self, Export};
use super::wire::{DISCONNECT, FLUSH, READ, REPLY_BYTES, Reply, Request, WRITE};

/// The most that every server takes in one request, in bytes.
const REQUEST_MAX_BYTES: usize = 32 << 20;

/// A connection to a server on this machine.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    export: Export,
    requests: u64,
}

impl Client {
    /// Connects to the server's default export. One that answers nothing for `answer_max` hangs.
    ///
    /// # Errors
    /// As the server's answer, or its silence.
    pub fn connect(socket: &Path, answer_max: Duration) -> io::Result<Self> {
        Self::over(UnixStream::connect(socket)?, answer_max)
    }

    fn over(mut stream: UnixStream, answer_max: Duration) -> io::Result<Self> {
        stream.set_read_timeout(Some(answer_max))?;
        stream.set_write_timeout(Some(answer_max))?;
        handshake::greet(&mut stream)?;
        let export = handshake::ask(&mut stream, "", &[])?;
        Ok(Self {
            stream,
            export,
            requests: 0,
        })
    }

    /// Size of the export in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.export.size
    }

    /// Fills `out` with the bytes at `offset_bytes`.
    ///
    /// # Errors
    /// As the server's answer.
    pub fn read(&mut self, offset_bytes: u64, out: &mut [u8]) -> io::Result<()> {
        let mut at = offset_bytes;
        for part in out.chunks_mut(REQUEST_MAX_BYTES) {
            self.send(READ, at, part.len(), &[])?;
            self.reply()?;
            self.stream.read_exact(part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes `bytes` at `offset_bytes`.
    ///
    /// # Errors
    /// As the server's answer.
    pub fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = offset_bytes;
        for part in bytes.chunks(REQUEST_MAX_BYTES) {
            self.send(WRITE, at, part.len(), part)?;
            self.reply()?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes everything durable that was answered, on every connection.
    ///
    /// # Errors
    /// As the server's answer.
    pub fn flush(&mut self) -> io::Result<()> {
        self.send(FLUSH, 0, 0, &[])?;
        self.reply()
    }

    fn send(&mut self, command: u16, offset: u64, length: usize, data: &[u8]) -> io::Result<()> {
        self.requests += 1;
        let request = Request {
            command,
            offset,
            length: length as u32,
            ..Request::flush(self.requests)
        };
        self.stream.write_all(&request.header())?;
        self.stream.write_all(data)
    }

    fn reply(&mut self) -> io::Result<()> {
        let mut header = [0; REPLY_BYTES];
        self.stream.read_exact(&mut header)?;
        let reply = Reply::parse(&header).map_err(io::Error::other)?;
        if reply.cookie != self.requests {
            let why = format!(
                "it answered request {}, and was asked {}",
                reply.cookie, self.requests
            );
            return Err(io::Error::other(why));
        }
        match reply.error {
            0 => Ok(()),
            // The protocol's numbers are Linux's.
            errno => Err(io::Error::from_raw_os_error(errno as i32)),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The server ends the connection either way.
        let _ = self.send(DISCONNECT, 0, 0, &[]);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::super::wire::{EINVAL, ESHUTDOWN, part};
    use super::*;

    const SIZE: usize = 4096;
    const ANSWER_MAX: Duration = Duration::from_secs(60);

    /// A server that keeps what is written. It refuses what lies beyond its end, and answers a write at 1 under another number.
    fn serve(mut socket: UnixStream) -> Vec<u8> {
        let mut disk = vec![0; SIZE];
        socket.write_all(&handshake::new_hello()).unwrap();
        handshake::answer(&mut socket, SIZE as u64).unwrap();
        loop {
            let mut header = [0; 28];
            socket.read_exact(&mut header).unwrap();
            let request = Request::parse(&header).unwrap();
            let mut data = vec![0; request.payload_bytes()];
            socket.read_exact(&mut data).unwrap();
            let at = request.offset as usize;
            let error = match request.command {
                DISCONNECT => return disk,
                FLUSH => ESHUTDOWN,
                _ if request.end() > SIZE as u64 => EINVAL,
                _ => 0,
            };
            let cookie = request.cookie + u64::from(request.command == WRITE && at == 1);
            let reply = Reply {
                cookie,
                error,
                payload: Default::default(),
            };
            socket.write_all(&reply.header()).unwrap();
            match request.command {
                READ if error == 0 => socket.write_all(&disk[at..request.end() as usize]).unwrap(),
                WRITE if error == 0 => disk[at..request.end() as usize].copy_from_slice(&data),
                _ => {}
            }
        }
    }

    #[test]
    fn it_reads_what_it_wrote_and_hears_of_errors() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || serve(theirs));
        let mut client = Client::over(ours, ANSWER_MAX).unwrap();
        assert_eq!(client.size_bytes(), SIZE as u64);
        client.write(100, b"hello").unwrap();
        let mut out = [0; 7];
        client.read(99, &mut out).unwrap();
        assert_eq!(&out, b"\0hello\0");
        assert_eq!(
            client.write(SIZE as u64, b"x").unwrap_err().raw_os_error(),
            Some(22)
        );
        assert_eq!(client.flush().unwrap_err().raw_os_error(), Some(108));
        let error = client.write(1, b"x").unwrap_err().to_string();
        assert!(error.contains("it answered request"), "{error}");
        drop(client);
        assert_eq!(part(&server.join().unwrap(), 100), *b"hello");
    }
}

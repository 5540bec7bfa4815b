//! Links to a server: made, and made again for as long as it takes.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use crate::handshake::{self, Export};
use crate::uri::{Place, Uri};

/// The kernel ends a connection whose other side answers nothing for this long. More than any request takes a server that lives
/// (`io_timeout`, 60 s): behind a line that is cut it may still carry one out, which must not come after its repetition.
const SILENCE_MAX: Duration = Duration::from_secs(150);
const CONNECT_MAX: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// A link that lived for less is counted as another failure.
const SHORT: Duration = Duration::from_secs(1);
const STACK_BYTES: usize = 256 << 10;

/// A link: connected, greeted. The stream may be one of TCP, which reads and writes no differently.
pub(crate) type Dialled = (UnixStream, Export);

/// Connects once. How long the server takes to answer is its own affair: it may be opening a volume.
pub(crate) fn dial(uri: &Uri) -> io::Result<Dialled> {
    let mut socket = match &uri.place {
        Place::Unix(path) => UnixStream::connect(path)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?,
        Place::Tcp(host, port) => tcp(host, *port)?,
    };
    let export = handshake::ask(&mut socket, &uri.export)?;
    Ok((socket, export))
}

fn tcp(host: &str, port: u16) -> io::Result<UnixStream> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{host}:{port}: {error}"));
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs().map_err(named)? {
        match TcpStream::connect_timeout(&address, CONNECT_MAX) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                sockopt::set_socket_keepalive(&socket, true)?;
                sockopt::set_tcp_keepidle(&socket, SILENCE_MAX / 10)?;
                sockopt::set_tcp_keepintvl(&socket, SILENCE_MAX / 10)?;
                sockopt::set_tcp_keepcnt(&socket, 9)?;
                sockopt::set_tcp_user_timeout(&socket, SILENCE_MAX.as_millis() as u32)?;
                return Ok(UnixStream::from(OwnedFd::from(socket)));
            }
            Err(error) => last = error,
        }
    }
    Err(named(last))
}

/// Makes links in a thread of its own, one after the other.
pub(crate) struct Dialler {
    uri: Uri,
    done: (Sender<Dialled>, Receiver<Dialled>),
    wake: UnixStream,
    woken: UnixStream,
    pause: Duration,
}

impl Dialler {
    pub(crate) fn new(uri: Uri) -> io::Result<Self> {
        let (wake, woken) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        Ok(Self {
            uri,
            done: channel(),
            wake,
            woken,
            pause: PAUSE_MIN,
        })
    }

    /// What becomes readable when a link is there.
    pub(crate) fn woken(&self) -> &UnixStream {
        &self.woken
    }

    /// The link that was made.
    pub(crate) fn taken(&self) -> Option<Dialled> {
        while io::Read::read(&mut &self.woken, &mut [0; 16]).is_ok_and(|read| read > 0) {}
        self.done.1.try_recv().ok()
    }

    /// Begins to make the next link, at once if the last one lived for a while.
    pub(crate) fn begin(&mut self, last_began: Option<Instant>) -> io::Result<()> {
        let lived = last_began.is_some_and(|began| began.elapsed() >= SHORT);
        let first = if lived { Duration::ZERO } else { self.pause };
        self.pause = if lived {
            PAUSE_MIN
        } else {
            (self.pause * 2).min(PAUSE_MAX)
        };
        let (uri, done, wake) = (self.uri.clone(), self.done.0.clone(), self.wake.try_clone()?);
        let thread = thread::Builder::new()
            .name("dial".to_owned())
            .stack_size(STACK_BYTES);
        thread.spawn(move || {
            thread::sleep(first);
            let dialled = until_there(&uri, None);
            if let Ok(dialled) = dialled
                && done.send(dialled).is_ok()
            {
                let _ = io::Write::write(&mut &wake, &[1]);
            }
        })?;
        Ok(())
    }
}

/// Tries until there is a link, or until a time.
pub(crate) fn until_there(uri: &Uri, until: Option<Instant>) -> io::Result<Dialled> {
    let (mut pause, mut said) = (PAUSE_MIN, String::new());
    loop {
        let error = match dial(uri) {
            Ok(dialled) => return Ok(dialled),
            Err(error) => error,
        };
        if until.is_some_and(|until| Instant::now() + pause > until) {
            return Err(error);
        }
        if error.to_string() != said {
            said = error.to_string();
            log::warn!("{uri}: {said}; trying on");
        }
        thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

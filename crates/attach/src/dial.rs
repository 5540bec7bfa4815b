//! Links to a server: made, and made again for as long as it takes.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use crate::error::AttachError;
use crate::nbd::handshake::{self, Export};
use crate::tls::Tls;
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

/// A server, and what it takes to reach it.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    uri: Uri,
    tls: Option<Tls>,
}

impl Server {
    pub(crate) fn new(uri: &Uri) -> Result<Self, AttachError> {
        let tls = uri.tls.as_ref();
        Ok(Self {
            tls: tls.map(|(dir, host)| Tls::load(dir, host)).transpose()?,
            uri: uri.clone(),
        })
    }

    /// Connects once. How long the server takes to answer is its own affair: it may be opening a volume.
    fn dial(&self) -> io::Result<Dialled> {
        let mut socket = match &self.uri.place {
            Place::Unix(path) => UnixStream::connect(path)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?,
            Place::Tcp(host, port) => tcp(host, *port)?,
        };
        handshake::greet(&mut socket)?;
        if let Some(tls) = &self.tls {
            handshake::start_tls(&mut socket)?;
            socket = tls.secure(socket)?;
        }
        let export = handshake::ask(&mut socket, &self.uri.export, handshake::FOR_DEVICE)?;
        Ok((socket, export))
    }
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

/// What comes of dialling.
#[derive(Debug)]
pub(crate) enum News {
    /// There is a link.
    Up(Dialled),
    /// There is none yet, for a reason that is not the last one's.
    Failed(String),
}

/// Makes links, one after the other, in a thread of its own: one for all of them, which is there before it is needed. When the server
/// dies, memory or threads may be short, and a device whose relay cannot dial would be lost.
pub(crate) struct Dialler {
    orders: Sender<Duration>,
    news: Receiver<News>,
    woken: UnixStream,
    pause: Duration,
}

impl Dialler {
    pub(crate) fn new(server: Server) -> io::Result<Self> {
        Self::with(move || server.dial())
    }

    fn with(mut dial: impl FnMut() -> io::Result<Dialled> + Send + 'static) -> io::Result<Self> {
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let (orders, ordered) = channel();
        let (tell, news) = channel();
        let tell = move |news| {
            let told = tell.send(news).is_ok();
            // One byte is as good as many.
            let _ = io::Write::write(&mut &wake, &[1]);
            told
        };
        let thread = thread::Builder::new()
            .name("dial".to_owned())
            .stack_size(STACK_BYTES);
        thread.spawn(move || {
            for pause in ordered {
                thread::sleep(pause);
                if !dial_on(&mut dial, &tell) {
                    return;
                }
            }
        })?;
        Ok(Self {
            orders,
            news,
            woken,
            pause: PAUSE_MIN,
        })
    }

    /// What becomes readable when there is news.
    pub(crate) fn woken(&self) -> &UnixStream {
        &self.woken
    }

    /// The news since.
    pub(crate) fn news(&self) -> Vec<News> {
        while io::Read::read(&mut &self.woken, &mut [0; 16]).is_ok_and(|read| read > 0) {}
        self.news.try_iter().collect()
    }

    /// Begins to make another connection while there is a link.
    pub(crate) fn look(&self) {
        let _ = self.orders.send(Duration::ZERO);
    }

    /// Begins to make the next link, at once if the last one lived for a while.
    pub(crate) fn begin(&mut self, last_began: Option<Instant>) {
        let lived = last_began.is_some_and(|began| began.elapsed() >= SHORT);
        let first = if lived { Duration::ZERO } else { self.pause };
        self.pause = if lived {
            PAUSE_MIN
        } else {
            (self.pause * 2).min(PAUSE_MAX)
        };
        // The thread ends with this alone.
        let _ = self.orders.send(first);
    }
}

/// Tries until there is a link; whether anybody hears of it.
fn dial_on(dial: &mut impl FnMut() -> io::Result<Dialled>, tell: &impl Fn(News) -> bool) -> bool {
    let (mut pause, mut said) = (PAUSE_MIN, None);
    loop {
        // Without this thread no link would ever come up again.
        let dialled = catch_unwind(AssertUnwindSafe(&mut *dial))
            .unwrap_or_else(|_| Err(io::Error::other("the relay has a fault: dialling panicked")));
        let why = match dialled {
            Ok(dialled) => return tell(News::Up(dialled)),
            Err(error) => error.to_string(),
        };
        if said.as_ref() != Some(&why) {
            if !tell(News::Failed(why.clone())) {
                return false;
            }
            said = Some(why);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Makes the first link. Tries until a time.
pub(crate) fn until_there(server: &Server, until: Instant) -> io::Result<Dialled> {
    let (mut pause, mut said) = (PAUSE_MIN, String::new());
    loop {
        let error = match server.dial() {
            Ok(dialled) => return Ok(dialled),
            Err(error) => error,
        };
        if Instant::now() + pause > until {
            return Err(error);
        }
        if error.to_string() != said {
            said = error.to_string();
            log::warn!("{}: {said}; trying on", server.uri);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// The next news.
    fn next(dialler: &Dialler) -> News {
        dialler.news.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    /// So that a thread that cannot be started later is no end of the relay.
    #[test]
    fn all_links_are_made_by_one_thread_whatever_happens_to_it() {
        let threads = Arc::new(Mutex::new(BTreeSet::new()));
        let (seen, mut times) = (threads.clone(), 0);
        let mut dialler = Dialler::with(move || {
            seen.lock()
                .unwrap()
                .insert(format!("{:?}", thread::current().id()));
            times += 1;
            match times {
                1 => panic!("of a test"),
                2 | 3 => Err(io::Error::other("nobody there")),
                _ => Ok((UnixStream::pair()?.0, Export::default())),
            }
        })
        .unwrap();
        dialler.begin(None);
        for word in ["panicked", "nobody there"] {
            assert!(matches!(next(&dialler), News::Failed(why) if why.contains(word)));
        }
        for _ in 0..3 {
            assert!(matches!(next(&dialler), News::Up(_)));
            dialler.begin(None);
        }
        assert_eq!(threads.lock().unwrap().len(), 1);
    }
}

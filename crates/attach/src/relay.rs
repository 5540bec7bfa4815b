//! The relay: moves bytes between the kernel's socket and the link to the server, as the machine says.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::dial::{Dialled, Dialler, News};
use crate::machine::{Action, Event, Machine};
use crate::nbd::wire::{Cutter, Payload, REPLY_BYTES, REQUEST_BYTES, Reply, Request, lacks_memory};
use crate::outage::Outage;

/// The end of a link waits so long for its last bytes to go.
const GOODBYE_MAX: Duration = Duration::from_secs(1);
const SLICES_MAX: usize = 64;
const NO_MEMORY_PAUSE: Duration = Duration::from_millis(50);

/// Bytes on their way out.
#[derive(Default)]
struct Outbox {
    queue: VecDeque<(Vec<u8>, Payload)>,
    /// How much of the first is gone.
    sent: usize,
}

impl Outbox {
    fn push(&mut self, header: &[u8], payload: Payload) {
        self.queue.push_back((header.to_vec(), payload));
    }

    /// Writes what the socket takes; the end of it is no error.
    fn write(&mut self, mut socket: &UnixStream) -> io::Result<()> {
        while !self.queue.is_empty() {
            let mut slices = Vec::with_capacity(SLICES_MAX);
            let mut skip = self.sent;
            for (header, payload) in self.queue.iter().take(SLICES_MAX / 2) {
                for bytes in [&header[..], &payload[..]] {
                    slices.push(IoSlice::new(&bytes[skip.min(bytes.len())..]));
                    skip = skip.saturating_sub(bytes.len());
                }
            }
            match socket.write_vectored(&slices) {
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if lacks_memory(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
            while let Some((header, payload)) = self.queue.front()
                && self.sent >= header.len() + payload.len()
            {
                self.sent -= header.len() + payload.len();
                self.queue.pop_front();
            }
        }
        Ok(())
    }
}

struct Link {
    socket: UnixStream,
    incoming: Cutter<REPLY_BYTES>,
    outgoing: Outbox,
    began: Instant,
}

/// What the relay's owner is told and asked.
pub(crate) trait Owner {
    /// The server answers, or is away for this reason.
    fn link(&mut self, lost: Option<&str>);
    /// The export has so many bytes now: more than the device, which can have them.
    fn grown(&mut self, size: u64);
    /// It was looked whether the export has grown: it has not, or this hinders it.
    fn looked(&mut self, obstacle: Option<&str>);
    /// SIGTERM came. Whether the relay is to end at once: a device is detached first, which ends it.
    fn told_to_end(&mut self) -> bool;
}

/// What becomes readable when a signal comes.
pub(crate) struct Signals {
    /// It is to end.
    pub(crate) terminate: UnixStream,
    /// It is to look whether the export has grown.
    pub(crate) look: UnixStream,
}

impl Signals {
    /// Whether one came since this was asked.
    fn came(mut signal: &UnixStream) -> bool {
        io::Read::read(&mut signal, &mut [0; 16]).is_ok_and(|read| read > 0)
    }
}

/// A relay between two sockets.
pub(crate) struct Relay<O> {
    kernel: UnixStream,
    incoming: Cutter<REQUEST_BYTES>,
    outgoing: Outbox,
    machine: Machine,
    link: Option<Link>,
    /// The next link, if there is one already. Nothing is sent over it before the last one has ended.
    next: Option<Dialled>,
    links: u64,
    dialler: Dialler,
    outage: Outage,
    /// What was not finished when the last link came up.
    unfinished: (usize, usize),
    dead_after: Option<Duration>,
    has_ended: bool,
    /// Whether it was the kernel that ended it.
    is_detached: bool,
    signals: Signals,
    owner: O,
}

impl<O: Owner> Relay<O> {
    /// Begins with a link.
    pub(crate) fn new(
        kernel: UnixStream,
        (socket, export): Dialled,
        dialler: Dialler,
        (hold_bytes, dead_after): (usize, Option<Duration>),
        signals: Signals,
        owner: O,
    ) -> io::Result<Self> {
        kernel.set_nonblocking(true)?;
        signals.terminate.set_nonblocking(true)?;
        signals.look.set_nonblocking(true)?;
        let mut relay = Self {
            kernel,
            incoming: Cutter::new(),
            outgoing: Outbox::default(),
            machine: Machine::new(export.clone(), hold_bytes),
            link: None,
            next: None,
            links: 0,
            dialler,
            outage: Outage::none(Instant::now()),
            unfinished: (0, 0),
            dead_after,
            has_ended: false,
            is_detached: false,
            signals,
            owner,
        };
        relay.link_up((socket, export));
        Ok(relay)
    }

    /// Relays until the kernel gives the device up, or this is told to end; whether it was the kernel.
    pub(crate) fn run(mut self) -> io::Result<bool> {
        while !self.has_ended {
            self.send();
            self.wait()?;
            if Signals::came(&self.signals.terminate) {
                self.has_ended = self.owner.told_to_end();
            }
            // Without a link the next one tells.
            if Signals::came(&self.signals.look) && self.link.is_some() {
                self.dialler.look();
            }
            for news in self.dialler.news() {
                match news {
                    News::Up(dialled) if self.link.is_some() => self.look_at(dialled),
                    News::Up(dialled) => self.link_up(dialled),
                    News::Failed(why) if self.link.is_some() => self.not_seen(&why),
                    News::Failed(why) => self.is_away(&why),
                }
            }
            self.receive_replies();
            self.receive_requests();
            self.watch_outage();
        }
        self.end();
        Ok(self.is_detached)
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> io::Result<()> {
        let wanted = |outbox: &Outbox| match outbox.queue.is_empty() {
            true => PollFlags::IN,
            false => PollFlags::IN | PollFlags::OUT,
        };
        let mut sockets = vec![
            PollFd::new(&self.signals.terminate, PollFlags::IN),
            PollFd::new(&self.signals.look, PollFlags::IN),
            PollFd::new(self.dialler.woken(), PollFlags::IN),
        ];
        // More than any kernel asks for at once is left in the socket.
        let kernel = match self.machine.is_full() {
            true => wanted(&self.outgoing) & !PollFlags::IN,
            false => wanted(&self.outgoing),
        };
        sockets.push(PollFd::new(&self.kernel, kernel));
        if let Some(link) = &self.link {
            sockets.push(PollFd::new(&link.socket, wanted(&link.outgoing)));
        }
        let now = Instant::now();
        let since = self.outage.since().filter(|_| !self.machine.has_given_up());
        let deadline = since.zip(self.dead_after).map(|(since, may)| since + may);
        let timeout = deadline.map(|deadline| deadline.saturating_duration_since(now));
        let timeout = timeout.into_iter().chain(self.outage.next_tell(now)).min();
        let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
        match poll(&mut sockets, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            // The machine has no memory for it at this moment. A device is not lost for that.
            Err(Errno::NOMEM | Errno::AGAIN) => {
                thread::sleep(NO_MEMORY_PAUSE);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn link_up(&mut self, (socket, export): Dialled) {
        if let Err(error) = socket.set_nonblocking(true) {
            return self.link_lost(error.to_string());
        }
        self.links += 1;
        let link = Link {
            socket,
            incoming: Cutter::new(),
            outgoing: Outbox::default(),
            began: Instant::now(),
        };
        self.link = Some(link);
        self.unfinished = self.machine.unfinished();
        self.handle(Event::LinkUp {
            link: self.links,
            export,
        });
    }

    fn link_lost(&mut self, why: String) {
        let began = self.link.take().map(|link| link.began);
        self.is_away(&why);
        match self.next.take() {
            Some(dialled) => self.link_up(dialled),
            None => self.dialler.begin(began),
        }
    }

    /// Another connection while there is a link. The link is given up for a larger export alone: it may be the only one that there ever is
    /// to this export, whatever is served at its address now.
    fn look_at(&mut self, dialled: Dialled) {
        match self.machine.is_larger(&dialled.1) {
            Ok(true) => {
                self.next = Some(dialled);
                self.handle(Event::Larger);
            }
            Ok(false) => self.owner.looked(None),
            Err(why) => self.not_seen(&why),
        }
    }

    fn not_seen(&mut self, why: &str) {
        log::warn!("whether the export has grown cannot be seen: {why}; the link stays");
        self.owner.looked(Some(why));
    }

    fn is_away(&mut self, why: &str) {
        let is_new = self.outage.why() != Some(why);
        if let Some(line) = self.outage.lost(why, Instant::now()) {
            log::warn!("{line}");
        }
        if is_new {
            self.owner.link(Some(why));
        }
    }

    /// Ends an outage once the server answers, and tells of one that lasts.
    fn watch_outage(&mut self) {
        let now = Instant::now();
        let Some(since) = self.outage.since() else { return };
        if self.link.is_some() && !self.machine.is_away() {
            if let Some(lasted) = self.outage.over(now) {
                let (unanswered, held) = self.unfinished;
                log::warn!(
                    "the link is up again after {:.1} s: {unanswered} requests without an answer and {held} changes without a \
                     flush are sent again",
                    lasted.as_secs_f64()
                );
            }
            return self.owner.link(None);
        }
        if let Some(line) = self.outage.tell(now) {
            log::warn!("{line}");
        }
        let silence = now.saturating_duration_since(since);
        if !self.machine.has_given_up() && self.dead_after.is_some_and(|may| silence >= may) {
            log::error!(
                "no answer for {} s: requests fail until there is one",
                silence.as_secs()
            );
            self.handle(Event::GiveUp);
        }
    }

    fn handle(&mut self, event: Event) {
        for action in self.machine.handle(event) {
            match action {
                Action::ToServer(request) => {
                    if let Some(link) = &mut self.link {
                        link.outgoing.push(&request.header(), request.payload);
                    }
                }
                Action::ToKernel(reply) => self.outgoing.push(&reply.header(), reply.payload),
                Action::Reconnect { why } => self.link_lost(why),
                Action::Grow(size) => self.owner.grown(size),
                Action::End => (self.has_ended, self.is_detached) = (true, true),
            }
        }
    }

    fn receive_replies(&mut self) {
        while let Some(link) = &mut self.link {
            let machine = &self.machine;
            let next = link.incoming.next(&mut &link.socket, |header| {
                machine.reply_bytes(&Reply::parse(header)?)
            });
            match next {
                Ok(None) => return,
                Ok(Some((header, payload))) => match Reply::parse(&header) {
                    Ok(reply) => self.handle(Event::Reply {
                        link: self.links,
                        reply: Reply { payload, ..reply },
                    }),
                    Err(why) => self.handle(Event::LinkLost {
                        link: self.links,
                        why,
                    }),
                },
                Err(error) => {
                    let why = match error.kind() {
                        io::ErrorKind::UnexpectedEof => "the server ended it".to_owned(),
                        _ => error.to_string(),
                    };
                    self.handle(Event::LinkLost {
                        link: self.links,
                        why,
                    });
                }
            }
        }
    }

    fn receive_requests(&mut self) {
        while !self.has_ended && !self.machine.is_full() {
            let next = self.incoming.next(&mut &self.kernel, |header| {
                Ok(Request::parse(header)?.payload_bytes())
            });
            match next {
                Ok(None) => return,
                Ok(Some((header, payload))) => match Request::parse(&header) {
                    Ok(request) => self.handle(Event::Request(Request { payload, ..request })),
                    Err(why) => self.kernel_gone(&io::Error::other(why)),
                },
                Err(error) => self.kernel_gone(&error),
            }
        }
    }

    fn kernel_gone(&mut self, why: &io::Error) {
        log::info!("nothing more can come from the kernel: {why}");
        self.has_ended = true;
        // Of any other reason, such as what is no request, the kernel still has the device.
        self.is_detached = matches!(
            why.kind(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof
        );
    }

    fn send(&mut self) {
        if let Err(error) = self.outgoing.write(&self.kernel) {
            self.kernel_gone(&error);
        }
        if let Some(link) = &mut self.link
            && let Err(error) = link.outgoing.write(&link.socket)
        {
            self.handle(Event::LinkLost {
                link: self.links,
                why: error.to_string(),
            });
        }
    }

    fn end(&mut self) {
        let (unanswered, held) = self.machine.unfinished();
        if let Some(link) = &mut self.link {
            let goodbye = Request {
                command: crate::nbd::wire::DISCONNECT,
                ..Request::flush(0)
            };
            link.outgoing.push(&goodbye.header(), goodbye.payload);
            let _ = link.socket.set_nonblocking(false);
            let _ = link.socket.set_write_timeout(Some(GOODBYE_MAX));
            let _ = link.outgoing.write(&link.socket);
        }
        if unanswered + held > 0 {
            log::error!(
                "detached before the server had taken everything: {unanswered} requests may not be carried out, and {held} changes that it \
                 had not flushed may be lost"
            );
        }
    }
}

//! The relay: moves bytes between the kernel's socket and the link to the server, as the machine says.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::dial::{Dialled, Dialler};
use crate::machine::{Action, Event, Machine};
use crate::wire::{Cutter, Payload, REPLY_BYTES, REQUEST_BYTES, Reply, Request};

/// The end of a link waits so long for its last bytes to go.
const GOODBYE_MAX: Duration = Duration::from_secs(1);
const SLICES_MAX: usize = 64;

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
    /// The link is up, or was lost for this reason.
    fn link(&mut self, lost: Option<&str>);
    /// SIGTERM came. Whether the relay is to end at once: a device is detached first, which ends it.
    fn told_to_end(&mut self) -> bool;
}

/// A relay between two sockets.
pub(crate) struct Relay<O> {
    kernel: UnixStream,
    incoming: Cutter<REQUEST_BYTES>,
    outgoing: Outbox,
    machine: Machine,
    link: Option<Link>,
    links: u64,
    dialler: Dialler,
    /// When and why there was a link last.
    lost: Option<(Instant, String)>,
    dead_after: Option<Duration>,
    has_given_up: bool,
    has_ended: bool,
    terminate: UnixStream,
    owner: O,
}

impl<O: Owner> Relay<O> {
    /// Begins with a link. `terminate` becomes readable when SIGTERM comes.
    pub(crate) fn new(
        kernel: UnixStream,
        (socket, export): Dialled,
        dialler: Dialler,
        (hold_bytes, dead_after): (usize, Option<Duration>),
        terminate: UnixStream,
        owner: O,
    ) -> io::Result<Self> {
        kernel.set_nonblocking(true)?;
        terminate.set_nonblocking(true)?;
        let mut relay = Self {
            kernel,
            incoming: Cutter::new(),
            outgoing: Outbox::default(),
            machine: Machine::new(export.clone(), hold_bytes),
            link: None,
            links: 0,
            dialler,
            lost: None,
            dead_after,
            has_given_up: false,
            has_ended: false,
            terminate,
            owner,
        };
        relay.link_up((socket, export))?;
        Ok(relay)
    }

    /// Relays until the kernel gives the device up.
    pub(crate) fn run(mut self) -> io::Result<()> {
        while !self.has_ended {
            self.send();
            self.wait()?;
            if io::Read::read(&mut &self.terminate, &mut [0; 16]).is_ok_and(|read| read > 0) {
                self.has_ended = self.owner.told_to_end();
            }
            if let Some(dialled) = self.dialler.taken() {
                self.link_up(dialled)?;
            }
            self.receive_replies();
            self.receive_requests();
            let silence = self.lost.as_ref().map(|(since, _)| since.elapsed());
            if !self.has_given_up && silence.zip(self.dead_after).is_some_and(|(is, may)| is >= may) {
                self.has_given_up = true;
                log::error!(
                    "no link for {} s: requests fail until there is one",
                    silence.unwrap_or_default().as_secs()
                );
                self.handle(Event::GiveUp);
            }
        }
        self.end();
        Ok(())
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> io::Result<()> {
        let wanted = |outbox: &Outbox| match outbox.queue.is_empty() {
            true => PollFlags::IN,
            false => PollFlags::IN | PollFlags::OUT,
        };
        let mut sockets = vec![
            PollFd::new(&self.terminate, PollFlags::IN),
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
        let deadline = self
            .lost
            .as_ref()
            .filter(|_| !self.has_given_up)
            .zip(self.dead_after);
        let timeout = deadline.map(|((since, _), may)| may.saturating_sub(since.elapsed()));
        let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
        match poll(&mut sockets, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn link_up(&mut self, (socket, export): Dialled) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        self.links += 1;
        let link = Link {
            socket,
            incoming: Cutter::new(),
            outgoing: Outbox::default(),
            began: Instant::now(),
        };
        self.link = Some(link);
        let (unanswered, held) = self.machine.unfinished();
        self.handle(Event::LinkUp {
            link: self.links,
            export,
        });
        if self.link.is_some() {
            if let Some((since, _)) = self.lost.take() {
                log::warn!(
                    "the link is up again after {:.1} s: {unanswered} requests without an answer and {held} changes without a \
                     flush are sent again",
                    since.elapsed().as_secs_f64()
                );
            }
            self.has_given_up = false;
            self.owner.link(None);
        }
        Ok(())
    }

    fn link_lost(&mut self, why: String) {
        let began = self.link.take().map(|link| link.began);
        let (since, said) = self
            .lost
            .take()
            .unwrap_or_else(|| (Instant::now(), String::new()));
        if said != why {
            log::warn!("no link: {why}; requests wait");
            self.owner.link(Some(&why));
        }
        self.lost = Some((since, why));
        if let Err(error) = self.dialler.begin(began) {
            // No thread: nothing will ever come up again.
            log::error!("no more links can be made: {error}");
            self.has_ended = true;
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
                Action::End => self.has_ended = true,
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
                    Err(why) => self.kernel_gone(&why),
                },
                Err(error) => self.kernel_gone(&error.to_string()),
            }
        }
    }

    fn kernel_gone(&mut self, why: &str) {
        log::info!("the kernel has given the device up: {why}");
        self.has_ended = true;
    }

    fn send(&mut self) {
        if let Err(error) = self.outgoing.write(&self.kernel) {
            self.kernel_gone(&error.to_string());
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
                command: crate::wire::DISCONNECT,
                ..Request::flush(0)
            };
            link.outgoing.push(&goodbye.header(), goodbye.payload);
            let _ = link.socket.set_nonblocking(false);
            let _ = link.socket.set_write_timeout(Some(GOODBYE_MAX));
            let _ = link.outgoing.write(&link.socket);
        } else if unanswered + held > 0 {
            log::error!(
                "detached without a link: {unanswered} requests were not carried out, and {held} changes that the server had \
                 not flushed may be lost"
            );
        }
    }
}

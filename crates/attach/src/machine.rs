//! What the relay does with requests, answers and links. Pure: events in, actions out.
//!
//! * What was not answered is kept, and sent again over the next link.
//! * A change that was answered is held until a flush that was sent after its answer is answered: a server that dies may
//!   lose it. It is sent again over the next link, before anything that came after it.
//! * An export that has grown is gone on with in its new size, once its server has answered something; one that has shrunk is not.
//! * Two requests that reach the same byte, one of which changes it, are never under way at once. So the order in which the
//!   kernel sent them is the order in which they take effect, over any number of links.

use std::collections::{BTreeMap, VecDeque};

use crate::held::{Holdings, cost};
use crate::nbd::handshake::Export;
use crate::nbd::wire::{DISCONNECT, EINVAL, EIO, ESHUTDOWN, FLUSH, Payload, READ, Reply, Request};

/// So many requests are under way at once at most: the kernel's own queue is 128 a link.
const UNDER_WAY_MAX: usize = 256;
/// While so many wait, no more are taken from the kernel.
const WAITING_MAX: usize = 1024;

/// So much is read to see whether a server answers.
const SIGN_BYTES: u32 = 512;

/// Why a link ends over which a server answers.
const LARGER: &str = "the export has grown, and is gone on with over a new link";

/// What comes in. `link` tells which link it came over: links are counted from 1.
#[derive(Debug)]
pub(crate) enum Event {
    /// The kernel sent a request, with its payload.
    Request(Request),
    /// The server answered. The reply has the cookie under which the request was sent.
    Reply { link: u64, reply: Reply },
    /// There is a new link.
    LinkUp { link: u64, export: Export },
    /// A link has ended.
    LinkLost { link: u64, why: String },
    /// The server was away for as long as requests may wait.
    GiveUp,
    /// There is another connection, over which the export is larger: that is to be the next link.
    Larger,
}

/// What is to be done.
#[derive(Debug)]
pub(crate) enum Action {
    /// Send a request under its own cookie.
    ToServer(Request),
    /// Answer the kernel.
    ToKernel(Reply),
    /// Close the link and make the next one. What was not sent over it yet is not sent.
    Reconnect { why: String },
    /// Have the device grow to so many bytes: the export has them now.
    Grow(u64),
    /// The kernel has detached the device.
    End,
}

/// Who wants a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum For {
    /// The kernel, which gave it this cookie.
    Kernel(u64),
    /// The kernel has its answer: it is done again for a server that may have lost it.
    Again,
    /// The relay itself, to make room: a flush.
    Room,
    /// The relay itself, to see whether the server answers: a read.
    Sign,
    /// Nobody any more: the kernel has been told that it failed.
    Nobody,
}

#[derive(Debug, Clone)]
struct Item {
    request: Request,
    wanted: For,
}

impl Item {
    /// Whether the kernel waits for its answer.
    fn is_kernels(&self) -> bool {
        matches!(self.wanted, For::Kernel(_))
    }
}

/// The relay's state.
#[derive(Debug)]
pub(crate) struct Machine {
    export: Export,
    /// The link that is up.
    link: Option<u64>,
    /// Why this link is to end. It ends once all that is under way is answered: the server lives, and would carry it out later
    /// than what comes over the next link.
    parting: Option<String>,
    /// What the export has on this link, if that is more than before, until something is answered over it. A stranger that greets and hangs
    /// up has nothing grow that could not shrink again.
    grows_to: Option<u64>,
    next_cookie: u64,
    waiting: VecDeque<Item>,
    /// What is under way by cookie; of a flush, how many changes were answered before it was sent.
    under_way: BTreeMap<u64, (Item, u64)>,
    held: Holdings,
    /// The error of a flush of the relay's own, which the kernel's next flush is to hear of.
    owed: Option<u32>,
    /// From the loss of a link until something is answered over another one.
    is_away: bool,
    /// Something that was to be done again was refused: until all of it is done, answers to a part of it are no sign that the server is
    /// back.
    is_stuck: bool,
    has_given_up: bool,
}

impl Machine {
    /// Nothing is under way. With `hold_max_bytes` 0 no answered change is held.
    pub(crate) fn new(export: Export, hold_max_bytes: usize) -> Self {
        // Without flush there is nothing that could be lost, as far as a client can know.
        let hold_max_bytes = if export.can_flush() { hold_max_bytes } else { 0 };
        Self {
            export,
            link: None,
            parting: None,
            grows_to: None,
            next_cookie: 1,
            waiting: VecDeque::new(),
            under_way: BTreeMap::new(),
            held: Holdings::new(hold_max_bytes),
            owed: None,
            is_away: false,
            is_stuck: false,
            has_given_up: false,
        }
    }

    /// How many bytes follow the header of a reply, or that it answers nothing that was asked.
    pub(crate) fn reply_bytes(&self, reply: &Reply) -> Result<usize, String> {
        match self.under_way.get(&reply.cookie) {
            None => Err(format!(
                "it answered request {}, which it does not have",
                reply.cookie
            )),
            Some((item, _)) if item.request.command == READ && reply.error == 0 => {
                Ok(item.request.length as usize)
            }
            Some(_) => Ok(0),
        }
    }

    /// Whether an export is larger than the one that is gone on with; an error is why it cannot be gone on with.
    pub(crate) fn is_larger(&self, export: &Export) -> Result<bool, String> {
        match self.export.obstacle(export) {
            None => Ok(export.size > self.export.size),
            Some(why) => Err(why),
        }
    }

    /// Whether requests fail until the server answers.
    pub(crate) fn has_given_up(&self) -> bool {
        self.has_given_up
    }

    /// Whether the server has answered nothing that counts since a link was lost.
    pub(crate) fn is_away(&self) -> bool {
        self.is_away
    }

    /// Whether there is more to do than any kernel asks for.
    pub(crate) fn is_full(&self) -> bool {
        // What is done again does not come from the kernel, and may be more.
        self.waiting.len() >= WAITING_MAX
            && self.waiting.iter().filter(|item| item.is_kernels()).count() >= WAITING_MAX
    }

    /// How many requests have no answer, and how many changes are held.
    pub(crate) fn unfinished(&self) -> (usize, usize) {
        let under_way = self.under_way.values().map(|(item, _)| item);
        let unanswered = under_way.chain(&self.waiting).filter(|item| item.is_kernels());
        (unanswered.count(), self.held.len())
    }

    /// Takes an event in, and says what is to be done, in order.
    pub(crate) fn handle(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Request(request) if request.command == DISCONNECT => actions.push(Action::End),
            Event::Request(request) => self.take(request, &mut actions),
            Event::Reply { link, reply } if self.link == Some(link) => self.answer(reply, &mut actions),
            Event::LinkLost { link, why } if self.link == Some(link) => self.lose(why, &mut actions),
            Event::LinkUp { link, export } => match self.export.obstacle(&export) {
                None => self.resume(link, export),
                Some(why) => {
                    self.is_away = true;
                    actions.push(Action::Reconnect { why });
                }
            },
            Event::GiveUp if self.is_away => self.give_up(&mut actions),
            Event::Larger if self.link.is_some() => {
                self.parting.get_or_insert_with(|| LARGER.to_owned());
                self.part(&mut actions);
            }
            // Of a link that is gone, or a moment too late.
            Event::Reply { .. } | Event::LinkLost { .. } | Event::GiveUp | Event::Larger => {}
        }
        self.send(&mut actions);
        actions
    }

    fn take(&mut self, request: Request, actions: &mut Vec<Action>) {
        let end = request.offset.checked_add(request.length.into());
        let error = match () {
            () if self.has_given_up => EIO,
            () if end.is_none_or(|end| end > self.export.size) => EINVAL,
            () => {
                let cookie = self.cookie();
                let wanted = For::Kernel(request.cookie);
                self.waiting.push_back(Item {
                    request: Request { cookie, ..request },
                    wanted,
                });
                return;
            }
        };
        actions.push(refusal(request.cookie, error));
    }

    fn cookie(&mut self) -> u64 {
        self.next_cookie += 1;
        self.next_cookie - 1
    }

    fn answer(&mut self, reply: Reply, actions: &mut Vec<Action>) {
        let Some((item, answered_before)) = self.under_way.remove(&reply.cookie) else {
            let why = format!("it answered request {}, which it does not have", reply.cookie);
            return self.lose(why, actions);
        };
        let refused = match (item.wanted, reply.error) {
            (_, ESHUTDOWN) => Some("the server is shutting down".to_owned()),
            (For::Again, error) if error != 0 => Some(format!(
                "a {} at {} that an earlier server had carried out got error {error}; nothing goes on without it",
                item.request.name(),
                item.request.offset,
            )),
            _ => None,
        };
        match refused {
            // What is left is lost with the link; of an item that is done again there is another one in what is held.
            Some(why) => {
                self.is_stuck |= item.wanted == For::Again && reply.error != ESHUTDOWN;
                self.waiting.push_front(item);
                self.parting.get_or_insert(why);
            }
            None => {
                self.is_stuck &= self.does_again();
                if !self.is_stuck {
                    (self.is_away, self.has_given_up) = (false, false);
                    self.grow(actions);
                }
                self.finish(item, answered_before, reply, actions);
            }
        }
        self.part(actions);
    }

    /// Ends a link that is to end, once nothing is under way.
    fn part(&mut self, actions: &mut Vec<Action>) {
        if let Some(why) = self.parting.take_if(|_| self.under_way.is_empty()) {
            self.lose(why, actions);
        }
    }

    /// The server answers, so what it said of the size counts.
    fn grow(&mut self, actions: &mut Vec<Action>) {
        if let Some(size) = self.grows_to.take() {
            self.export.size = size;
            actions.push(Action::Grow(size));
        }
    }

    /// Whether anything that an earlier server had carried out is still to be done again.
    fn does_again(&self) -> bool {
        let under_way = self.under_way.values().map(|(item, _)| item);
        under_way
            .chain(&self.waiting)
            .any(|item| item.wanted == For::Again)
    }

    /// An answer that counts.
    fn finish(&mut self, item: Item, answered_before: u64, reply: Reply, actions: &mut Vec<Action>) {
        match item.wanted {
            For::Again | For::Sign => {}
            // The export has it all the same.
            For::Nobody if reply.error == 0 && item.request.command == FLUSH => {
                self.held.flushed(answered_before);
            }
            For::Nobody if reply.error == 0 => self.held.add(item.request),
            For::Nobody => {}
            For::Room if reply.error == 0 => self.held.flushed(answered_before),
            For::Room => self.no_room(reply.error, actions),
            For::Kernel(cookie) => {
                let error = match (item.request.command, reply.error) {
                    (FLUSH, 0) => {
                        self.held.flushed(answered_before);
                        self.owed.take().unwrap_or(0)
                    }
                    (_, error) => error,
                };
                if error == 0 {
                    self.held.add(item.request);
                }
                let payload = if error == 0 {
                    reply.payload
                } else {
                    Payload::default()
                };
                actions.push(Action::ToKernel(Reply {
                    cookie,
                    error,
                    payload,
                }));
            }
        }
    }

    /// The flush that was to make room failed. The change that waited for the room hears of it, and so does the next flush:
    /// the server may tell of a failure only once.
    fn no_room(&mut self, error: u32, actions: &mut Vec<Action>) {
        self.owed = Some(error);
        if self.waiting.front().is_some_and(|item| self.lacks_room(item))
            && let Some(Item {
                wanted: For::Kernel(cookie),
                ..
            }) = self.waiting.pop_front()
        {
            actions.push(refusal(cookie, error));
        }
    }

    fn lose(&mut self, why: String, actions: &mut Vec<Action>) {
        (self.link, self.parting, self.is_away) = (None, None, true);
        self.grows_to = None;
        let lost = std::mem::take(&mut self.under_way)
            .into_values()
            .map(|(item, _)| item);
        let waiting = std::mem::take(&mut self.waiting);
        self.waiting = lost.chain(waiting).filter(Item::is_kernels).collect();
        // By cookie is the order in which they came.
        self.waiting
            .make_contiguous()
            .sort_by_key(|item| item.request.cookie);
        actions.push(Action::Reconnect { why });
    }

    fn resume(&mut self, link: u64, export: Export) {
        self.link = Some(link);
        self.grows_to = Some(export.size).filter(|size| *size > self.export.size);
        // A server that did not say which volume it has may have been replaced by one that does.
        if self.export.volume().is_none() {
            self.export.description = export.description;
        }
        let again = |request| Item {
            request,
            wanted: For::Again,
        };
        let again: Vec<Item> = self.held.requests().map(again).collect();
        for mut item in again.into_iter().rev() {
            // One of its own, for it may be a piece of several.
            item.request.cookie = self.cookie();
            self.waiting.push_front(item);
        }
        // Where nothing is asked of it, nobody would ever know.
        let size = self.grows_to.unwrap_or(self.export.size);
        if self.is_away && self.waiting.is_empty() && size > 0 {
            let least = self.export.blocks.map_or(0, |(least, ..)| least).max(SIGN_BYTES);
            let request = Request {
                command: READ,
                length: u64::from(least).min(size) as u32,
                ..Request::flush(self.cookie())
            };
            self.waiting.push_back(Item {
                request,
                wanted: For::Sign,
            });
        }
    }

    /// What the kernel asked for fails. What is under way may be carried out yet, and holds up what reaches the same bytes.
    fn give_up(&mut self, actions: &mut Vec<Action>) {
        self.has_given_up = true;
        for (item, _) in self.under_way.values_mut() {
            if let For::Kernel(cookie) = item.wanted {
                item.wanted = For::Nobody;
                actions.push(refusal(cookie, EIO));
            }
        }
        self.waiting.retain(|item| match item.wanted {
            For::Kernel(cookie) => {
                actions.push(refusal(cookie, EIO));
                false
            }
            _ => true,
        });
    }

    /// Sends what may be sent, in order: the first that may not holds up those after it.
    fn send(&mut self, actions: &mut Vec<Action>) {
        while self.link.is_some() && self.parting.is_none() {
            // Early, so that nobody waits for it while the server is quick enough.
            if self.held.is_half_full() && self.owed.is_none() {
                self.flush_for_room(actions);
            }
            let Some(item) = self.waiting.front() else { return };
            if self.under_way.len() >= UNDER_WAY_MAX || self.must_wait(item) {
                return;
            }
            if self.lacks_room(item) {
                return self.flush_for_room(actions);
            }
            if let Some(item) = self.waiting.pop_front() {
                self.put_under_way(item, actions);
            }
        }
    }

    fn put_under_way(&mut self, item: Item, actions: &mut Vec<Action>) {
        actions.push(Action::ToServer(item.request.clone()));
        self.under_way
            .insert(item.request.cookie, (item, self.held.answered()));
    }

    /// Whether what is under way must be answered before it is sent: it reaches the same bytes, or it is a flush and what it
    /// covers is being done again.
    fn must_wait(&self, item: &Item) -> bool {
        let is_flush = item.request.command == FLUSH;
        self.under_way.values().any(|(earlier, _)| {
            earlier.request.conflicts(&item.request) || (is_flush && earlier.wanted == For::Again)
        })
    }

    /// Whether no more changes can be held until a flush is answered.
    fn lacks_room(&self, item: &Item) -> bool {
        if item.wanted == For::Again || !item.request.is_change() {
            return false;
        }
        let to_be_held =
            |(earlier, _): &&(Item, u64)| earlier.request.is_change() && earlier.wanted != For::Again;
        let under_way = self.under_way.values().filter(to_be_held);
        let under_way = under_way.map(|(item, _)| cost(&item.request)).sum();
        self.held.lacks_room(under_way, &item.request)
    }

    /// Has the server flush, if there is anything to be flushed and no flush is under way.
    fn flush_for_room(&mut self, actions: &mut Vec<Action>) {
        let is_again = |item: &Item| item.wanted == For::Again;
        let hinders = |(item, _): &(Item, u64)| item.request.command == FLUSH || is_again(item);
        if self.held.len() == 0
            || self.waiting.front().is_some_and(is_again)
            || self.under_way.values().any(hinders)
        {
            return;
        }
        let request = Request::flush(self.cookie());
        self.put_under_way(
            Item {
                request,
                wanted: For::Room,
            },
            actions,
        );
    }
}

fn refusal(cookie: u64, error: u32) -> Action {
    Action::ToKernel(Reply {
        cookie,
        error,
        payload: Payload::default(),
    })
}

#[cfg(test)]
#[path = "machine_model.rs"]
mod model;

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;

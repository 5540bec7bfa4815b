//! Changes that the server has answered and may lose. Pure.

use std::collections::BTreeMap;

use crate::nbd::wire::{FUA, Request};

/// What keeping a request costs beside its payload.
pub(crate) const KEPT_BYTES: usize = 128;

/// What keeping a request costs.
pub(crate) fn cost(request: &Request) -> usize {
    request.payload.len() + KEPT_BYTES
}

#[derive(Debug)]
struct Held {
    request: Request,
    /// When it was first answered, counted in such answers.
    answered: u64,
}

/// What is held until a flush covers it.
#[derive(Debug)]
pub(crate) struct Holdings {
    /// By cookie, which is the order in which they came, and by place, since what is left of one may be in pieces.
    held: BTreeMap<(u64, u64), Held>,
    bytes: usize,
    max_bytes: usize,
    answered: u64,
}

impl Holdings {
    /// Holds nothing, and with 0 never will.
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self {
            held: BTreeMap::new(),
            bytes: 0,
            max_bytes,
            answered: 0,
        }
    }

    /// How many changes were answered, ever: what a flush covers that is sent now.
    pub(crate) fn answered(&self) -> u64 {
        self.answered
    }

    /// How many are held.
    pub(crate) fn len(&self) -> usize {
        self.held.len()
    }

    /// What they cost.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it is time for a flush, so that nobody has to wait for it later.
    pub(crate) fn is_half_full(&self) -> bool {
        self.bytes > self.max_bytes / 2
    }

    /// Whether another change cannot be held beside those that are under way. One alone always can.
    pub(crate) fn lacks_room(&self, under_way_bytes: usize, request: &Request) -> bool {
        let kept = self.bytes + under_way_bytes;
        self.max_bytes > 0 && kept > 0 && kept + cost(request) > self.max_bytes
    }

    /// What is held, in order.
    pub(crate) fn requests(&self) -> impl Iterator<Item = Request> {
        self.held.values().map(|held| held.request.clone())
    }

    /// Keeps a change that was answered. A durable one need not be kept, but what lies below it must not be done again: it would
    /// be undone by that, until it is done again too.
    pub(crate) fn add(&mut self, request: Request) {
        if self.max_bytes == 0 || !request.is_change() {
            return;
        }
        if request.flags & FUA != 0 {
            return self.cut_out(&request);
        }
        self.insert(Held {
            request,
            answered: self.answered,
        });
        self.answered += 1;
    }

    fn insert(&mut self, held: Held) {
        self.bytes += cost(&held.request);
        self.held.insert((held.request.cookie, held.request.offset), held);
    }

    /// Takes what a request reaches out of all that is held.
    fn cut_out(&mut self, over: &Request) {
        let below = self.held.iter().filter(|(_, held)| held.request.conflicts(over));
        let below: Vec<_> = below.map(|(key, _)| *key).collect();
        for Held { request, answered } in below
            .iter()
            .filter_map(|key| self.held.remove(key))
            .collect::<Vec<_>>()
        {
            self.bytes -= cost(&request);
            let (start, end) = (request.offset, request.end());
            let left = start..over.offset.clamp(start, end);
            let right = over.end().clamp(start, end)..end;
            for piece in [left, right].into_iter().filter(|piece| !piece.is_empty()) {
                self.insert(Held {
                    request: request.cut(piece),
                    answered,
                });
            }
        }
    }

    /// A flush was answered that was sent when so many changes had been.
    pub(crate) fn flushed(&mut self, answered_before: u64) {
        self.held.retain(|_, held| held.answered >= answered_before);
        self.bytes = self.held.values().map(|held| cost(&held.request)).sum();
    }
}

//! Decides which request goes to the store next: client reads first, then read-ahead, then background work.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// The purpose of a fetch, the most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A client waits for the bytes.
    Foreground,
    /// A client will probably want the bytes soon.
    ReadAhead,
    /// Work of the volume itself.
    Background,
}

const CLASSES: usize = 3;

/// A fixed number of slots for requests, given to the most urgent class that waits. Within a class the first to wait
/// comes first.
#[derive(Debug)]
pub struct PriorityGate {
    slots: Mutex<Slots>,
}

#[derive(Debug)]
struct Slots {
    /// The most slots that a class and the less urgent ones may hold together. A quarter is always left to the
    /// foreground.
    most: [usize; CLASSES],
    /// The slots that each of the less urgent classes gets before a more urgent one, so that it goes on however many clients read: publishes
    /// complete blocks as background work, and clients wait for what is read ahead.
    least: usize,
    /// The most slots that read-ahead may hold. Its fetches are the largest, so this bounds the memory that they take.
    most_ahead: usize,
    held: [usize; CLASSES],
    waiting: [VecDeque<oneshot::Sender<()>>; CLASSES],
}

impl Slots {
    fn can_take(&self, class: Class) -> bool {
        let all: usize = self.held.iter().sum();
        let later: usize = self.held[Class::ReadAhead as usize..].iter().sum();
        match class {
            _ if all >= self.most[0] => false,
            Class::Foreground => true,
            Class::ReadAhead if self.held[Class::ReadAhead as usize] >= self.most_ahead => false,
            Class::ReadAhead | Class::Background => later < self.most[class as usize],
        }
    }

    /// Gives free slots to those who wait.
    fn hand_out(&mut self) {
        let later = [Class::ReadAhead, Class::Background];
        let first = later.map(|class| (class, self.least));
        let all = [Class::Foreground, Class::ReadAhead, Class::Background];
        for (class, most) in first.into_iter().chain(all.map(|class| (class, usize::MAX))) {
            while self.held[class as usize] < most && self.can_take(class) {
                let Some(next) = self.waiting[class as usize].pop_front() else {
                    break;
                };
                self.held[class as usize] += 1;
                if next.send(()).is_err() {
                    // The waiter was dropped while it waited.
                    self.held[class as usize] -= 1;
                }
            }
        }
    }
}

/// A slot for one request, given back when it is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    gate: &'a PriorityGate,
    class: Class,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut slots = self.gate.slots.lock();
        slots.held[self.class as usize] -= 1;
        slots.hand_out();
    }
}

impl PriorityGate {
    /// A gate with this many slots, at least 4.
    pub fn new(slots: usize) -> Self {
        let slots = slots.max(4);
        let later = slots - slots / 4;
        Self {
            slots: Mutex::new(Slots {
                most: [slots, later, later],
                least: slots / 16,
                most_ahead: slots / 4,
                held: [0; CLASSES],
                waiting: Default::default(),
            }),
        }
    }

    /// Waits for a slot.
    pub async fn enter(&self, class: Class) -> Turn<'_> {
        let place = {
            let mut slots = self.slots.lock();
            if slots.waiting[class as usize].is_empty() && slots.can_take(class) {
                slots.held[class as usize] += 1;
                return Turn { gate: self, class };
            }
            let (hand, handed) = oneshot::channel();
            slots.waiting[class as usize].push_back(hand);
            HeldSlot {
                gate: self,
                class,
                handed: Some(handed),
            }
        };
        place.wait().await
    }
}

/// A place in the queue. If it is dropped after it got a slot and before that was noticed, it gives the slot back.
struct HeldSlot<'a> {
    gate: &'a PriorityGate,
    class: Class,
    handed: Option<oneshot::Receiver<()>>,
}

impl<'a> HeldSlot<'a> {
    async fn wait(mut self) -> Turn<'a> {
        if let Some(handed) = &mut self.handed {
            // The gate outlives the place, and never drops a sender without sending.
            let _ = handed.await;
        }
        self.handed = None;
        Turn {
            gate: self.gate,
            class: self.class,
        }
    }
}

impl Drop for HeldSlot<'_> {
    fn drop(&mut self) {
        if self.handed.as_mut().is_some_and(|handed| {
            // From here on no slot is sent any more, to be lost.
            handed.close();
            handed.try_recv().is_ok()
        }) {
            drop(Turn {
                gate: self.gate,
                class: self.class,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn the_most_urgent_goes_first_and_a_quarter_is_left_to_it() {
        let gate = PriorityGate::new(4);
        let mut held: Vec<Turn<'_>> = Vec::new();
        for _ in 0..3 {
            held.extend(gate.enter(Class::Background).now_or_never());
        }
        assert_eq!(held.len(), 3);
        let mut ahead = Box::pin(gate.enter(Class::ReadAhead));
        assert!(
            ahead.as_mut().now_or_never().is_none(),
            "the last quarter is not for it"
        );
        held.extend(gate.enter(Class::Foreground).now_or_never());
        assert_eq!(held.len(), 4);
        let mut background = Box::pin(gate.enter(Class::Background));
        let mut foreground = Box::pin(gate.enter(Class::Foreground));
        assert!(background.as_mut().now_or_never().is_none());
        assert!(foreground.as_mut().now_or_never().is_none());
        held.remove(0);
        assert!(ahead.as_mut().now_or_never().is_none());
        let first = foreground
            .as_mut()
            .now_or_never()
            .expect("the foreground is first");
        held.remove(0);
        let second = ahead.as_mut().now_or_never().expect("then read-ahead");
        assert!(background.as_mut().now_or_never().is_none());
        drop((first, second));
        assert!(background.as_mut().now_or_never().is_some());
    }

    #[test]
    fn nobody_waits_for_ever_behind_a_more_urgent_class() {
        let gate = PriorityGate::new(16);
        let mut held: VecDeque<_> = (0..16)
            .filter_map(|_| gate.enter(Class::Foreground).now_or_never())
            .collect();
        let mut ahead = [gate.enter(Class::ReadAhead), gate.enter(Class::ReadAhead)].map(Box::pin);
        let mut background = Box::pin(gate.enter(Class::Background));
        for waiting in ahead.iter_mut().chain([&mut background]) {
            assert!(waiting.as_mut().now_or_never().is_none());
        }
        // Clients go on without a pause.
        let mut clients = VecDeque::new();
        for _ in 0..40 {
            let mut next = Box::pin(gate.enter(Class::Foreground));
            assert!(next.as_mut().now_or_never().is_none());
            clients.push_back(next);
            drop(held.pop_front());
            if let Some(turn) = clients.front_mut().and_then(|next| next.as_mut().now_or_never()) {
                held.push_back(turn);
                clients.pop_front();
            }
        }
        let first = ahead[0].as_mut().now_or_never();
        assert!(first.is_some(), "one for read-ahead");
        assert!(
            background.as_mut().now_or_never().is_some(),
            "and one for the background"
        );
        assert!(
            ahead[1].as_mut().now_or_never().is_none(),
            "the other one waits its turn"
        );
    }

    #[test]
    fn read_ahead_holds_a_quarter_at_most() {
        let gate = PriorityGate::new(16);
        let ahead: Vec<_> = (0..8)
            .filter_map(|_| gate.enter(Class::ReadAhead).now_or_never())
            .collect();
        assert_eq!(ahead.len(), 4);
        let mut waiting = Box::pin(gate.enter(Class::ReadAhead));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert!(gate.enter(Class::Background).now_or_never().is_some());
        drop(ahead);
        assert!(waiting.as_mut().now_or_never().is_some());
    }

    #[test]
    fn who_goes_away_leaves_the_turn_to_others() {
        let gate = PriorityGate::new(4);
        let held: Vec<_> = (0..4)
            .filter_map(|_| gate.enter(Class::Foreground).now_or_never())
            .collect();
        for is_handed in [false, true] {
            let mut gone = Box::pin(gate.enter(Class::Foreground));
            assert!(gone.as_mut().now_or_never().is_none());
            if is_handed {
                break;
            }
            drop(gone);
        }
        let mut handed = Box::pin(gate.enter(Class::Foreground));
        assert!(handed.as_mut().now_or_never().is_none());
        drop(held);
        drop(handed);
        let again: Vec<_> = (0..4)
            .filter_map(|_| gate.enter(Class::Foreground).now_or_never())
            .collect();
        assert_eq!(again.len(), 4, "no turn is lost");
    }
}

//! Quota and back-pressure: the room in the write buffer, and how writers wait for it. Its functions block the calling
//! thread; never call them on the runtime.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::overlay::{Buffered, Overlay};
use super::policy::BufferPolicy;
use super::throttle::Throttle;
use crate::base::error::VolumeError;

/// How often a waiting writer checks for room that may come back without a signal.
const ROOM_POLL: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
struct Room {
    /// Counts how often room came back, so that a waiting writer notices it.
    made: u64,
    /// Bytes that admitted writers have not buffered yet, and the bytes of every [`Taken`].
    reserved_bytes: u64,
    /// Writers that wait for room.
    waiting: u32,
}

/// Room in the write buffer that is reserved for one change. It is given back when the change is buffered.
#[derive(Debug)]
pub struct Reservation<'a> {
    quota: &'a Quota,
    bytes: u64,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let (room, is_published) = &self.quota.room;
        let mut room = room.lock();
        room.reserved_bytes -= self.bytes;
        // The change may have buffered less than was reserved for it.
        if room.waiting > 0 {
            is_published.notify_all();
        }
    }
}

/// Room that is taken by something other than buffered changes. It is given back when this is dropped.
#[derive(Debug)]
pub struct Taken {
    quota: Arc<Quota>,
    bytes: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.quota.room.0.lock().reserved_bytes -= self.bytes;
        self.quota.made_room();
    }
}

/// The state that writers and the checkpoint task share.
#[derive(Debug)]
pub struct Quota {
    policy: BufferPolicy,
    /// Why the volume is fenced; `None` while it is not.
    fenced: Mutex<Option<String>>,
    is_fenced: AtomicBool,
    /// The last attempt to publish failed.
    is_failing: AtomicBool,
    throttle: Mutex<Throttle>,
    /// When the newest publish is expected to end, or to let the next one begin.
    room_expected: Mutex<Instant>,
    /// The time until which the writers together are slowed for what they buffered.
    paid_until: Mutex<Instant>,
    room: (Mutex<Room>, Condvar),
}

impl Quota {
    /// For a write buffer with these thresholds.
    pub fn new(policy: BufferPolicy) -> Self {
        Self {
            policy,
            fenced: Mutex::default(),
            is_fenced: AtomicBool::new(false),
            is_failing: AtomicBool::new(false),
            throttle: Mutex::new(Throttle::new(policy)),
            room_expected: Mutex::new(Instant::now()),
            paid_until: Mutex::new(Instant::now()),
            room: Default::default(),
        }
    }

    /// Returns the error of a fenced volume if the volume is fenced.
    pub fn check_fenced(&self) -> Result<(), VolumeError> {
        if !self.is_fenced.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(self.fenced_error())
    }

    /// The error with the reason that was noted.
    pub(crate) fn fenced_error(&self) -> VolumeError {
        VolumeError::Fenced {
            reason: self.fenced.lock().clone().unwrap_or_default(),
        }
    }

    /// Notes why the volume is fenced, and logs it. Only the first reason counts.
    pub(crate) fn note_fenced(&self, reason: String) {
        let mut fenced = self.fenced.lock();
        if fenced.is_none() {
            log::error!("fenced: {reason}; writes and flushes fail from now on, reads go on");
            *fenced = Some(reason);
        }
    }

    /// Notes whether an attempt to publish has failed.
    pub(crate) fn note_failing(&self, is_failing: bool) {
        self.is_failing.store(is_failing, Ordering::Relaxed);
    }

    /// Whether the last attempt to publish failed.
    pub(crate) fn is_failing(&self) -> bool {
        self.is_failing.load(Ordering::Relaxed)
    }

    /// Refuses every writer from now on.
    pub(crate) fn fence(&self) {
        self.is_fenced.store(true, Ordering::Release);
        self.wake_writers();
    }

    /// Notes that a publish of `bytes` has begun. It is the newest.
    pub(crate) fn publish_began(&self, bytes: u64) {
        let takes = self.throttle.lock().publish_estimate(bytes);
        *self.room_expected.lock() = Instant::now() + takes;
    }

    /// Notes that a publish of `bytes` succeeded.
    pub(crate) fn published(&self, bytes: u64, took: Duration) {
        self.throttle.lock().published(bytes, took);
    }

    /// Takes room for a generation that the buffer has dropped, until its memory is free, or for the bytes that an
    /// upload copies.
    pub(crate) fn take(self: &Arc<Self>, bytes: u64) -> Taken {
        self.room.0.lock().reserved_bytes += bytes;
        Taken {
            quota: self.clone(),
            bytes,
        }
    }

    /// Notes that a generation was frozen or dropped, so that there is room again.
    pub(crate) fn made_room(&self) {
        *self.paid_until.lock() = Instant::now();
        self.wake_writers();
    }

    fn wake_writers(&self) {
        let (room, is_published) = &self.room;
        room.lock().made += 1;
        is_published.notify_all();
    }

    /// Slows the caller according to what its change buffered.
    pub fn slow_down(&self, change: Buffered) {
        let fill = self
            .policy
            .fill_bytes(change.total_bytes, change.active_bytes, change.is_streaming);
        let now = Instant::now();
        let (delay, longest) = {
            let throttle = self.throttle.lock();
            if fill <= self.policy.soft_bytes() {
                return;
            }
            let room_in = self.room_expected.lock().saturating_duration_since(now);
            let delay = throttle.delay(change.added_bytes, fill, room_in);
            (delay, throttle.longest_wait(fill, room_in))
        };
        let until = {
            let mut paid_until = self.paid_until.lock();
            // Caps the throttle's debt at the current longest delay. Otherwise writers would stall when that delay
            // rises.
            *paid_until = ((*paid_until).max(now) + delay).min(now + longest);
            *paid_until
        };
        let (room, is_published) = &self.room;
        let mut room = room.lock();
        let seen = room.made;
        while !delay.is_zero() && room.made == seen && !is_published.wait_until(&mut room, until).timed_out()
        {
        }
    }

    /// Waits until the buffer has room for a change that adds at most `bytes`.
    ///
    /// # Errors
    /// [`VolumeError::BufferFull`] when no publish made progress for `timeout`, [`VolumeError::Fenced`].
    pub fn wait_for_room(
        &self,
        overlay: &Overlay,
        bytes: u64,
        timeout: Duration,
        ask_for_room: impl Fn(),
    ) -> Result<Reservation<'_>, VolumeError> {
        let capacity = self.policy.capacity_bytes();
        let needed = self.policy.needed_bytes(bytes);
        let has_room = |room: &Room| overlay.total_bytes() + room.reserved_bytes + needed <= capacity;
        let mut room = self.wait_until(overlay, has_room, timeout, None, ask_for_room)?;
        room.reserved_bytes += bytes;
        Ok(Reservation { quota: self, bytes })
    }

    /// Waits until a publish has made room of another kind. `has_room` is also asked at intervals, because such room
    /// may come back without a signal.
    ///
    /// # Errors
    /// As [`Self::wait_for_room`].
    pub fn wait_for(
        &self,
        overlay: &Overlay,
        has_room: impl Fn() -> bool,
        timeout: Duration,
        ask_for_room: impl Fn(),
    ) -> Result<(), VolumeError> {
        let poll = Some(ROOM_POLL);
        self.wait_until(overlay, |_| has_room(), timeout, poll, ask_for_room)
            .map(drop)
    }

    fn wait_until(
        &self,
        overlay: &Overlay,
        has_room: impl Fn(&Room) -> bool,
        timeout: Duration,
        poll: Option<Duration>,
        ask_for_room: impl Fn(),
    ) -> Result<MutexGuard<'_, Room>, VolumeError> {
        let mut until = Instant::now() + timeout;
        let (room, is_published) = &self.room;
        let mut room = room.lock();
        while !has_room(&room) {
            self.check_fenced()?;
            ask_for_room();
            let look_again = poll.map_or(until, |poll| until.min(Instant::now() + poll));
            room.waiting += 1;
            let is_over = is_published.wait_until(&mut room, look_again).timed_out();
            room.waiting -= 1;
            if is_over && Instant::now() >= until && !has_room(&room) {
                let progress = overlay.last_progress().map(|at| at.into_std() + timeout);
                if let Some(later) = progress.filter(|later| *later > Instant::now()) {
                    until = later;
                    continue;
                }
                return Err(VolumeError::BufferFull {
                    capacity_bytes: self.policy.capacity_bytes(),
                    waited: timeout,
                });
            }
        }
        Ok(room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::geometry::Geometry;
    use crate::write_buffer::generation::RANGE_BYTES;

    const NO_TIME: Duration = Duration::from_millis(1);

    #[test]
    fn a_dropped_generation_takes_room_until_it_is_freed() {
        let quota = Arc::new(Quota::new(BufferPolicy::new(1 << 20)));
        let overlay = Overlay::new(Geometry::new(1 << 30, 4096));
        let has_room = || quota.wait_for_room(&overlay, 512 << 10, NO_TIME, || {}).is_ok();
        let taken = quota.take(768 << 10);
        assert!(!has_room());
        drop(taken);
        assert!(has_room());
    }

    /// Runs of zeroed blocks take memory as data does. A client that makes them without end is held back.
    #[test]
    fn scattered_zeroes_fill_the_buffer() {
        let quota = Arc::new(Quota::new(BufferPolicy::new(1 << 20)));
        let overlay = Overlay::new(Geometry::new(1 << 40, 4096));
        let mut let_in = 0;
        while quota.wait_for_room(&overlay, RANGE_BYTES, NO_TIME, || {}).is_ok() {
            overlay.zero(let_in * 8192, 4096);
            let_in += 1;
            assert!(let_in <= (1 << 20) / RANGE_BYTES, "more than there is room for");
        }
        assert_eq!(let_in, (1 << 20) / RANGE_BYTES);
    }

    #[test]
    fn room_given_back_wakes_a_writer_that_waits() {
        let quota = Arc::new(Quota::new(BufferPolicy::new(1 << 20)));
        let taken = quota.take(1 << 20);
        let (asks, asked) = std::sync::mpsc::channel();
        let writer = std::thread::spawn({
            let quota = quota.clone();
            move || {
                let overlay = Overlay::new(Geometry::new(1 << 30, 4096));
                let ask = || asks.send(()).expect("somebody listens");
                let room = quota.wait_for_room(&overlay, 4096, Duration::from_secs(3600), ask);
                room.is_ok()
            }
        });
        asked.recv().expect("the writer has to wait");
        drop(taken);
        assert!(writer.join().unwrap());
    }

    /// The timeout of a waiting writer counts from the last step of a publish, which comes after an hour here.
    #[tokio::test(start_paused = true)]
    async fn a_writer_waits_for_a_publish_that_gets_on() {
        let quota = Arc::new(Quota::new(BufferPolicy::new(1 << 20)));
        let overlay = Overlay::new(Geometry::new(1 << 30, 4096));
        let taken = quota.take(1 << 20);
        let has_room = |ask: &dyn Fn()| quota.wait_for_room(&overlay, 4096, NO_TIME, ask).is_ok();
        assert!(!has_room(&|| {}));
        overlay.write(0, &[1; 4096]);
        let frozen = overlay.freeze();
        tokio::time::advance(Duration::from_secs(3600)).await;
        frozen.progress().advanced();
        let (asks, asked) = std::sync::mpsc::channel();
        let store = std::thread::spawn(move || {
            for _ in 0..2 {
                asked
                    .recv()
                    .expect("the writer asks again each time that its time is over");
            }
            drop(taken);
        });
        assert!(has_room(&|| asks.send(()).expect("somebody listens")));
        store.join().expect("it ends");
    }
}

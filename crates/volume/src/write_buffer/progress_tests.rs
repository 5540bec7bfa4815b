use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::*;
use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::VolumeError;
use crate::base::geometry::Geometry;
use crate::checkpoint::handle::{Driver, DriverConfig};
use crate::engine::{Beside, Engine};
use crate::meta::checkpoint_list::NoRecorder;
use crate::options::VolumeOptions;
use crate::testing::memory_engine::MemoryEngine;
use crate::volume::Volume;
use crate::write_buffer::overlay::{Frozen, Overlay};
use crate::write_buffer::policy::BufferPolicy;

const IO_TIMEOUT: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_secs(40);

#[tokio::test(start_paused = true)]
async fn what_is_done_again_is_no_progress() {
    let progress = Progress::default();
    assert_eq!(progress.last(), None);
    progress.reached(2);
    let first = progress.last();
    assert_eq!(first, Some(Instant::now()));
    tokio::time::advance(Duration::from_secs(1)).await;
    // The next attempt.
    progress.reached(1);
    progress.reached(2);
    assert_eq!(progress.last(), first);
    progress.reached(3);
    assert_eq!(progress.last(), Some(Instant::now()));
    tokio::time::advance(Duration::from_secs(1)).await;
    progress.advanced();
    assert_eq!(progress.last(), Some(Instant::now()));
}

/// How a publish ends once it took its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Published,
    Fails,
    StandsStill,
}

/// Publishes in steps that take a while each.
struct SlowEngine {
    inner: MemoryEngine,
    steps: u64,
    step: Duration,
    then: Then,
}

#[async_trait]
impl Engine for SlowEngine {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        self.inner.read(offset_bytes, out).await
    }

    async fn block_runs(&self, blocks: Range<u64>) -> Result<Vec<(Range<u64>, bool)>, VolumeError> {
        self.inner.block_runs(blocks).await
    }

    async fn publish(&self, frozen: Arc<Frozen>, beside: Beside) -> Result<Option<Checkpoint>, VolumeError> {
        for step in 1..=self.steps {
            tokio::time::sleep(self.step).await;
            frozen.progress().reached(step);
        }
        match self.then {
            Then::Published => self.inner.publish(frozen, beside).await,
            Then::Fails => Err(VolumeError::Internal("injected".into())),
            Then::StandsStill => std::future::pending().await,
        }
    }

    async fn recover(&self) -> Result<(), VolumeError> {
        self.inner.recover().await
    }

    async fn close(&self) -> bool {
        true
    }
}

/// The answer to a flush, and the seconds that it took.
async fn flush(steps: u64, then: Then) -> (Result<(), VolumeError>, u64) {
    let geometry = Geometry::new(1 << 20, 4096);
    let engine = SlowEngine {
        inner: MemoryEngine::new(geometry),
        steps,
        step: STEP,
        then,
    };
    let overlay = Arc::new(Overlay::new(geometry));
    let config = DriverConfig {
        checkpoint_interval: Duration::from_secs(3600),
        io_timeout: IO_TIMEOUT,
        buffer: BufferPolicy::new(16 << 20),
        first_generation: 1,
        metrics: Default::default(),
        recorded_generation: 0,
        wal: None,
    };
    let driver = Driver::start(overlay.clone(), Arc::new(engine), Arc::new(NoRecorder), config);
    driver.buffered(overlay.write(0, &[1; 4096]));
    let began = Instant::now();
    let answer = driver.flush().await;
    (answer, began.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn a_slow_publish_that_gets_on_is_waited_for() {
    let (answer, took) = flush(5, Then::Published).await;
    answer.expect("no step took as long as a request may wait");
    assert_eq!(took, 200);
}

#[tokio::test(start_paused = true)]
async fn one_that_stands_still_is_waited_for_from_its_last_step() {
    let (answer, took) = flush(2, Then::StandsStill).await;
    assert!(matches!(answer, Err(VolumeError::Timeout { .. })), "{answer:?}");
    assert_eq!(took, 2 * STEP.as_secs() + IO_TIMEOUT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn attempts_that_fail_at_the_same_step_get_nowhere() {
    let (answer, took) = flush(2, Then::Fails).await;
    assert!(matches!(answer, Err(VolumeError::Timeout { .. })), "{answer:?}");
    assert_eq!(took, 2 * STEP.as_secs() + IO_TIMEOUT.as_secs());
}

/// As a flush is: what was answered is not thrown away while its checkpoint goes on.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_waits_for_a_slow_checkpoint_that_gets_on() {
    for (steps, then) in [(7, Then::Published), (1, Then::StandsStill)] {
        let engine = SlowEngine {
            inner: MemoryEngine::new(Geometry::new(1 << 20, 4096)),
            steps,
            step: Duration::from_millis(500),
            then,
        };
        let options = VolumeOptions {
            checkpoint_interval: Duration::from_secs(3600),
            ..VolumeOptions::default()
        };
        let volume = Volume::over(Arc::new(engine), Arc::new(NoRecorder), &options);
        let closed = tokio::task::spawn_blocking(move || {
            volume.write(0, &[1; 4096], false)?;
            volume.close(Duration::from_secs(3))
        });
        let closed = closed.await.expect("it does not panic");
        assert_eq!(closed.is_ok(), then == Then::Published, "{closed:?}");
    }
}

//! A write of the inode that its owner was told had failed, and that is carried out later.

use std::path::PathBuf;
use std::sync::Arc;

use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextRef,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use hypernbd_volume::engine::{Beside, Engine};
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;
use parking_lot::Mutex;

use crate::compaction::{BLOCK, World};
use crate::faults::BoxError;
use crate::fixture::pattern;

#[derive(Debug, Default)]
enum State {
    /// Nothing is done.
    #[default]
    Unarmed,
    Armed,
    /// The first is sent, over this.
    Sent(Vec<u8>),
    /// The first is on its way, for all that anybody knows.
    UnderWay(Vec<u8>),
    Arrived,
}

/// The first write of the inode fails, and is carried out in front of the second.
#[derive(Debug, Default)]
struct Late {
    /// The inode, as the store keeps it.
    file: Mutex<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct IsFirst;

impl Storable for IsFirst {
    type Storer = StoreReplace<Self>;
}

#[derive(Debug)]
struct Injector(Arc<Late>);

impl Intercept for Injector {
    fn name(&self) -> &'static str {
        "late"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        let path = request.uri().split('?').next().unwrap_or_default();
        if request.method() != "PUT" || !path.ends_with("/inode") {
            return Ok(());
        }
        let file = self.0.file.lock().clone();
        let mut state = self.0.state.lock();
        match std::mem::take(&mut *state) {
            State::Armed => {
                bag.interceptor_state().store_put(IsFirst);
                *state = State::Sent(std::fs::read(file)?);
            }
            State::UnderWay(late) => {
                std::fs::write(file, late)?;
                *state = State::Arrived;
            }
            other => *state = other,
        }
        Ok(())
    }

    fn read_before_deserialization(
        &self,
        _: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if bag.load::<IsFirst>().is_none() {
            return Ok(());
        }
        bag.interceptor_state().unset::<IsFirst>();
        let file = self.0.file.lock().clone();
        let mut state = self.0.state.lock();
        if let State::Sent(before) = std::mem::take(&mut *state) {
            let late = std::fs::read(&file)?;
            std::fs::write(&file, before)?;
            *state = State::UnderWay(late);
        }
        Err("injected: no answer".into())
    }
}

/// What is stored after a flip that failed may be a publish that was given up: that one is no flip, and the places of copies are not those
/// of what it wrote.
#[test]
fn a_publish_that_arrives_late_is_not_taken_for_the_flip_that_it_hindered() {
    let late = Arc::<Late>::default();
    let mut world = World::created_with(|mut store| {
        let config = store.client.config().to_builder();
        let config = config.interceptor(Injector(late.clone()));
        store.client = aws_sdk_s3::Client::from_conf(config.build());
        store
    });
    *late.file.lock() = world.f.object_file("volume/inode");
    let mut rng = fastrand::Rng::with_seed(21);
    for _ in 0..4 {
        world.publish(&mut rng, 20);
    }
    let before = world.newest();
    let (f, engine, geometry) = (world.f.clone(), world.engine.clone(), world.engine.geometry());
    // A block that the flip moves, too.
    let at = {
        let model = world.model.lock();
        let mut blocks = model.chunks(BLOCK).enumerate();
        let written = blocks.find(|(_, bytes)| bytes.iter().any(|&byte| byte != 0));
        written.unwrap().0 * BLOCK
    };
    let mut generation = Generation::new(geometry);
    let bytes = pattern(77, BLOCK);
    generation.write(PreparedWrite::new(geometry, at as u64, &bytes));
    let frozen = Arc::new(Frozen::new(generation));
    *late.state.lock() = State::Armed;
    f.run(engine.publish(frozen, Beside::default())).unwrap_err();
    f.run(engine.recover()).unwrap();
    assert_eq!(world.newest(), before, "it is not there yet");
    let moved = world.relocate(&world.objects(), None);
    assert!(matches!(*late.state.lock(), State::Arrived));
    assert!(moved.is_err(), "{moved:?}");
    assert_eq!(world.newest(), before + 1, "it has arrived");
    let mut model = world.model.lock().clone();
    model[at..at + BLOCK].copy_from_slice(&bytes);
    let mut out = vec![0; model.len()];
    f.run(engine.read(0, &mut out)).unwrap();
    assert!(out == model, "read from where the flip would have put it");
}

//! Writes smaller than a block: what the blocks lack is read from the objects of many checkpoints, several with one
//! request.

use std::time::Duration;

use hypernbd_volume::Volume;

use crate::fixture::{Fixture, pattern};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u64 = 96;
const CLOSE: Duration = Duration::from_secs(20);

/// The same numbers in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn write(volume: &Volume, model: &mut [u8], at: u64, bytes: &[u8]) {
    volume.write(at, bytes, false).unwrap();
    model[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
}

/// Parts of a third of all blocks in each checkpoint, so that what is read for the next ones lies scattered over all of
/// them: neighbours in the volume in different objects, and neighbours in an object far apart in the volume. Some blocks
/// were never written.
#[test]
fn blocks_are_completed_from_wherever_their_bytes_are() {
    let f = Fixture::new();
    f.create(BLOCKS * BLOCK, BLOCK as u32);
    let mut model = vec![0; (BLOCKS * BLOCK) as usize];
    let mut random = Random(7);
    let mut volume = f.open();
    write(
        &volume,
        &mut model,
        0,
        &pattern(1, (BLOCKS * BLOCK) as usize * 3 / 4),
    );
    volume.flush().unwrap();
    for round in 0..12 {
        for n in 0..BLOCKS / 3 {
            // Some of them across the end of a block, some two in one block.
            let at = random.below(BLOCKS * BLOCK - 9000);
            let len = 1 + random.below(9000) as usize;
            write(&volume, &mut model, at, &pattern(round * 1000 + n, len));
        }
        volume.flush().unwrap();
        if round % 4 == 3 {
            // Nothing is known of where anything is.
            volume.close(CLOSE).unwrap();
            volume = f.open();
        }
        assert!(
            f.read(&volume, 0, model.len()) == model,
            "after checkpoint {round}"
        );
    }
    volume.close(CLOSE).unwrap();
    let volume = f.open();
    assert!(f.read(&volume, 0, model.len()) == model);
    volume.close(CLOSE).unwrap();
}

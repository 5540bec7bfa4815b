//! What a record says of the records before it.

use std::path::Path;

use tokio::sync::mpsc;

use super::*;
use crate::base::geometry::Geometry;
use crate::wal::journal::Journal;
use crate::wal::record::NONE_ACKNOWLEDGED;

async fn appender(path: &Path, volume_id: Uuid) -> Appender {
    let journal = Journal::open(path, volume_id, None).await.unwrap();
    let wal = DriverWal {
        store: Arc::new(journal),
        volume_id,
        epoch: 1,
        newest: NewestCheckpoint::default(),
    };
    Appender::new(
        wal,
        Commands::to(&mpsc::unbounded_channel().0),
        Metrics::default(),
    )
}

#[tokio::test]
async fn a_group_says_which_before_it_nobody_was_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let mut appender = appender(dir.path(), Uuid::from_u128(42)).await;
    let overlay = Overlay::with_wal(Geometry::new(1 << 20, 4096), 1 << 20);
    let made = |appender: &mut Appender, sequence: u64| {
        overlay.write(sequence * 4096, &[1; 4096]);
        let taken = appender.snapshot(sequence, &overlay, std::iter::empty(), GenerationId(1));
        assert!(matches!(taken, Snapshot::Record { .. }));
        Record::decode(&appender.groups[&sequence].bytes)
            .unwrap()
            .unacknowledged
    };
    assert_eq!(made(&mut appender, 1), NONE_ACKNOWLEDGED);
    assert_eq!(made(&mut appender, 2), NONE_ACKNOWLEDGED);
    appender.forget(1);
    assert_eq!(made(&mut appender, 3), 1, "2 is on its way");
    assert_eq!(made(&mut appender, 4), 2);
    appender.forget(2);
    appender.forget(3);
    appender.forget(4);
    assert_eq!(made(&mut appender, 5), 0);
}

#[tokio::test]
async fn a_write_is_on_its_way_until_its_group_is_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut appender = appender(dir.path(), Uuid::from_u128(42)).await;
    let overlay = Overlay::with_wal(Geometry::new(1 << 20, 4096), 64 << 10);
    let snapshot = |appender: &mut Appender, sequence: u64| {
        appender.snapshot(sequence, &overlay, std::iter::empty(), GenerationId(1))
    };
    overlay.write(0, &[1; 4096]);
    let written = overlay.unlogged_since();
    assert!(written.is_some() && appender.unlogged_since().is_none());
    snapshot(&mut appender, 1);
    assert_eq!(
        (appender.unlogged_since(), overlay.unlogged_since()),
        (written, None)
    );
    overlay.write(4096, &[1; 4096]);
    snapshot(&mut appender, 2);
    assert_eq!(appender.unlogged_since(), written, "the oldest of both");
    appender.forget(2);
    assert_eq!(appender.unlogged_since(), None, "all before it are durable, too");
    // Too large to be logged at once: it is left to its checkpoint.
    overlay.write(0, &[1; 256 << 10]);
    let written = overlay.unlogged_since();
    assert_eq!(snapshot(&mut appender, 3), Snapshot::TooLarge);
    assert_eq!(overlay.unlogged_since(), written, "nothing was taken");
}

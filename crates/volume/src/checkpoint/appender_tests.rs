//! What a group says of those before it.

use std::path::Path;

use tokio::sync::mpsc;

use super::*;
use crate::base::geometry::Geometry;
use crate::wal::journal::Journal;

async fn appender(path: &Path, volume_id: Uuid) -> Appender {
    let journal = Journal::open(path, volume_id, None).await.unwrap();
    let log = DriverLog {
        store: Arc::new(journal),
        volume_id,
        epoch: 1,
        newest: NewestCheckpoint::default(),
    };
    Appender::new(
        log,
        Commands::to(&mpsc::unbounded_channel().0),
        Metrics::default(),
    )
}

#[tokio::test]
async fn a_group_says_which_before_it_nobody_was_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let mut appender = appender(dir.path(), Uuid::from_u128(42)).await;
    let overlay = Overlay::with_log(Geometry::new(1 << 20, 4096), 1 << 20);
    let made = |appender: &mut Appender, sequence: u64| {
        overlay.write(sequence * 4096, &[1; 4096]);
        let taken = appender.snapshot(sequence, &overlay, std::iter::empty(), GenerationId(1));
        assert!(matches!(taken, Snapshot::Group { .. }));
        Group::decode(&appender.groups[&sequence].bytes)
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

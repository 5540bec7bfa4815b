//! Retention of volumes that other Hyperfile tools publish to, too.

use hyperfile::file::hyper::Hyper;
use hypernbd_volume::Volume;
use hypernbd_volume::admin::retention::{prune, set_policy};
use hypernbd_volume::options::{LeaseOptions, VolumeOptions};
use hypernbd_volume::past::{self, At, Past};
use hypernbd_volume::retention::Policy;

use crate::faults::LIMIT;
use crate::fixture::pattern;
use crate::resize::{FORMATS, made_elsewhere};

/// A checkpoint that another tool published, and that was the newest at no open of ours, is in no list. Its name keeps it.
#[test]
fn a_name_keeps_what_another_tool_published() {
    for format in FORMATS {
        let (f, model) = made_elsewhere(format, 3 * 1024 * 1024);
        let name: past::SnapshotName = "precious".parse().unwrap();
        f.run(past::create(&f.url, &f.store_options, &name, None))
            .unwrap();
        f.with_hyper_opened(|mut file: Hyper<'static>| async move {
            file.fs_write(0, &pattern(9, 100_000)).await.unwrap();
            file.fs_flush().await.unwrap();
        });
        let volume = f.open();
        for seed in 0..25 {
            volume.write(0, &pattern(seed, 3 * 1024 * 1024), false).unwrap();
            volume.flush().unwrap();
        }
        volume.close(LIMIT).unwrap();
        let read = || {
            let (options, at) = (VolumeOptions::default(), Past::At(At::Name(name.clone())));
            let opened = f.run(Volume::open_past(&f.url, &f.store_options, &options, &at));
            let volume = opened.unwrap();
            let read = f.read(&volume, 0, model.len());
            volume.close(LIMIT).unwrap();
            read
        };
        assert!(read() == model, "{format:?}");
        let policy = Policy {
            keep_last: 1,
            ..Policy::default()
        };
        f.run(set_policy(&f.url, &f.store_options, Some(&policy)))
            .unwrap();
        let removed = f
            .run(prune(&f.url, &f.store_options, &LeaseOptions::default()))
            .unwrap();
        assert!(
            removed.checkpoints > 5 && removed.objects > 5,
            "{format:?}: {removed:?}"
        );
        assert!(read() == model, "{format:?}");
        f.run(past::delete(&f.url, &f.store_options, &name)).unwrap();
        let removed = f
            .run(prune(&f.url, &f.store_options, &LeaseOptions::default()))
            .unwrap();
        assert!(
            removed.checkpoints == 1 && removed.objects > 0,
            "{format:?}: {removed:?}"
        );
    }
}

//! Containers near the end of their numbers.

use std::time::Duration;

use hyperfile::ondisk::InodeRaw;
use hypernbd_volume::engine::limits::CHECKPOINT_NUMBER_MAX;
use hypernbd_volume::{ErrorKind, admin};

use crate::fixture::{Fixture, pattern};

const MIB: u64 = 1 << 20;

/// As if so many checkpoint numbers had been used.
fn use_up(f: &Fixture, numbers: u64) {
    let store = f.store().unwrap();
    let key = store.data_key("inode");
    f.run(async {
        let (body, etag) = store.get(&key).await.unwrap().unwrap();
        let mut raw = InodeRaw::from_u8_slice(&body);
        raw.i_last_seq = numbers;
        store
            .put_if_match(&key, raw.as_u8_slice().to_vec(), &etag)
            .await
            .unwrap();
    });
}

/// The engine would mask the next number, and publish what nobody can read.
#[test]
fn a_volume_whose_checkpoint_numbers_end_is_read_and_not_written() {
    let f = Fixture::new();
    f.create(4 * MIB, 4096);
    let volume = f.open();
    volume.write(0, &pattern(1, 8192), true).unwrap();
    volume.close(Duration::from_secs(30)).unwrap();
    use_up(&f, CHECKPOINT_NUMBER_MAX - 1200);
    let volume = f.open();
    let mut written = 0;
    let refused = loop {
        match volume.write(MIB + written * 4096, &pattern(written + 2, 4096), true) {
            Ok(()) => written += 1,
            Err(e) => break e,
        }
        assert!(written < 200, "writes are refused before the end");
    };
    assert_eq!(refused.kind(), ErrorKind::Exhausted, "{refused}");
    assert!(written > 50, "{written}: some are left");
    volume.flush().unwrap();
    let check = |volume: &hypernbd_volume::Volume| {
        assert!(f.read(volume, 0, 8192) == pattern(1, 8192));
        for n in 0..written {
            assert!(
                f.read(volume, MIB + n * 4096, 4096) == pattern(n + 2, 4096),
                "{n}"
            );
        }
    };
    check(&volume);
    volume.close(Duration::from_secs(30)).unwrap();
    for last in [CHECKPOINT_NUMBER_MAX - 64, CHECKPOINT_NUMBER_MAX - 1] {
        use_up(&f, last);
        let volume = f.open();
        check(&volume);
        for refused in [
            volume.write(0, b"x", false),
            volume.zero(0, 4096, false),
            volume.trim(0, 4096, false),
        ] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Exhausted);
        }
        volume.flush().unwrap();
        volume.close(Duration::from_secs(30)).unwrap();
        check(&f.open_read_only());
        let info = f.run(admin::info(&f.url, &f.store_options)).unwrap();
        assert_eq!(info.checkpoint_numbers_used, last);
    }
}

/// Names have ten digits for an owner's number.
#[test]
fn a_volume_that_has_had_its_last_owner_is_read_and_not_written() {
    let f = Fixture::new();
    f.create(4 * MIB, 4096);
    let volume = f.open();
    volume.write(0, &pattern(1, 8192), true).unwrap();
    volume.close(Duration::from_secs(30)).unwrap();
    let mut lease = f.lease().unwrap();
    lease.epoch = 9_999_999_999;
    f.put_lease(&lease);
    let refused = f.try_open().err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Exhausted, "{refused}");
    assert_eq!(f.lease().unwrap(), lease, "nothing was written");
    assert!(f.read(&f.open_read_only(), 0, 8192) == pattern(1, 8192));
    lease.epoch += 1;
    f.put_lease(&lease);
    let refused = f.try_open().err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
}

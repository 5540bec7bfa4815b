//! The log's decoder and its replay, given anything: neither may panic, and what the decoder accepts must be what the
//! encoder would have written.
//!
//! `cargo +nightly fuzz run log_record` (docs/architecture.md). The first byte chooses: the rest as it is, or with its
//! checksums made right first, so that what lies behind them is reached.

#![no_main]

use bytes::Bytes;
use hypernbd_volume::wal::RecordId;
use hypernbd_volume::wal::record::{Record, HEADER_BYTES, fix_checksums};
use hypernbd_volume::wal::replay::Replay;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&choice, log)) = input.split_first() else {
        return;
    };
    let mut log = log.to_vec();
    if choice & 1 == 1 {
        fix_checksums(&mut log);
    }
    let log = Bytes::from(log);
    let mut replay = Replay::new(u64::from(choice >> 1));
    let mut at = 0;
    while at + HEADER_BYTES <= log.len() {
        let Ok((group, len)) = Record::decode_prefix(&log.slice(at..)) else {
            at += 1;
            continue;
        };
        assert_eq!(
            group.encode(),
            log.slice(at..at + len),
            "what is accepted is what would have been written"
        );
        let (epoch, sequence) = (group.epoch, group.sequence);
        if replay.next(RecordId { epoch, sequence }, group).is_err() {
            return;
        }
        at += len;
    }
});

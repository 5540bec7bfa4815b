//! The objects of the WAL, on the in-process S3 server: sealing, lost answers, deletion.

use super::*;
use crate::base::url::VolumeUrl;
use crate::store::options::StoreOptions;
use crate::wal::record::{Content, Entry};

struct Fixture {
    _dir: tempfile::TempDir,
    store: Store,
    volume_id: Uuid,
}

impl Fixture {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = VolumeUrl::parse(&format!("file://{}/log/", dir.path().display())).unwrap();
        let store = crate::store::connect_for_create(&url, &StoreOptions::default())
            .await
            .unwrap();
        Self {
            _dir: dir,
            store,
            volume_id: Uuid::from_u128(42),
        }
    }

    async fn open(&self, epoch: u64) -> Result<S3Wal, VolumeError> {
        S3Wal::open(self.store.clone(), self.volume_id, epoch, false).await
    }

    fn group(&self, epoch: u64, sequence: u64, generation: u64) -> EncodedGroup {
        let group = Record {
            is_seal: false,
            entries: vec![Entry {
                generation,
                offset_bytes: 0,
                content: Content::Data(vec![sequence as u8; 100].into()),
            }],
            ..Record::seal(self.volume_id, epoch, sequence)
        };
        EncodedGroup {
            sequence,
            newest_generation: generation,
            bytes: group.encode(),
        }
    }

    async fn keys(&self) -> Vec<String> {
        let root = self.store.data_key("");
        let listed = self.store.list(&root).await.unwrap();
        listed
            .iter()
            .map(|o| o.key.strip_prefix(&root).unwrap().to_owned())
            .collect()
    }
}

fn is_fenced(result: &Result<(), AppendError>) -> bool {
    matches!(result, Err(AppendError::Fenced(_)))
}

#[test]
fn only_names_of_groups_are_taken_for_groups() {
    let (epoch, sequence) = (3, 12);
    assert_eq!(
        parse_name("0000000003/0000000012"),
        Some(RecordId { epoch, sequence })
    );
    for name in [
        "",
        "3/12",
        "0000000003",
        "x/0000000003/0000000012",
        "0000000003/000000001x",
    ] {
        assert_eq!(parse_name(name), None, "{name}");
    }
}

/// Invariant L1, with the same epoch for both owners and with rising epochs.
#[tokio::test]
async fn an_older_owner_can_append_nothing_more() {
    for epochs in [(1, 1), (1, 2)] {
        let f = Fixture::new().await;
        let older = f.open(epochs.0).await.unwrap();
        let first = older.first_sequence();
        for n in first..first + 3 {
            older.append(&f.group(epochs.0, n, 1)).await.unwrap();
        }
        // Three records are in flight. One of them arrives before the next owner opens the WAL.
        older.append(&f.group(epochs.0, first + 4, 1)).await.unwrap();
        let newer = f.open(epochs.1).await.unwrap();
        for n in [first + 3, first + 5] {
            let late = older.append(&f.group(epochs.0, n, 1)).await;
            assert!(is_fenced(&late), "{n}: {late:?}");
        }
        // It was not acknowledged, because an earlier record is missing. It may be replayed.
        let mut groups = Vec::new();
        for id in newer.found() {
            let group = newer.read(*id).await.unwrap();
            groups.extend((!group.is_seal).then_some(group.sequence));
        }
        assert_eq!(groups, [first, first + 1, first + 2, first + 4]);
        // A record that the older owner still has in flight beyond its seal does no harm.
        let _ = older.append(&f.group(epochs.0, first + 7, 1)).await;
        for n in newer.first_sequence()..newer.first_sequence() + 10 {
            newer.append(&f.group(epochs.1, n, 2)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_append_whose_answer_was_lost_is_recognised() {
    let f = Fixture::new().await;
    let wal = f.open(1).await.unwrap();
    let group = f.group(1, wal.first_sequence(), 1);
    wal.append(&group).await.unwrap();
    wal.append(&group).await.unwrap();
    let mut other = f.group(1, wal.first_sequence(), 1);
    other.bytes = f.group(1, 99, 1).bytes;
    assert!(is_fenced(&wal.append(&other).await));
}

#[tokio::test]
async fn an_owner_of_an_earlier_epoch_is_refused() {
    let f = Fixture::new().await;
    f.open(5).await.unwrap();
    let ahead = f.open(4).await;
    assert!(matches!(
        ahead,
        Err(VolumeError::WalAhead {
            newest: 5,
            own: 4,
            ..
        })
    ));
    f.open(5).await.unwrap();
}

#[tokio::test]
async fn the_log_of_another_volume_is_refused_and_left_as_it_is() {
    let f = Fixture::new().await;
    let wal = f.open(1).await.unwrap();
    let before = f.keys().await;
    let error = S3Wal::open(f.store.clone(), Uuid::from_u128(43), 1, false)
        .await
        .unwrap_err();
    let text = error.to_string();
    for id in [42, 43] {
        assert!(text.contains(&Uuid::from_u128(id).to_string()), "{text}");
    }
    assert_eq!(f.keys().await, before);
    wal.append(&f.group(1, wal.first_sequence(), 1)).await.unwrap();
}

#[tokio::test]
async fn only_published_groups_are_removed_and_in_the_end_everything() {
    let f = Fixture::new().await;
    f.store.put(&f.store.data_key("notes.txt"), "mine").await.unwrap();
    let wal = f.open(1).await.unwrap();
    let first = wal.first_sequence();
    for (n, generation) in (first..).zip([1, 1, 2, 2, 3]) {
        wal.append(&f.group(1, n, generation)).await.unwrap();
    }
    let left = async || -> Vec<u64> {
        let found = wal.list().await.unwrap();
        found
            .iter()
            .map(|id| id.sequence)
            .filter(|n| *n >= first)
            .collect()
    };
    wal.trim(2, first + 2).await.unwrap();
    assert_eq!(
        left().await,
        [first + 2, first + 3, first + 4],
        "not past what is acknowledged"
    );
    wal.trim(9, first + 4).await.unwrap();
    assert_eq!(left().await, [first + 4], "the newest tells where the log ends");
    wal.clear(false).await.unwrap();
    assert_eq!(f.keys().await, ["notes.txt"]);
}

/// Invariant L1: after the clean end of an owner that took over by force, a paused one wakes up.
#[tokio::test]
async fn an_owner_that_may_be_alive_stays_shut_out_of_a_log_that_is_cleared() {
    let f = Fixture::new().await;
    let older = f.open(1).await.unwrap();
    let first = older.first_sequence();
    // The first of two records in flight has not arrived.
    older.append(&f.group(1, first + 1, 1)).await.unwrap();
    let newer = f.open(2).await.unwrap();
    newer
        .append(&f.group(2, newer.first_sequence(), 9))
        .await
        .unwrap();
    newer.clear(true).await.unwrap();
    for n in [first, first + 2] {
        assert!(is_fenced(&older.append(&f.group(1, n, 1)).await), "{n}");
    }
    assert_eq!(
        f.keys().await.len(),
        3,
        "the seals and nothing else, that of the older one's beginning too: {:?}",
        f.keys().await
    );
    // The next owner, who finds the seals, keeps the older one out as well.
    f.open(3).await.unwrap().clear(true).await.unwrap();
    assert!(is_fenced(&older.append(&f.group(1, first + 2, 1)).await));
    f.open(4).await.unwrap().clear(false).await.unwrap();
    assert!(f.keys().await.is_empty());
}

/// Invariant L1: the seals in the gaps of an older owner's part were put by one that was killed, not by the one that gives the log up.
#[tokio::test]
async fn giving_a_log_up_keeps_the_seals_of_those_before() {
    for is_tail_sealed in [true, false] {
        let f = Fixture::new().await;
        let older = f.open(1).await.unwrap();
        let first = older.first_sequence();
        older.append(&f.group(1, first, 1)).await.unwrap();
        // The second of three records in flight is on its way.
        older.append(&f.group(1, first + 2, 1)).await.unwrap();
        let killed = f.open(2).await.unwrap();
        if !is_tail_sealed {
            let (epoch, sequence) = (1, first + 3);
            killed.remove(&[RecordId { epoch, sequence }]).await.unwrap();
        }
        let resigned = S3Wal::open(f.store.clone(), f.volume_id, 3, true).await.unwrap();
        resigned.remove_found().await.unwrap();
        resigned.clear(true).await.unwrap();
        for n in [first + 1, first + 3] {
            let late = older.append(&f.group(1, n, 1)).await;
            assert!(is_fenced(&late), "{n}, tail sealed: {is_tail_sealed}");
        }
    }
}

/// `hypernbd wal discard` opens a log twice, first to seal it and then to clear it, and reads none of it the second time.
#[tokio::test]
async fn a_log_that_is_cleared_unread_keeps_the_seals_in_its_gaps() {
    let f = Fixture::new().await;
    let older = f.open(1).await.unwrap();
    let first = older.first_sequence();
    // The first of two records in flight has not arrived.
    older.append(&f.group(1, first + 1, 1)).await.unwrap();
    for _ in 0..2 {
        let given_up = S3Wal::open(f.store.clone(), f.volume_id, 2, true).await.unwrap();
        given_up.clear(true).await.unwrap();
    }
    for n in [first, first + 2] {
        let late = older.append(&f.group(1, n, 1)).await;
        assert!(is_fenced(&late), "{n}: {late:?}");
    }
}

/// An owner that was paused while it ended, and was overtaken.
#[tokio::test]
async fn clearing_leaves_what_a_later_owner_has_begun() {
    let f = Fixture::new().await;
    let older = f.open(1).await.unwrap();
    older
        .append(&f.group(1, older.first_sequence(), 1))
        .await
        .unwrap();
    let newer = f.open(2).await.unwrap();
    let id = RecordId {
        epoch: 2,
        sequence: newer.first_sequence(),
    };
    newer.append(&f.group(2, id.sequence, 9)).await.unwrap();
    older.clear(false).await.unwrap();
    let next = f.open(3).await.unwrap();
    assert!(next.found().contains(&id), "{:?}", next.found());
}

#[tokio::test]
async fn a_damaged_last_record_is_in_the_way_only_of_those_who_need_it() {
    let f = Fixture::new().await;
    let wal = f.open(1).await.unwrap();
    let id = RecordId {
        epoch: 1,
        sequence: wal.first_sequence(),
    };
    wal.append(&f.group(1, id.sequence, 1)).await.unwrap();
    f.store.put(&key(&f.store, id), "damaged").await.unwrap();
    assert!(matches!(f.open(2).await, Err(VolumeError::Corrupt { .. })));
    let resigned = S3Wal::open(f.store.clone(), f.volume_id, 3, true).await.unwrap();
    resigned.remove_found().await.unwrap();
    assert!(!f.keys().await.contains(&"0000000001/0000000002".to_owned()));
    f.open(4).await.unwrap();
}

#[tokio::test]
async fn a_damaged_record_is_an_error_that_names_it() {
    let f = Fixture::new().await;
    let wal = f.open(1).await.unwrap();
    let id = RecordId {
        epoch: 1,
        sequence: wal.first_sequence(),
    };
    wal.append(&f.group(1, id.sequence, 1)).await.unwrap();
    f.store.put(&key(&f.store, id), "damaged").await.unwrap();
    let error = wal.read(id).await.unwrap_err().to_string();
    assert!(error.contains("0000000001/0000000002"), "{error}");
    // A record under another record's name counts as damaged, too.
    f.store
        .put(&key(&f.store, id), f.group(1, 77, 1).bytes)
        .await
        .unwrap();
    assert!(wal.read(id).await.is_err());
}

/// A name of eleven digits would not be listed, and the flush that it holds would be lost.
#[tokio::test]
async fn a_record_that_has_no_name_is_not_acknowledged() {
    let f = Fixture::new().await;
    let wal = f.open(1).await.unwrap();
    let refused = wal.append(&f.group(1, NUMBER_MAX + 1, 5)).await;
    assert!(matches!(
        refused,
        Err(AppendError::Failed(VolumeError::CountersExhausted { .. }))
    ));
    wal.append(&f.group(1, NUMBER_MAX, 5)).await.unwrap();
    let last = wal.list().await.unwrap().pop().unwrap();
    assert_eq!(last.sequence, NUMBER_MAX);
    let later = f.open(NUMBER_MAX + 1).await.err().unwrap();
    assert!(matches!(later, VolumeError::CountersExhausted { .. }), "{later}");
}

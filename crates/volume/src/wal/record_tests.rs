//! The decoder with arbitrary input. `fuzz/` has the same tests as a target for cargo-fuzz.

use proptest::prelude::*;

use super::*;

fn entry() -> impl Strategy<Value = Entry> {
    let content = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..300).prop_map(|b| Content::Data(b.into())),
        (1..1u64 << 40).prop_map(|len_bytes| Content::Zero { len_bytes }),
    ];
    (any::<u64>(), 0..1u64 << 50, content).prop_map(|(generation, offset_bytes, content)| Entry {
        generation,
        offset_bytes,
        content,
    })
}

fn group() -> impl Strategy<Value = Record> {
    (
        any::<u128>(),
        any::<u64>(),
        any::<u64>(),
        any::<(u64, u32, Option<(u64, u64)>)>(),
        prop::collection::vec(entry(), 0..6),
    )
        .prop_map(
            |(id, epoch, sequence, (after_generation, unacknowledged, base), entries)| Record {
                volume_id: Uuid::from_u128(id),
                epoch,
                sequence,
                is_seal: false,
                after_generation,
                unacknowledged,
                base: base.map(|(cno, check)| CheckpointId {
                    cno,
                    check: InodeCheck::from_bits(check),
                }),
                entries,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_is_encoded_is_decoded(group in group(), tail in prop::collection::vec(any::<u8>(), 0..50)) {
        let bytes = group.encode();
        prop_assert_eq!(Record::decode(&bytes), Ok(group.clone()));
        let longer: Bytes = [&bytes[..], &tail].concat().into();
        prop_assert_eq!(Record::decode_prefix(&longer), Ok((group, bytes.len())));
        prop_assert_eq!(Record::decode(&longer).is_ok(), tail.is_empty());
    }

    /// Every change of a single bit is noticed, and so is every cut.
    #[test]
    fn no_flipped_bit_and_no_cut_gets_through(group in group(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let bytes = group.encode();
        let at = at.index(bytes.len());
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 1 << bit;
        prop_assert!(Record::decode(&flipped.into()).is_err());
        prop_assert!(Record::decode(&bytes.slice(..at)).is_err());
    }

    /// A mixture of two records is not accepted, unless it equals one of them.
    #[test]
    fn a_torn_group_is_none(a in group(), b in group(), at in any::<prop::sample::Index>()) {
        let (a, b) = (a.encode(), b.encode());
        let at = at.index(a.len().min(b.len()) + 1);
        let torn: Bytes = [&a[..at], &b[at..]].concat().into();
        if torn != b && torn != a {
            prop_assert!(Record::decode(&torn).is_err());
        }
    }

    #[test]
    fn noise_is_refused(noise in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Record::decode(&noise.into()).is_err());
    }

    /// The checksums are right and the fields make no sense: the decoder must neither panic nor trust them.
    #[test]
    fn impossible_fields_are_refused(
        group in group(),
        at in 8..76usize,
        value in any::<u64>(),
        body_at in any::<prop::sample::Index>(),
        body_value in any::<u64>(),
    ) {
        let mut bytes = group.encode().to_vec();
        let end = (at + 8).min(HEADER_BYTES - 4);
        bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        if bytes.len() >= HEADER_BYTES + 8 {
            let at = HEADER_BYTES + body_at.index(bytes.len() - HEADER_BYTES - 7);
            bytes[at..at + 8].copy_from_slice(&body_value.to_le_bytes());
        }
        fix_checksums(&mut bytes);
        let bytes = Bytes::from(bytes);
        if let Ok(decoded) = Record::decode(&bytes) {
            prop_assert_eq!(decoded.encode(), bytes, "what is accepted is what would have been written");
        }
    }
}

/// Damage that a disk can do to the bytes of a WAL.
#[derive(Debug, Clone)]
enum Damage {
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    /// The end of one record is written over another.
    Tear(prop::sample::Index, prop::sample::Index),
    Swap(prop::sample::Index, prop::sample::Index),
    Repeat(prop::sample::Index),
    Foreign(prop::sample::Index),
    Noise(prop::sample::Index, Vec<u8>),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        (at(), 0..8u8).prop_map(|(i, bit)| Damage::Flip(i, bit)),
        at().prop_map(Damage::Cut),
        (at(), at()).prop_map(|(i, n)| Damage::Tear(i, n)),
        (at(), at()).prop_map(|(i, n)| Damage::Swap(i, n)),
        at().prop_map(Damage::Repeat),
        at().prop_map(Damage::Foreign),
        (at(), prop::collection::vec(any::<u8>(), 1..200)).prop_map(|(i, n)| Damage::Noise(i, n)),
    ]
}

/// Applies the damage to the pieces, each of which is one record.
fn damaged(mut pieces: Vec<Vec<u8>>, damage: &Damage) -> Vec<Vec<u8>> {
    match damage {
        Damage::Flip(at, bit) => {
            let piece = at.index(pieces.len());
            let byte = at.index(pieces[piece].len());
            pieces[piece][byte] ^= 1 << bit;
        }
        Damage::Cut(at) => {
            let piece = at.index(pieces.len());
            let len = at.index(pieces[piece].len());
            pieces[piece].truncate(len.max(1));
        }
        Damage::Tear(at, other) => {
            let (piece, other) = (at.index(pieces.len()), other.index(pieces.len()));
            let shared = pieces[piece].len().min(pieces[other].len());
            let from = at.index(shared);
            let end = pieces[other][from..shared].to_vec();
            pieces[piece][from..shared].copy_from_slice(&end);
        }
        Damage::Swap(one, other) => {
            let (one, other) = (one.index(pieces.len()), other.index(pieces.len()));
            pieces.swap(one, other);
        }
        Damage::Repeat(at) => {
            let piece = pieces[at.index(pieces.len())].clone();
            pieces.insert(at.index(pieces.len()), piece);
        }
        Damage::Foreign(at) => {
            let foreign = Record::seal(Uuid::from_u128(99), 1, 1).encode().to_vec();
            pieces.insert(at.index(pieces.len()), foreign);
        }
        Damage::Noise(at, noise) => pieces.insert(at.index(pieces.len()), noise.clone()),
    }
    pieces
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// A WAL whose records are torn, cut, mixed up or repeated, with foreign records, noise and flipped bits. What the
    /// decoder returns is one of the records, byte for byte, and what the replay makes of them is in order and of this
    /// WAL.
    #[test]
    fn a_damaged_log_gives_no_wrong_byte(
        groups in prop::collection::vec(group(), 1..6),
        damages in prop::collection::vec(damage(), 1..5),
    ) {
        let groups: Vec<Record> = (1..)
            .zip(groups)
            .map(|(sequence, group)| Record { epoch: 1, sequence, ..group })
            .collect();
        let mut pieces: Vec<Vec<u8>> = groups.iter().map(|g| g.encode().to_vec()).collect();
        for damage in &damages {
            pieces = damaged(pieces, damage);
        }
        let wal = Bytes::from(pieces.concat());
        let mut replay = crate::wal::replay::Replay::new(0);
        let mut at = 0;
        let mut sequences = Vec::new();
        while at < wal.len() {
            let Ok((group, len)) = Record::decode_prefix(&wal.slice(at..)) else {
                at += 1;
                continue;
            };
            prop_assert!(len > 0);
            at += len;
            if group.volume_id == Uuid::from_u128(99) {
                continue;
            }
            prop_assert!(groups.contains(&group), "never a group that was not written");
            let id = crate::wal::RecordId { epoch: group.epoch, sequence: group.sequence };
            if let Ok(entries) = replay.next(id, group) {
                prop_assert!(entries.iter().all(|e| groups[id.sequence as usize - 1].entries.contains(e)));
                sequences.push(id.sequence);
            }
        }
        prop_assert!(sequences.is_sorted(), "{sequences:?}");
    }
}

#[test]
fn errors_say_what_is_wrong() {
    let seal = Record::seal(Uuid::from_u128(7), 3, 9);
    let bytes = seal.encode();
    assert_eq!(bytes.len(), HEADER_BYTES);
    assert_eq!(Record::decode(&bytes), Ok(seal));
    assert_eq!(Record::decode(&bytes.slice(..70)), Err(RecordError::Truncated));
    let mut other = bytes.to_vec();
    other[8] = 3;
    let crc = crc32c(&other[..HEADER_BYTES - 4]);
    other[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    let error = Record::decode(&other.into()).unwrap_err();
    assert_eq!(error, RecordError::Version(3));
    assert!(error.to_string().contains("versions 1 to 2"), "{error}");
    assert_eq!(
        Record::decode(&Bytes::from(vec![0; 200])),
        Err(RecordError::NotARecord)
    );
}

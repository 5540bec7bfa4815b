//! The readers of what lies in a store, for whoever gives them anything: bytes that somebody else wrote come in through these.
//!
//! A reader says what is wrong with its bytes or takes them. It never panics, and takes no more memory than a small multiple
//! of their length. `fuzz/stored.rs` looks for bytes that break this; a unit test does so in small.

use bytes::Bytes;

use crate::buffer_file;
use crate::format::{inode, node, segment_header, summary};
use crate::index::origins::Origins;
use crate::lease::LeaseRecord;
use crate::meta::checkpoint_list::CatalogueEntry;
use crate::meta::children::{Child, ChildRecord};
use crate::meta::import_record::ImportRecord;
use crate::meta::label::Label;
use crate::meta::origin::Origin;
use crate::meta::scrub_record::ScrubRecord;
use crate::meta::wal_marker::MarkerState;
use crate::past::{At, Snapshot};
use crate::retention::Policy;
use crate::retention::pins::Pin;
use crate::retention::plan::Plan;
use crate::retention::usage::Usage;
use crate::store::sums::Sums;
use crate::wal::record::Record;

/// A reader of one kind of object, or of a part of one.
#[derive(Debug, Clone, Copy)]
pub struct Reader {
    /// What it reads.
    pub name: &'static str,
    /// Reads, and tells what is wrong.
    pub read: fn(&[u8]) -> Result<(), String>,
}

/// All of them.
pub const READERS: &[Reader] = &[
    Reader {
        name: "label",
        read: |bytes| Label::decode(bytes).map(drop),
    },
    Reader {
        name: "marker",
        read: |bytes| MarkerState::decode(bytes).map(drop),
    },
    Reader {
        name: "lease",
        read: |bytes| LeaseRecord::decode(bytes).map(drop),
    },
    Reader {
        name: "catalogue-entry",
        read: |bytes| CatalogueEntry::decode(bytes).map(drop),
    },
    Reader {
        name: "snapshot",
        read: |bytes| Snapshot::decode(bytes).map(drop),
    },
    Reader {
        name: "retention-policy",
        read: |bytes| Policy::decode(bytes).map(drop),
    },
    Reader {
        name: "retention-plan",
        read: |bytes| Plan::decode(bytes).map(|plan| drop(plan.emptied(1))),
    },
    Reader {
        name: "retention-usage",
        read: |bytes| Usage::decode(bytes).map(drop),
    },
    // Behind the check, which hardly anything passes.
    Reader {
        name: "retention-usage-table",
        read: |bytes| Usage::decode_table(bytes).map(drop),
    },
    Reader {
        name: "retention-pin",
        read: |bytes| Pin::decode(bytes).map(drop),
    },
    Reader {
        name: "origin",
        read: |bytes| Origin::decode(bytes).map(drop),
    },
    Reader {
        name: "child",
        read: |bytes| ChildRecord::decode(bytes).map(drop),
    },
    Reader {
        name: "child-name",
        read: |bytes| {
            let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
            Child::of_name(text)
                .map(drop)
                .ok_or_else(|| "no name of an entry".to_owned())
        },
    },
    Reader {
        name: "checkpoint-name",
        read: |bytes| {
            let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
            text.parse::<At>().map(drop).map_err(|e| e.to_string())
        },
    },
    Reader {
        name: "sums",
        read: |bytes| Sums::decode(bytes).map(drop),
    },
    Reader {
        name: "import",
        read: |bytes| ImportRecord::decode(bytes).map(drop),
    },
    Reader {
        name: "scrub",
        read: |bytes| ScrubRecord::decode(bytes).map(drop),
    },
    Reader {
        name: "buffer-file",
        read: buffer_file::check_head,
    },
    Reader {
        name: "log-record",
        read: |bytes| {
            let group = Record::decode(&Bytes::copy_from_slice(bytes));
            group.map(drop).map_err(|e| e.to_string())
        },
    },
    Reader {
        name: "inode",
        read: |bytes| inode::decode(bytes).map(drop),
    },
    Reader {
        name: "index-node",
        read: node::check,
    },
    Reader {
        name: "segment-summary",
        read: |bytes| {
            let len_bytes = bytes.len() as u64;
            summary::needed_bytes(bytes, len_bytes)?;
            let summary = summary::decode(bytes, len_bytes)?;
            let nodes = bytes.get(summary.nodes.start as usize..summary.nodes.end as usize);
            nodes.map(summary::nodes).into_iter().flatten().for_each(drop);
            Ok(())
        },
    },
    Reader {
        name: "origins",
        read: |bytes| {
            let origins = Origins::decode(bytes)?;
            origins.birth_of(u64::MAX / 3);
            Ok(())
        },
    },
    Reader {
        name: "segment-header",
        read: |bytes| segment_header::decode_header(bytes, bytes.len() as u64).map(drop),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that each reader takes, or nearly takes.
    fn example(name: &str) -> Vec<u8> {
        let id = "971042b2-deec-4714-b02c-8745cd37ad39";
        let text = match name {
            "label" => format!(
                r#"{{"volume_id":"{id}","created_ms":1,"origin":"00000000000000ff","place":{{"bucket":"b","prefix":"p"}},"deletion":7}}"#
            ),
            "marker" => format!(
                r#"{{"url":"s3://b/log/","volume_id":"{id}","host":"h","epoch":3,"opened_ms":1,"watermark":9,"is_clean":true}}"#
            ),
            "lease" => format!(
                r#"{{"state":"held","epoch":3,"token":"t","renewals":1,"duration_ms":30000,"volume_id":"{id}","holder":{{"host":"h","boot_id":"b","pid_namespace":"n","pid":1,"started_ticks":1,"program":"nbdkit"}},"taken_ms":1}}"#
            ),
            "catalogue-entry" => {
                r#"{"cno":5,"epoch":3,"generation":9,"published_ms":1,"size_bytes":4096}"#.to_owned()
            }
            "snapshot" => {
                r#"{"name":"monday","checkpoint":{"cno":5,"check":"00000000000000ff"},"published_ms":1,"named_ms":2}"#.to_owned()
            }
            "import" => {
                r#"{"source":{"path":"/a","size_bytes":1,"modified_ns":2,"inode":3},"written_bytes":4,"epoch":5,"is_new":true}"#.to_owned()
            }
            "scrub" => format!(
                r#"{{"version":1,"volume_id":"{id}","pass":{{"began_ms":1,"up_to":7,"after":21474836481,"objects":3,"verified_bytes":4,"unverified_bytes":5}},"last":{{"began_ms":1,"ended_ms":2,"objects":3,"verified_bytes":4,"unverified_bytes":5}},"damage":[{{"object":"p/0000000001.0","offset_bytes":0,"len_bytes":16384,"reason":"r","is_newest_affected":true,"ranges":[{{"offset_bytes":4096,"len_bytes":4096}}],"affected_bytes":4096,"found_ms":6}}],"more":0}}"#
            ),
            "origin" => format!(
                r#"{{"version":1,"url":"s3://bucket/c/","volume_id":"{id}","parents":[{{"up_to":7,"url":"s3://bucket/p/","volume_id":"{id}","checkpoint":{{"cno":5,"check":"00000000000000ff"}}}},{{"up_to":9,"url":"s3://bucket/q/","volume_id":"{id}","checkpoint":{{"cno":8,"check":"00000000000000ff"}}}}]}}"#
            ),
            "child" => r#"{"url":"s3://bucket/c/","made_ms":1}"#.to_owned(),
            "child-name" => format!("0000000005-00000000000000ff-{id}"),
            "sums" => r#"{"version":1,"write":"w","object_bytes":16385,"crc32c":"16k:AAAAAAAAAAA="}"#.to_owned(),
            "checkpoint-name" => "@2026-11-22T10:00:00Z".to_owned(),
            _ => return vec![0; 4096],
        };
        text.into_bytes()
    }

    fn changed(bytes: &[u8], rng: &mut fastrand::Rng) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..rng.usize(1..6) {
            let at = rng.usize(0..=bytes.len());
            match rng.u8(0..6) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, rng.u8(..)),
                2 if at < bytes.len() => bytes[at] ^= 1 << rng.u8(0..8),
                3 if at < bytes.len() => bytes[at] = *rng.choice(b"0-9e.\"{}[]\\\xff\x00").unwrap_or(&0),
                4 => {
                    let copy = bytes[at..(at + rng.usize(0..16)).min(bytes.len())].to_vec();
                    bytes.splice(at..at, copy);
                }
                _ => {
                    let digits: Vec<u8> = (0..rng.usize(1..30)).map(|_| b'0' + rng.u8(0..10)).collect();
                    bytes.splice(at..at, digits);
                }
            }
        }
        bytes
    }

    #[test]
    fn no_reader_panics_at_anything() {
        let mut rng = fastrand::Rng::with_seed(21);
        for reader in READERS {
            let example = example(reader.name);
            for _ in 0..4000 {
                let _ = (reader.read)(&changed(&example, &mut rng));
            }
            for len in [0, 1, 31, 160, 4096] {
                let noise: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(len).collect();
                assert!(
                    (reader.read)(&noise).is_err(),
                    "{} takes noise of {len} bytes",
                    reader.name
                );
            }
        }
    }

    #[test]
    fn the_examples_are_what_is_read() {
        for name in [
            "label",
            "marker",
            "lease",
            "catalogue-entry",
            "snapshot",
            "checkpoint-name",
            "origin",
            "child",
            "child-name",
            "sums",
            "import",
            "scrub",
        ] {
            let reader = READERS
                .iter()
                .find(|reader| reader.name == name)
                .expect("a reader");
            assert_eq!((reader.read)(&example(name)), Ok(()), "{name}");
        }
    }
}

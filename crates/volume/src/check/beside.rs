//! What lies beside a volume's container: every object is read, and is what its name says.

use std::collections::BTreeMap;

use futures::stream::{self, StreamExt, TryStreamExt};

use super::report::{Findings, Kind};
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::index::checksums;
use crate::index::origins::Origins;
use crate::lease::{self, LeaseRecord};
use crate::meta::checkpoint_list::{self, CatalogueEntry};
use crate::meta::children::{Child, ChildRecord};
use crate::meta::import_record::ImportRecord;
use crate::meta::label::{self, Label};
use crate::meta::origin::{self, Origin};
use crate::meta::scrub_record::ScrubRecord;
use crate::meta::snapshots::{Snapshot, SnapshotName};
use crate::meta::wal_marker::{self, MarkerState};
use crate::open::history;
use crate::retention::Policy;
use crate::retention::pins::Pin;
use crate::retention::plan::Plan;
use crate::retention::usage::Usage;
use crate::store::sums::Sums;
use crate::store::{Store, probe};

/// Objects read at once.
const READS_AT_ONCE: usize = 32;

/// What is beside the container, as far as other looks need it.
#[derive(Debug, Default)]
pub(super) struct Beside {
    /// Entries of the checkpoint list, by number.
    pub entries: BTreeMap<u64, CatalogueEntry>,
    /// Numbers whose entries cannot be read.
    pub damaged_entries: Vec<u64>,
    /// The names.
    pub snapshots: Vec<Snapshot>,
    /// The plan of what is removed.
    pub plan: Option<Plan>,
    /// The marker of the log.
    pub marker: Option<MarkerState>,
    /// The usage table.
    pub usage: Option<Usage>,
}

/// An object that was read.
enum Read {
    Entry(CatalogueEntry),
    Snapshot(Snapshot),
    Plan(Plan),
    Marker(MarkerState),
    Usage(Usage),
    /// One that nothing else here depends on.
    Other,
}

/// Reads one kind of object, or says what is wrong.
type Reader = Box<dyn Fn(&[u8]) -> Result<Read, String> + Send + Sync>;

/// How an object is read, and what to do when it cannot be.
struct Known {
    read: Reader,
    advice: String,
}

/// What is known of the object of this name, below the volume's `.meta/`. None when it is not the volume's.
fn known(store: &Store, name: &str) -> Option<Known> {
    let url = &store.url;
    let known = |read: Reader, advice: String| Some(Known { read, advice });
    let parts: Vec<&str> = name.split('/').collect();
    match parts.as_slice() {
        [label::NAME] => known(
            Box::new(|body| Label::decode(body).map(|_| Read::Other)),
            format!("put it back from a backup, or delete it while no server runs: the next one gives {url} another id, and a log that was not closed is then given up; where it has clones (hypernbd info), the next one must have adopt=yes, and gives it the id that they know it by"),
        ),
        [lease::NAME] => known(
            Box::new(|body| LeaseRecord::decode(body).map(|_| Read::Other)),
            "make sure that no server has the volume, and delete it: the next server takes another".to_owned(),
        ),
        [wal_marker::NAME] => known(
            Box::new(|body| MarkerState::decode(body).map(Read::Marker)),
            "put it back from a backup of the volume; it says which log holds flushed writes, and no server opens the volume without it"
                .to_owned(),
        ),
        ["import"] => known(
            Box::new(|body| ImportRecord::decode(body).map(|_| Read::Other)),
            "delete it, and import the image again with --overwrite, unless that import had ended".to_owned(),
        ),
        ["scrub"] => known(
            Box::new(|body| ScrubRecord::decode(body).map(|_| Read::Other)),
            "nothing: it is made anew by the next pass of a server with scrub_interval".to_owned(),
        ),
        ["checkpoints", number] => {
            let number: u64 = number.parse().ok()?;
            (checkpoint_list::entry_name(number) == name).then_some(())?;
            known(
                Box::new(move |body| {
                    let entry = CatalogueEntry::decode(body)?;
                    match entry.cno == number {
                        true => Ok(Read::Entry(entry)),
                        false => Err(format!("it is that of checkpoint {}", entry.cno)),
                    }
                }),
                format!(
                    "the checkpoint itself may be whole: put the entry back from a backup; without it checkpoint {number} is not found by its number"
                ),
            )
        }
        ["snapshots", snapshot] => {
            let snapshot: SnapshotName = snapshot.parse().ok()?;
            let advice = format!(
                "delete it with hypernbd snapshot delete {url} {snapshot}, and name the checkpoint again"
            );
            known(
                Box::new(move |body| {
                    let read = Snapshot::decode(body)?;
                    match read.name == snapshot {
                        true => Ok(Read::Snapshot(read)),
                        false => Err(format!("it is of the name {}", read.name)),
                    }
                }),
                advice,
            )
        }
        ["retention", "policy"] => known(
            Box::new(|body| Policy::decode(body).map(|_| Read::Other)),
            format!("set it anew with hypernbd retention set {url}; nothing is removed until then"),
        ),
        ["retention", "plan"] => known(
            Box::new(|body| Plan::decode(body).map(Read::Plan)),
            "delete it while no server runs: what it names and is not removed yet stays".to_owned(),
        ),
        ["retention", "usage"] => known(
            Box::new(|body| Usage::decode(body).map(Read::Usage)),
            "nothing: it is made anew by the next round of the retention".to_owned(),
        ),
        ["retention", "pins", _] => known(
            Box::new(|body| Pin::decode(body).map(|_| Read::Other)),
            "delete it, unless somebody reads the checkpoint that it was put for: nothing is removed for a day otherwise".to_owned(),
        ),
        ["sums", object] => known(
            Box::new(|body| Sums::decode(body).map(|_| Read::Other)),
            format!("delete it: {object} can be read again then, without check values until hypernbd check --write adds them"),
        ),
        [origin::NAME] => known(
            Box::new(|body| Origin::decode(body).map(|_| Read::Other)),
            "put it back from a backup of the volume: without it what the clone shares is not found".to_owned(),
        ),
        ["children", entry] => {
            Child::of_name(entry)?;
            known(
                Box::new(|body| ChildRecord::decode(body).map(|_| Read::Other)),
                "nothing: its name alone keeps what the clone needs".to_owned(),
            )
        }
        ["origins", object] => {
            let object = (*object).to_owned();
            known(
                Box::new(move |body| Origins::decode(body).map(|_| Read::Other)),
                format!("delete it: what was only moved to {object} counts as changed then"),
            )
        }
        ["index", object] => {
            let object = (*object).to_owned();
            known(
                Box::new(move |body| checksums::check_seal(body).map(|()| Read::Other)),
                format!("delete it: the index of {object} is then read without check values of its own"),
            )
        }
        _ => None,
    }
}

/// What the names of the objects beside a container say of its label.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct LabelSeen {
    is_there: bool,
    /// Something is there that is put only once there is a label.
    was_there: bool,
    is_of_clone: bool,
}

impl LabelSeen {
    fn see(&mut self, name: &str) {
        match name.split_once('/').map_or(name, |(dir, _)| dir) {
            label::NAME => self.is_there = true,
            origin::NAME => (self.was_there, self.is_of_clone) = (true, true),
            lease::NAME | wal_marker::NAME | "checkpoints" => self.was_there = true,
            _ => {}
        }
    }

    /// Tells of a label that is not there.
    ///
    /// # Errors
    /// When the store fails.
    async fn tell(self, store: &Store, findings: &mut Findings) -> Result<(), VolumeError> {
        if self.is_there {
            return Ok(());
        }
        let (url, key) = (&store.url, store.meta_key(label::NAME));
        match store.head(&key).await {
            Ok(None) => {}
            Err(e) if e.kind != StoreErrorKind::Corrupt => return Err(e.into()),
            // It was made since: nothing follows from it before that.
            Ok(Some(_)) | Err(_) => return Ok(()),
        }
        if !self.was_there {
            findings.note("it has no label: it was never opened for writing here, and gets one then");
            return Ok(());
        }
        let advice = match self.is_of_clone {
            true => format!(
                "put it back from a backup or from the bucket's versions before anything opens {url} for writing: it says that the volume \
                 is a clone, and without it nothing is found of what the clone shares"
            ),
            false => format!(
                "put it back from a backup or from the bucket's versions before a server opens {url} for writing: the next one gives it \
                 another id, and a log that was not closed can then only be given up; where it has clones (hypernbd info), the next one \
                 must have adopt=yes, and gives it the id that they know it by"
            ),
        };
        let reason = "it is not there; it says which volume this is";
        findings.tell(Kind::Missing, key, reason, advice);
        Ok(())
    }
}

/// Reads everything.
///
/// # Errors
/// When the store fails.
pub(super) async fn look(store: &Store, findings: &mut Findings) -> Result<Beside, VolumeError> {
    let prefix = store.meta_key("");
    let mut others = Vec::new();
    let mut wanted = Vec::new();
    let mut label = LabelSeen::default();
    for object in store.list(&prefix).await? {
        let name = object.key.strip_prefix(&prefix).unwrap_or_default();
        label.see(name);
        match known(store, name) {
            Some(known) => wanted.push((object.key, known)),
            // The records of a log are read as a replay reads them.
            None if history::is_aside(name)
                || wal_marker::is_beside(name)
                || probe::is_own(store, &object) => {}
            None => others.push(object.key),
        }
    }
    findings.note_others(&others);
    label.tell(store, findings).await?;
    let reads = stream::iter(wanted).map(|(key, known)| async move {
        let read = read(store, &key, &known).await?;
        Ok::<_, VolumeError>((key, known.advice, read))
    });
    let mut reads = reads.buffered(READS_AT_ONCE);
    let mut beside = Beside::default();
    while let Some((key, advice, read)) = reads.try_next().await? {
        match read {
            Ok(None | Some(Read::Other)) => {}
            Ok(Some(Read::Entry(entry))) => drop(beside.entries.insert(entry.cno, entry)),
            Ok(Some(Read::Snapshot(snapshot))) => beside.snapshots.push(snapshot),
            Ok(Some(Read::Plan(plan))) => beside.plan = Some(plan),
            Ok(Some(Read::Marker(marker))) => beside.marker = Some(marker),
            Ok(Some(Read::Usage(usage))) => beside.usage = Some(usage),
            Err(reason) => {
                if let Some(number) = key.strip_prefix(&store.meta_key("checkpoints/")) {
                    beside.damaged_entries.extend(number.parse::<u64>());
                }
                findings.tell(Kind::Damaged, key, reason, advice);
            }
        }
    }
    Ok(beside)
}

/// Reads one object; nothing when it went meanwhile. The inner error is what is wrong with it. Objects are replaced whole, so what is
/// wrong with one is no work of a server that is at it.
async fn read(store: &Store, key: &str, known: &Known) -> Result<Result<Option<Read>, String>, VolumeError> {
    match store.get(key).await {
        Ok(None) => Ok(Ok(None)),
        Ok(Some((body, _))) => Ok((known.read)(&body).map(Some)),
        Err(e) if e.kind == StoreErrorKind::Corrupt => Ok(Err(e.detail)),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_missed_where_something_follows_from_it() {
        let seen = |names: &[&str]| {
            let mut seen = LabelSeen::default();
            names.iter().for_each(|name| seen.see(name));
            (seen.is_there, seen.was_there, seen.is_of_clone)
        };
        // Of a container of another program: read at an earlier checkpoint, named, with rules.
        let of_others = [
            "retention/policy",
            "retention/pins/0",
            "snapshots/monday",
            "sums/0000000001.0",
        ];
        assert_eq!(seen(&of_others), (false, false, false));
        for name in ["lease", "wal", "checkpoints/0000000001"] {
            assert_eq!(seen(&[name]), (false, true, false), "{name}");
            assert_eq!(seen(&[name, "volume.json"]), (true, true, false), "{name}");
        }
        assert_eq!(seen(&["origin"]), (false, true, true));
        assert_eq!(seen(&["volume.json.old"]), (false, false, false));
    }
}

//! What a check found, and how it is told. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use rangemap::RangeSet;
use serde::Serialize;

use super::checkpoints::Checkpoints;
use crate::base::checkpoint_id::CheckpointId;
use crate::base::units::format_size;
use crate::base::url::VolumeUrl;
use crate::meta::snapshots::SnapshotName;
use crate::store::verify::Wrong;

/// Ranges told of one problem, at most.
const RANGES_MAX: usize = 1000;
/// Names told of things that are somebody else's, at most.
const OTHERS_MAX: usize = 5;

/// What is wrong with an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// It is not there.
    Missing,
    /// It ends too early.
    Short,
    /// It is not what was written, or is of another object.
    Damaged,
    /// It contradicts something else that is stored.
    Contradiction,
}

impl From<Wrong> for Kind {
    fn from(wrong: Wrong) -> Self {
        match wrong {
            Wrong::Missing => Self::Missing,
            Wrong::Short => Self::Short,
            Wrong::Damaged => Self::Damaged,
        }
    }
}

/// A range of the volume that cannot be read, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Affected {
    /// Where it starts.
    pub offset_bytes: u64,
    /// Its length.
    pub len_bytes: u64,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The object: its key.
    pub object: String,
    /// What is wrong with it.
    pub kind: Kind,
    /// The same in words.
    pub reason: String,
    /// First and last number of each run of checkpoints that cannot be read whole.
    pub checkpoints: Vec<(u64, u64)>,
    /// Whether the newest one is among them.
    pub is_newest_affected: bool,
    /// Names of those among them that have some.
    pub names: Vec<SnapshotName>,
    /// The ranges that cannot be read, ascending, the first thousand.
    pub ranges: Vec<Affected>,
    /// What to do.
    pub advice: String,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The volume.
    pub url: String,
    /// Number of its newest checkpoint; 0 before the first.
    pub newest_checkpoint: u64,
    /// Checkpoints whose indexes were read.
    pub checkpoints: u64,
    /// Index nodes that were read.
    pub index_nodes: u64,
    /// Objects that these need.
    pub objects: u64,
    /// Bytes of the blocks of data that they need.
    pub data_bytes: u64,
    /// Bytes of objects that were read and are what was written; nothing when data was not read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified_bytes: Option<u64>,
    /// Bytes of objects that were read and have no check values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unverified_bytes: Option<u64>,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// What is worth knowing, and no harm.
    pub notes: Vec<String>,
}

impl Report {
    pub(super) fn new(url: &VolumeUrl, checkpoints: &Checkpoints) -> Self {
        Self {
            url: url.to_string(),
            newest_checkpoint: checkpoints.newest.map_or(0, |id| id.cno),
            checkpoints: checkpoints.all.len() as u64,
            index_nodes: 0,
            objects: 0,
            data_bytes: 0,
            verified_bytes: None,
            unverified_bytes: None,
            problems: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// Takes in what was found.
    pub(super) fn tell(&mut self, findings: Findings, checkpoints: &Checkpoints) {
        let problem = |finding: Finding| {
            let is_affected = |id: &CheckpointId| finding.checkpoints.contains(id);
            let ranges = finding.ranges.iter().take(RANGES_MAX);
            Problem {
                checkpoints: runs(finding.checkpoints.iter().map(|id| id.cno)),
                is_newest_affected: checkpoints.newest.as_ref().is_some_and(is_affected),
                names: checkpoints.names_of(is_affected),
                ranges: ranges
                    .map(|range| Affected {
                        offset_bytes: range.start,
                        len_bytes: range.end - range.start,
                    })
                    .collect(),
                object: finding.object,
                kind: finding.kind,
                reason: match finding.more {
                    0 => finding.reason,
                    more => format!("{}; and so in {more} places more", finding.reason),
                },
                advice: finding.advice,
            }
        };
        self.problems = findings.found.into_iter().map(problem).collect();
        self.notes = findings.notes;
    }
}

fn runs(numbers: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if number <= last.saturating_add(1) => *last = number.max(*last),
            _ => runs.push((number, number)),
        }
    }
    runs
}

/// Something found, while more is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub kind: Kind,
    pub object: String,
    pub reason: String,
    pub advice: String,
    /// Places beside the first where the same is wrong.
    pub more: u64,
    /// Checkpoints that cannot be read whole. A finding that had some is forgotten when all of them went meanwhile.
    pub checkpoints: BTreeSet<CheckpointId>,
    /// What of the volume that is, in bytes.
    pub ranges: RangeSet<u64>,
}

/// Everything found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub found: Vec<Finding>,
    pub notes: Vec<String>,
    /// Places in objects that cannot be used, each of a finding: by number of the object, in bytes.
    pub bad: BTreeMap<u64, Vec<(Range<u64>, usize)>>,
    /// Index nodes that cannot be used, by their pointers: the finding, and the blocks.
    pub bad_nodes: BTreeMap<u64, (usize, Range<u64>)>,
    /// What was found of each object: a few, of damage that may be in many.
    of_object: HashMap<String, Vec<usize>>,
}

impl Findings {
    /// Something is wrong with an object. Returns its number among what was found: what is wrong with it in the same way is one.
    pub fn add(
        &mut self,
        kind: Kind,
        object: impl Into<String>,
        reason: impl Into<String>,
        advice: impl Into<String>,
    ) -> usize {
        let object = object.into();
        // What is not there is wrong in no other way.
        let is_one = |a: Kind, b: Kind| a == b || a == Kind::Missing || b == Kind::Missing;
        let of = self.of_object.entry(object.clone()).or_default();
        let is_same = |at: &&usize| is_one(self.found[**at].kind, kind);
        if let Some(&at) = of.iter().rev().find(is_same) {
            let there = &mut self.found[at];
            match (there.kind, kind) {
                (Kind::Missing, _) => {}
                (_, Kind::Missing) => {
                    (there.kind, there.reason, there.more) = (kind, reason.into(), 0);
                }
                _ => there.more += 1,
            }
            return at;
        }
        of.push(self.found.len());
        self.found.push(Finding {
            kind,
            object,
            reason: reason.into(),
            advice: advice.into(),
            more: 0,
            checkpoints: BTreeSet::new(),
            ranges: RangeSet::new(),
        });
        self.found.len() - 1
    }

    /// Keeps what `is_kept` takes. The numbers of what was found before are worth nothing afterwards.
    pub fn retain(&mut self, is_kept: impl FnMut(&mut Finding) -> bool) {
        self.found.retain_mut(is_kept);
        self.bad.clear();
        self.bad_nodes.clear();
        self.of_object.clear();
        for (at, finding) in self.found.iter().enumerate() {
            self.of_object.entry(finding.object.clone()).or_default().push(at);
        }
    }

    /// As [`Self::add`], for who has nothing to add to it.
    pub fn tell(
        &mut self,
        kind: Kind,
        object: impl Into<String>,
        reason: impl Into<String>,
        advice: impl Into<String>,
    ) {
        let _ = self.add(kind, object, reason, advice);
    }

    /// As [`Self::add`], of one checkpoint.
    pub fn add_of(
        &mut self,
        checkpoint: CheckpointId,
        kind: Kind,
        object: impl Into<String>,
        reason: impl Into<String>,
        advice: impl Into<String>,
    ) {
        let at = self.add(kind, object, reason, advice);
        self.found[at].checkpoints.insert(checkpoint);
    }

    /// A part of an object of the container cannot be used: it is found out later what needs it.
    pub fn add_place(&mut self, kind: Kind, object: u64, key: String, bytes: Range<u64>, reason: String) {
        let at = self.add(kind, key, reason, OBJECT_ADVICE);
        self.bad.entry(object).or_default().push((bytes, at));
    }

    /// What was found of a part of an object, each by its number.
    pub fn bad_at(&self, object: u64, bytes: &Range<u64>) -> impl Iterator<Item = usize> {
        let of = self.bad.get(&object).into_iter().flatten();
        let is_in = move |bad: &Range<u64>| bad.start < bytes.end && bytes.start < bad.end;
        of.filter(move |(bad, _)| is_in(bad)).map(|(_, finding)| *finding)
    }

    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Objects that are none of a volume's.
    pub fn note_others(&mut self, keys: &[String]) {
        if keys.is_empty() {
            return;
        }
        let first = keys
            .iter()
            .take(OTHERS_MAX)
            .cloned()
            .collect::<Vec<_>>()
            .join(", ");
        let more = match keys.len() > OTHERS_MAX {
            true => ", …",
            false => "",
        };
        self.note(format!(
            "{} objects there are not the volume's: {first}{more}",
            keys.len()
        ));
    }

    pub fn note_orphans(&mut self, objects: u64, bytes: u64) {
        if objects > 0 {
            self.note(format!(
                "{objects} objects with {} are needed by no checkpoint that is kept: what publishes that failed left, or what waits \
                 to be removed",
                format_size(bytes)
            ));
        }
    }
}

/// What to do about an object of the container.
pub(super) const OBJECT_ADVICE: &str = "nothing ever changes such an object once it is written: put it back from the bucket's versions or \
     from a copy of the volume; else go back to a checkpoint that is whole (hypernbd rollback), or to a backup";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_object_is_told_once_of_each_kind_and_once_when_it_is_gone() {
        let mut findings = Findings::default();
        assert_eq!(findings.add(Kind::Damaged, "a", "first", "x"), 0);
        assert_eq!(findings.add(Kind::Damaged, "a", "second", "x"), 0);
        assert_eq!(findings.add(Kind::Short, "a", "third", "x"), 1);
        assert_eq!(findings.add(Kind::Damaged, "b", "fourth", "x"), 2);
        assert_eq!(findings.add(Kind::Missing, "b", "gone", "x"), 2);
        assert_eq!(findings.add(Kind::Damaged, "b", "fifth", "x"), 2);
        let told: Vec<(Kind, &str, u64)> = findings
            .found
            .iter()
            .map(|f| (f.kind, f.reason.as_str(), f.more))
            .collect();
        assert_eq!(
            told,
            [
                (Kind::Damaged, "first", 1),
                (Kind::Short, "third", 0),
                (Kind::Missing, "gone", 0)
            ]
        );
        // What is forgotten may be found again, and what is left has another number.
        findings.retain(|finding| finding.reason != "first");
        assert_eq!(findings.add(Kind::Short, "a", "fourth", "x"), 0);
        assert_eq!(findings.add(Kind::Damaged, "b", "fifth", "x"), 1);
        assert_eq!(findings.add(Kind::Damaged, "a", "sixth", "x"), 2);
        assert_eq!(findings.found.len(), 3);
    }

    #[test]
    fn numbers_are_told_in_runs() {
        assert_eq!(runs([1, 2, 3, 7, 9, 10].into_iter()), [(1, 3), (7, 7), (9, 10)]);
        assert!(runs([].into_iter()).is_empty());
    }
}

//! The usage table: which objects which checkpoints need. Pure.
//!
//! The table follows the volume from one listed checkpoint to the next. For each object it holds the number of places
//! in the object that the newest checkpoint refers to (`live`), the first checkpoint that referred to it (`born`), and
//! the first checkpoint since which none has (`dead_since`). *An object is needed when `live` is above 0, or when a
//! kept checkpoint r exists with born <= r < dead_since.* That is exact as long as nothing was rolled back. After a
//! rollback it keeps a little too much, and never too little.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use crate::base::checkpoint_id::CheckpointId;
use crate::base::checkpoint_id::InodeCheck;
use crate::base::checksum::crc32c;
use crate::format::object_names::name_of;

/// Format of the stored table; another one is not read.
const VERSION: u32 = 3;

/// The version of a stored table, whatever else it has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// What is stored. A large table has no check values in its object's metadata, and a number in which a bit has changed may let something
/// go that is needed.
#[derive(Serialize, Deserialize)]
struct Stored<'a> {
    version: u32,
    /// CRC-32C of the table's text.
    crc32c: u32,
    #[serde(borrow)]
    table: &'a RawValue,
}

/// Places in one object.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct Places {
    /// Blocks of data.
    pub blocks: u64,
    /// Nodes of the index.
    pub nodes: u64,
}

impl From<(u64, u64)> for Places {
    fn from((blocks, nodes): (u64, u64)) -> Self {
        Self { blocks, nodes }
    }
}

impl From<Places> for (u64, u64) {
    fn from(of: Places) -> Self {
        (of.blocks, of.nodes)
    }
}

impl Places {
    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.blocks == 0 && self.nodes == 0
    }

    fn max(self, other: Self) -> Self {
        Self {
            blocks: self.blocks.max(other.blocks),
            nodes: self.nodes.max(other.nodes),
        }
    }

    fn changed(self, by: &Delta) -> Option<Self> {
        let after = |places: u64, change: i64| places.checked_add_signed(change);
        let (blocks, nodes) = after(self.blocks, by.blocks).zip(after(self.nodes, by.nodes))?;
        Some(Self { blocks, nodes })
    }
}

/// The use of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StoredUse", into = "StoredUse")]
pub(crate) struct ObjectUse {
    /// Places in it that the checkpoint accounted last refers to.
    pub live: Places,
    /// The first checkpoint that referred to it.
    pub born: u64,
    /// The first checkpoint since which none refers to it, once `live` is 0; otherwise the largest number there is.
    pub dead_since: u64,
    /// Places in it, at most, that any checkpoint needs which is kept. What is in an object only ever dies, so the oldest kept
    /// checkpoint needs the most. (After a rollback it is an estimate: it says what is worth copying, and never what may go.)
    pub held: Places,
    /// What `held` becomes once no checkpoint before `next_since` is kept.
    pub next_held: Places,
    /// See `next_held`.
    pub next_since: u64,
}

/// The numbers of an [`ObjectUse`] in their order.
type StoredUse = (Places, u64, u64, Places, Places, u64);

impl From<StoredUse> for ObjectUse {
    fn from((live, born, dead_since, held, next_held, next_since): StoredUse) -> Self {
        Self {
            live,
            born,
            dead_since,
            held,
            next_held,
            next_since,
        }
    }
}

impl From<ObjectUse> for StoredUse {
    fn from(of: ObjectUse) -> Self {
        (
            of.live,
            of.born,
            of.dead_since,
            of.held,
            of.next_held,
            of.next_since,
        )
    }
}

/// A listed checkpoint that was accounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(InodeCheck, u64, u64)", into = "(InodeCheck, u64, u64)")]
pub(crate) struct Accounted {
    /// Distinguishes it from other checkpoints with that number.
    pub check: InodeCheck,
    /// When it was published, in milliseconds since 1970-01-01 UTC, by its server's clock.
    pub published_ms: u64,
    /// Size of the volume at the checkpoint, in bytes.
    pub size_bytes: u64,
}

impl From<(InodeCheck, u64, u64)> for Accounted {
    fn from((check, published_ms, size_bytes): (InodeCheck, u64, u64)) -> Self {
        Self {
            check,
            published_ms,
            size_bytes,
        }
    }
}

impl From<Accounted> for (InodeCheck, u64, u64) {
    fn from(of: Accounted) -> Self {
        (of.check, of.published_ms, of.size_bytes)
    }
}

/// The change in the use of one object from one checkpoint to the next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Delta {
    /// Change in the number of data blocks.
    pub blocks: i64,
    /// Change in the number of index nodes.
    pub nodes: i64,
}

/// The table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// The checkpoint that was accounted last.
    at: Option<CheckpointId>,
    /// By the object's number.
    objects: BTreeMap<u64, ObjectUse>,
    /// Checkpoints that are accounted and not removed, by number.
    kept: BTreeMap<u64, Accounted>,
}

impl Usage {
    /// Decodes a stored table.
    ///
    /// # Errors
    /// A text that says what is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        let Versioned { version } = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        if version != VERSION {
            return Err(format!("it has version {version}, and {VERSION} is known"));
        }
        let stored: Stored<'_> = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        let table = stored.table.get().as_bytes();
        match crc32c(table) == stored.crc32c {
            true => Self::decode_table(table),
            false => Err("it is not what was written: its CRC-32C is another".to_owned()),
        }
    }

    /// The table as it is stored.
    ///
    /// # Errors
    /// That it cannot be written as text.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let table = to_raw_value(self).map_err(|e| e.to_string())?;
        let stored = Stored {
            version: VERSION,
            crc32c: crc32c(table.get().as_bytes()),
            table: &table,
        };
        serde_json::to_vec(&stored).map_err(|e| e.to_string())
    }

    /// Decodes a table without its version and its check.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_table(table: &[u8]) -> Result<Self, String> {
        let usage: Self = serde_json::from_slice(table).map_err(|e| e.to_string())?;
        let at = usage.at_number();
        let is_sound = |of: &ObjectUse| {
            let is_live = !of.live.is_empty();
            of.born <= at && is_live == (of.dead_since == u64::MAX) && (is_live || of.dead_since <= at)
        };
        match usage.objects.values().all(is_sound) {
            true => Ok(usage),
            false => Err("it tells of uses that no checkpoint has".to_owned()),
        }
    }

    /// The checkpoint that was accounted last.
    pub fn at(&self) -> Option<CheckpointId> {
        self.at
    }

    /// The number of the checkpoint that was accounted last; 0 before the first.
    pub fn at_number(&self) -> u64 {
        self.at.map_or(0, |at| at.cno)
    }

    /// Checkpoints that are accounted and not removed, ascending.
    pub fn kept(&self) -> &BTreeMap<u64, Accounted> {
        &self.kept
    }

    /// The use of each object.
    pub fn objects(&self) -> &BTreeMap<u64, ObjectUse> {
        &self.objects
    }

    /// Advances to the next listed checkpoint, with these differences.
    ///
    /// # Errors
    /// When the table cannot belong to the previous checkpoint. It must then be computed again.
    pub fn step(
        &mut self,
        cno: u64,
        checkpoint: Accounted,
        deltas: &HashMap<u64, Delta>,
    ) -> Result<(), String> {
        for (object, delta) in deltas {
            let is_new = !self.objects.contains_key(object);
            let of = self.objects.entry(*object).or_insert(ObjectUse {
                live: Places::default(),
                born: cno,
                dead_since: u64::MAX,
                held: Places::default(),
                next_held: Places::default(),
                next_since: cno,
            });
            let Some(live) = of.live.changed(delta) else {
                return Err(format!("object {object:#x} would have fewer uses than none"));
            };
            of.live = live;
            (of.held, of.next_held) = (of.held.max(live), of.next_held.max(live));
            match live.is_empty() {
                // What a checkpoint neither had nor has.
                true if is_new => drop(self.objects.remove(object)),
                true => of.dead_since = of.dead_since.min(cno),
                false => of.dead_since = u64::MAX,
            }
        }
        let check = checkpoint.check;
        self.at = Some(CheckpointId { cno, check });
        self.kept.insert(cno, checkpoint);
        Ok(())
    }

    /// Whether the checkpoint accounted last, or one of `kept`, needs an object. An object that is not in the table was
    /// used by no accounted checkpoint.
    pub fn is_needed(&self, object: u64, kept: &BTreeMap<u64, Accounted>) -> bool {
        let Some(of) = self.objects.get(&object) else {
            return false;
        };
        !of.live.is_empty()
            || of.dead_since == u64::MAX
            || (of.born < of.dead_since && kept.range(of.born..of.dead_since).next().is_some())
    }

    /// The differences between this table and one of the same checkpoint that was counted from the stored data: objects
    /// that an existing checkpoint uses and that this table would remove, and other numbers of places that the newest
    /// checkpoint uses.
    pub fn differences(&self, counted: &Self) -> Vec<String> {
        let none = ObjectUse {
            live: Places::default(),
            born: u64::MAX,
            dead_since: 0,
            held: Places::default(),
            next_held: Places::default(),
            next_since: 0,
        };
        let mut differences = Vec::new();
        for (object, truth) in &counted.objects {
            let own = self.objects.get(object).unwrap_or(&none);
            let name = name_of(*object);
            if own.live != truth.live {
                differences.push(format!(
                    "{name} has {} blocks and {} nodes in use, and the table {} and {}",
                    truth.live.blocks, truth.live.nodes, own.live.blocks, own.live.nodes
                ));
            }
            let mut users = counted
                .kept
                .range(truth.born..truth.dead_since)
                .map(|(cno, _)| *cno);
            let (first, last) = (users.next(), users.next_back());
            let is_known = |cno: u64| own.born <= cno && cno < own.dead_since;
            let unknown = first.into_iter().chain(last).find(|cno| !is_known(*cno));
            if let Some(cno) = unknown {
                differences.push(format!(
                    "checkpoint {cno} uses {name}, and the table says that it does not"
                ));
            }
        }
        let unused = self
            .objects
            .iter()
            .filter(|(object, of)| !of.live.is_empty() && !counted.objects.contains_key(object));
        differences
            .extend(unused.map(|(object, _)| format!("the table says that {} is in use", name_of(*object))));
        differences
    }

    /// Notes what checkpoints that are gone no longer hold in the objects. Each place is let go of at latest when two times as many
    /// checkpoints are gone as were kept when it died.
    pub fn settle(&mut self) {
        let at = self.at_number();
        for of in self.objects.values_mut() {
            let oldest = self
                .kept
                .range(of.born..)
                .next()
                .map_or(u64::MAX, |(cno, _)| *cno);
            if oldest >= of.next_since {
                (of.held, of.next_held, of.next_since) = (of.next_held, of.live, at);
            }
        }
    }

    /// Of the accounted checkpoints only these are there still.
    pub fn retain(&mut self, is_kept: impl Fn(u64) -> bool) {
        self.kept.retain(|cno, _| is_kept(*cno));
    }

    /// Drops checkpoints and objects that were removed.
    pub fn forget(&mut self, checkpoints: &[u64], objects: &[u64]) {
        for cno in checkpoints {
            self.kept.remove(cno);
        }
        for object in objects {
            self.objects.remove(object);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounted(cno: u64) -> Accounted {
        (InodeCheck::from_bits(cno), cno * 1000, 1 << 30).into()
    }

    fn step(usage: &mut Usage, cno: u64, blocks: &[(u64, i64)]) {
        let deltas = blocks
            .iter()
            .map(|&(object, blocks)| (object, Delta { blocks, nodes: 0 }));
        usage.step(cno, accounted(cno), &deltas.collect()).unwrap();
    }

    fn needed(usage: &Usage, kept: &[u64]) -> Vec<u64> {
        let kept = usage
            .kept()
            .iter()
            .filter(|(cno, _)| kept.contains(cno))
            .map(|(cno, of)| (*cno, *of))
            .collect();
        let objects = usage.objects().keys().copied();
        objects.filter(|object| usage.is_needed(*object, &kept)).collect()
    }

    #[test]
    fn an_object_is_needed_from_its_first_use_to_its_last() {
        let mut usage = Usage::default();
        step(&mut usage, 1, &[(10, 2)]);
        step(&mut usage, 2, &[(20, 1), (10, -1)]);
        step(&mut usage, 5, &[(50, 1), (10, -1)]);
        step(&mut usage, 6, &[(20, -1), (60, 1)]);
        assert_eq!(needed(&usage, &[]), [50, 60]);
        assert_eq!(needed(&usage, &[1]), [10, 50, 60]);
        assert_eq!(needed(&usage, &[2]), [10, 20, 50, 60]);
        assert_eq!(needed(&usage, &[5]), [20, 50, 60]);
        assert_eq!(needed(&usage, &[1, 5]), [10, 20, 50, 60]);
        // An object that was dead is used again, as after a rollback: it counts as needed all along.
        step(&mut usage, 8, &[(10, 1), (60, -1)]);
        assert_eq!(needed(&usage, &[]), [10, 50]);
        step(&mut usage, 9, &[(10, -1)]);
        assert_eq!(needed(&usage, &[6]), [10, 50, 60]);
        usage.forget(&[1, 2, 5], &[20]);
        assert_eq!(usage.kept().keys().copied().collect::<Vec<_>>(), [6, 8, 9]);
        let stored = usage.encode().unwrap();
        assert_eq!(Usage::decode(&stored), Ok(usage));
    }

    /// A number that is another because a bit of the disk is.
    #[test]
    fn no_digit_of_a_stored_table_may_be_another() {
        let mut usage = Usage::default();
        step(&mut usage, 1, &[(10, 2)]);
        step(&mut usage, 2, &[(20, 1), (10, -1)]);
        step(&mut usage, 5, &[(50, 1), (10, -1)]);
        let stored = usage.encode().unwrap();
        let digits = (0..stored.len()).filter(|&at| stored[at].is_ascii_digit());
        let mut tried = 0;
        for at in digits {
            let mut rotten = stored.clone();
            rotten[at] ^= 1;
            assert!(
                Usage::decode(&rotten).is_err(),
                "{}",
                String::from_utf8_lossy(&rotten)
            );
            tried += 1;
        }
        assert!(tried > 50, "{tried}");
    }

    #[test]
    fn what_kept_checkpoints_hold_is_never_told_too_low() {
        let mut usage = Usage::default();
        let held = |usage: &Usage| usage.objects()[&10].held.blocks;
        step(&mut usage, 1, &[(10, 100)]);
        for cno in 2..=40 {
            step(&mut usage, cno, &[(10, -2), (cno * 100, 2)]);
            // Ten are kept; the oldest of them needs what was live at it.
            let gone: Vec<u64> = usage
                .kept()
                .keys()
                .copied()
                .filter(|kept| kept + 10 <= cno)
                .collect();
            usage.forget(&gone, &[]);
            usage.settle();
            let oldest = usage.kept().keys().next().copied().unwrap();
            let needed = 100 - 2 * (oldest - 1);
            assert!(held(&usage) >= needed, "{cno}: {} of {needed}", held(&usage));
            let late = 100 - 2 * (oldest.saturating_sub(11));
            assert!(held(&usage) <= late, "{cno}: {} of {late}", held(&usage));
        }
        assert!(held(&usage) < 60);
        // A rollback brings back what was dead.
        step(&mut usage, 41, &[(10, 70)]);
        usage.settle();
        assert!(held(&usage) >= 92);
    }

    #[test]
    fn a_table_that_is_not_of_the_volume_is_noticed() {
        let mut usage = Usage::default();
        step(&mut usage, 1, &[(10, 2)]);
        let deltas = HashMap::from([(10, Delta { blocks: -3, nodes: 0 })]);
        assert!(usage.step(2, accounted(2), &deltas).is_err());
        let whole = String::from_utf8(usage.encode().unwrap()).unwrap();
        let older = Usage::decode(whole.replace("\"version\":3", "\"version\":2").as_bytes());
        assert!(older.unwrap_err().contains("version 2"));
        let stored = serde_json::to_string(&usage).unwrap();
        let is_read = |from: &str, to: &str| {
            let changed = stored.replace(from, to);
            assert_ne!(changed, stored);
            Usage::decode_table(changed.as_bytes()).is_ok()
        };
        // Live and dead at once; born later than what was accounted; more uses than there are numbers.
        assert!(!is_read("[[2,0],1,18446744073709551615,", "[[2,0],1,1,"));
        assert!(!is_read(
            "[[2,0],1,18446744073709551615,",
            "[[2,0],9,18446744073709551615,"
        ));
        assert!(is_read(
            "[[2,0],1,",
            "[[18446744073709551615,18446744073709551615],1,"
        ));
    }
}

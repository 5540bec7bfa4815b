//! The damaged places that are known. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::object_names::of_name;
use crate::meta::scrub_record::{DamagedPlace, PLACES_MAX};

/// The places, ascending by object and offset, as many as are kept.
#[derive(Debug, Default)]
pub(super) struct Known {
    places: Vec<DamagedPlace>,
    /// Places that were found beside these, by the number of their object.
    more: BTreeMap<u64, u64>,
    /// Places that an earlier server found beside these. Of which objects is not known.
    more_before: u64,
}

/// The number of a place's object; `None` for a key that is none of a container's object.
fn number(place: &DamagedPlace) -> Option<u64> {
    of_name(place.object.rsplit('/').next()?)
}

/// Whether two places have something in common, or are both of the object as such, which have no length.
fn overlap(one: &DamagedPlace, other: &DamagedPlace) -> bool {
    let end = |place: &DamagedPlace| place.offset_bytes.saturating_add(place.len_bytes);
    let is_in = one.offset_bytes < end(other) && other.offset_bytes < end(one);
    let is_same = (one.offset_bytes, one.len_bytes) == (other.offset_bytes, other.len_bytes);
    one.object == other.object && (is_in || is_same)
}

impl Known {
    /// What was known before.
    pub fn new(places: Vec<DamagedPlace>, more: u64) -> Self {
        Self {
            places,
            more: BTreeMap::new(),
            more_before: more,
        }
    }

    /// The places.
    pub fn places(&self) -> &[DamagedPlace] {
        &self.places
    }

    /// The number of places beside these.
    pub fn more(&self) -> u64 {
        self.more_before + self.more.values().sum::<u64>()
    }

    /// Whether none are known.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty() && self.more() == 0
    }

    /// The numbers of the damaged objects.
    pub fn objects(&self) -> BTreeSet<u64> {
        self.places.iter().filter_map(number).collect()
    }

    /// A pass begins, which finds again what earlier servers found beside the places that are kept.
    pub fn begin_pass(&mut self) {
        self.more_before = 0;
    }

    /// Forgets the places in objects that nothing needs any more. Returns whether there were some.
    pub fn retain(&mut self, is_needed: impl Fn(u64) -> bool) -> bool {
        let before = (self.places.len(), self.more.len());
        self.places.retain(|place| number(place).is_some_and(&is_needed));
        self.more.retain(|object, _| is_needed(*object));
        (self.places.len(), self.more.len()) != before
    }

    /// What was found of an object takes the place of what was known of it. Returns what is new of it, and whether anything is another
    /// than before.
    pub fn replace(&mut self, object: u64, found: Vec<DamagedPlace>) -> (Vec<DamagedPlace>, bool) {
        let is_of_it = |place: &DamagedPlace| number(place) == Some(object);
        let (old, others): (Vec<_>, Vec<_>) = self.places.drain(..).partition(is_of_it);
        self.places = others;
        let had = self.more.remove(&object).unwrap_or(0);
        let mut beside = 0;
        let mut new = Vec::new();
        let mut kept = Vec::new();
        for place in found {
            let before = old.iter().find(|old| overlap(old, &place));
            let has_room = self.places.len() + kept.len() < PLACES_MAX;
            match before {
                Some(before) if has_room => kept.push(DamagedPlace {
                    found_ms: before.found_ms,
                    ..place
                }),
                None if has_room => {
                    new.push(place.clone());
                    kept.push(place);
                }
                _ => {
                    beside += 1;
                    // As many as were told of are told of no more.
                    if before.is_none() && beside > had {
                        match self.more_before.checked_sub(1) {
                            Some(left) => self.more_before = left,
                            None => new.push(place),
                        }
                    }
                }
            }
        }
        if beside > 0 {
            self.more.insert(object, beside);
        }
        let is_changed = !new.is_empty() || kept != old || beside != had;
        self.places.extend(kept);
        let order = |place: &DamagedPlace| (number(place), place.offset_bytes);
        self.places.sort_by_key(order);
        (new, is_changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(cno: u64) -> u64 {
        cno << 32 | 1
    }

    fn place(cno: u64, offset_bytes: u64, found_ms: u64) -> DamagedPlace {
        DamagedPlace {
            object: format!("vol/{cno:010}.0"),
            offset_bytes,
            len_bytes: 16384,
            reason: "damaged".into(),
            is_newest_affected: true,
            ranges: Vec::new(),
            affected_bytes: 0,
            found_ms,
        }
    }

    #[test]
    fn what_was_found_before_is_not_new() {
        let mut known = Known::default();
        let (new, is_changed) = known.replace(object(7), vec![place(7, 0, 1), place(7, 65536, 1)]);
        assert!(new.len() == 2 && is_changed);
        assert_eq!(known.objects(), BTreeSet::from([object(7)]));
        // Found again, a little longer, and one more; one is gone.
        let longer = DamagedPlace {
            len_bytes: 32768,
            ..place(7, 0, 2)
        };
        let (new, is_changed) = known.replace(object(7), vec![longer, place(7, 131_072, 2)]);
        assert_eq!(new, [place(7, 131_072, 2)]);
        assert!(is_changed);
        let (new, is_changed) = known.replace(object(7), known.places().to_vec());
        assert!(new.is_empty() && !is_changed);
        let of_7: Vec<(u64, u64)> = known
            .places()
            .iter()
            .map(|place| (place.offset_bytes, place.found_ms))
            .collect();
        assert_eq!(of_7, [(0, 1), (131_072, 2)], "found when it was found first");
        // Of another object with the same place.
        known.replace(object(3), vec![place(3, 0, 3)]);
        assert_eq!(known.places()[0], place(3, 0, 3));
        assert_eq!(known.replace(object(7), Vec::new()), (Vec::new(), true));
        assert_eq!(known.objects(), BTreeSet::from([object(3)]));
        // Of an object as such.
        let whole = DamagedPlace {
            len_bytes: 0,
            ..place(3, 0, 4)
        };
        known.replace(object(3), vec![whole.clone()]);
        assert_eq!(known.replace(object(3), vec![whole]), (Vec::new(), false));
        assert!(!known.retain(|number| number == object(3)));
        assert!(known.retain(|_| false) && known.is_empty());
    }

    #[test]
    fn only_so_many_are_kept_and_the_rest_is_counted() {
        let mut known = Known::default();
        for cno in 1..=PLACES_MAX as u64 + 5 {
            let (new, _) = known.replace(object(cno), vec![place(cno, 0, 1)]);
            assert_eq!(new.len(), 1, "each is told of");
        }
        assert_eq!((known.places().len(), known.more()), (PLACES_MAX, 5));
        // Found again by the next pass, nothing of it is new.
        known.begin_pass();
        for cno in 1..=PLACES_MAX as u64 + 5 {
            let again = known.replace(object(cno), vec![place(cno, 0, 2)]);
            assert_eq!(again, (Vec::new(), false), "{cno}");
        }
        assert_eq!((known.places().len(), known.more()), (PLACES_MAX, 5));
        // One is mended.
        let last = PLACES_MAX as u64 + 5;
        assert_eq!(known.replace(object(last), Vec::new()), (Vec::new(), true));
        assert_eq!(known.more(), 4);
        // After a start it is known how many they are, and not which.
        let mut known = Known::new(known.places().to_vec(), known.more());
        let (new, _) = known.replace(object(last - 1), vec![place(last - 1, 0, 3)]);
        assert!(new.is_empty(), "{new:?}");
        assert_eq!(known.more(), 4);
        known.begin_pass();
        assert_eq!(known.more(), 1);
        assert!(known.retain(|_| false) && known.is_empty());
    }

    /// The record of more places than are kept could not be read by the next server.
    #[test]
    fn one_place_that_becomes_many_does_not_go_beyond_what_is_kept() {
        let whole = DamagedPlace {
            len_bytes: 1 << 30,
            ..place(7, 0, 1)
        };
        let mut known = Known::new(vec![whole], 0);
        let found = (0..PLACES_MAX as u64 + 5).map(|at| place(7, at << 16, 2));
        let (new, is_changed) = known.replace(object(7), found.collect());
        assert!(new.is_empty() && is_changed, "{new:?}");
        assert_eq!((known.places().len(), known.more()), (PLACES_MAX, 5));
    }
}

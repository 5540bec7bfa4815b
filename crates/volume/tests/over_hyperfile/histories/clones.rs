//! Clones in a history: made of what is published or has a name, ended by a deletion or by copying what they share.

use hypernbd_volume::admin::{self, IfDamaged, flatten};
use hypernbd_volume::past::At;
use hypernbd_volume::{ErrorKind, VolumeError};

use super::faults::Faults;
use super::line::{Contents, Line};
use super::world::World;

impl World {
    /// Whether the volume at this place has clones that share its objects.
    pub fn has_clones(&self, at: usize) -> bool {
        self.places.iter().any(|place| place.parent == Some(at))
    }

    /// Whether it shares objects with another, in one or the other way: such a volume is neither copied nor put back.
    pub fn is_sharing(&self, at: usize) -> bool {
        self.places[at].parent.is_some() || self.has_clones(at)
    }

    /// Makes a clone of another volume at an empty place, if there is one that can have a clone.
    pub fn clone_to(&mut self, at: usize) -> bool {
        let others: Vec<_> = (0..self.places.len())
            .filter(|&other| other != at && self.is_closed(other))
            .collect();
        if others.is_empty() {
            return false;
        }
        let from = others[self.random.usize(..others.len())];
        let (checkpoint, contents) = self.clonable(from);
        let what = format!("clone {} to {}", self.places[from].name, self.places[at].name);
        let (url, to) = (self.url(from), self.url(at));
        let of = (url.clone(), to.clone(), checkpoint.clone());
        let mut cloned = self.verb(&what, |store| {
            Box::pin(async move { admin::clone(&of.0, &store, of.2.as_ref(), &of.1).await })
        });
        let was_killed = cloned.is_none();
        loop {
            match cloned {
                Some(Ok(_)) => break,
                // A volume that was made and not written has no checkpoint.
                Some(Err(VolumeError::NoCheckpoint { .. })) if contents.iter().all(|&byte| byte == 0) => {
                    return false;
                }
                Some(Err(VolumeError::AlreadyExists { .. })) if was_killed => break,
                Some(Err(VolumeError::Leftovers { .. })) => {
                    let lease = self.lease();
                    self.whole(
                        "delete what is left",
                        admin::delete(&to, &Faults::none(), &lease, IfDamaged::Refuse),
                    )
                    .unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
                }
                Some(Err(error)) => panic!("{what}: {}", error.chain()),
                None => {}
            }
            let store = Faults::none();
            let again = admin::clone(&url, &store, checkpoint.as_ref(), &to);
            cloned = Some(self.whole(&what, again));
        }
        self.made(at, Line::known(Vec::clone(&contents)));
        self.places[at].parent = Some(from);
        self.seen.cloned += 1;
        true
    }

    /// A checkpoint that a clone may begin as, and how it reads.
    fn clonable(&mut self, from: usize) -> (Option<At>, Contents) {
        let names: Vec<_> = self.places[from].names.iter().collect();
        if !names.is_empty() && self.random.bool() {
            let (name, contents) = names[self.random.usize(..names.len())];
            return (Some(format!("@{name}").parse().unwrap()), contents.clone());
        }
        let line = self.places[from].line.as_ref().unwrap();
        (None, line.newest().clone())
    }

    /// Copies what a clone shares, which ends the sharing.
    pub fn flatten(&mut self, at: usize) {
        if self.places[at].parent.is_none() || !self.is_closed(at) {
            return self.check_names(at);
        }
        let (url, lease) = (self.url(at), self.lease());
        let what = format!("flatten {}", self.places[at].name);
        let of = (url.clone(), lease.clone());
        let mut flattened = self.verb(&what, |store| {
            Box::pin(async move { flatten(&of.0, &store, &of.1).await })
        });
        let was_killed = flattened.is_none();
        if was_killed && self.random.bool() {
            // It serves as a clone, or as what it has become.
            self.open(at, true);
            self.close(at);
            if !self.is_closed(at) {
                return;
            }
        }
        if was_killed {
            flattened = Some(self.whole(&what, flatten(&url, &Faults::none(), &lease)));
        }
        match flattened.unwrap() {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                if self.has_clones(at) {
                    return self.check_names(at);
                }
                assert!(was_killed, "{what}: {}", error.chain());
            }
            Err(error) => panic!("{what}: {}", error.chain()),
        }
        self.places[at].parent = None;
        self.seen.flattened += 1;
    }

    /// A volume with clones is not deleted, wherever the deletion is killed.
    pub fn refuse_to_delete(&mut self, at: usize) {
        let (url, lease) = (self.url(at), self.lease());
        let what = format!("delete {}, which has clones", self.places[at].name);
        let deleted = self.verb(&what, |store| {
            Box::pin(async move { admin::delete(&url, &store, &lease, IfDamaged::Refuse).await })
        });
        match deleted {
            None => {}
            Some(Err(VolumeError::HasClones { .. })) => self.seen.deletions_refused += 1,
            Some(other) => panic!("{what}: {:?}", other.map(drop)),
        }
        self.check_names(at);
    }
}

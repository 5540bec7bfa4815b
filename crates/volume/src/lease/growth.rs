//! The request, carried by the lease itself, that its holder grows the volume. Pure.
//!
//! Whoever asks writes the lease that is stored, with a request in it, on condition that it is still the stored one. The holder's next
//! renewal is refused for that, and reads the lease, as after a renewal whose answer was lost: it finds its own token and goes on, in every
//! release. What a release does not know in the lease it drops with its next renewal. So a request costs nothing while there is none, and is
//! part of a lease that its holder replaces at its next renewal and every other owner replaces by its own: no request outlives that.
//!
//! The holder carries a request out only after the store has taken the lease with the stage [`GrowthStage::Taken`] over the one with the
//! request. Whoever asked may take the request back in the same way until then: of the two writes one is refused. So a request that was
//! withdrawn is never carried out, and one request is carried out once.
//!
//! | stage | written by |
//! |---|---|
//! | asked, withdrawn | who asks |
//! | taken, then grown or failed | the holder of the lease |

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Deserializer, Serialize};

use super::record::{DURATION_MAX, LeaseRecord};
use crate::base::stored_text::printable;
use crate::base::volume_id::VolumeId;

/// Its name in the lease.
pub(super) const FIELD: &str = "growth";

/// How far a request is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GrowthStage {
    /// The holder has not seen it.
    Asked,
    /// Whoever asked has taken it back.
    Withdrawn,
    /// The holder is at it.
    Taken,
    /// The volume has this size.
    Grown {
        /// In bytes.
        size_bytes: u64,
    },
    /// The holder did not, or could not.
    Failed {
        /// Why, in the holder's words.
        #[serde(deserialize_with = "printable")]
        why: String,
    },
}

/// A request that the holder of a lease grows the volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowthRequest {
    /// A random id, of this request alone.
    #[serde(deserialize_with = "printable")]
    pub id: String,
    /// The volume that is meant.
    pub volume_id: VolumeId,
    /// The size that it is to have, in bytes.
    pub size_bytes: u64,
    /// When it was asked for, in milliseconds since 1970-01-01 UTC, by the clock of who asked.
    pub asked_ms: u64,
    /// How long it holds from when it was stored, in milliseconds of the store's clock.
    pub valid_ms: u64,
    /// The program, process and machine that asked.
    #[serde(deserialize_with = "printable")]
    pub asked_by: String,
    /// How far it is.
    pub stage: GrowthStage,
}

impl GrowthRequest {
    /// At another stage.
    pub(crate) fn at(&self, stage: GrowthStage) -> Self {
        Self {
            stage,
            ..self.clone()
        }
    }

    /// Whether somebody may still carry it out, or is at it.
    pub fn is_pending(&self) -> bool {
        matches!(self.stage, GrowthStage::Asked | GrowthStage::Taken)
    }

    /// Whether it is too old to be waited for, going by the clock of who asked; or that clock is ahead by more, and would never say so.
    /// Nothing is carried out or left out because of it.
    pub fn is_stale(&self, now_ms: u64) -> bool {
        now_ms.abs_diff(self.asked_ms) > self.valid_ms
    }

    /// Whether it still held when it was taken. Both times are the store's.
    pub(super) fn holds(&self, asked: SystemTime, taken: SystemTime) -> bool {
        // The store's machines may differ by a little.
        let age = taken.duration_since(asked).unwrap_or_default();
        age <= Duration::from_millis(self.valid_ms).min(DURATION_MAX)
    }
}

/// Reads a request. One that cannot be read is none: it must not keep anybody from reading the lease.
pub(super) fn readable<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<GrowthRequest>, D::Error> {
    let value = Option::<serde_json::Value>::deserialize(deserializer)?;
    Ok(value.and_then(|value| serde_json::from_value(value).ok()))
}

/// What the holder of the lease does about requests.
#[derive(Debug)]
pub(super) enum Growing {
    /// There was none.
    Idle,
    /// The lease that says that it is taken is to be stored, or on its way.
    Taking(GrowthRequest),
    /// It is taken, and being carried out.
    UnderWay(GrowthRequest),
    /// It has its end, which is to be stored or is.
    Ended(GrowthRequest),
}

/// What follows from a look at the stored lease.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Nothing,
    /// The lease is to be written.
    Put,
    /// The request is to be carried out.
    Begin(GrowthRequest),
}

impl Growing {
    /// Looks at the stored lease, which is the holder's own and held.
    pub fn found(&mut self, record: &LeaseRecord) -> Step {
        let there = record.growth.as_ref();
        if let Self::Taking(taking) = &*self {
            match there
                .filter(|there| there.id == taking.id)
                .map(|there| &there.stage)
            {
                // The answer to that write was lost.
                Some(GrowthStage::Taken) => return self.begin(),
                Some(GrowthStage::Asked) => return Step::Put,
                // It was withdrawn.
                _ => *self = Self::Idle,
            }
        }
        match (&*self, there) {
            (Self::Idle | Self::Ended(_), Some(asked))
                if asked.stage == GrowthStage::Asked && !self.has_ended(asked) =>
            {
                *self = match asked.volume_id == record.volume_id {
                    true => Self::Taking(asked.clone()),
                    false => {
                        let why = format!("it was asked for volume {}, and this is another", asked.volume_id);
                        Self::Ended(asked.at(GrowthStage::Failed { why }))
                    }
                };
                Step::Put
            }
            _ => Step::Nothing,
        }
    }

    fn has_ended(&self, asked: &GrowthRequest) -> bool {
        matches!(self, Self::Ended(ended) if ended.id == asked.id)
    }

    /// What the next lease of the holder says. A holder that gives it back takes no more requests.
    pub fn written(&self, is_given_back: bool) -> Option<GrowthRequest> {
        match self {
            Self::Idle => None,
            Self::Taking(_) if is_given_back => None,
            Self::Taking(request) | Self::UnderWay(request) => Some(request.at(GrowthStage::Taken)),
            Self::Ended(request) => Some(request.clone()),
        }
    }

    /// The lease with what [`Self::written`] says was stored.
    pub fn stored(&mut self) -> Step {
        match self {
            Self::Taking(_) => self.begin(),
            _ => Step::Nothing,
        }
    }

    fn begin(&mut self) -> Step {
        let Self::Taking(request) = self else {
            return Step::Nothing;
        };
        let request = request.clone();
        *self = Self::UnderWay(request.clone());
        Step::Begin(request)
    }

    /// The request that was carried out has this end.
    pub fn ended(&mut self, stage: GrowthStage) {
        if let Self::UnderWay(request) = self {
            *self = Self::Ended(request.at(stage));
        }
    }
}

/// What became of a request that was stored, to who asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outlook {
    /// The holder has not looked yet.
    Asked,
    /// The holder is at it.
    Taken,
    /// The volume has this size.
    Grown(u64),
    /// The holder did not, or could not.
    Failed(String),
    /// The holder renewed its lease and took no notice.
    Ignored,
    /// It was taken back, and is never carried out.
    Withdrawn,
    /// The holder has ended, or somebody else has the volume.
    Gone,
}

/// What became of `request`, which was stored in the lease with this token, by what is stored now.
pub(crate) fn outlook(request: &GrowthRequest, token: &str, found: Option<&LeaseRecord>) -> Outlook {
    let Some(record) = found.filter(|record| record.token == token) else {
        return Outlook::Gone;
    };
    let own = record.growth.as_ref().filter(|there| there.id == request.id);
    match own.map(|own| &own.stage) {
        Some(GrowthStage::Grown { size_bytes }) => Outlook::Grown(*size_bytes),
        Some(GrowthStage::Failed { why }) => Outlook::Failed(why.clone()),
        _ if !record.is_held() => Outlook::Gone,
        Some(GrowthStage::Asked) => Outlook::Asked,
        Some(GrowthStage::Taken) => Outlook::Taken,
        Some(GrowthStage::Withdrawn) => Outlook::Withdrawn,
        None => Outlook::Ignored,
    }
}

#[cfg(test)]
#[path = "growth_tests.rs"]
mod tests;

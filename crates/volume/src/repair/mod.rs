//! What `check` finds wrong is mended, as far as that is possible without guessing.
//!
//! * [`replica`]: objects are put back from a replica or a copy of the volume.
//! * [`versions`]: objects are put back from what the bucket keeps of them.
//! * [`list`]: entries of the list of checkpoints are written again, from what the container says.
//! * [`newest`]: the volume goes back to the newest checkpoint that is whole.
//!
//! Each looks first, and changes nothing unless that is asked for. Nothing is deleted.

use async_trait::async_trait;
use serde::Serialize;

use crate::base::control::Control;
use crate::base::error::VolumeError;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::url::VolumeUrl;
use crate::check::{self, Problem, check};
use crate::format::object_names::{cno_of, of_name};
use crate::options::StoreOptions;
use crate::store::copy::Over;
use crate::store::{ObjectInfo, Store};

mod list;
mod newest;
mod replica;
mod versions;

pub use list::rebuild_list;
pub use newest::{Done, Newest, WayBack, to_newest_whole};
pub use replica::{Request, repair};
pub use versions::from_versions;

/// Bytes of an object that are read with one request.
const READ_BYTES: u64 = 4 << 20;
/// Requests under way at once.
const READS_AT_ONCE: usize = 8;

/// How far a repair goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct How {
    /// Damage is looked for in the data, too, all of which is read.
    pub is_data: bool,
    /// What can be mended is. Otherwise it is only said what could be.
    pub is_written: bool,
}

/// What becomes of an object that something is wrong with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It could be put back.
    Possible,
    /// It was put back.
    Mended,
    /// It stays as it is, for this reason.
    Left(String),
}

/// Something that was wrong, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Found {
    /// What was wrong.
    pub problem: Problem,
    /// What became of it.
    pub outcome: Outcome,
}

/// What a repair found and did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// The volume.
    pub url: String,
    /// Where objects were taken from.
    pub from: String,
    /// What was wrong before.
    pub found: Vec<Found>,
    /// What a look after the repair found. Nothing when no object was put back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left: Option<Vec<Problem>>,
}

impl Repaired {
    /// Whether nothing is wrong any more.
    pub fn is_whole(&self) -> bool {
        self.left.as_ref().map_or(self.found.is_empty(), Vec::is_empty)
    }
}

/// A look at a volume, before a repair and after it.
struct Look<'a> {
    url: &'a VolumeUrl,
    store_options: &'a StoreOptions,
    is_data: bool,
    control: &'a Control,
}

/// A way to mend what is wrong.
#[async_trait]
trait Mend: Sync {
    /// Mends what a check has found, or says what could be, or why it stays.
    async fn mend(&self, problem: &Problem) -> Result<Outcome, VolumeError>;
}

impl Look<'_> {
    /// What is wrong.
    async fn problems(&self) -> Result<Vec<Problem>, VolumeError> {
        let request = check::Request {
            is_data: self.is_data,
            ..check::Request::default()
        };
        let report = check(self.url, self.store_options, &request, self.control).await?;
        Ok(report.problems)
    }

    /// Mends what can be, one problem after the other, and looks again where something was.
    async fn mend_all(
        &self,
        mut problems: Vec<Problem>,
        way: &dyn Mend,
        from: String,
    ) -> Result<Repaired, VolumeError> {
        // What lies beside the container is proved by what is in it, which so comes first.
        problems.sort_by_key(|problem| problem.object.contains(".meta/"));
        let mut found = Vec::new();
        for problem in problems {
            if self.control.is_stopped() {
                return Err(VolumeError::Closed);
            }
            let outcome = way.mend(&problem).await?;
            found.push(Found { problem, outcome });
        }
        let is_changed = found.iter().any(|one| one.outcome == Outcome::Mended);
        let left = match is_changed {
            true => Some(self.problems().await?),
            false => None,
        };
        Ok(Repaired {
            url: self.url.to_string(),
            from,
            found,
            left,
        })
    }
}

/// The number of the object of the volume's own container that a problem is with, or why it is none.
fn own_object(store: &Store, problem: &Problem) -> Result<u64, String> {
    let name = problem.object.strip_prefix(&store.data_key(""));
    let Some(object) = name.and_then(of_name) else {
        return Err("it is no object of the volume's own container".to_owned());
    };
    match store.lineage().inherits(cno_of(object)) {
        false => Ok(object),
        true => Err(format!(
            "it lies in {}, of which this clone shares it: repair that volume",
            store.holder_of(cno_of(object)).url
        )),
    }
}

/// What is left of an object.
enum LeftOf {
    Nothing,
    Object(ObjectInfo),
    /// A file whose end, which says what it is, is damaged.
    Unreadable,
}

impl LeftOf {
    /// What a copy that is put back may replace.
    fn over(&self) -> Over {
        match self {
            Self::Object(_) | Self::Unreadable => Over::Anything,
            Self::Nothing => Over::Nothing,
        }
    }
}

async fn left_of(store: &Store, key: &str) -> Result<LeftOf, StoreError> {
    match store.head(key).await {
        Ok(Some(there)) => Ok(LeftOf::Object(there)),
        Ok(None) => Ok(LeftOf::Nothing),
        Err(e) if e.kind == StoreErrorKind::Corrupt => Ok(LeftOf::Unreadable),
        Err(e) => Err(e),
    }
}

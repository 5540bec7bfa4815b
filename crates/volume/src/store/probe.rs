//! Tests whether a store keeps the promises on which a volume relies.
//!
//! If a store accepts a conditional write and ignores the condition, two servers of one volume diverge, and neither
//! notices. So before the first write through an endpoint, each promise is tested with objects of a few bytes below
//! `<root>.meta/probe-…/`, which are removed again. A passed probe is recorded in `<root>.meta/probe`.

use std::collections::BTreeSet;

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use futures::future::join_all;
use log::{info, warn};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::probe_objects::{self, ATTEMPTS_MAX};
use super::{ETag, ObjectEntry, Store, permission};
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::url::VolumeUrl;

/// Raised when a check is added, so that stores are probed again.
const VERSION: u32 = 1;
/// Where a passed probe is recorded, below the volume's `.meta/`.
const NAME: &str = "probe";
/// Number of writers that race for one object.
const RACERS: usize = 8;

/// The test of one promise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The promise.
    pub name: &'static str,
    /// What was seen instead, if the promise was broken.
    pub failure: Option<String>,
}

/// The record of a probe that found nothing wrong.
#[derive(Debug, Serialize, Deserialize)]
struct Passed {
    version: u32,
    /// The address at which the store was reached.
    endpoint: String,
    probed_ms: u64,
    /// Other addresses that passed earlier, the newest first. Servers of one volume may reach the store at different
    /// addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    others: Vec<String>,
}

/// The most addresses that are recorded besides the newest.
const OTHERS_MAX: usize = 7;

impl Passed {
    /// The record after a probe that passed now at `endpoint`, given the earlier record.
    fn after(before: Option<Self>, endpoint: &str) -> Self {
        let before = before.filter(|passed| passed.version == VERSION);
        let others = before.map_or_else(Vec::new, |passed| {
            let mut others = vec![passed.endpoint];
            others.extend(passed.others);
            others.retain(|other| other != endpoint);
            others.truncate(OTHERS_MAX);
            others
        });
        Self {
            version: VERSION,
            endpoint: endpoint.to_owned(),
            probed_ms: now_ms(),
            others,
        }
    }

    fn is_of(&self, endpoint: &str) -> bool {
        self.version == VERSION && (self.endpoint == endpoint || self.others.iter().any(|o| o == endpoint))
    }
}

/// Unsafe stores that are used nevertheless. The process warns of each once.
static WARNED_OF: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Why a check did not pass.
enum Failure {
    /// The promise is broken.
    Broken(String),
    /// The store was not reached, or refused the credentials or the form of a request. That says nothing of its
    /// promises.
    Store(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error.kind {
            StoreErrorKind::Unreachable
            | StoreErrorKind::AccessDenied
            | StoreErrorKind::Unauthenticated
            | StoreErrorKind::Refused => Self::Store(error),
            _ => Self::Broken(error.detail),
        }
    }
}

type Outcome = Result<(), Failure>;

fn broken(what: impl Into<String>) -> Outcome {
    Err(Failure::Broken(what.into()))
}

fn hold(is_held: bool, otherwise: impl FnOnce() -> String) -> Outcome {
    if is_held { Ok(()) } else { broken(otherwise()) }
}

/// Checks that the store is safe for a volume. The store of a directory is part of this program. Its file system is
/// tested each time, which costs no request.
///
/// # Errors
/// [`VolumeError::UnsafeStore`] with what is broken, unless `allow_unsafe`, which only warns; [`VolumeError::Store`]
/// for a file system that cannot hold a volume.
pub async fn ensure(store: &Store, allow_unsafe: bool) -> Result<(), VolumeError> {
    if matches!(store.url, VolumeUrl::File { .. }) {
        return Ok(store.try_directory().await?);
    }
    if allow_unsafe && WARNED_OF.lock().contains(store.endpoint()) {
        return Ok(());
    }
    if has_passed(store).await? {
        return Ok(());
    }
    let checks = run(store).await.map_err(permission::advised)?;
    let failures: Vec<String> = checks
        .iter()
        .filter_map(|check| Some(format!("{} ({})", check.name, check.failure.as_ref()?)))
        .collect();
    if failures.is_empty() {
        info!("{} keeps what a volume needs of it", store.endpoint());
        let passed = Passed::after(remembered(store).await?, store.endpoint());
        let body = serde_json::to_vec(&passed).map_err(|e| VolumeError::Internal(e.to_string()))?;
        store.put(&store.meta_key(NAME), body).await?;
        return Ok(());
    }
    let unsafe_store = VolumeError::UnsafeStore {
        endpoint: store.endpoint().to_owned(),
        failures: failures.join("; "),
    };
    if !allow_unsafe {
        return Err(unsafe_store);
    }
    WARNED_OF.lock().insert(store.endpoint().to_owned());
    warn!("USED ALL THE SAME, because of allow_unsafe_store=yes: {unsafe_store}");
    Ok(())
}

/// Whether this is one of the probes' own objects, or the record of a passed probe. Such objects do not belong to a
/// volume.
pub(crate) fn is_own(store: &Store, object: &ObjectEntry) -> bool {
    object.key == store.meta_key(NAME) || probe_objects::is_of_probe(store, object)
}

/// Whether the store is known to be safe. Nothing is recorded for a directory.
///
/// # Errors
/// When the store fails.
pub(crate) async fn has_passed(store: &Store) -> Result<bool, VolumeError> {
    if matches!(store.url, VolumeUrl::File { .. }) {
        return Ok(false);
    }
    let passed = remembered(store).await?;
    Ok(passed.is_some_and(|passed| passed.is_of(store.endpoint())))
}

/// The record of a passed probe. A record that cannot be read counts as none.
async fn remembered(store: &Store) -> Result<Option<Passed>, StoreError> {
    let known = store.get(&store.meta_key(NAME)).await?;
    Ok(known.and_then(|(body, _)| serde_json::from_slice(&body).ok()))
}

/// Tests every promise.
///
/// # Errors
/// When the store is not reached, or refuses the credentials.
pub async fn run(store: &Store) -> Result<Vec<Check>, StoreError> {
    let probe = Probe {
        store,
        prefix: probe_objects::new_prefix(store),
    };
    let checks = probe.all().await;
    // Nothing is left behind, whatever the result.
    if let Err(e) = store.delete_prefix(&probe.prefix).await {
        warn!("objects of the probe are left below {}: {e}", probe.prefix);
    } else if let Err(e) = probe_objects::sweep(store).await {
        warn!("objects of earlier probes are left: {e}");
    }
    checks
}

struct Probe<'a> {
    store: &'a Store,
    prefix: String,
}

/// Runs a check again while the store is not reached, under another key each time.
macro_rules! check {
    ($checks:ident, $name:literal, $probe:ident.$check:ident) => {{
        let mut attempt = 1;
        let failure = loop {
            let key = format!("{}{}-{attempt}", $probe.prefix, stringify!($check));
            match $probe.$check(key).await {
                Ok(()) => break None,
                Err(Failure::Broken(what)) => break Some(what),
                Err(Failure::Store(e)) if e.kind == StoreErrorKind::Unreachable && attempt < ATTEMPTS_MAX => {
                    attempt += 1
                }
                Err(Failure::Store(e)) => return Err(e),
            }
        };
        $checks.push(Check { name: $name, failure });
    }};
}

impl Probe<'_> {
    async fn all(&self) -> Result<Vec<Check>, StoreError> {
        let mut checks = Vec::new();
        check!(checks, "an absent object is answered 404", self.absent);
        check!(
            checks,
            "what was written is read back, and listed, at once",
            self.read_back
        );
        check!(checks, "user metadata comes back with HEAD", self.metadata);
        check!(checks, "range reads answer exactly", self.ranges);
        check!(checks, "ETags name the write", self.etags);
        check!(checks, "If-None-Match: * on PUT", self.create_only);
        check!(checks, "If-Match on PUT", self.replace_matching);
        check!(
            checks,
            "If-None-Match: * on CompleteMultipartUpload",
            self.create_only_multipart
        );
        check!(checks, "of racing creations one wins", self.racing_creations);
        check!(
            checks,
            "of racing replacements one wins",
            self.racing_replacements
        );
        Ok(checks)
    }

    async fn absent(&self, key: String) -> Outcome {
        let head = self.store.head(&key).await?;
        hold(head.is_none(), || {
            "HEAD finds an object that was never written".into()
        })?;
        let got = self.store.get(&key).await?;
        hold(got.is_none(), || {
            "GET finds an object that was never written".into()
        })
    }

    async fn read_back(&self, key: String) -> Outcome {
        for body in ["first", "second, which is longer"] {
            self.store.put(&key, body).await?;
            self.holds(&key, body).await?;
        }
        let listed = self.store.list(&key).await?;
        hold(listed.len() == 1, || {
            format!("a listing has {} of 1 objects", listed.len())
        })?;
        self.store.delete(&key).await?;
        let got = self.store.get(&key).await?;
        hold(got.is_none(), || "a deleted object is still there".into())
    }

    async fn holds(&self, key: &str, body: &str) -> Outcome {
        let got = self.store.get(key).await?;
        hold(got.is_some_and(|(bytes, _)| bytes == body.as_bytes()), || {
            "an object is not what was written last".into()
        })
    }

    async fn metadata(&self, key: String) -> Outcome {
        let etag = self.store.put(&key, "x").await?;
        let metadata = [("hypernbd-probe".to_owned(), "Value-1".to_owned())].into();
        self.store.put_if_match_with(&key, "y", &etag, metadata).await?;
        let head = self.store.head(&key).await?;
        let value = head.and_then(|info| info.metadata.get("hypernbd-probe").cloned());
        hold(value.as_deref() == Some("Value-1"), || match value {
            Some(other) => format!("it comes back as {other:?}"),
            None => "it is gone".into(),
        })
    }

    async fn ranges(&self, key: String) -> Outcome {
        let body: Vec<u8> = (0..=255).collect();
        self.store.put(&key, body.clone()).await?;
        for (range, expected) in [
            ("bytes=0-0", &body[..1]),
            ("bytes=100-199", &body[100..200]),
            ("bytes=255-255", &body[255..]),
            ("bytes=200-9999", &body[200..]),
            ("bytes=250-", &body[250..]),
            ("bytes=-10", &body[246..]),
            ("bytes=-9999", &body[..]),
        ] {
            let got = self.store.get_as(&key, range).await?;
            let len = got.as_ref().map_or(0, |bytes| bytes.len());
            hold(got.is_some_and(|bytes| bytes == expected), || {
                format!("{range} of 256 bytes answers {len} bytes, or others")
            })?;
        }
        Ok(())
    }

    async fn etags(&self, key: String) -> Outcome {
        let mut before = None;
        for body in ["one", "two"] {
            let put = self.store.put(&key, body).await?;
            let head = self.store.head(&key).await?.map(|info| info.etag);
            let get = self.store.get(&key).await?.map(|(_, etag)| etag);
            hold(head.as_ref() == Some(&put) && get.as_ref() == Some(&put), || {
                "PUT, HEAD and GET tell different ones".into()
            })?;
            hold(before.as_ref() != Some(&put), || {
                "another write has the same one".into()
            })?;
            before = Some(put);
        }
        Ok(())
    }

    async fn create_only(&self, key: String) -> Outcome {
        self.store.put_create_only(&key, "first").await?;
        refused(
            self.store.put_create_only(&key, "second").await,
            "a second creation is carried out",
        )?;
        self.holds(&key, "first").await
    }

    async fn replace_matching(&self, key: String) -> Outcome {
        let first = self.store.put(&key, "first").await?;
        self.store.put_if_match(&key, "second", &first).await?;
        refused(
            self.store.put_if_match(&key, "third", &first).await,
            "a replacement of a write that is not there any more is carried out",
        )?;
        self.holds(&key, "second").await?;
        self.store.delete(&key).await?;
        refused(
            self.store.put_if_match(&key, "fourth", &first).await,
            "a replacement of a deleted object is carried out",
        )
    }

    async fn create_only_multipart(&self, key: String) -> Outcome {
        self.upload(&key, "first").await?;
        self.holds(&key, "first").await?;
        refused(
            self.upload(&key, "second").await,
            "a second creation is carried out",
        )?;
        self.holds(&key, "first").await
    }

    /// Creates an object by an upload in one part.
    async fn upload(&self, key: &str, body: &'static str) -> Result<(), StoreError> {
        let (client, bucket) = (&self.store.client, &self.store.bucket);
        let started = client
            .create_multipart_upload()
            .bucket(bucket)
            .key(key)
            .send()
            .await;
        let started = started.map_err(|e| self.store.error("start an upload of", key, e))?;
        let id = started.upload_id().unwrap_or_default();
        let part = client
            .upload_part()
            .bucket(bucket)
            .key(key)
            .upload_id(id)
            .part_number(1)
            .body(ByteStream::from_static(body.as_bytes()))
            .send()
            .await
            .map_err(|e| self.store.error("upload a part of", key, e))?;
        let part = CompletedPart::builder()
            .part_number(1)
            .set_e_tag(part.e_tag)
            .build();
        let completed = client
            .complete_multipart_upload()
            .bucket(bucket)
            .key(key)
            .upload_id(id)
            .if_none_match("*")
            .multipart_upload(CompletedMultipartUpload::builder().parts(part).build())
            .send()
            .await;
        if completed.is_err() {
            // Otherwise its part would stay stored, unseen.
            let abort = client
                .abort_multipart_upload()
                .bucket(bucket)
                .key(key)
                .upload_id(id);
            if let Err(e) = abort.send().await {
                log::debug!("an upload of the probe is left behind: {e}");
            }
        }
        completed
            .map(drop)
            .map_err(|e| self.store.error("complete an upload of", key, e))
    }

    async fn racing_creations(&self, key: String) -> Outcome {
        let racers = (0..RACERS).map(|n| self.store.put_create_only(&key, n.to_string()));
        one_wins(join_all(racers).await)
    }

    async fn racing_replacements(&self, key: String) -> Outcome {
        let etag = self.store.put(&key, "start").await?;
        let racers = (0..RACERS).map(|n| self.store.put_if_match(&key, n.to_string(), &etag));
        one_wins(join_all(racers).await)
    }
}

fn refused<T>(result: Result<T, StoreError>, otherwise: &str) -> Outcome {
    match result {
        Ok(_) => broken(otherwise),
        Err(e)
            if matches!(
                e.kind,
                StoreErrorKind::PreconditionFailed | StoreErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

fn one_wins(results: Vec<Result<ETag, StoreError>>) -> Outcome {
    let mut winners = 0;
    for result in results {
        match result {
            Ok(_) => winners += 1,
            Err(e) if e.kind == StoreErrorKind::PreconditionFailed => {}
            Err(e) => return Err(e.into()),
        }
    }
    hold(winners == 1, || {
        format!("{winners} of {RACERS} are told that they have won")
    })
}

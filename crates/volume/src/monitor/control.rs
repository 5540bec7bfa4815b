//! What a server can be told to do, on a socket of its own: `POST /v1/VERB` with JSON, answered with JSON.
//!
//! Everything that can be asked elsewhere can be asked here, too. Who may connect is decided before anything is read: the
//! socket's file and the kernel's word on the peer (`SO_PEERCRED`) both say that it is this user, or root.

use std::collections::BTreeMap;
use std::sync::Arc;

use hyper::StatusCode;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::runtime::Handle;

use super::status::Status;
use super::{Monitor, Now, State};
use crate::base::control::Control;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::volume_name::VolumeName;
use crate::options::parse_checkpoint_interval;
use crate::past::{self, SnapshotName};
use crate::volume::Volume;

/// Paths of the verbs begin so. Another number is another meaning.
pub(super) const VERSION: &str = "/v1/";

/// Names the volume that a verb is about, by its id, where who asks knows it.
pub(super) const VOLUME_HEADER: &str = "hypernbd-volume";

/// What a server is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verb {
    /// Everything replied to becomes durable.
    Flush,
    /// The state of now gets a name.
    Snapshot(SnapshotName),
    /// The server ends.
    Shutdown {
        /// Once the last client has gone.
        when_idle: bool,
    },
    /// The volume grows.
    Resize {
        /// To this size.
        size_bytes: u64,
    },
    /// What is live is copied out of objects that are mostly dead.
    Compact,
    /// A clone gets copies of all that it shares.
    Flatten,
    /// What the retention does not keep is removed.
    Retention {
        /// Only where the server does that by itself, too.
        only_if_automatic: bool,
    },
    /// What may change while it runs.
    Set(Settings),
}

/// What may change while a server runs; the rest stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// What is logged, as in `RUST_LOG`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
    /// The parameter of that name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_interval: Option<String>,
}

/// Arguments of `snapshot`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotArguments {
    /// The name.
    pub name: String,
}

/// Arguments of `resize`, and its answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeArguments {
    /// The size that the volume is to have.
    pub size_bytes: u64,
}

/// Arguments of `retention`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionArguments {
    /// Only where the server does that by itself, too: the rules are others, and it is to go by them at once.
    pub only_if_automatic: bool,
}

/// Checkpoints and objects that a retention has removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    /// Checkpoints.
    pub checkpoints: u64,
    /// Objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Answer of `retention`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetentionAnswer {
    /// Whether anything was looked for.
    pub is_done: bool,
    /// What went now.
    #[serde(flatten)]
    pub gone: Gone,
    /// Checkpoints and objects that nobody needs either, and that go later.
    pub waiting: u64,
    /// How long something must not have been needed before it goes, in milliseconds.
    pub grace_ms: u64,
    /// What went since the server began, by itself or not.
    pub gone_since_start: Gone,
}

/// Arguments of `shutdown`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShutdownArguments {
    /// Once the last client has gone.
    pub when_idle: bool,
}

/// Arguments of verbs that take none.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct NoArguments {}

/// Why a server does not do what it is told.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub status: StatusCode,
    pub why: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, why: impl Into<String>) -> Self {
        Self {
            status,
            why: why.into(),
        }
    }
}

impl From<VolumeError> for Refusal {
    fn from(error: VolumeError) -> Self {
        let status = match error.kind() {
            ErrorKind::InvalidInput => StatusCode::BAD_REQUEST,
            ErrorKind::Fenced | ErrorKind::ReadOnly | ErrorKind::Closed => StatusCode::CONFLICT,
            _ => StatusCode::BAD_GATEWAY,
        };
        Self::new(status, error.chain())
    }
}

/// What `body` says, or the arguments that are usual when it is empty.
fn arguments<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|e| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("the body is not what is expected: {e}"),
        )
    })
}

/// Reads what a server is told. Pure.
pub(super) fn verb(path: &str, body: &[u8]) -> Result<Verb, Refusal> {
    match path.strip_prefix(VERSION) {
        Some("flush") => arguments::<NoArguments>(body).map(|_| Verb::Flush),
        Some("snapshot") => {
            let SnapshotArguments { name } = arguments(body)?;
            let name: SnapshotName = name
                .parse()
                .map_err(|why: String| Refusal::new(StatusCode::BAD_REQUEST, why))?;
            Ok(Verb::Snapshot(name))
        }
        Some("shutdown") => {
            let ShutdownArguments { when_idle } = arguments(body)?;
            Ok(Verb::Shutdown { when_idle })
        }
        Some("set") => {
            let settings: Settings = arguments(body)?;
            if settings == Settings::default() {
                let why = "nothing is to be set: give log or checkpoint_interval";
                return Err(Refusal::new(StatusCode::BAD_REQUEST, why));
            }
            Ok(Verb::Set(settings))
        }
        Some("resize") => {
            let ResizeArguments { size_bytes } = arguments(body)?;
            Ok(Verb::Resize { size_bytes })
        }
        Some("compact") => arguments::<NoArguments>(body).map(|_| Verb::Compact),
        Some("flatten") => arguments::<NoArguments>(body).map(|_| Verb::Flatten),
        Some("retention") => {
            let RetentionArguments { only_if_automatic } = arguments(body)?;
            Ok(Verb::Retention { only_if_automatic })
        }
        _ => Err(Refusal::new(
            StatusCode::NOT_FOUND,
            "there are /v1/status, /v1/report, /v1/flush, /v1/snapshot, /v1/resize, /v1/compact, /v1/flatten, /v1/retention, /v1/shutdown and /v1/set",
        )),
    }
}

/// The volume, of which something can be done only while it is open.
fn opened<'a>(now: &'a Now, done: &str) -> Result<&'a Volume, Refusal> {
    now.volume.as_deref().ok_or_else(|| {
        Refusal::new(
            StatusCode::CONFLICT,
            format!("the volume is {done} while it is open: connect a client first, or stop the server"),
        )
    })
}

fn to_json(answer: impl Serialize) -> Result<Value, Refusal> {
    serde_json::to_value(answer).map_err(|e| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
}

/// What helps somebody who was not there: what is known now, the parameters, the last lines of the log.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    status: Status,
    parameters: BTreeMap<String, String>,
    log: Vec<Value>,
}

/// The value of a parameter without what may be a secret in it: a name and a password in a URL.
fn without_secret(value: &str) -> String {
    let Some((scheme, rest)) = value.split_once("://") else {
        return value.to_owned();
    };
    let host_end = rest.find('/').unwrap_or(rest.len());
    match rest[..host_end].rfind('@') {
        Some(at) => format!("{scheme}://…{}", &rest[at..]),
        None => value.to_owned(),
    }
}

/// Refuses what is about another volume than the one that is open: who asks has found the socket by a lease that may be of the past.
pub(super) fn check_volume(asked: Option<&str>, open: Option<&str>) -> Result<(), Refusal> {
    match (asked, open) {
        (Some(asked), Some(open)) if asked != open => {
            let why = format!("this server has volume {open} open, and not {asked}: give the command again");
            Err(Refusal::new(StatusCode::CONFLICT, why))
        }
        _ => Ok(()),
    }
}

impl Monitor {
    /// As [`check_volume`], by what is open now.
    pub(super) fn check_volume(
        &self,
        volume: Option<&VolumeName>,
        asked: Option<&str>,
    ) -> Result<(), Refusal> {
        let now = self.now_of(volume);
        check_volume(asked, now.volume.as_ref().and_then(|volume| volume.identity()))
    }

    /// A report for somebody who was not there. Holds no credential.
    pub(super) fn report(&self) -> Report {
        let parameters = self.given.iter();
        let parameters = parameters.map(|(key, value)| (key.clone(), without_secret(value)));
        let lines = self.served.last_lines().into_iter();
        Report {
            status: self.status(),
            parameters: parameters.collect(),
            log: lines
                .map(|line| serde_json::from_str(&line).unwrap_or(Value::String(line)))
                .collect(),
        }
    }

    /// Ends the server: now, or once the last client has gone.
    pub(super) fn end(&self, when_idle: bool) {
        let when = if when_idle {
            " once the last client has gone"
        } else {
            ""
        };
        log::info!("told to end{when}");
        self.served.shut_down(when_idle);
    }

    /// Does what it is told; may take as long as a flush, or as a compaction or the copies of a clone, which `control` ends early. To be called where blocking harms
    /// nobody.
    pub(super) fn carry_out(
        &self,
        verb: &Verb,
        volume: Option<&VolumeName>,
        runtime: &Handle,
        control: &Arc<Control>,
    ) -> Result<Value, Refusal> {
        // Before that look, so that what it finds open stays so.
        let _kept = self.served.keep_open(volume);
        let now = self.now_of(volume);
        // The last checkpoint is being made, and whether it succeeds is not known.
        if now.state == State::Ending && !matches!(verb, Verb::Shutdown { .. } | Verb::Set(_)) {
            return Err(Refusal::new(
                StatusCode::CONFLICT,
                "the server is ending: wait until it has, and look at how it ended".to_owned(),
            ));
        }
        match verb {
            Verb::Flush => {
                if let Some(volume) = &now.volume {
                    volume.flush()?;
                }
                Ok(serde_json::json!({ "is_durable": true }))
            }
            Verb::Snapshot(name) => {
                // Between this and the name more may be published: the name is on a state of now, or a moment later.
                if let Some(opened) = &now.volume {
                    opened.publish()?;
                }
                let (above, store) = &self.place;
                let url = &volume.map_or_else(|| Ok(above.clone()), |name| above.below(name));
                let url = (url.as_ref()).map_err(|e| Refusal::new(StatusCode::BAD_REQUEST, e.to_string()))?;
                to_json(runtime.block_on(past::create(url, store, name, None))?)
            }
            Verb::Resize { size_bytes } => {
                let volume = opened(&now, "resized")?;
                volume.grow(*size_bytes)?;
                Ok(serde_json::json!({ "size_bytes": volume.size_bytes() }))
            }
            Verb::Compact => to_json(opened(&now, "compacted")?.compact(control)?),
            Verb::Flatten => to_json(opened(&now, "flattened")?.flatten(control)?),
            Verb::Retention { only_if_automatic } => {
                let volume = opened(&now, "pruned")?;
                let removed = volume.prune(*only_if_automatic)?;
                let (is_done, removed) = (removed.is_some(), removed.unwrap_or_default());
                let space = &self.metrics.space;
                to_json(RetentionAnswer {
                    is_done,
                    gone: Gone {
                        checkpoints: removed.checkpoints,
                        objects: removed.objects,
                        bytes: removed.bytes,
                    },
                    waiting: removed.waiting,
                    grace_ms: u64::try_from(volume.retention_grace().as_millis()).unwrap_or(u64::MAX),
                    gone_since_start: Gone {
                        checkpoints: space.removed_checkpoints.get(),
                        objects: space.removed_objects.get(),
                        bytes: space.removed_bytes.get(),
                    },
                })
            }
            // It ends once that is answered ([`Self::end`]).
            Verb::Shutdown { .. } => Ok(serde_json::json!({ "connections": now.connections })),
            Verb::Set(settings) => {
                let bad = |why: String| Refusal::new(StatusCode::BAD_REQUEST, why);
                let interval = settings.checkpoint_interval.as_deref();
                let interval = interval.map(parse_checkpoint_interval).transpose();
                let interval = interval.map_err(|why| bad(format!("checkpoint_interval: {why}")))?;
                if interval.is_some() && now.volume.is_none() {
                    let why = "checkpoint_interval is set while the volume is open: connect a client first";
                    return Err(Refusal::new(StatusCode::CONFLICT, why));
                }
                // All or nothing: what can fail is done first.
                if let Some(filter) = &settings.log {
                    self.served
                        .set_log(filter)
                        .map_err(|why| bad(format!("log: {why}")))?;
                }
                if let (Some(interval), Some(volume)) = (interval, &now.volume) {
                    volume.set_checkpoint_interval(interval);
                }
                log::info!(
                    "told to set {}",
                    serde_json::to_string(settings).unwrap_or_default()
                );
                to_json(settings)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_are_read() {
        assert_eq!(verb("/v1/flush", b"").unwrap(), Verb::Flush);
        assert_eq!(verb("/v1/flush", b"{}").unwrap(), Verb::Flush);
        let name = "before".parse().unwrap();
        assert_eq!(
            verb("/v1/snapshot", br#"{"name": "before"}"#).unwrap(),
            Verb::Snapshot(name)
        );
        for (body, when_idle) in [("", false), (r#"{"when_idle": true}"#, true)] {
            assert_eq!(
                verb("/v1/shutdown", body.as_bytes()).unwrap(),
                Verb::Shutdown { when_idle }
            );
        }
        assert_eq!(verb("/v1/compact", b"{}").unwrap(), Verb::Compact);
        assert_eq!(verb("/v1/flatten", b"").unwrap(), Verb::Flatten);
        for (body, only_if_automatic) in [("", false), (r#"{"only_if_automatic": true}"#, true)] {
            assert_eq!(
                verb("/v1/retention", body.as_bytes()).unwrap(),
                Verb::Retention { only_if_automatic }
            );
        }
        let settings = Settings {
            log: Some("debug".into()),
            ..Settings::default()
        };
        assert_eq!(
            verb("/v1/set", br#"{"log": "debug"}"#).unwrap(),
            Verb::Set(settings)
        );
    }

    #[test]
    fn what_is_about_another_volume_is_refused() {
        let refused = check_volume(Some("a"), Some("b")).unwrap_err();
        assert_eq!(refused.status, StatusCode::CONFLICT);
        for (asked, open) in [(Some("a"), Some("a")), (None, Some("b")), (Some("a"), None)] {
            assert_eq!(check_volume(asked, open), Ok(()));
        }
    }

    #[test]
    fn a_password_in_a_url_is_left_out() {
        for (value, shown) in [
            ("http://user:secret@host:9000/x", "http://…@host:9000/x"),
            ("http://host:9000", "http://host:9000"),
            ("s3://bucket/a@b/", "s3://bucket/a@b/"),
            ("5s", "5s"),
        ] {
            assert_eq!(without_secret(value), shown);
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (path, body, status) in [
            ("/v1/flush", "{\"x\": 1}", StatusCode::BAD_REQUEST),
            ("/v1/flush", "[", StatusCode::BAD_REQUEST),
            ("/v1/snapshot", "", StatusCode::BAD_REQUEST),
            ("/v1/snapshot", "{\"name\": \"../x\"}", StatusCode::BAD_REQUEST),
            ("/v1/snapshot", "{\"name\": 7}", StatusCode::BAD_REQUEST),
            (
                "/v1/shutdown",
                "{\"when_idle\": \"yes\"}",
                StatusCode::BAD_REQUEST,
            ),
            ("/v1/set", "", StatusCode::BAD_REQUEST),
            ("/v1/set", "{\"io_timeout\": \"1s\"}", StatusCode::BAD_REQUEST),
            ("/v1/resize", "{}", StatusCode::BAD_REQUEST),
            ("/v1/resize", "{\"size_bytes\": -1}", StatusCode::BAD_REQUEST),
            ("/v1/compact", "{\"rate\": 1}", StatusCode::BAD_REQUEST),
            ("/v1/flatten", "{\"rate\": 1}", StatusCode::BAD_REQUEST),
            ("/v1/retention", "{\"keep_last\": 1}", StatusCode::BAD_REQUEST),
            (
                "/v1/retention",
                "{\"only_if_automatic\": 1}",
                StatusCode::BAD_REQUEST,
            ),
            ("/v1/", "{}", StatusCode::NOT_FOUND),
            ("/v2/flush", "{}", StatusCode::NOT_FOUND),
            ("/flush", "{}", StatusCode::NOT_FOUND),
        ] {
            assert_eq!(
                verb(path, body.as_bytes()).unwrap_err().status,
                status,
                "{path} {body}"
            );
        }
    }
}

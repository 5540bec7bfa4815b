//! A guard around the inode: which requests the engine may make for it, and when.
//!
//! Whoever puts the inode decides what the volume is. Some paths of the engine read the inode again, build on whatever
//! they find and put it again; `docs/architecture.md` lists them. None of them checks the lease. So every request of
//! the engine that names the inode passes this guard first, and a request that this project did not decide on is not
//! sent. Only an open or a recovery reads the inode. A put may replace only the inode that this owner opened, published
//! last, or proved to be its own. [`Rules`] holds the decision; the rest carries it out.

use std::sync::Arc;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextRef,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use log::warn;
use parking_lot::Mutex;

use crate::store::ETag;

/// The header of the user metadata by which the engine recognises its own writes (the write mark).
const MARK_HEADER: &str = "x-amz-meta-hf-write";

/// A request that the guard does not send, or an answer that it does not pass on.
#[derive(Debug, thiserror::Error)]
#[error(
    "this server's own fence refuses to {what} the inode {object}: {why}; nothing was changed, and what is unpublished is \
     published again; where this repeats, another program writes to the volume: stop that one"
)]
struct Refusal {
    what: &'static str,
    /// The path in the object's URL.
    object: String,
    why: &'static str,
}

/// What a request of the engine does with the inode.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ask {
    /// Reads its content.
    Read,
    /// Reads its metadata without its content, to find out whose write it is.
    Look,
    /// Replaces it.
    Put {
        /// The ETag of the write that must be the stored one.
        over: Option<String>,
        /// The write mark of this write.
        mark: Option<String>,
    },
    /// Anything else.
    Other,
}

/// A request that was sent.
#[derive(Debug)]
struct Sent {
    ask: Ask,
    uri: String,
}

impl Storable for Sent {
    type Storer = StoreReplace<Self>;
}

impl Ask {
    /// What a request does with the inode; `None` when it does not name the inode. All objects of the container lie
    /// below one prefix, and no other object there has this name.
    fn of_request(method: &str, uri: &str, header: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        if !path.ends_with("/inode") {
            return None;
        }
        let is_whole = query
            .split('&')
            .all(|parameter| parameter.is_empty() || parameter.starts_with("x-id="));
        Some(match method {
            "GET" if is_whole => Self::Read,
            "HEAD" if is_whole => Self::Look,
            "PUT" if is_whole && header("x-amz-copy-source").is_none() => Self::Put {
                over: header("if-match").map(|etag| bare(&etag)),
                mark: header(MARK_HEADER),
            },
            _ => Self::Other,
        })
    }

    fn verb(&self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Look => "look at",
            Self::Put { .. } => "write",
            Self::Other => "change",
        }
    }
}

/// The store's answer.
#[derive(Debug, Clone, Copy)]
struct Answer<'a> {
    status: u16,
    etag: Option<&'a str>,
    mark: Option<&'a str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The container is being opened. Whoever opens it checks the lease afterwards, before anything else.
    Opening,
    /// The container is open.
    Closed,
    /// The container is returning to the stored state, which was proved to be this owner's own.
    Recovering,
}

/// Which requests for the inode are sent. ETags are without quotes.
#[derive(Debug)]
struct Rules {
    phase: Phase,
    /// The ETag of the inode on which this owner builds.
    base: Option<String>,
    /// The write mark of the last write.
    mark: Option<String>,
    /// The last write was refused. The refusal may answer a retransmission of a write that was carried out.
    is_refused: bool,
}

impl Rules {
    fn opening() -> Self {
        Self {
            phase: Phase::Opening,
            base: None,
            mark: None,
            is_refused: false,
        }
    }

    fn recovering(&mut self, proved: &str) {
        self.phase = Phase::Recovering;
        self.base = Some(bare(proved));
        self.is_refused = false;
    }

    /// Checks whether this request may be sent.
    fn check(&self, ask: &Ask) -> Result<(), &'static str> {
        match ask {
            Ask::Read if self.phase == Phase::Closed => Err("only an open or a recovery reads it"),
            Ask::Look if !self.is_refused => Err("no write of this server's was refused"),
            Ask::Put { over, .. } if over.is_none() || *over != self.base => {
                Err("it is not the one that this server opened or published last that would be replaced")
            }
            Ask::Other => Err("it changes only whole, and only over the one before it"),
            Ask::Read | Ask::Look | Ask::Put { .. } => Ok(()),
        }
    }

    fn sent(&mut self, ask: &Ask) {
        if let Ask::Put { mark, .. } = ask {
            self.mark.clone_from(mark);
            self.is_refused = false;
        }
    }

    /// Checks whether this answer may be passed on.
    fn answered(&mut self, ask: &Ask, answer: Answer<'_>) -> Result<(), &'static str> {
        let is_success = (200..300).contains(&answer.status);
        let etag = answer.etag.map(bare);
        match ask {
            Ask::Read if is_success && self.phase == Phase::Opening => self.base = etag,
            Ask::Read if is_success && (etag.is_none() || etag != self.base) => {
                return Err("another one was stored since this server proved that it is its own");
            }
            Ask::Put { .. } if is_success => self.base = etag,
            Ask::Put { .. } => self.is_refused = matches!(answer.status, 409 | 412),
            // The write had been carried out, and its answer was lost.
            Ask::Look if is_success && answer.mark.is_some() && answer.mark == self.mark.as_deref() => {
                self.base = etag;
            }
            Ask::Read | Ask::Look | Ask::Other => {}
        }
        Ok(())
    }
}

fn bare(etag: &str) -> String {
    etag.trim_matches('"').to_owned()
}

/// The guard of one owner's inode. All clones share one state.
#[derive(Debug, Clone)]
pub(crate) struct InodeGuard(Arc<Mutex<Rules>>);

impl InodeGuard {
    /// A guard for a container that is about to be opened.
    pub(crate) fn opening() -> Self {
        Self(Arc::new(Mutex::new(Rules::opening())))
    }

    /// Notes that the container is open, or has returned to the stored state.
    pub(crate) fn close(&self) {
        self.0.lock().phase = Phase::Closed;
    }

    /// Notes that the container returns to the stored state. `proved` is the write that is stored; it was proved to be
    /// the owner's.
    pub(super) fn recover(&self, proved: &ETag) {
        self.0.lock().recovering(&proved.0);
    }

    /// A client for the engine: a copy of `client` whose requests pass this guard.
    pub(super) fn guarded(&self, client: &Client) -> Client {
        let config = client.config().to_builder();
        Client::from_conf(config.interceptor(self.clone()).build())
    }

    fn refused(ask: &Ask, uri: &str, why: &'static str) -> BoxError {
        let path = uri.split_once('?').map_or(uri, |(path, _)| path);
        let refusal = Refusal {
            what: ask.verb(),
            object: path.to_owned(),
            why,
        };
        warn!("{refusal}");
        refusal.into()
    }
}

impl Intercept for InodeGuard {
    fn name(&self) -> &'static str {
        "InodeGuard"
    }

    /// Called once for each request, before its first transmission. A retransmission is the same request with the same
    /// condition.
    fn read_after_serialization(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        let header = |name: &str| request.headers().get(name).map(str::to_owned);
        let Some(ask) = Ask::of_request(request.method(), request.uri(), header) else {
            return Ok(());
        };
        let mut rules = self.0.lock();
        rules
            .check(&ask)
            .map_err(|why| Self::refused(&ask, request.uri(), why))?;
        rules.sent(&ask);
        let uri = request.uri().to_owned();
        bag.interceptor_state().store_put(Sent { ask, uri });
        Ok(())
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Some(Sent { ask, uri }) = bag.load::<Sent>() else {
            return Ok(());
        };
        let headers = context.response().headers();
        let answer = Answer {
            status: context.response().status().as_u16(),
            etag: headers.get("etag"),
            mark: headers.get(MARK_HEADER),
        };
        let answered = self.0.lock().answered(ask, answer);
        answered.map_err(|why| Self::refused(ask, uri, why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(over: &str, mark: &str) -> Ask {
        Ask::Put {
            over: Some(over.into()),
            mark: Some(mark.into()),
        }
    }

    fn answer(status: u16, etag: &'static str) -> Answer<'static> {
        Answer {
            status,
            etag: Some(etag),
            mark: None,
        }
    }

    fn marked(etag: &'static str, mark: &'static str) -> Answer<'static> {
        Answer {
            status: 200,
            etag: Some(etag),
            mark: Some(mark),
        }
    }

    /// Sends a request and takes its answer. Returns whether the engine gets the answer.
    fn goes(rules: &mut Rules, ask: &Ask, answer: Answer<'_>) -> bool {
        if rules.check(ask).is_err() {
            return false;
        }
        rules.sent(ask);
        rules.answered(ask, answer).is_ok()
    }

    /// The rules after an open that read the write "a".
    fn open() -> Rules {
        let mut rules = Rules::opening();
        assert!(goes(&mut rules, &Ask::Read, answer(200, "\"a\"")));
        rules.phase = Phase::Closed;
        rules
    }

    #[test]
    fn an_open_puts_over_nothing_but_what_it_read() {
        let mut rules = Rules::opening();
        assert!(rules.check(&put("a", "1")).is_err(), "before anything was read");
        assert!(goes(&mut rules, &Ask::Read, answer(200, "\"a\"")));
        assert!(rules.check(&put("b", "1")).is_err());
        assert!(rules.check(&put("a", "1")).is_ok());
        assert!(goes(&mut rules, &Ask::Read, answer(200, "\"b\"")));
        assert!(rules.check(&put("a", "1")).is_err());
        assert!(goes(&mut rules, &put("b", "1"), answer(200, "\"c\"")));
        assert!(rules.check(&put("c", "2")).is_ok());
    }

    #[test]
    fn an_open_container_reads_no_inode_and_puts_over_its_own_alone() {
        let mut rules = open();
        assert!(rules.check(&Ask::Read).is_err());
        assert!(rules.check(&Ask::Other).is_err());
        let unconditional = Ask::Put {
            over: None,
            mark: None,
        };
        assert!(rules.check(&unconditional).is_err());
        assert!(goes(&mut rules, &put("a", "1"), answer(200, "\"b\"")));
        assert!(rules.check(&put("a", "2")).is_err(), "published upon since");
        assert!(goes(&mut rules, &put("b", "2"), answer(503, "\"x\"")));
        assert!(rules.check(&put("b", "3")).is_ok(), "a failure moves nothing");
    }

    #[test]
    fn an_inode_is_looked_at_after_a_refusal_and_believed_by_its_mark() {
        for status in [409, 412] {
            let mut rules = open();
            assert!(rules.check(&Ask::Look).is_err());
            assert!(goes(&mut rules, &put("a", "1"), answer(503, "\"x\"")));
            assert!(rules.check(&Ask::Look).is_err());
            assert!(goes(&mut rules, &put("a", "1"), answer(status, "\"x\"")));
            assert!(goes(&mut rules, &Ask::Look, marked("\"f\"", "foreign")));
            assert!(
                rules.check(&put("f", "2")).is_err(),
                "what another wrote is not taken"
            );
            assert!(goes(&mut rules, &Ask::Look, answer(200, "\"f\"")));
            assert!(rules.check(&put("f", "2")).is_err(), "nor what has no mark");
            assert!(goes(&mut rules, &Ask::Look, marked("\"b\"", "1")));
            assert!(rules.check(&put("b", "2")).is_ok());
        }
    }

    #[test]
    fn a_recovery_takes_nothing_but_what_was_proved() {
        let mut rules = open();
        rules.recovering("\"p\"");
        assert!(goes(&mut rules, &Ask::Read, answer(200, "\"p\"")));
        assert!(!goes(&mut rules, &Ask::Read, answer(200, "\"f\"")));
        assert!(rules.check(&put("f", "1")).is_err());
        assert!(
            goes(&mut rules, &Ask::Read, answer(503, "\"x\"")),
            "no answer to judge"
        );
        assert!(goes(&mut rules, &put("p", "1"), answer(200, "\"q\"")));
        assert!(goes(&mut rules, &Ask::Read, answer(200, "\"q\"")));
        rules.phase = Phase::Closed;
        assert!(rules.check(&Ask::Read).is_err());
        assert!(rules.check(&put("q", "2")).is_ok());
    }

    #[test]
    fn requests_are_told_by_method_name_and_headers() {
        let none = |_: &str| None;
        let inode = "http://h/bucket/volume/inode";
        for (method, uri, expected) in [
            ("GET", format!("{inode}?x-id=GetObject"), Some(Ask::Read)),
            ("HEAD", inode.to_owned(), Some(Ask::Look)),
            ("DELETE", inode.to_owned(), Some(Ask::Other)),
            ("POST", format!("{inode}?uploads"), Some(Ask::Other)),
            (
                "PUT",
                format!("{inode}?partNumber=1&uploadId=u"),
                Some(Ask::Other),
            ),
            ("GET", format!("{inode}?acl"), Some(Ask::Other)),
            ("PUT", "http://h/bucket/volume/0000000001.0".to_owned(), None),
            (
                "GET",
                "http://h/bucket?list-type=2&prefix=v/inode".to_owned(),
                None,
            ),
        ] {
            assert_eq!(Ask::of_request(method, &uri, none), expected, "{method} {uri}");
        }
        let headers = |name: &str| match name {
            "if-match" => Some("\"e\"".to_owned()),
            MARK_HEADER => Some("m".to_owned()),
            _ => None,
        };
        assert_eq!(Ask::of_request("PUT", inode, headers), Some(put("e", "m")));
        let copied = |name: &str| (name == "x-amz-copy-source").then(|| "b/k".to_owned());
        assert_eq!(Ask::of_request("PUT", inode, copied), Some(Ask::Other));
    }
}

//! Requests that are refused, held back, or carried out though their answer is lost.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextMut, BeforeDeserializationInterceptorContextRef,
    BeforeTransmitInterceptorContextRef,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use hypernbd_volume::store::Store;
use hypernbd_volume::store::hook::Hook;
use parking_lot::{Condvar, Mutex};

/// Longer than anything takes.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Which request of the writing of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The object in one piece.
    Whole,
    /// An upload in pieces begins ...
    Create,
    /// ... one of the pieces ...
    Part,
    /// ... and its end, which makes the object.
    Complete,
}

/// A request that writes to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Name of the object in the container.
    pub object: String,
    pub step: Step,
}

impl Write {
    pub fn is_inode(&self) -> bool {
        self.object == "inode"
    }

    fn of_request(method: &str, uri: &str) -> Option<Self> {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        if path.contains(".meta/") {
            return None;
        }
        let asks = |name: &str| query.split('&').any(|p| p.split('=').next() == Some(name));
        let step = match method {
            "PUT" if asks("partNumber") => Step::Part,
            "PUT" => Step::Whole,
            "POST" if asks("uploads") => Step::Create,
            "POST" => Step::Complete,
            _ => return None,
        };
        let object = path.rsplit('/').next().unwrap_or_default().to_owned();
        Some(Self { object, step })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    /// Not sent.
    Refused,
    /// Carried out; the answer does not arrive.
    Lost,
}

/// Decides what becomes of each write.
pub trait Policy: Debug + Send + Sync + 'static {
    fn judge(&self, write: &Write) -> Verdict;
}

/// `store`, with its writes judged.
pub fn judged(mut store: Store, policy: Arc<dyn Policy>) -> Store {
    let config = store.client.config().to_builder();
    store.client = aws_sdk_s3::Client::from_conf(config.interceptor(Injector(policy)).build());
    store
}

/// For a volume whose writes are judged.
pub fn hook(policy: impl Policy) -> Hook {
    Hook::new(Injector(Arc::new(policy)))
}

#[derive(Debug)]
struct IsLost(bool);

impl Storable for IsLost {
    type Storer = StoreReplace<Self>;
}

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Keeps a request from the store: what is sent instead is a look at an object that is not there.
pub fn divert(request: &mut HttpRequest) -> Result<(), BoxError> {
    let path = request.uri().split('?').next().unwrap_or_default().to_owned();
    request.set_method("HEAD")?;
    *request.body_mut() = SdkBody::empty();
    request.headers_mut().insert("content-length", "0");
    request.set_uri(format!("{path}.none"))?;
    Ok(())
}

/// How S3 answers what it refuses.
pub fn refusal(status: u16, code: &str) -> Result<HttpResponse, BoxError> {
    let body = format!("<Error><Code>{code}</Code><Message>injected</Message></Error>");
    Ok(HttpResponse::new(status.try_into()?, SdkBody::from(body)))
}

#[derive(Debug)]
struct Injector(Arc<dyn Policy>);

impl Intercept for Injector {
    fn name(&self) -> &'static str {
        "injector"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        let write = Write::of_request(request.method(), request.uri());
        let verdict = write.map_or(Verdict::Pass, |write| self.0.judge(&write));
        bag.interceptor_state()
            .store_put(IsLost(verdict == Verdict::Lost));
        match verdict {
            Verdict::Refused => Err("injected: refused".into()),
            Verdict::Pass | Verdict::Lost => Ok(()),
        }
    }

    fn read_before_deserialization(
        &self,
        _: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        match bag.load::<IsLost>() {
            Some(IsLost(true)) => Err("injected: answer lost".into()),
            _ => Ok(()),
        }
    }
}

/// When something happens at a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    BeforeItIsSent,
    /// Once it was carried out, before it is answered.
    Stored,
}

/// Tells requests by their method and URI.
type IsIt = Box<dyn Fn(&str, &str) -> bool + Send + Sync>;

/// Something happens at the first request of a kind, on a thread of its own.
pub struct AtRequest {
    is_it: IsIt,
    when: When,
    what: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// Whether the request is not sent then.
    is_refused: bool,
    /// How the request is answered then; as the store does for `None`.
    answer: Option<(u16, &'static str)>,
    is_over: AtomicBool,
}

impl AtRequest {
    /// `is_it` is asked with a request's method and URI.
    pub fn new(
        is_it: impl Fn(&str, &str) -> bool + Send + Sync + 'static,
        when: When,
        what: impl FnOnce() + Send + 'static,
    ) -> Self {
        Self {
            is_it: Box::new(is_it),
            when,
            what: Mutex::new(Some(Box::new(what))),
            is_refused: false,
            answer: None,
            is_over: AtomicBool::new(false),
        }
    }

    /// At the first write of an inode.
    pub fn inode(when: When, what: impl FnOnce() + Send + 'static) -> Self {
        let is_it =
            |method: &str, uri: &str| Write::of_request(method, uri).is_some_and(|write| write.is_inode());
        Self::new(is_it, when, what)
    }

    /// The request is answered so then.
    pub fn answered(self, status: u16, code: &'static str) -> Self {
        Self {
            answer: Some((status, code)),
            ..self
        }
    }

    /// The request is not sent then, and has failed.
    pub fn refused(self) -> Self {
        Self {
            is_refused: true,
            ..self
        }
    }

    fn happen(&self) {
        let what = self.what.lock().take().expect("it happens once");
        tokio::task::block_in_place(|| std::thread::scope(|scope| scope.spawn(what).join().unwrap()));
    }
}

impl Debug for AtRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.when)
    }
}

#[derive(Debug)]
struct IsMet;

impl Storable for IsMet {
    type Storer = StoreReplace<Self>;
}

impl Intercept for AtRequest {
    fn name(&self) -> &'static str {
        "at a request"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        if (self.is_it)(request.method(), request.uri()) && !self.is_over.swap(true, Ordering::SeqCst) {
            bag.interceptor_state().store_put(IsMet);
            if self.when == When::BeforeItIsSent {
                self.happen();
            }
            if self.is_refused {
                return Err("injected: refused".into());
            }
        }
        Ok(())
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if bag.load::<IsMet>().is_none() {
            return Ok(());
        }
        bag.interceptor_state().unset::<IsMet>();
        if self.when == When::Stored {
            self.happen();
        }
        if let Some((status, code)) = self.answer {
            *context.response_mut() = refusal(status, code)?;
        }
        Ok(())
    }
}

/// Until when a write is held back.
#[derive(Debug, Clone, PartialEq)]
pub enum Until {
    /// This other write was asked for.
    Seen(Write),
    /// [`Script::open`].
    Opened,
}

#[derive(Debug, Clone, Copy)]
pub enum Then {
    Goes(Verdict),
    Panics,
}

#[derive(Debug)]
struct Rule {
    at: Write,
    /// So many such writes go through before.
    skip: usize,
    until: Until,
    then: Then,
}

#[derive(Debug, Default)]
struct State {
    seen: Vec<Write>,
    rules: Vec<Rule>,
    is_open: bool,
}

/// What becomes of which write; each rule is met once.
#[derive(Debug, Default)]
pub struct Script {
    state: Mutex<State>,
    changed: Condvar,
}

impl Script {
    pub fn add(&self, at: Write, skip: usize, until: Until, then: Then) {
        let rule = Rule {
            at,
            skip,
            until,
            then,
        };
        self.state.lock().rules.push(rule);
    }

    pub fn open(&self) {
        self.state.lock().is_open = true;
        self.changed.notify_all();
    }

    pub fn is_all_met(&self) -> bool {
        self.state.lock().rules.is_empty()
    }

    pub fn inodes_put(&self) -> usize {
        self.state.lock().seen.iter().filter(|w| w.is_inode()).count()
    }

    pub fn wait(&self, until: &Until) {
        let mut state = self.state.lock();
        let is_over = |state: &State| match until {
            Until::Seen(write) => state.seen.contains(write),
            Until::Opened => state.is_open,
        };
        while !is_over(&state) {
            let waited = self.changed.wait_for(&mut state, LIMIT);
            assert!(!waited.timed_out(), "{until:?} never came");
        }
    }
}

impl Policy for Script {
    fn judge(&self, write: &Write) -> Verdict {
        let rule = {
            let mut state = self.state.lock();
            state.seen.push(write.clone());
            self.changed.notify_all();
            let met = state
                .rules
                .iter()
                .position(|rule| rule.at == *write && rule.skip == 0);
            for rule in state.rules.iter_mut().filter(|rule| rule.at == *write) {
                rule.skip = rule.skip.saturating_sub(1);
            }
            met.map(|at| state.rules.remove(at))
        };
        let Some(rule) = rule else { return Verdict::Pass };
        tokio::task::block_in_place(|| self.wait(&rule.until));
        match rule.then {
            Then::Goes(verdict) => verdict,
            Then::Panics => panic!("injected"),
        }
    }
}

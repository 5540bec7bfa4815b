//! A store that fails one request, or all from one on.

use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextMut, BeforeTransmitInterceptorContextMut,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::store::hook::Hook;
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use crate::faults::{BoxError, divert, refusal};

/// Statuses with S3's codes; none is an answer that does not arrive.
const ANSWERS: [Option<(u16, &str)>; 7] = [
    Some((409, "ConditionalRequestConflict")),
    Some((412, "PreconditionFailed")),
    Some((429, "SlowDown")),
    Some((500, "InternalError")),
    Some((503, "SlowDown")),
    None,
    None,
];

/// How often it is asked whether there is still something to wait for.
const POLL: Duration = Duration::from_millis(5);

#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// This request alone fails.
    Once {
        answer: Option<(u16, &'static str)>,
        is_carried_out: bool,
    },
    /// This request stands still until [`Faults::release`], and is not carried out then.
    Held { answer: Option<(u16, &'static str)> },
    /// No request arrives from here on: the process was killed.
    End { is_carried_out: bool },
}

impl Fault {
    fn is_carried_out(self) -> bool {
        match self {
            Self::Once { is_carried_out, .. } | Self::End { is_carried_out } => is_carried_out,
            Self::Held { .. } => false,
        }
    }

    fn answer(self) -> Option<(u16, &'static str)> {
        match self {
            Self::Once { answer, .. } | Self::Held { answer } => answer,
            Self::End { .. } => None,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// How many requests go through before, and what happens then.
    armed: Option<(u32, Fault)>,
    met: u32,
    is_dead: bool,
    /// Whether a request stands still.
    is_held: bool,
    is_released: bool,
}

/// The faults of whoever was given [`Faults::options`].
#[derive(Debug, Default)]
pub struct Faults {
    state: Mutex<State>,
    died: Notify,
    changed: Condvar,
}

impl Faults {
    /// One fault, among the next `within` requests.
    pub fn arm(&self, random: &mut fastrand::Rng, within: u32) {
        let answer = ANSWERS[random.usize(..ANSWERS.len())];
        // A store that says 412 or 409 means it.
        let is_refusal = matches!(answer, Some((409 | 412, _)));
        let fault = Fault::Once {
            answer,
            is_carried_out: !is_refusal && random.bool(),
        };
        self.state.lock().armed = Some((random.u32(..within), fault));
    }

    /// The process ends at the request after so many.
    pub fn end_after(&self, requests: u32, is_carried_out: bool) {
        self.state.lock().armed = Some((requests, Fault::End { is_carried_out }));
    }

    /// The request after so many stands still.
    pub fn hold(&self, random: &mut fastrand::Rng, requests: u32) {
        let answer = [Some((503, "SlowDown")), Some((429, "SlowDown")), None][random.usize(..3)];
        self.state.lock().armed = Some((requests, Fault::Held { answer }));
    }

    /// Waits until a request stands still, or there is no need to.
    pub fn wait_for_held(&self, is_over: impl Fn() -> bool) {
        let mut state = self.state.lock();
        while !state.is_held && !is_over() {
            self.changed.wait_for(&mut state, POLL);
        }
    }

    /// Whether a request stood still.
    pub fn is_held(&self) -> bool {
        self.state.lock().is_held
    }

    /// Lets the request go on that stands still.
    pub fn release(&self) {
        let mut state = self.state.lock();
        (state.armed, state.is_released) = (None, true);
        self.changed.notify_all();
    }

    /// Nothing fails any more, unless the process has ended.
    pub fn disarm(&self) {
        self.state.lock().armed = None;
    }

    /// How many faults there were.
    pub fn met(&self) -> u32 {
        self.state.lock().met
    }

    /// Whether the process has ended.
    pub fn is_dead(&self) -> bool {
        self.state.lock().is_dead
    }

    /// Returns once the process has ended.
    pub async fn died(&self) {
        self.died.notified().await;
    }

    /// Options of somebody who meets none.
    pub fn none() -> StoreOptions {
        StoreOptions::default()
    }

    pub fn options(self: &Arc<Self>) -> StoreOptions {
        StoreOptions {
            hook: Hook::new(Injector(self.clone())),
            ..StoreOptions::default()
        }
    }

    fn next(&self) -> Option<Fault> {
        let mut state = self.state.lock();
        if state.is_dead {
            return Some(Fault::End {
                is_carried_out: false,
            });
        }
        let (skip, fault) = state.armed.as_mut()?;
        if *skip > 0 {
            *skip -= 1;
            return None;
        }
        let fault = *fault;
        state.armed = None;
        state.met += 1;
        state.is_dead = matches!(fault, Fault::End { .. });
        if matches!(fault, Fault::Held { .. }) {
            state.is_held = true;
            self.changed.notify_all();
            tokio::task::block_in_place(|| {
                while !state.is_released {
                    self.changed.wait(&mut state);
                }
            });
        }
        Some(fault)
    }
}

#[derive(Debug)]
struct Met(Fault);

impl Storable for Met {
    type Storer = StoreReplace<Self>;
}

#[derive(Debug)]
struct Injector(Arc<Faults>);

impl Injector {
    fn answer(&self, fault: Fault) -> Result<HttpResponse, BoxError> {
        if let Fault::End { .. } = fault {
            self.0.died.notify_one();
        }
        match fault.answer() {
            Some((status, code)) => refusal(status, code),
            None => Err("injected: no answer".into()),
        }
    }
}

impl Intercept for Injector {
    fn name(&self) -> &'static str {
        "injector of histories"
    }

    fn modify_before_transmit(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Some(fault) = self.0.next() else {
            return Ok(());
        };
        if !fault.is_carried_out() {
            match fault.answer() {
                Some(_) => divert(context.request_mut())?,
                None => return self.answer(fault).map(|_| ()),
            }
        }
        bag.interceptor_state().store_put(Met(fault));
        Ok(())
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Some(&Met(fault)) = bag.load::<Met>() else {
            return Ok(());
        };
        bag.interceptor_state().unset::<Met>();
        *context.response_mut() = self.answer(fault)?;
        Ok(())
    }
}

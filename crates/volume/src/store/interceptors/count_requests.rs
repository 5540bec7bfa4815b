//! Counts requests as they go over the line, each attempt on its own.

use std::time::Instant;

use aws_sdk_s3::config::interceptors::{BeforeTransmitInterceptorContextRef, FinalizerInterceptorContextRef};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_smithy_runtime_api::client::orchestrator::Metadata;
use aws_smithy_types::config_bag::{Storable, StoreReplace};

use crate::metrics::Metrics;
use crate::metrics::store::{Failure, Operation};

/// Interceptor that counts.
#[derive(Debug)]
pub(crate) struct CountRequests(pub Metrics);

/// When an attempt began.
#[derive(Debug)]
struct Began(Instant);

impl Storable for Began {
    type Storer = StoreReplace<Self>;
}

impl Intercept for CountRequests {
    fn name(&self) -> &'static str {
        "CountRequests"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let sent = context.request().body().content_length().unwrap_or(0);
        self.0.store.sent_bytes.add(sent);
        config.interceptor_state().store_put(Began(Instant::now()));
        Ok(())
    }

    fn read_after_attempt(
        &self,
        context: &FinalizerInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        // Nothing was sent, as when there are no credentials.
        let Some(Began(began)) = config.load::<Began>() else {
            return Ok(());
        };
        let name = config.load::<Metadata>().map_or("", Metadata::name);
        let status = context.response().map(|response| response.status().as_u16());
        let has_failed = matches!(context.output_or_error(), Some(Err(_)) | None);
        let failure = has_failed.then(|| Failure::of_status(status));
        let length = |header: &str| header.parse().ok();
        let received = context.response().and_then(|response| {
            let body = response.body().content_length();
            body.or_else(|| response.headers().get("content-length").and_then(length))
        });
        let requests = &self.0.store;
        requests.ended(Operation::of_name(name), began.elapsed(), failure);
        // A HEAD announces what it does not send.
        if name != "HeadObject" {
            requests.received_bytes.add(received.unwrap_or(0));
        }
        Ok(())
    }
}

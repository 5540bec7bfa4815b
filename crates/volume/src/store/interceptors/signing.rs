//! Whether the bodies of uploads are part of a request's signature.
//!
//! Left alone, the SDK signs bodies that are one piece of memory and does not sign streams. Hashing costs seconds of
//! processor time a gigabyte on machines without SHA instructions, so over TLS, which protects the body itself, bodies
//! stay unsigned. Over plain http the signature is the only thing that notices a changed body.

use aws_runtime::auth::PayloadSigningOverride;
use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;

use super::upload::in_one_piece;
use crate::store::options::PayloadSigning;

/// Interceptor that carries out the choice.
#[derive(Debug)]
pub(crate) struct SignPayload {
    choice: PayloadSigning,
    /// A request's own URI says so only once it is about to be signed.
    is_over_tls: bool,
}

impl SignPayload {
    /// For the store at this address; AWS without one, which is reached over TLS.
    pub(crate) fn new(choice: PayloadSigning, endpoint_url: Option<&str>) -> Self {
        let scheme = endpoint_url.and_then(|endpoint| endpoint.split_once(':'));
        Self {
            choice,
            is_over_tls: scheme.is_none_or(|(scheme, _)| scheme.eq_ignore_ascii_case("https")),
        }
    }

    fn signs(&self) -> bool {
        match self.choice {
            PayloadSigning::Auto => !self.is_over_tls,
            PayloadSigning::Always => true,
            PayloadSigning::Never => false,
        }
    }
}

impl Intercept for SignPayload {
    fn name(&self) -> &'static str {
        "SignPayload"
    }

    /// A body to sign is made one piece.
    fn modify_before_retry_loop(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if !self.signs() {
            return Ok(());
        }
        in_one_piece(
            context.request_mut().body_mut(),
            "only bodies that are in memory can be signed; set payload_signing=never",
        )
    }

    fn modify_before_signing(
        &self,
        _: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        // A stream with a checksum behind it has a kind of signature of its own, which the SDK has set by now.
        if !self.signs() && config.load::<PayloadSigningOverride>().is_none() {
            config
                .interceptor_state()
                .store_put(PayloadSigningOverride::unsigned_payload());
        }
        Ok(())
    }
}

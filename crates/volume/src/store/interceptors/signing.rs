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
pub(crate) struct SignPayload(pub PayloadSigning);

impl SignPayload {
    fn signs(&self, uri: &str) -> bool {
        match self.0 {
            PayloadSigning::Auto => !uri.starts_with("https:"),
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
        let request = context.request_mut();
        if !self.signs(request.uri()) {
            return Ok(());
        }
        in_one_piece(
            request.body_mut(),
            "only bodies that are in memory can be signed; set payload_signing=never",
        )
    }

    fn modify_before_signing(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        // A stream with a checksum behind it has a kind of signature of its own, which the SDK has set by now.
        if !self.signs(context.request().uri()) && config.load::<PayloadSigningOverride>().is_none() {
            config
                .interceptor_state()
                .store_put(PayloadSigningOverride::unsigned_payload());
        }
        Ok(())
    }
}

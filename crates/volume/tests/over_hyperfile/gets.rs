//! Counts the requests for bytes of a container's objects, of data and of the index alike.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::store::hook::Hook;

use crate::faults::BoxError;

/// The count. All clones share it.
#[derive(Debug, Clone, Default)]
pub struct Gets(Arc<AtomicUsize>);

impl Gets {
    /// Options of a store whose requests are counted here.
    pub fn options(&self) -> StoreOptions {
        StoreOptions {
            hook: Hook::new(self.clone()),
            ..StoreOptions::default()
        }
    }

    /// The count since it was asked for last.
    pub fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl Intercept for Gets {
    fn name(&self) -> &'static str {
        "counts reads of objects"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        let path = request.uri().split('?').next().unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default();
        let is_object = !path.contains(".meta/") && name.starts_with(|c: char| c.is_ascii_digit());
        if request.method() == "GET" && is_object {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }
}

//! For tests only: an interceptor between a volume and its store, whoever opens the volume.

use std::sync::Arc;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{Intercept, SharedInterceptor};

use super::Store;

/// An interceptor of every request and answer; none by default.
#[derive(Debug, Clone, Default)]
pub struct Hook(Option<Arc<SharedInterceptor>>);

impl PartialEq for Hook {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl Eq for Hook {}

impl Hook {
    /// A hook with this interceptor.
    pub fn new(interceptor: impl Intercept + 'static) -> Self {
        Self(Some(Arc::new(SharedInterceptor::new(interceptor))))
    }

    /// Puts the interceptor between the store and its users.
    pub(super) fn attach(&self, store: &mut Store) {
        if let Some(interceptor) = &self.0 {
            let config = store.client.config().to_builder();
            let config = config.interceptor(SharedInterceptor::clone(interceptor));
            store.client = Client::from_conf(config.build());
        }
    }
}

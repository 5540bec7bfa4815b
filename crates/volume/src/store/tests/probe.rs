//! The probe against honest stores and against every kind of liar.

use std::sync::atomic::{AtomicU32, Ordering};

use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextMut, BeforeTransmitInterceptorContextMut,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;

use super::*;
use crate::error::{ErrorKind, VolumeError};
use crate::store::probe::{self, Check};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    None,
    IgnoresIfNoneMatch,
    IgnoresIfMatch,
    IgnoresConditionsOfUploads,
    DropsMetadata,
    IgnoresSuffixRanges,
    IgnoresRanges,
    HasOneETag,
}

/// Between the client and an honest store: what comes out is a store that lies.
#[derive(Debug, Clone)]
struct Liar {
    lie: Lie,
    requests: Arc<AtomicU32>,
}

impl Intercept for Liar {
    fn name(&self) -> &'static str {
        "liar"
    }

    fn modify_before_signing(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let request = context.request_mut();
        let is_put = request.method() == "PUT";
        let is_suffix = request
            .headers()
            .get("range")
            .is_some_and(|range| range.starts_with("bytes=-"));
        let headers = request.headers_mut();
        match self.lie {
            Lie::IgnoresIfNoneMatch if is_put => drop(headers.remove("if-none-match")),
            Lie::IgnoresIfMatch => drop(headers.remove("if-match")),
            Lie::IgnoresConditionsOfUploads if !is_put => drop(headers.remove("if-none-match")),
            Lie::DropsMetadata => drop(headers.remove("x-amz-meta-hypernbd-probe")),
            Lie::IgnoresSuffixRanges if is_suffix => drop(headers.remove("range")),
            Lie::IgnoresRanges => drop(headers.remove("range")),
            _ => {}
        }
        Ok(())
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let headers = context.response_mut().headers_mut();
        if self.lie == Lie::HasOneETag && headers.contains_key("etag") {
            headers.insert("etag", "\"always\"");
        }
        Ok(())
    }
}

/// A store that `ensure` takes for one on S3, and its number of requests.
async fn lying(lie: Lie) -> (Tested, Arc<AtomicU32>) {
    let mut tested = file_store().await;
    let liar = Liar {
        lie,
        requests: Arc::default(),
    };
    let requests = liar.requests.clone();
    let config = tested.store.client.config().to_builder().interceptor(liar);
    tested.store.client = Client::from_conf(config.build());
    tested.store.url = VolumeUrl::parse("s3://bucket/vol/").unwrap();
    (tested, requests)
}

fn broken(checks: &[Check]) -> Vec<&'static str> {
    let failed = checks.iter().filter(|check| check.failure.is_some());
    failed.map(|check| check.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_honest_store_passes_and_nothing_is_left() {
    for Tested { store, dir: _dir } in stores().await {
        let checks = probe::run(&store).await.unwrap();
        assert_eq!(broken(&checks), Vec::<&str>::new(), "{checks:?}");
        let names: Vec<&str> = checks.iter().map(|check| check.name).collect();
        let documented = include_str!("../../../../../docs/s3-compatibility.md")
            .lines()
            .filter_map(|line| line.strip_prefix("| "))
            .skip_while(|row| !row.starts_with("promise"))
            .skip(1)
            .take(names.len())
            .map(|row| row.split(" |").next().unwrap());
        assert_eq!(names, documented.collect::<Vec<_>>());
        assert_eq!(store.list(&store.meta_key("")).await.unwrap(), []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_lie_is_found_and_named() {
    for (lie, expected) in [
        (
            Lie::IgnoresIfNoneMatch,
            &["If-None-Match: * on PUT", "of racing creations one wins"][..],
        ),
        (
            Lie::IgnoresIfMatch,
            &["If-Match on PUT", "of racing replacements one wins"],
        ),
        (
            Lie::IgnoresConditionsOfUploads,
            &["If-None-Match: * on CompleteMultipartUpload"],
        ),
        (Lie::DropsMetadata, &["user metadata comes back with HEAD"]),
        (Lie::IgnoresSuffixRanges, &["range reads answer exactly"]),
        (Lie::IgnoresRanges, &["range reads answer exactly"]),
    ] {
        let (tested, _) = lying(lie).await;
        let checks = probe::run(&tested.store).await.unwrap();
        assert_eq!(broken(&checks), expected, "{lie:?}: {checks:?}");
        assert_eq!(tested.store.list("").await.unwrap(), [], "{lie:?}");
    }
    // Where all writes look alike a condition on one means nothing, and nothing built on it works.
    let (tested, _) = lying(Lie::HasOneETag).await;
    let checks = probe::run(&tested.store).await.unwrap();
    assert!(broken(&checks).contains(&"ETags name the write"), "{checks:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_store_is_refused_by_name_unless_that_is_allowed() {
    let (tested, requests) = lying(Lie::IgnoresIfMatch).await;
    let refused = probe::ensure(&tested.store, false).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(
        matches!(refused, VolumeError::UnsafeStore { .. }),
        "a refusal of its own: {refused}"
    );
    let text = refused.to_string();
    for part in [
        tested.store.endpoint(),
        "If-Match on PUT",
        "is carried out",
        "allow_unsafe_store=yes",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    probe::ensure(&tested.store, true).await.unwrap();
    assert_eq!(
        tested.store.list("").await.unwrap(),
        [],
        "a failure is not remembered as a pass"
    );
    let before = requests.load(Ordering::SeqCst);
    probe::ensure(&tested.store, false).await.unwrap_err();
    assert!(
        requests.load(Ordering::SeqCst) > before + 10,
        "it was not probed again"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pass_is_remembered_for_the_endpoint() {
    let (mut tested, requests) = lying(Lie::None).await;
    let mut costs = Vec::new();
    for endpoint in ["http://one", "http://one", "http://other", "http://other"] {
        tested.store.endpoint = endpoint.into();
        let before = requests.load(Ordering::SeqCst);
        probe::ensure(&tested.store, false).await.unwrap();
        costs.push(requests.load(Ordering::SeqCst) - before);
    }
    assert!(
        costs[0] > 10 && costs[1] == 1 && costs[2] > 10 && costs[3] == 1,
        "{costs:?}"
    );
    let keys: Vec<String> = tested
        .store
        .list("")
        .await
        .unwrap()
        .into_iter()
        .map(|o| o.key)
        .collect();
    assert_eq!(keys, [tested.store.meta_key("probe")]);
}

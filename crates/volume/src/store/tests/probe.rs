//! The probe against honest stores and against every kind of liar.

use std::sync::atomic::{AtomicU32, Ordering};

use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextMut, BeforeTransmitInterceptorContextMut,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;

use super::*;
use crate::base::error::{ErrorKind, VolumeError};
use crate::store::local::object_file::ObjectHeader;
use crate::store::probe::{self, Check};
use crate::store::probe_objects;

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
    /// Nothing gets through from this request on, as when the program is killed there.
    KilledAt(u32),
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
        let before = self.requests.fetch_add(1, Ordering::SeqCst);
        if matches!(self.lie, Lie::KilledAt(request) if before >= request) {
            return Err("killed".into());
        }
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
    for endpoint in [
        "http://one",
        "http://one",
        "http://other",
        "http://other",
        "http://one",
    ] {
        tested.store.endpoint = endpoint.into();
        let before = requests.load(Ordering::SeqCst);
        probe::ensure(&tested.store, false).await.unwrap();
        costs.push(requests.load(Ordering::SeqCst) - before);
    }
    assert!(
        costs[0] > 10 && costs[1] == 1 && costs[2] > 10 && costs[3] == 1 && costs[4] == 1,
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

#[tokio::test(flavor = "multi_thread")]
async fn so_many_addresses_are_remembered_and_no_more() {
    let (mut tested, requests) = lying(Lie::None).await;
    let mut cost = async |number: usize| {
        tested.store.endpoint = format!("http://host-{number}").into();
        let before = requests.load(Ordering::SeqCst);
        probe::ensure(&tested.store, false).await.unwrap();
        requests.load(Ordering::SeqCst) - before
    };
    for number in 0..9 {
        assert!(cost(number).await > 10, "{number}");
    }
    for number in (1..9).rev() {
        assert_eq!(cost(number).await, 1, "{number}");
    }
    assert!(cost(0).await > 10, "the oldest is forgotten");
}

/// Makes an object look as if it had been written some time ago.
fn age(dir: &TempDir, key: &str, by: Duration) {
    let name = crate::store::local::object_file::name_of_key(key).unwrap();
    let path = dir.path().join("vol/objects").join(name);
    let mut header = ObjectHeader::read(&std::fs::File::open(&path).unwrap()).unwrap();
    header.modified_ms -= by.as_millis() as u64;
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.truncate(header.data_len_bytes as usize);
    bytes.extend(header.encode().unwrap());
    std::fs::write(&path, bytes).unwrap();
}

async fn keys(store: &Store) -> Vec<String> {
    let listed = store.list("").await.unwrap();
    listed.into_iter().map(|object| object.key).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_killed_probe_leaves_is_known_and_goes_once_it_is_old() {
    let mut left_names = std::collections::BTreeSet::new();
    for request in (0..).step_by(3) {
        let (tested, _) = lying(Lie::KilledAt(request)).await;
        let dir = tested.dir.as_ref().unwrap();
        let ended = probe::run(&tested.store).await;
        let honest = connect(&file_url(&dir.path().join("vol")), &StoreOptions::default())
            .await
            .unwrap();
        let left = honest.list("").await.unwrap();
        for object in &left {
            assert!(probe::is_own(&honest, object), "{}", object.key);
            left_names.insert(object.key.rsplit('/').next().unwrap().to_owned());
        }
        // Another probe may be using them.
        probe_objects::sweep(&honest).await.unwrap();
        assert_eq!(
            keys(&honest).await.len(),
            left.len(),
            "killed at request {request}"
        );
        for object in &left {
            age(dir, &object.key, Duration::from_secs(16 * 60));
        }
        probe_objects::sweep(&honest).await.unwrap();
        assert_eq!(
            keys(&honest).await,
            Vec::<String>::new(),
            "killed at request {request}"
        );
        if ended.is_ok_and(|checks| broken(&checks).is_empty()) {
            break;
        }
    }
    assert!(left_names.len() >= 9, "{left_names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_that_is_not_a_probes() {
    let Tested { store, dir } = file_store().await;
    let id = "0123456789abcdef0123456789abcdef";
    let meta = |name: &str| store.meta_key(name);
    let others = [
        meta(&format!("probe-{id}/read_back-5")),
        meta(&format!("probe-{id}/notes-1")),
        meta(&format!("probe-{id}/read_back-1/x")),
        meta(&format!("probe-{}/read_back-1", id.to_uppercase())),
        meta("probe-1/read_back-1"),
        store.data_key(&format!("probe-{id}/read_back-1")),
    ];
    for key in &others {
        store.put(key, "x").await.unwrap();
    }
    let large = meta(&format!("probe-{id}/read_back-2"));
    store.put(&large, vec![0; 257]).await.unwrap();
    let ours = meta(&format!("probe-{id}/read_back-1"));
    store.put(&ours, "first").await.unwrap();
    for key in others.iter().chain([&large, &ours]) {
        age(dir.as_ref().unwrap(), key, Duration::from_secs(3600));
    }
    // The next probe removes what is old.
    assert_eq!(broken(&probe::run(&store).await.unwrap()), Vec::<&str>::new());
    let mut expected: Vec<String> = others.into_iter().chain([large]).collect();
    expected.sort();
    assert_eq!(keys(&store).await, expected);
}

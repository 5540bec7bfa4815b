//! What is made of the answers of an S3 service, or of their absence. The service is a scripted one.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};

use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};

use super::*;
use StoreErrorKind::*;
use interceptors::sums::SumsWriter;

/// An empty listing, as the first request of a connection expects.
const EMPTY_LIST: &str = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>";

/// A server that answers every request with what `respond` makes of its head (nothing: the connection is closed).
/// Gives its address and the requests, in lower case.
fn serve(mut respond: impl FnMut(&str) -> String + Send + 'static) -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (heads, received) = channel();
    std::thread::spawn(move || {
        // The thread ends with the test's process; a test sends a handful of requests.
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let (mut bytes, mut piece) = (Vec::new(), [0; 65536]);
            let head_len = loop {
                match stream.read(&mut piece) {
                    Ok(0) | Err(_) => break None,
                    Ok(len) => bytes.extend_from_slice(&piece[..len]),
                }
                if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                    break Some(at + 4);
                }
            };
            let Some(head_len) = head_len else { continue };
            let head = String::from_utf8_lossy(&bytes[..head_len]).to_lowercase();
            let body_len: usize = header(&head, "content-length").map_or(0, |len| len.parse().unwrap());
            let mut rest = vec![0; (head_len + body_len).saturating_sub(bytes.len())];
            if stream.read_exact(&mut rest).is_ok() {
                let answer = respond(&head);
                bytes.append(&mut rest);
                let body = String::from_utf8_lossy(&bytes[head_len..]).to_lowercase();
                // The test is over once nobody receives, or reads the answer.
                let _ = heads.send(head + &body);
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
    (endpoint, received)
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\n{headers}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn error_answer(status: &str, headers: &str, code: &str) -> String {
    answer(
        status,
        headers,
        &format!("<Error><Code>{code}</Code><Message>so it is</Message></Error>"),
    )
}

async fn connect_to(endpoint: &str) -> Result<Store, StoreError> {
    let url = VolumeUrl::S3 {
        bucket: "bucket".into(),
        prefix: "vol".into(),
    };
    let options = StoreOptions {
        endpoint_url: Some(endpoint.into()),
        region: Some("us-east-1".into()),
        ..Default::default()
    };
    s3::tests::connect_with_keys(&url, &options).await
}

async fn connect_error(endpoint: &str) -> StoreError {
    let error = connect_to(endpoint).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(endpoint) && text.contains("s3://bucket/vol/"),
        "{text}"
    );
    assert!(!text.contains("test-secret"), "{text}");
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_refuses_connections_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // Nobody listens at a client's port, and while it is one no other test gets it.
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let error = connect_error(&format!("http://{}", client.local_addr().unwrap())).await;
    assert_eq!(error.kind, Unreachable);
    assert!(error.to_string().contains("check endpoint_url"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_never_answers_is_given_up() {
    // The kernel accepts connections, and nobody reads them.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let error = connect_error(&format!("http://{}", listener.local_addr().unwrap())).await;
    assert_eq!(error.kind, Unreachable);
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_credentials_are_said_to_be_missing() {
    let (endpoint, heads) = serve(|_| answer("200 OK", "", EMPTY_LIST));
    let url = VolumeUrl::S3 {
        bucket: "bucket".into(),
        prefix: "vol".into(),
    };
    let options = StoreOptions {
        endpoint_url: Some(endpoint),
        ..Default::default()
    };
    let error = s3::tests::connect_without_keys(&url, &options).await.unwrap_err();
    assert_eq!(error.kind, Unauthenticated, "{error}");
    assert!(error.to_string().contains("set AWS_ACCESS_KEY_ID"), "{error}");
    assert_eq!(heads.try_iter().count(), 0, "a request was sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_told_apart() {
    for (status, headers, code, kind, advice) in [
        (
            "403 Forbidden",
            "",
            "InvalidAccessKeyId",
            Unauthenticated,
            "check the credentials",
        ),
        ("403 Forbidden", "", "AccessDenied", AccessDenied, "policy"),
        ("400 Bad", "", "ExpiredToken", Unauthenticated, "credentials"),
        (
            "403 Forbidden",
            "x-amz-request-id: 1\r\n",
            "Unheard",
            AccessDenied,
            "policy",
        ),
        ("403 Forbidden", "", "Unheard", Unauthenticated, "credentials"),
        ("404 Not Found", "", "NoSuchBucket", NotFound, "create the bucket"),
        ("503 Busy", "", "SlowDown", Unreachable, "503"),
        (
            "301 Moved",
            "x-amz-bucket-region: eu-north-1\r\n",
            "PermanentRedirect",
            Other,
            "region=eu-north-1",
        ),
        ("400 Bad", "", "InvalidRequest", Refused, "when_required"),
        ("501 No", "", "NotImplemented", Refused, "when_required"),
        ("400 Bad", "", "BadDigest", Other, "400"),
        ("400 Bad", "", "XAmzContentChecksumMismatch", Other, "400"),
        ("400 Bad", "", "IncompleteBody", Other, "400"),
        (
            "403 Forbidden",
            "date: Wed, 21 Oct 2015 07:28:00 GMT\r\n",
            "RequestTimeTooSkewed",
            Unauthenticated,
            "ahead of the store's: set it",
        ),
    ] {
        let (endpoint, _heads) = serve(move |_| error_answer(status, headers, code));
        let error = connect_error(&endpoint).await;
        assert_eq!(error.kind, kind, "{error}");
        let text = error.to_string();
        assert!(text.contains(code) && text.contains(advice), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_caused_by_ones_own_lost_answer_is_a_success() {
    for (whose, expected) in [
        ("own", Ok(ETag("\"abc\"".into()))),
        ("another's", Err(PreconditionFailed)),
    ] {
        let (mut puts, mut mark) = (0, String::new());
        let (endpoint, _heads) = serve(move |head| match head.split(' ').next().unwrap() {
            "put" => {
                puts += 1;
                mark = header(head, "x-amz-meta-hypernbd-write").unwrap().to_string();
                if puts == 1 {
                    String::new()
                } else {
                    error_answer("412 No", "", "PreconditionFailed")
                }
            }
            "head" => {
                let mark = if whose == "own" { mark.as_str() } else { "other" };
                let headers = format!("x-amz-meta-hypernbd-write: {mark}\r\netag: \"abc\"\r\n");
                answer("200 OK", &headers, "")
            }
            _ => answer("200 OK", "", EMPTY_LIST),
        });
        let store = connect_to(&endpoint).await.unwrap();
        let result = store.put_create_only("vol.meta/lease", "mine").await;
        assert_eq!(result.map_err(|error| error.kind), expected, "{whose}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_with_a_write_in_progress_is_tried_again() {
    let mut puts = 0;
    let (endpoint, _heads) = serve(move |head| match head.split(' ').next().unwrap() {
        "put" => {
            puts += 1;
            match puts {
                1 => error_answer("409 Conflict", "", "ConditionalRequestConflict"),
                _ => answer("200 OK", "etag: \"abc\"\r\n", ""),
            }
        }
        "head" => answer("404 Not Found", "", ""),
        _ => answer("200 OK", "", EMPTY_LIST),
    });
    let store = connect_to(&endpoint).await.unwrap();
    assert_eq!(
        store.put_create_only("vol.meta/lease", "mine").await.unwrap(),
        ETag("\"abc\"".into())
    );
}

/// A store that is busy with something of its own says nothing of other owners: an owner that took it for one would be shut out for good.
#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_that_nobody_knows_is_decided_by_what_is_stored() {
    let etag = ETag("\"abc\"".into());
    for (stored, expected) in [
        (Some("\"abc\""), Unreachable),
        (Some("\"def\""), PreconditionFailed),
        (None, Unreachable),
    ] {
        let (endpoint, _heads) = serve(move |head| match (head.split(' ').next().unwrap(), stored) {
            ("put", _) => error_answer("409 Conflict", ID, "Unheard"),
            ("head", Some(etag)) => {
                let headers = format!("{ID}x-amz-meta-hypernbd-write: other\r\netag: {etag}\r\n");
                answer("200 OK", &headers, "")
            }
            ("head", None) => answer("404 Not Found", ID, ""),
            _ => answer("200 OK", ID, EMPTY_LIST),
        });
        let store = connect_to(&endpoint).await.unwrap();
        let key = "vol.meta/lease";
        let (replaced, created) = tokio::join!(
            store.put_if_match(key, "mine", &etag),
            store.put_create_only(key, "mine")
        );
        let (replaced, created) = (replaced.unwrap_err(), created.unwrap_err());
        assert_eq!(replaced.kind, expected, "{stored:?}: {replaced}");
        let expected = stored.map_or(Unreachable, |_| PreconditionFailed);
        assert_eq!(created.kind, expected, "{stored:?}: {created}");
    }
}

/// What a reverse proxy says while the store behind it is away.
const PAGE: &str = "<html><body>back soon</body></html>";
const ID: &str = "x-amz-request-id: 1\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_page_instead_of_a_success_is_no_answer_of_a_store_that_marks_its_own() {
    for is_marking in [true, false] {
        let (endpoint, _heads) = serve(move |head| match head.split(' ').next().unwrap() {
            "get" if head.contains("list-type=2") => {
                answer("200 OK", if is_marking { ID } else { "" }, EMPTY_LIST)
            }
            "head" => answer("200 OK", "etag: \"x\"\r\n", ""),
            _ => answer("200 OK", "etag: \"x\"\r\n", PAGE),
        });
        let store = connect_to(&endpoint).await.unwrap();
        let key = "vol.meta/lease";
        let answers = [
            ("PUT", store.put_create_only(key, "mine").await.map(drop)),
            ("GET", store.get(key).await.map(drop)),
            ("HEAD", store.head(key).await.map(drop)),
            ("DELETE", store.delete(key).await.map(drop)),
        ];
        for (method, result) in answers {
            if is_marking {
                let error = result.expect_err(method);
                assert_eq!(error.kind, Unreachable, "{method}: {error}");
            } else {
                result.unwrap_or_else(|error| panic!("{method} of a store that marks nothing: {error}"));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_connection_saw_of_a_store_counts_for_the_next() {
    let mut requests = 0;
    let (endpoint, _heads) = serve(move |_| {
        requests += 1;
        answer("200 OK", if requests == 1 { ID } else { "" }, EMPTY_LIST)
    });
    let url = VolumeUrl::S3 {
        bucket: "bucket".into(),
        prefix: "vol".into(),
    };
    let options = StoreOptions {
        endpoint_url: Some(endpoint),
        region: Some("us-east-1".into()),
        ..Default::default()
    };
    s3::tests::connect_with_keys(&url, &options).await.unwrap();
    let error = s3::tests::connect_with_keys(&url, &options).await.unwrap_err();
    assert_eq!(error.kind, Unreachable, "{error}");
    assert!(error.to_string().contains("no request id"), "{error}");
}

/// A store that knows the older request for listings alone answers so.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_listing_is_not_taken_for_all_of_it() {
    let (endpoint, _heads) = serve(|head| {
        let line = head.lines().next().unwrap();
        let page = |rest: &str| {
            format!("<ListBucketResult>{rest}<Contents><Key>vol/a</Key></Contents></ListBucketResult>")
        };
        let body = match line {
            _ if line.contains("continuation-token=") => page("<IsTruncated>false</IsTruncated>"),
            _ if line.contains("goes-on") => {
                page("<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>")
            }
            _ if line.contains("cut") => page("<IsTruncated>true</IsTruncated>"),
            _ => EMPTY_LIST.to_owned(),
        };
        answer("200 OK", "", &body)
    });
    let store = connect_to(&endpoint).await.unwrap();
    assert_eq!(store.list("goes-on").await.unwrap().len(), 2);
    let error = store.list("cut").await.unwrap_err();
    assert_eq!(error.kind, Other, "{error}");
    assert!(error.to_string().contains("continuation token"), "{error}");
    // Who has found what was looked for needs no more of it.
    assert!(store.has_any("cut", |key| key == "vol/a").await.unwrap());
}

/// The store's clock is years behind this machine's. An upload of a minute ago goes on, one of a day ago has been left.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_old_by_the_clock_of_the_store() {
    let upload = |id: &str, initiated: &str| {
        format!(
            "<Upload><Key>vol/{id}</Key><UploadId>{id}</UploadId><Initiated>{initiated}</Initiated></Upload>"
        )
    };
    let uploads = [
        upload("new", "2015-10-21T07:27:00.000Z"),
        upload("old", "2015-10-20T07:27:00.000Z"),
    ]
    .concat();
    let (endpoint, heads) = serve(move |head| match head.split(' ').next().unwrap() {
        "head" => answer(
            "200 OK",
            "etag: \"x\"\r\nlast-modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n",
            "",
        ),
        "delete" => answer("204 No Content", "", ""),
        _ if head.lines().next().unwrap().contains("uploads") => answer(
            "200 OK",
            "",
            &format!(
                "<ListMultipartUploadsResult>{uploads}<IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"
            ),
        ),
        _ => answer("200 OK", "", EMPTY_LIST),
    });
    let store = connect_to(&endpoint).await.unwrap();
    let lease = store.meta_key("lease");
    let aborted = store.abort_old_uploads(|_| true, Duration::from_secs(3600), &lease);
    assert_eq!(aborted.await.unwrap(), 1);
    let aborted: Vec<String> = heads
        .try_iter()
        .filter(|head| head.starts_with("delete"))
        .collect();
    assert!(
        aborted.len() == 1 && aborted[0].contains("uploadid=old"),
        "{aborted:?}"
    );
}

/// A store begins such an answer before it knows how the completion ends, and what is in the way is in its body. The check values that are
/// there already may be those of the object that was in the way.
#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_failed_with_status_200_replaces_no_check_values_and_is_made_later() {
    let mut completions = 0;
    let (endpoint, received) = serve(move |head| {
        let line = head.lines().next().unwrap();
        match line.split(' ').next().unwrap() {
            "post" if line.contains("?uploads") => answer(
                "200 OK",
                "",
                "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>",
            ),
            "post" => {
                completions += 1;
                match completions {
                    1 => error_answer("200 OK", "", "PreconditionFailed"),
                    _ => answer(
                        "200 OK",
                        "",
                        "<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>",
                    ),
                }
            }
            "put" if line.contains("/sums/") && head.contains("if-none-match") => {
                error_answer("412 No", "", "PreconditionFailed")
            }
            "put" => answer("200 OK", "etag: \"e\"\r\n", ""),
            "head" => answer(
                "200 OK",
                "x-amz-meta-hypernbd-write: other\r\netag: \"x\"\r\n",
                "",
            ),
            _ => answer("200 OK", "", EMPTY_LIST),
        }
    });
    let store = connect_to(&endpoint).await.unwrap();
    let client = SumsWriter::new(store.clone()).client(&store.client);
    let key = store.data_key("0000000001.0");
    let create = client
        .create_multipart_upload()
        .bucket(&store.bucket)
        .key(&key)
        .metadata("hf-write", "mark");
    let id = create.send().await.unwrap().upload_id.unwrap();
    let upload = client
        .upload_part()
        .bucket(&store.bucket)
        .key(&key)
        .upload_id(&id)
        .part_number(1)
        .body(vec![7u8; 1000].into());
    let etag = upload.send().await.unwrap().e_tag.unwrap();
    let complete = || {
        let part = CompletedPart::builder().part_number(1).e_tag(&etag).build();
        let parts = CompletedMultipartUpload::builder().parts(part).build();
        client
            .complete_multipart_upload()
            .bucket(&store.bucket)
            .key(&key)
            .upload_id(&id)
            .multipart_upload(parts)
            .send()
    };
    let refused = complete().await.unwrap_err();
    assert_eq!(refused.code(), Some("PreconditionFailed"), "{refused}");
    complete().await.unwrap();

    let requests: Vec<String> = received.try_iter().collect();
    let at = |is_it: &dyn Fn(&str) -> bool| -> Vec<usize> {
        let numbered = requests.iter().enumerate();
        let found = numbered.filter(|(_, request)| is_it(request.lines().next().unwrap()));
        found.map(|(at, _)| at).collect()
    };
    let completions = at(&|line| line.starts_with("post") && line.contains("uploadid"));
    assert_eq!(completions.len(), 2, "{requests:#?}");
    let mut replaced = at(&|line| line.starts_with("put") && line.contains("/sums/"));
    replaced.retain(|at| !requests[*at].contains("if-none-match"));
    assert!(
        matches!(replaced[..], [at] if at > completions[1]),
        "{replaced:?} of {requests:#?}"
    );
    // The store asks for the parts' checksums each time.
    for at in completions {
        assert!(requests[at].contains("checksumcrc64nvme"), "{}", requests[at]);
    }
}

//! What the interceptors of uploads have in common: which request it is, its body as one piece, and whether an answer says that an
//! upload was completed.

use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::primitives::{AggregatedBytes, ByteStream, SdkBody};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use futures::FutureExt;

/// What a store answers with once an upload in parts is completed.
const COMPLETED: &str = "CompleteMultipartUploadResult";

/// Whether the query of a request's URI has a parameter of this name.
pub(crate) fn has_parameter(uri: &str, name: &str) -> bool {
    let query = uri.split_once('?').map_or("", |(_, query)| query);
    query.split('&').any(|pair| pair.split('=').next() == Some(name))
}

/// The bytes of a body. The bodies of a volume are streams only in that they are pieces of memory.
///
/// # Errors
/// `not_in_memory` for a body that is not; what reading it fails with.
pub(crate) fn pieces(body: SdkBody, not_in_memory: &'static str) -> Result<AggregatedBytes, BoxError> {
    let pieces = ByteStream::new(body).collect().now_or_never();
    Ok(pieces.ok_or(not_in_memory)??)
}

/// Makes a body one piece of memory.
///
/// # Errors
/// As [`pieces`].
pub(crate) fn in_one_piece(body: &mut SdkBody, not_in_memory: &'static str) -> Result<(), BoxError> {
    if body.bytes().is_some() {
        return Ok(());
    }
    let whole = pieces(std::mem::replace(body, SdkBody::taken()), not_in_memory)?;
    *body = SdkBody::from(whole.into_bytes());
    Ok(())
}

/// Whether this answer to the completion of an upload says that the object is there. A store may begin the answer before it knows: the
/// status is 200 then, whatever comes of it, and an error is in the body alone
/// (<https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html>). A page of something else is no such answer either.
/// The body is in memory afterwards.
///
/// # Errors
/// When the body cannot be read.
pub(crate) async fn is_completed(answer: &mut HttpResponse) -> Result<bool, BoxError> {
    if !answer.status().is_success() {
        return Ok(false);
    }
    let body = ByteStream::new(answer.take_body()).collect().await?.into_bytes();
    let is_made = root_of(&body) == Some(COMPLETED);
    *answer.body_mut() = SdkBody::from(body);
    Ok(is_made)
}

/// The name of the outermost element of a document in XML, without its prefix.
fn root_of(document: &[u8]) -> Option<&str> {
    let mut rest = std::str::from_utf8(document).ok()?.trim_start_matches('\u{feff}');
    loop {
        // Spaces keep the connection alive for as long as the store is at work.
        rest = rest.trim_start().strip_prefix('<')?;
        let end = match rest {
            declaration if declaration.starts_with('?') => "?>",
            comment if comment.starts_with("!--") => "-->",
            _ => break,
        };
        rest = rest.split_once(end)?.1;
    }
    let name = rest
        .split(|c: char| c.is_whitespace() || matches!(c, '>' | '/'))
        .next()?;
    name.rsplit(':').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn says_completed(status: u16, body: &'static str) -> bool {
        let mut answer = HttpResponse::new(status.try_into().expect("a status"), SdkBody::from(body));
        let is_completed = is_completed(&mut answer).await.expect("in memory");
        assert_eq!(
            answer.body().bytes(),
            Some(body.as_bytes()),
            "whoever reads it next finds it"
        );
        is_completed
    }

    #[tokio::test]
    async fn only_the_result_of_a_completion_says_that_it_is_made() {
        let result =
            "<CompleteMultipartUploadResult xmlns=\"x\"><ETag>e</ETag></CompleteMultipartUploadResult>";
        assert!(says_completed(200, result).await);
        for made in [
            "<?xml version=\"1.0\"?>\n   \n<CompleteMultipartUploadResult/>",
            "\u{feff}<!-- x --> <s3:CompleteMultipartUploadResult>",
        ] {
            assert!(says_completed(200, made).await, "{made}");
        }
        for other in [
            "<Error><Code>InternalError</Code></Error>",
            "<?xml version=\"1.0\"?>     <Error><Message><CompleteMultipartUploadResult/></Message></Error>",
            "<!DOCTYPE html><html>back soon</html>",
            "<?xml",
            "<!-- <CompleteMultipartUploadResult>",
            "back soon",
            "",
        ] {
            assert!(!says_completed(200, other).await, "{other}");
        }
        assert!(!says_completed(503, result).await);
    }
}

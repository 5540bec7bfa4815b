//! Options for connecting to a store and using it.

use std::time::Duration;

use super::interceptors::foreign::SeenMarks;
use crate::metrics::Metrics;

/// How the store is reached. What is not given comes from the AWS environment, profile and credential chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreOptions {
    /// Address of an S3 service other than AWS, `http://` or `https://`.
    pub endpoint_url: Option<String>,
    /// Region of the bucket.
    pub region: Option<String>,
    /// The profile of the AWS configuration that says which keys, which address and which region; `None` leaves that to the environment.
    pub profile: Option<String>,
    /// Bucket in the path (`true`) or in the host name (`false`); `None` chooses by the endpoint.
    pub path_style: Option<bool>,
    /// Whether the bodies of uploads are part of the request's signature.
    pub payload_signing: PayloadSigning,
    /// The encryption by the store that every upload requests; `None` leaves it to the bucket.
    pub sse: Option<ServerSideEncryption>,
    /// The KMS key for [`ServerSideEncryption::Kms`]; `None` is the account's own.
    pub sse_kms_key_id: Option<String>,
    /// Whether a store is used that fails the probe of the properties that a volume needs.
    pub allow_unsafe: bool,
    /// How long a request for a single object may be answered nothing; `None` leaves that to the S3 client.
    pub answer_time: Option<Duration>,
    /// Where requests are counted, and what else is counted of the volume.
    pub metrics: Metrics,
    /// What was seen of how stores mark their answers.
    pub seen_marks: SeenMarks,
    /// What tests put between a volume and its store.
    #[cfg(feature = "testing")]
    pub hook: super::hook::Hook,
}

/// Encryption by the store (S3's server-side encryption).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerSideEncryption {
    /// With keys of the store.
    Aes256,
    /// With a key of the key management service.
    Kms,
}

impl ServerSideEncryption {
    /// Its name in S3's headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes256 => "AES256",
            Self::Kms => "aws:kms",
        }
    }
}

/// Whether the bodies of uploads are signed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PayloadSigning {
    /// Unsigned over TLS, which protects the body by itself, and signed over plain http.
    #[default]
    Auto,
    /// Always signed.
    Always,
    /// Never signed, for stores and networks that are trusted.
    Never,
}

/// Checks an address for [`StoreOptions::endpoint_url`]. The error says what to write.
pub(crate) fn check_endpoint(value: &str) -> Result<String, String> {
    let host = value
        .strip_prefix("http://")
        .or_else(|| value.strip_prefix("https://"))
        .unwrap_or("");
    let well_formed = !host.is_empty() && !host.starts_with('/') && !host.contains(char::is_whitespace);
    if !well_formed {
        return Err("write http://HOST:PORT or https://HOST:PORT".to_string());
    }
    Ok(value.to_string())
}

/// Checks the name of a region. The error says what to write.
pub(crate) fn check_region(value: &str) -> Result<String, String> {
    let well_formed = !value.is_empty() && value.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if !well_formed {
        return Err("write the name of a region, as in eu-west-1".to_string());
    }
    Ok(value.to_string())
}

//! What the AWS environment variables and profiles say of the store.
//!
//! The SDK reads them itself, but takes a variable that is set and empty, as compose files and CI systems leave them, for a
//! value, and panics at a number that is none. Here an empty variable is one that is not set, and every other is checked as
//! the parameters are. <https://docs.aws.amazon.com/sdkref/latest/guide/settings-reference.html>

use std::io;
use std::path::Path;

use aws_config::profile::ProfileSet;
use aws_runtime::env_config::file::EnvConfigFiles;
use aws_types::os_shim_internal::{Env, Fs};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::options::{check_endpoint, check_region};

/// The profile of those who name none.
const DEFAULT_PROFILE: &str = "default";

/// What the environment says, beyond what the SDK finds by itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Environment {
    /// Address of the store.
    pub endpoint_url: Option<String>,
    /// Region of the bucket.
    pub region: Option<String>,
    /// The profile to use.
    pub profile: String,
    /// Certificates, as PEM, of the authorities that may vouch for the store; `None` leaves it to the system's.
    pub ca_bundle: Option<Vec<u8>>,
    /// `AWS_MAX_ATTEMPTS` or `AWS_RETRY_MODE` are set and empty: the SDK must not read them.
    pub has_empty_retries: bool,
}

impl Default for Environment {
    fn default() -> Self {
        Self {
            endpoint_url: None,
            region: None,
            profile: DEFAULT_PROFILE.to_owned(),
            ca_bundle: None,
            has_empty_retries: false,
        }
    }
}

/// Variables that have few values.
const CHOICES: &[(&str, &[&str])] = &[
    ("AWS_RETRY_MODE", &["standard", "adaptive"]),
    (
        "AWS_REQUEST_CHECKSUM_CALCULATION",
        &["when_supported", "when_required"],
    ),
    (
        "AWS_RESPONSE_CHECKSUM_VALIDATION",
        &["when_supported", "when_required"],
    ),
    ("AWS_USE_DUALSTACK_ENDPOINT", &["true", "false"]),
    ("AWS_USE_FIPS_ENDPOINT", &["true", "false"]),
    ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", &["true", "false"]),
];

/// Reads the process's environment, and the profile that it names.
///
/// # Errors
/// What is wrong, where, and what to write.
pub(super) async fn read() -> Result<Environment, String> {
    let files = EnvConfigFiles::default();
    let profiles = aws_config::profile::load(&Fs::real(), &Env::real(), &files, None).await;
    // What is wrong with the files the SDK says itself.
    evaluate(
        |name| std::env::var(name).ok(),
        profiles.ok().as_ref(),
        |path| std::fs::read(path),
    )
}

fn evaluate(
    variable: impl Fn(&str) -> Option<String>,
    profiles: Option<&ProfileSet>,
    read_file: impl Fn(&Path) -> io::Result<Vec<u8>>,
) -> Result<Environment, String> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let is_empty = |name: &str| variable(name).is_some_and(|value| value.is_empty());
    for (name, allowed) in CHOICES {
        if let Some(value) = set(name)
            && !allowed.iter().any(|choice| value.eq_ignore_ascii_case(choice))
        {
            return Err(wrong(name, &value, &format!("write {}", allowed.join(" or "))));
        }
    }
    if let Some(value) = set("AWS_MAX_ATTEMPTS")
        && value
            .parse::<u32>()
            .ok()
            .filter(|attempts| *attempts > 0)
            .is_none()
    {
        return Err(wrong("AWS_MAX_ATTEMPTS", &value, "write a number, 1 or more"));
    }
    let checked = |names: [&str; 2], check: fn(&str) -> Result<String, String>| {
        for name in names {
            if let Some(value) = set(name) {
                return match check(&value) {
                    Ok(value) => Ok(Some(value)),
                    Err(advice) => Err(wrong(name, &value, &advice)),
                };
            }
        }
        Ok(None)
    };
    let endpoint_url = checked(["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"], check_endpoint)?;
    let region = checked(["AWS_REGION", "AWS_DEFAULT_REGION"], check_region)?;
    let profile = match set("AWS_PROFILE") {
        Some(named) if profiles.is_none_or(|profiles| profiles.get_profile(&named).is_none()) => {
            let file = |variable, default: &str| set(variable).unwrap_or_else(|| default.to_owned());
            let advice = format!(
                "there is no such profile in {} or {}; correct the name or unset it",
                file("AWS_CONFIG_FILE", "~/.aws/config"),
                file("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
            );
            return Err(wrong("AWS_PROFILE", &named, &advice));
        }
        Some(named) => named,
        None => DEFAULT_PROFILE.to_owned(),
    };
    let of_profile = profiles
        .and_then(|profiles| profiles.get_profile(&profile)?.get("ca_bundle"))
        .filter(|path| !path.is_empty())
        .map(|path| (format!("ca_bundle of the profile {profile}"), path.to_owned()));
    let of_variable = set("AWS_CA_BUNDLE").map(|path| ("AWS_CA_BUNDLE".to_owned(), path));
    let ca_bundle = match of_variable.or(of_profile) {
        Some((name, path)) => Some(certificates(&name, &path, &read_file)?),
        None => None,
    };
    Ok(Environment {
        endpoint_url,
        region,
        profile,
        ca_bundle,
        has_empty_retries: is_empty("AWS_MAX_ATTEMPTS") || is_empty("AWS_RETRY_MODE"),
    })
}

fn wrong(name: &str, value: &str, advice: &str) -> String {
    format!("{name} is \"{value}\"; {advice}")
}

/// The certificates of a file, checked: the HTTP client panics at one that is none.
fn certificates(
    name: &str,
    path: &str,
    read_file: impl Fn(&Path) -> io::Result<Vec<u8>>,
) -> Result<Vec<u8>, String> {
    let advice = "name a readable file of PEM certificates";
    let pem = read_file(Path::new(path)).map_err(|e| wrong(name, path, &format!("{e}; {advice}")))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.map_err(|e| wrong(name, path, &format!("it is damaged ({e}); {advice}")))?;
    if found.is_empty() {
        return Err(wrong(name, path, &format!("it has no certificates; {advice}")));
    }
    let mut roots = RootCertStore::empty();
    for certificate in found {
        roots.add(certificate).map_err(|e| {
            wrong(
                name,
                path,
                &format!("a certificate in it is damaged ({e}); {advice}"),
            )
        })?;
    }
    Ok(pem)
}

#[cfg(test)]
mod tests {
    use aws_runtime::env_config::file::EnvConfigFileKind;

    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Environment, String> {
        let find = |name: &str| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| value.to_string())
        };
        evaluate(find, None, |_| Ok(b"no certificate".to_vec()))
    }

    #[test]
    fn an_empty_variable_is_one_that_is_not_set() {
        let unset = of(&[]).expect("nothing is wrong with nothing");
        let names = [
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_S3",
            "AWS_REGION",
            "AWS_DEFAULT_REGION",
            "AWS_PROFILE",
            "AWS_CA_BUNDLE",
            "AWS_REQUEST_CHECKSUM_CALCULATION",
        ];
        for name in names {
            assert_eq!(of(&[(name, "")]).as_ref(), Ok(&unset), "{name}");
        }
        let both = of(&[("AWS_ENDPOINT_URL_S3", ""), ("AWS_ENDPOINT_URL", "http://h:1")]);
        assert_eq!(
            both.expect("well formed").endpoint_url.as_deref(),
            Some("http://h:1")
        );
        assert!(of(&[("AWS_MAX_ATTEMPTS", "")]).expect("unset").has_empty_retries);
    }

    #[test]
    fn every_variable_is_checked_as_parameters_are() {
        for (name, value, advice) in [
            (
                "AWS_ENDPOINT_URL",
                "minio:9000",
                "write http://HOST:PORT or https://HOST:PORT",
            ),
            ("AWS_ENDPOINT_URL_S3", "minio:9000", "write http://HOST:PORT"),
            ("AWS_REGION", "eu west 1", "as in eu-west-1"),
            ("AWS_DEFAULT_REGION", "eu/west", "as in eu-west-1"),
            ("AWS_MAX_ATTEMPTS", "0", "write a number"),
            ("AWS_MAX_ATTEMPTS", "many", "write a number"),
            ("AWS_RETRY_MODE", "legacy", "write standard or adaptive"),
            (
                "AWS_REQUEST_CHECKSUM_CALCULATION",
                "never",
                "write when_supported or when_required",
            ),
            ("AWS_PROFILE", "work", "there is no such profile in ~/.aws/config"),
            ("AWS_CA_BUNDLE", "/ca.pem", "it has no certificates"),
        ] {
            let error = of(&[(name, value)]).expect_err(name);
            assert!(
                error.contains(&format!("{name} is \"{value}\"")) && error.contains(advice),
                "{error}"
            );
        }
    }

    #[test]
    fn a_bundle_that_cannot_be_read_or_is_damaged_is_named() {
        let find = |name: &str| (name == "AWS_CA_BUNDLE").then(|| "/ca.pem".to_owned());
        let error = evaluate(find, None, |_| Err(io::ErrorKind::NotFound.into())).expect_err("no file");
        assert!(error.contains("AWS_CA_BUNDLE is \"/ca.pem\""), "{error}");
        let pem = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_vec();
        let error = evaluate(find, None, |_| Ok(pem.clone())).expect_err("no certificate");
        assert!(error.contains("damaged"), "{error}");
    }

    #[tokio::test]
    async fn a_profile_names_a_bundle() {
        let contents = "[profile private]\nca_bundle = /ca.pem\n";
        let files = EnvConfigFiles::builder()
            .with_contents(EnvConfigFileKind::Config, contents)
            .build();
        let profiles = aws_config::profile::load(&Fs::real(), &Env::real(), &files, None).await;
        let profiles = profiles.expect("well formed");
        let named = |name: &str| (name == "AWS_PROFILE").then(|| "private".to_owned());
        let absent = |_: &Path| Err(io::ErrorKind::NotFound.into());
        let error = evaluate(named, Some(&profiles), absent).expect_err("no file");
        assert!(
            error.contains("ca_bundle of the profile private is \"/ca.pem\""),
            "{error}"
        );
    }
}

//! What the AWS environment variables and profiles say of the store.
//!
//! The SDK reads them itself, but takes a variable that is set and empty, as compose files and CI systems leave them, for a
//! value, and panics at a number that is none. Here an empty variable is one that is not set, and every other is checked as
//! the parameters are. <https://docs.aws.amazon.com/sdkref/latest/guide/settings-reference.html>

use std::borrow::Cow;
use std::convert::Infallible;
use std::io;
use std::path::Path;

use aws_config::profile::ProfileSet;
use aws_runtime::env_config::file::EnvConfigFiles;
use aws_runtime::env_config::get_service_env_config;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_types::os_shim_internal::{Env, Fs};
use aws_types::service_config::ServiceConfigKey;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::store::options::{check_endpoint, check_region};

/// The profile of those who name none.
const DEFAULT_PROFILE: &str = "default";

/// What the environment says, beyond what the SDK finds by itself.
#[derive(Debug, PartialEq)]
pub(super) struct Environment {
    /// Address of the store: of the variables, else of the profile, and of S3 before that of all services.
    pub endpoint_url: Option<String>,
    /// Region of the bucket.
    pub region: Option<String>,
    /// The profile to use.
    pub profile: String,
    /// Certificates, as PEM, of the authorities that may vouch for the store; `None` leaves it to the system's.
    pub ca_bundle: Option<Vec<u8>>,
    /// How failed requests are tried again.
    pub retries: RetryConfig,
}

impl Default for Environment {
    fn default() -> Self {
        Self {
            endpoint_url: None,
            region: None,
            profile: DEFAULT_PROFILE.to_owned(),
            ca_bundle: None,
            retries: RetryConfig::standard(),
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

/// Variables that say where a store is. A profile that is named by somebody says it in their place.
const OF_PLACE: &[&str] = &[
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
];

/// Reads the process's environment, and the profile that it names, or the one that is named here.
///
/// # Errors
/// What is wrong, where, and what to write.
pub(super) async fn read(named: Option<&str>) -> Result<Environment, String> {
    let variable = |name: &str| match named {
        Some(named) if name == "AWS_PROFILE" => Some(named.to_owned()),
        Some(_) if OF_PLACE.contains(&name) => None,
        _ => std::env::var(name).ok(),
    };
    let profile = variable("AWS_PROFILE").filter(|named| !named.is_empty());
    let profile = profile.unwrap_or_else(|| DEFAULT_PROFILE.to_owned());
    let files = EnvConfigFiles::default();
    let profiles =
        aws_config::profile::load(&Fs::real(), &Env::real(), &files, Some(Cow::Owned(profile))).await;
    if let (Some(named), Ok(profiles)) = (named, &profiles)
        && profiles.get_profile(named).is_none()
    {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        return Err(wrong("the profile", named, &no_such_profile(set)));
    }
    // What is wrong with the files the SDK says itself.
    evaluate(variable, profiles.ok().as_ref(), |path| std::fs::read(path))
}

fn evaluate(
    variable: impl Fn(&str) -> Option<String>,
    profiles: Option<&ProfileSet>,
    read_file: impl Fn(&Path) -> io::Result<Vec<u8>>,
) -> Result<Environment, String> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    for (name, allowed) in CHOICES {
        if let Some(value) = set(name)
            && !allowed.iter().any(|choice| value.eq_ignore_ascii_case(choice))
        {
            return Err(wrong(name, &value, &format!("write {}", allowed.join(" or "))));
        }
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
    let of_variables = checked(["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"], check_endpoint)?;
    let region = checked(["AWS_REGION", "AWS_DEFAULT_REGION"], check_region)?;
    let profile = match set("AWS_PROFILE") {
        Some(named) if profiles.is_some_and(|profiles| profiles.get_profile(&named).is_none()) => {
            let advice = format!("{} or unset it", no_such_profile(set));
            return Err(wrong("AWS_PROFILE", &named, &advice));
        }
        Some(named) => named,
        None => DEFAULT_PROFILE.to_owned(),
    };
    let either = |name: &str, key: &str| {
        let of_variable = set(name).map(|value| (name.to_owned(), value));
        of_variable.or_else(|| {
            let value = profiles?.get_profile(&profile)?.get(key);
            let value = value.filter(|value| !value.is_empty())?;
            Some((of_profile(key, &profile), value.to_owned()))
        })
    };
    let ca_bundle = match either("AWS_CA_BUNDLE", "ca_bundle") {
        Some((name, path)) => Some(certificates(&name, &path, &read_file)?),
        None => None,
    };
    let retries = retries(
        either("AWS_MAX_ATTEMPTS", "max_attempts"),
        either("AWS_RETRY_MODE", "retry_mode"),
    )?;
    let are_ignored =
        set("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS").is_some_and(|ignore| ignore.eq_ignore_ascii_case("true"));
    let endpoint_url = match (of_variables, profiles) {
        _ if are_ignored => None,
        (None, Some(profiles)) => endpoint_of_profile(profiles, &profile)?,
        (of_variables, _) => of_variables,
    };
    Ok(Environment {
        endpoint_url,
        region,
        profile,
        ca_bundle,
        retries,
    })
}

/// Where a profile was looked for.
fn no_such_profile(set: impl Fn(&str) -> Option<String>) -> String {
    let file = |variable, default: &str| set(variable).unwrap_or_else(|| default.to_owned());
    format!(
        "there is no such profile in {} or {}; correct the name",
        file("AWS_CONFIG_FILE", "~/.aws/config"),
        file("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    )
}

/// How a setting of a profile is called in an error.
fn of_profile(key: &str, profile: &str) -> String {
    format!("{key} of the profile {profile}")
}

/// The policy for retries, from what is set: names and values.
fn retries(
    attempts: Option<(String, String)>,
    mode: Option<(String, String)>,
) -> Result<RetryConfig, String> {
    let retries = match mode {
        Some((_, mode)) if mode.eq_ignore_ascii_case("adaptive") => RetryConfig::adaptive(),
        // The word of other SDKs, which profiles may be written for.
        Some((_, mode))
            if ["standard", "legacy"]
                .iter()
                .any(|m| mode.eq_ignore_ascii_case(m)) =>
        {
            RetryConfig::standard()
        }
        Some((name, mode)) => return Err(wrong(&name, &mode, "write standard or adaptive")),
        None => RetryConfig::standard(),
    };
    let Some((name, value)) = attempts else {
        return Ok(retries);
    };
    match value.parse() {
        Ok(attempts) if attempts > 0 => Ok(retries.with_max_attempts(attempts)),
        _ => Err(wrong(&name, &value, "write a number, 1 or more")),
    }
}

/// The address that the profile names for S3, or else for every service.
fn endpoint_of_profile(profiles: &ProfileSet, profile: &str) -> Result<Option<String>, String> {
    let key = ServiceConfigKey::builder()
        .service_id("S3")
        .env("AWS_ENDPOINT_URL")
        .profile("endpoint_url")
        .build()
        .map_err(|e| e.to_string())?;
    let no_variables = Env::from_slice(&[]);
    let as_it_is = |value: &str| Ok::<_, Infallible>(value.to_owned());
    let found = get_service_env_config(key, &no_variables, Some(profiles), as_it_is);
    let found = found
        .map_err(|e| e.to_string())?
        .filter(|found| !found.is_empty());
    found
        .map(|found| {
            check_endpoint(&found)
                .map_err(|advice| wrong(&of_profile("endpoint_url", profile), &found, &advice))
        })
        .transpose()
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
        evaluate(find, Some(&ProfileSet::default()), |_| {
            Ok(b"no certificate".to_vec())
        })
    }

    async fn profiles(contents: &str, selected: &'static str) -> ProfileSet {
        let files = EnvConfigFiles::builder()
            .with_contents(EnvConfigFileKind::Config, contents)
            .build();
        let selected = Some(Cow::Borrowed(selected));
        let profiles = aws_config::profile::load(&Fs::real(), &Env::real(), &files, selected).await;
        profiles.expect("well formed")
    }

    fn no_file(_: &Path) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::NotFound.into())
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
            "AWS_MAX_ATTEMPTS",
            "AWS_RETRY_MODE",
        ];
        for name in names {
            assert_eq!(of(&[(name, "")]).as_ref(), Ok(&unset), "{name}");
        }
        let both = of(&[("AWS_ENDPOINT_URL_S3", ""), ("AWS_ENDPOINT_URL", "http://h:1")]);
        assert_eq!(
            both.expect("well formed").endpoint_url.as_deref(),
            Some("http://h:1")
        );
        let one = of(&[("AWS_MAX_ATTEMPTS", "7"), ("AWS_RETRY_MODE", "")]).expect("well formed");
        assert_eq!(one.retries, RetryConfig::standard().with_max_attempts(7));
        let other = of(&[("AWS_MAX_ATTEMPTS", ""), ("AWS_RETRY_MODE", "Adaptive")]).expect("well formed");
        assert_eq!(other.retries, RetryConfig::adaptive());
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
        let profiles = profiles("[profile private]\nca_bundle = /ca.pem\n", "private").await;
        let named = |name: &str| (name == "AWS_PROFILE").then(|| "private".to_owned());
        let error = evaluate(named, Some(&profiles), no_file).expect_err("no file");
        assert!(
            error.contains("ca_bundle of the profile private is \"/ca.pem\""),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_profile_names_an_address_and_retries() {
        let contents = "[default]\nendpoint_url = http://all:1\nservices = own\nmax_attempts = 5\nretry_mode = legacy\n\
                        [services own]\ns3 =\n  endpoint_url = http://s3:1\n";
        let profiles = profiles(contents, DEFAULT_PROFILE).await;
        let under = |variables: &'static [(&str, &str)]| {
            let find = |name: &str| {
                let found = variables.iter().find(|(variable, _)| *variable == name);
                found.map(|(_, value)| value.to_string())
            };
            evaluate(find, Some(&profiles), no_file).expect("well formed")
        };
        let alone = under(&[("AWS_ENDPOINT_URL", ""), ("AWS_ENDPOINT_URL_S3", "")]);
        assert_eq!(alone.endpoint_url.as_deref(), Some("http://s3:1"));
        assert_eq!(alone.retries, RetryConfig::standard().with_max_attempts(5));
        let beside = under(&[
            ("AWS_ENDPOINT_URL", "http://variable:1"),
            ("AWS_MAX_ATTEMPTS", "2"),
        ]);
        assert_eq!(beside.endpoint_url.as_deref(), Some("http://variable:1"));
        assert_eq!(beside.retries, RetryConfig::standard().with_max_attempts(2));
        let ignored = under(&[("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")]);
        assert_eq!(ignored.endpoint_url, None);
    }

    #[tokio::test]
    async fn settings_of_a_profile_are_checked() {
        for (line, advice) in [
            (
                "endpoint_url = minio:9000",
                "endpoint_url of the profile default is \"minio:9000\"; write http://",
            ),
            (
                "max_attempts = many",
                "max_attempts of the profile default is \"many\"; write a number",
            ),
            (
                "retry_mode = never",
                "retry_mode of the profile default is \"never\"; write standard",
            ),
        ] {
            let profiles = profiles(&format!("[default]\n{line}\n"), DEFAULT_PROFILE).await;
            let error = evaluate(|_| None, Some(&profiles), no_file).expect_err(line);
            assert!(error.contains(advice), "{error}");
        }
    }

    /// What is wrong with files is told by the SDK, which names them.
    #[test]
    fn a_profile_in_files_that_cannot_be_read_is_not_called_missing() {
        let named = |name: &str| (name == "AWS_PROFILE").then(|| "work".to_owned());
        let environment = evaluate(named, None, no_file).expect("not known to be missing");
        assert_eq!(environment.profile, "work");
    }
}

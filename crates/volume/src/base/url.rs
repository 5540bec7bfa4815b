//! Where a volume lives: `s3://bucket/prefix/` or `file:///path/`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The address of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum VolumeUrl {
    /// A prefix in an S3 bucket.
    S3 {
        /// Name of the bucket.
        bucket: String,
        /// Key prefix without leading or trailing slash; never empty.
        prefix: String,
    },
    /// A directory of this machine.
    File {
        /// Absolute path without trailing slash; never the root directory.
        path: PathBuf,
    },
}

/// A volume URL that cannot be used. The text names the URL and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot use \"{url}\" as a volume URL: {reason}")]
pub struct UrlError {
    /// The URL as it was given.
    pub url: String,
    /// What is wrong with it and what to do.
    pub reason: String,
}

/// Longest key prefix: S3 keys hold 1024 bytes, the rest is room for the names of a volume's objects.
const PREFIX_LEN_MAX_BYTES: usize = 900;

/// What to write, for the errors of URLs that are neither.
const FORMS: &str = "write s3://BUCKET/PREFIX/ or file:///ABSOLUTE/PATH/";

impl VolumeUrl {
    /// Reads a URL. A trailing slash may be left out; `file://./path` is taken from the current directory.
    ///
    /// # Errors
    /// [`UrlError`] for anything that is not clearly one volume: another scheme, an empty prefix, `.`, `..` or empty
    /// components, a query, names ending in `.meta` (kept for what lies beside a volume), bad bucket names.
    pub fn parse(url: &str) -> Result<Self, UrlError> {
        let fail = |reason: String| UrlError {
            url: url.to_string(),
            reason,
        };
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err(fail(format!("it has no scheme; {FORMS}")));
        };
        if let Some(bad) = url.chars().find(|&c| c == '?' || c == '#' || c.is_control()) {
            return Err(fail(format!(
                "it contains {bad:?}; queries, fragments and control characters are not allowed"
            )));
        }
        match scheme {
            "s3" => parse_s3(rest),
            "file" => parse_file(rest),
            _ => Err(format!("the scheme \"{scheme}://\" is not supported; {FORMS}")),
        }
        .map_err(fail)
    }
}

fn parse_s3(rest: &str) -> Result<VolumeUrl, String> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    check_bucket(bucket)?;
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    if prefix.is_empty() {
        return Err(format!(
            "it names a whole bucket; add a prefix for the volume, as in s3://{bucket}/my-volume/"
        ));
    }
    if prefix.len() > PREFIX_LEN_MAX_BYTES {
        return Err(format!(
            "the prefix is longer than {PREFIX_LEN_MAX_BYTES} bytes; choose a shorter one"
        ));
    }
    check_components(prefix)?;
    Ok(VolumeUrl::S3 {
        bucket: bucket.to_string(),
        prefix: prefix.to_string(),
    })
}

fn parse_file(rest: &str) -> Result<VolumeUrl, String> {
    let components = match rest.strip_prefix("./") {
        Some(relative) => relative,
        None => rest.strip_prefix('/').ok_or_else(|| {
            format!("the path is not absolute; write file:///{rest} (three slashes) or file://./{rest}")
        })?,
    };
    let components = components.strip_suffix('/').unwrap_or(components);
    if components.is_empty() {
        return Err("it names no directory of its own; add one, as in file:///srv/my-volume/".to_string());
    }
    check_components(components)?;
    let path = if rest.starts_with('/') {
        Path::new("/").join(components)
    } else {
        let current = std::env::current_dir()
            .map_err(|error| format!("the current directory is unknown ({error}); write an absolute path"))?;
        current.join(components)
    };
    if path.to_str().is_none() {
        return Err("the current directory's name is not UTF-8; write an absolute path".to_string());
    }
    Ok(VolumeUrl::File { path })
}

/// The naming rules of general purpose buckets, and those that buckets of before 2018 and other stores follow: up to 255
/// letters, digits, dots, hyphens and underscores. <https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html>
fn check_bucket(bucket: &str) -> Result<(), String> {
    let edge = |c: char| c.is_ascii_alphanumeric();
    if bucket.is_empty() {
        return Err(format!("the bucket is missing; {FORMS}"));
    }
    let well_formed = (3..=255).contains(&bucket.len())
        && bucket.chars().all(|c| edge(c) || ['-', '.', '_'].contains(&c))
        && bucket.starts_with(edge)
        && bucket.ends_with(edge);
    if !well_formed {
        return Err(format!(
            "\"{bucket}\" is not a bucket name (3 to 255 letters, digits, dots, hyphens and underscores)"
        ));
    }
    if bucket.ends_with("--x-s3") {
        return Err(format!(
            "\"{bucket}\" is a directory bucket, whose listings a volume cannot do with; use a general purpose bucket"
        ));
    }
    Ok(())
}

fn check_components(path: &str) -> Result<(), String> {
    for component in path.split('/') {
        match component {
            "" => return Err("it contains \"//\"; write single slashes".to_string()),
            "." | ".." => return Err(format!("it contains \"{component}\"; write the path out")),
            _ if component.ends_with(".meta") => {
                return Err(format!(
                    "\"{component}\" ends in .meta, which is kept for what lies beside a volume; \
                     choose another name"
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

impl FromStr for VolumeUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        Self::parse(url)
    }
}

/// Canonical, with a trailing slash.
impl fmt::Display for VolumeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}/"),
            Self::File { path } => write!(f, "file://{}/", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s3(bucket: &str, prefix: &str) -> VolumeUrl {
        VolumeUrl::S3 {
            bucket: bucket.into(),
            prefix: prefix.into(),
        }
    }

    fn reason(url: &str) -> String {
        let error = VolumeUrl::parse(url).expect_err(url);
        assert_eq!(error.url, url);
        assert!(
            error.to_string().contains(&format!("\"{url}\"")),
            "the error names the URL: {error}"
        );
        error.reason
    }

    #[test]
    fn s3_urls() {
        let expected = s3("mybucket", "root/of/backend");
        for url in ["s3://mybucket/root/of/backend/", "s3://mybucket/root/of/backend"] {
            let parsed = VolumeUrl::parse(url).unwrap();
            assert_eq!(parsed, expected);
            assert_eq!(parsed.to_string(), "s3://mybucket/root/of/backend/");
        }
        assert_eq!("s3://a.b-c1/vol 1=ü".parse(), Ok(s3("a.b-c1", "vol 1=ü")));
    }

    #[test]
    fn file_urls() {
        let parsed = VolumeUrl::parse("file:///srv/vol/").unwrap();
        assert_eq!(
            parsed,
            VolumeUrl::File {
                path: "/srv/vol".into()
            }
        );
        assert_eq!(parsed.to_string(), "file:///srv/vol/");
        assert_eq!(VolumeUrl::parse("file:///srv/vol"), Ok(parsed));
    }

    #[test]
    fn relative_file_urls_become_absolute() {
        let VolumeUrl::File { path } = VolumeUrl::parse("file://./data/vol/").unwrap() else {
            panic!("not a file")
        };
        assert_eq!(path, std::env::current_dir().unwrap().join("data/vol"));
    }

    #[test]
    fn canonical_form_reads_back() {
        for url in ["s3://bucket/a/b", "file:///a/b", "file://./a"] {
            let parsed = VolumeUrl::parse(url).unwrap();
            assert_eq!(VolumeUrl::parse(&parsed.to_string()), Ok(parsed));
        }
    }

    #[test]
    fn other_schemes_are_refused_with_what_works() {
        for url in [
            "http://host/vol/",
            "gs://bucket/vol/",
            "S3://bucket/vol/",
            "bucket/vol",
            "/srv/vol",
            "",
            "s3:/b/v",
        ] {
            let reason = reason(url);
            assert!(
                reason.contains("s3://BUCKET/PREFIX/") && reason.contains("file:///"),
                "{url}: {reason}"
            );
        }
    }

    #[test]
    fn whole_buckets_and_the_root_directory_are_refused() {
        for url in ["s3://bucket", "s3://bucket/"] {
            assert!(reason(url).contains("s3://bucket/my-volume/"), "{url}");
        }
        for url in ["file:///", "file://./"] {
            assert!(reason(url).contains("no directory"), "{url}");
        }
        assert!(reason("s3:///vol/").contains("bucket is missing"));
    }

    #[test]
    fn ambiguous_paths_are_refused() {
        for base in ["s3://bucket/", "file:///"] {
            for (path, part) in [
                ("a//b", "\"//\""),
                ("/a", "\"//\""),
                ("a//", "\"//\""),
                ("../a", "\"..\""),
                ("a/./b", "\".\""),
                ("a/..", "\"..\""),
                ("a?versionId=1", "queries"),
                ("a#b", "fragments"),
                ("a\nb", "control"),
                ("a\0b", "control"),
                ("vol.meta", ".meta"),
                ("vol.meta/", ".meta"),
                ("vol.meta/inner", ".meta"),
            ] {
                let reason = reason(&format!("{base}{path}"));
                assert!(reason.contains(part), "{base}{path}: {reason}");
            }
        }
    }

    #[test]
    fn two_slashes_for_three_are_explained() {
        assert!(reason("file://srv/vol").contains("file:///srv/vol"));
    }

    #[test]
    fn buckets_of_old_and_of_other_stores_are_taken() {
        for bucket in ["Bucket", "my_bucket", "My.Old_Bucket-1", &"a".repeat(64)] {
            assert_eq!(
                VolumeUrl::parse(&format!("s3://{bucket}/vol/")),
                Ok(s3(bucket, "vol"))
            );
        }
    }

    #[test]
    fn directory_buckets_are_refused_with_what_works() {
        assert!(reason("s3://disks--use1-az4--x-s3/vol/").contains("use a general purpose bucket"));
    }

    #[test]
    fn bucket_names_follow_the_rules() {
        for bucket in ["ab", "-bucket", "bucket.", "user:pw@bucket", &"a".repeat(256)] {
            assert!(
                reason(&format!("s3://{bucket}/vol/")).contains("not a bucket name"),
                "{bucket}"
            );
        }
    }

    #[test]
    fn prefixes_leave_room_for_object_names() {
        assert!(VolumeUrl::parse(&format!("s3://bucket/{}/", "a".repeat(900))).is_ok());
        assert!(reason(&format!("s3://bucket/{}/", "a".repeat(901))).contains("shorter"));
    }
}

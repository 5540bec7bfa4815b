//! NBD URIs.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::AttachError;

const PORT: u16 = 10809;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Tcp(String, u16),
    Unix(PathBuf),
}

/// An export of a server: `nbd://HOST[:PORT][/EXPORT]` or `nbd+unix:///[EXPORT]?socket=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    text: String,
    pub(crate) place: Place,
    pub(crate) export: String,
}

impl fmt::Display for Uri {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.text)
    }
}

impl FromStr for Uri {
    type Err = AttachError;

    fn from_str(text: &str) -> Result<Self, AttachError> {
        let wrong = |why: &str| AttachError::Uri {
            uri: text.to_owned(),
            why: why.to_owned(),
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| {
            wrong("it is no URI; say nbd://HOST[:PORT][/EXPORT] or nbd+unix:///[EXPORT]?socket=PATH")
        })?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let decode = |text: &str| {
            decode(text).ok_or_else(|| wrong("a % in it is not followed by two hexadecimal digits"))
        };
        let place = match scheme {
            "nbd" if !query.is_empty() => return Err(wrong("what follows the '?' is not known")),
            "nbd" if host.is_empty() => return Err(wrong("it names no host")),
            "nbd" => {
                let (host, port) = match host.rsplit_once(':') {
                    Some((host, port)) if !port.ends_with(']') => (
                        host,
                        port.parse()
                            .map_err(|_| wrong("its port is no number up to 65535"))?,
                    ),
                    _ => (host, PORT),
                };
                Place::Tcp(
                    host.trim_start_matches('[').trim_end_matches(']').to_owned(),
                    port,
                )
            }
            "nbd+unix" => match query.strip_prefix("socket=") {
                Some(path) if host.is_empty() && path.starts_with('/') && !path.contains('&') => {
                    Place::Unix(decode(path)?.into())
                }
                _ => {
                    return Err(wrong(
                        "it should be nbd+unix:///[EXPORT]?socket=PATH, the path beginning with /",
                    ));
                }
            },
            "nbds" | "nbds+unix" => {
                return Err(wrong(
                    "TLS is not supported yet; serve on a UNIX socket, or let a tunnel (stunnel, ssh -L) do the TLS and attach its end",
                ));
            }
            "s3" | "file" => {
                return Err(wrong(
                    "that is a volume; attach what its server listens on, as 'hypernbd serve' prints it",
                ));
            }
            _ => return Err(wrong("only nbd:// and nbd+unix:// can be")),
        };
        if text.chars().any(char::is_control) {
            return Err(wrong("it holds control characters"));
        }
        Ok(Self {
            text: text.to_owned(),
            place,
            export: decode(export)?,
        })
    }
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        (rest, bytes) = match first {
            b'%' => {
                let (digits, after) = after.split_at_checked(2)?;
                bytes.push(u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?);
                (after, bytes)
            }
            other => {
                bytes.push(other);
                (after, bytes)
            }
        };
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (Place, String) {
        let uri: Uri = text.parse().unwrap();
        assert_eq!(uri.to_string(), text);
        (uri.place, uri.export)
    }

    #[test]
    fn uris_are_understood() {
        let tcp = |host: &str, port| Place::Tcp(host.to_owned(), port);
        assert_eq!(
            parsed("nbd://localhost"),
            (tcp("localhost", 10809), String::new())
        );
        assert_eq!(
            parsed("nbd://10.0.2.2:7788/@monday"),
            (tcp("10.0.2.2", 7788), "@monday".to_owned())
        );
        assert_eq!(parsed("nbd://[::1]:1/"), (tcp("::1", 1), String::new()));
        assert_eq!(parsed("nbd://[fe80::2]"), (tcp("fe80::2", 10809), String::new()));
        let unix = Place::Unix("/run/a b.sock".into());
        assert_eq!(
            parsed("nbd+unix:///x%2Fy?socket=/run/a%20b.sock"),
            (unix, "x/y".to_owned())
        );
    }

    #[test]
    fn others_are_refused_with_what_to_do() {
        for (text, word) in [
            ("/run/disk.sock", "nbd+unix:///"),
            ("nbds://host", "tunnel"),
            ("s3://bucket/vol/", "hypernbd serve"),
            ("nbd://", "no host"),
            ("nbd://host:x", "port"),
            ("nbd+unix:///?path=/x", "socket=PATH"),
            ("nbd+unix:///?socket=x", "beginning with /"),
            ("nbd+unix:///?socket=/%zz", "hexadecimal"),
            ("http://host", "only nbd://"),
        ] {
            let error = text.parse::<Uri>().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}

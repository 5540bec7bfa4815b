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

/// An export of a server: `nbd://HOST[:PORT][/EXPORT]` or `nbd+unix:///[EXPORT]?socket=PATH`, with TLS `nbds` and
/// `tls-certificates=DIR`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    text: String,
    pub(crate) place: Place,
    /// The directory of certificates, and whose the server's must be.
    pub(crate) tls: Option<(PathBuf, String)>,
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
        let (mut socket, mut certificates, mut hostname) = (None, None, None);
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let slot = match key {
                "socket" => &mut socket,
                "tls-certificates" => &mut certificates,
                "tls-hostname" => &mut hostname,
                "tls-psk-file" => {
                    return Err(wrong(
                        "keys that are shared cannot be used for TLS; use tls-certificates=DIR",
                    ));
                }
                _ => return Err(wrong(&format!("the parameter {key:?} is not known"))),
            };
            if slot.replace(decode(value)?).is_some() {
                return Err(wrong(&format!("it says {key:?} twice")));
            }
        }
        let is_tls = scheme.starts_with("nbds");
        let place = match scheme {
            "nbd" | "nbds" if socket.is_some() => {
                return Err(wrong("a socket has nbd+unix:/// or nbds+unix:/// before it"));
            }
            "nbd" | "nbds" if host.is_empty() => return Err(wrong("it names no host")),
            "nbd" | "nbds" => {
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
            "nbd+unix" | "nbds+unix" => match socket {
                Some(path) if host.is_empty() && path.starts_with('/') => Place::Unix(path.into()),
                _ => {
                    return Err(wrong(
                        "it should be nbd+unix:///[EXPORT]?socket=PATH, the path beginning with /",
                    ));
                }
            },
            "s3" | "file" => {
                return Err(wrong(
                    "that is a volume; attach what its server listens on, as 'hypernbd serve' prints it",
                ));
            }
            _ => return Err(wrong("only nbd://, nbd+unix://, nbds:// and nbds+unix:// can be")),
        };
        let host = match &place {
            Place::Tcp(host, _) => host.clone(),
            Place::Unix(_) => "localhost".to_owned(),
        };
        let tls = match (is_tls, certificates, hostname) {
            (true, Some(dir), hostname) if dir.starts_with('/') => {
                Some((dir.into(), hostname.unwrap_or(host)))
            }
            (true, ..) => {
                return Err(wrong(
                    "say where its certificates are: ?tls-certificates=DIR, the path beginning with / (ca-cert.pem in it, client-cert.pem \
                     and client-key.pem if the server asks for them)",
                ));
            }
            (false, None, None) => None,
            (false, ..) => return Err(wrong("TLS is asked for by nbds:// or nbds+unix://")),
        };
        if text.chars().any(char::is_control) {
            return Err(wrong("it holds control characters"));
        }
        Ok(Self {
            text: text.to_owned(),
            place,
            tls,
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
    fn tls_is_understood() {
        let tls = |text: &str| text.parse::<Uri>().unwrap().tls;
        let of = |host: &str| Some(("/etc/pki/a b".into(), host.to_owned()));
        assert_eq!(tls("nbds://h:1/?tls-certificates=/etc/pki/a%20b"), of("h"));
        assert_eq!(
            tls("nbds+unix:///?socket=/s&tls-certificates=/etc/pki/a%20b"),
            of("localhost")
        );
        assert_eq!(
            tls("nbds+unix:///?tls-hostname=store&tls-certificates=/etc/pki/a%20b&socket=/s"),
            of("store")
        );
        assert_eq!(tls("nbd://h"), None);
    }

    #[test]
    fn others_are_refused_with_what_to_do() {
        for (text, word) in [
            ("/run/disk.sock", "nbd+unix:///"),
            ("nbds://host", "tls-certificates=DIR"),
            ("nbds://host?tls-certificates=pki", "beginning with /"),
            ("nbds://host?tls-psk-file=/keys", "shared"),
            ("nbd://host?tls-certificates=/pki", "nbds://"),
            ("nbd://host?socket=/x", "nbd+unix"),
            ("nbd+unix:///?socket=/x&socket=/y", "twice"),
            ("nbd+unix:///?socket=/x&block=1", "\"block\" is not known"),
            ("s3://bucket/vol/", "hypernbd serve"),
            ("nbd://", "no host"),
            ("nbd://host:x", "port"),
            ("nbd+unix:///", "socket=PATH"),
            ("nbd+unix:///?socket=x", "beginning with /"),
            ("nbd+unix:///?socket=/%zz", "hexadecimal"),
            ("http://host", "only nbd://"),
        ] {
            let error = text.parse::<Uri>().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}

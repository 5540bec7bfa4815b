//! Where a server tells of itself.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// A place to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// A TCP address; port 0 lets the system choose one.
    Tcp(SocketAddr),
    /// A Unix socket; the path is absolute.
    Unix(PathBuf),
}

impl ListenAddress {
    /// Reads `ADDRESS:PORT` or `unix:/PATH`.
    ///
    /// # Errors
    /// What to write.
    pub fn parse(text: &str) -> Result<Self, String> {
        let advice = "write an address and a port of this machine, as in 127.0.0.1:9100, or unix:/PATH";
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') && !path.ends_with('/') => Ok(Self::Unix(path.into())),
            Some(_) => Err(advice.into()),
            None => text.parse().map(Self::Tcp).map_err(|_| advice.into()),
        }
    }

    /// Whether other machines can reach it.
    pub fn is_reachable_from_outside(&self) -> bool {
        matches!(self, Self::Tcp(address) if !address.ip().is_loopback())
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Where a server is told what to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ControlSocket {
    /// In the runtime directory, if there is one that can be used.
    #[default]
    Auto,
    /// Nowhere.
    Off,
    /// At this absolute path.
    At(PathBuf),
}

impl ControlSocket {
    /// Reads `auto`, `off` or `unix:/PATH`.
    ///
    /// # Errors
    /// What to write.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            other => match ListenAddress::parse(other) {
                Ok(ListenAddress::Unix(path)) => Ok(Self::At(path)),
                _ => Err("write auto, off or unix:/PATH".into()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_socket_is_never_on_the_network() {
        assert_eq!(ControlSocket::parse("auto"), Ok(ControlSocket::Auto));
        assert_eq!(ControlSocket::parse("off"), Ok(ControlSocket::Off));
        assert_eq!(
            ControlSocket::parse("unix:/run/c"),
            Ok(ControlSocket::At("/run/c".into()))
        );
        for wrong in ["127.0.0.1:9100", "yes", "/run/c", "unix:c", ""] {
            assert!(ControlSocket::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn addresses_are_read() {
        for (text, shown, outside) in [
            ("127.0.0.1:9100", "http://127.0.0.1:9100", false),
            ("[::1]:0", "http://[::1]:0", false),
            ("0.0.0.0:9100", "http://0.0.0.0:9100", true),
            ("unix:/run/m.sock", "unix:/run/m.sock", false),
        ] {
            let address = ListenAddress::parse(text).unwrap();
            assert_eq!(
                (address.to_string().as_str(), address.is_reachable_from_outside()),
                (shown, outside)
            );
        }
        for wrong in [
            "",
            "9100",
            ":9100",
            "localhost:9100",
            "127.0.0.1",
            "unix:",
            "unix:m",
            "unix:/run/",
            "127.0.0.1:99999",
        ] {
            assert!(ListenAddress::parse(wrong).is_err(), "{wrong}");
        }
    }
}

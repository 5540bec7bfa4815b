//! Where a server listens, and the lines that connect clients to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A TCP port; the unspecified address means all of the machine's.
    Tcp(SocketAddr),
    /// A Unix socket; the path is absolute.
    Unix(PathBuf),
}

/// What clients may do, and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clients {
    /// They cannot write.
    pub read_only: bool,
    /// They must use TLS.
    pub tls: bool,
}

impl Address {
    /// The NBD URI: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md>
    pub fn uri(&self, tls: bool) -> String {
        let scheme = if tls { "nbds" } else { "nbd" };
        match self {
            Self::Tcp(address) => {
                let address = SocketAddr::new(local(address.ip()), address.port());
                format!("{scheme}://{address}")
            }
            Self::Unix(path) => {
                let path = percent_encoded(&path.display().to_string());
                format!("{scheme}+unix:///?socket={path}")
            }
        }
    }

    /// As [`Self::uri`], of an export.
    fn uri_of(&self, export: &str, tls: bool) -> String {
        let uri = self.uri(tls);
        match self {
            Self::Tcp(_) => format!("{uri}/{export}"),
            Self::Unix(_) => uri.replacen("///?", &format!("///{export}?"), 1),
        }
    }

    /// As [`Self::connect_lines`], of a server of many volumes, in which NAME stands for one of them.
    pub fn connect_lines_of_many(&self, clients: Clients) -> String {
        let (list, one) = (self.uri(clients.tls), self.uri_of("NAME", clients.tls));
        format!(
            "# what there is\n\
             nbdinfo --list {list}\n\
             # a block device of this machine\n\
             hypernbd attach {one}\n\
             # a copy of all its data (the other way round, nbdcopy overwrites the volume)\n\
             nbdcopy --progress {one} volume.img\n",
            list = quoted(&list),
            one = quoted(&one),
        )
    }

    /// nbdkit's arguments for listening here.
    pub fn nbdkit_args(&self) -> Vec<String> {
        match self {
            Self::Tcp(address) => vec![
                format!("--ipaddr={}", address.ip()),
                format!("--port={}", address.port()),
            ],
            Self::Unix(path) => vec![format!("--unix={}", path.display())],
        }
    }

    /// Whether other machines can connect.
    pub fn is_reachable_from_outside(&self) -> bool {
        matches!(self, Self::Tcp(address) if !address.ip().is_loopback())
    }

    /// Lines for a shell: comments, and commands that work as they stand. `reply_wait_max` is the longest a request
    /// may wait for its reply. QEMU opens a read-only export only where it is told to.
    pub fn connect_lines(&self, reply_wait_max: Duration, clients: Clients) -> String {
        let uri = self.uri(clients.tls);
        let copies = format!(
            "# a copy of all its data (the other way round, nbdcopy overwrites the volume)\n\
             nbdcopy --progress {uri} volume.img\n\
             # a file, ./volume/nbd, without root (detach: fusermount3 -u volume)\n\
             mkdir -p volume && nbdfuse volume {uri}\n",
            uri = quoted(&uri),
        );
        if clients.tls {
            return format!(
                "# certificates: in ~/.pki/libnbd, or named in the URI (tls-certificates=DIRECTORY); nbd-client takes -x, -F, \
                 -K and -A, QEMU an -object tls-creds-x509\n{copies}"
            );
        }
        // Above the server's own limit, so that it is the server who says that a request has failed.
        let timeout_s = reply_wait_max.as_secs() + 30;
        let read_only = if clients.read_only { ",readonly=on" } else { "" };
        let nbd_client_address = match self {
            Self::Tcp(address) => format!("{} {}", local(address.ip()), address.port()),
            Self::Unix(path) => format!("-unix {}", quoted(&path.display().to_string())),
        };
        format!(
            "# a block device of this machine (detach: sudo nbd-client -d /dev/nbd0)\n\
             sudo modprobe nbd && sudo nbd-client {nbd_client_address} /dev/nbd0 -C 4 -t {timeout_s}\n\
             # a disk of a virtual machine\n\
             qemu-system-x86_64 -m 2G -drive {drive}\n{copies}",
            drive = quoted(&format!(
                "file={uri},format=raw,if=virtio,cache=none,discard=unmap{read_only}"
            )),
        )
    }
}

/// An address this machine reaches itself by.
fn local(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) if v4.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(v6) if v6.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        specified => specified,
    }
}

/// Escapes what is not plain in a URI's query, and commas, which QEMU gives a meaning.
fn percent_encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    text.bytes()
        .map(|byte| {
            if plain(byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

/// The text as one word of a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/-._~:=,+%@".contains(c);
    if text.chars().all(plain) {
        text.to_string()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(address: &str) -> Address {
        Address::Tcp(address.parse().unwrap())
    }

    #[test]
    fn uris() {
        for (address, uri) in [
            (tcp("127.0.0.1:10809"), "nbd://127.0.0.1:10809"),
            (tcp("0.0.0.0:7788"), "nbd://127.0.0.1:7788"),
            (tcp("[::1]:7788"), "nbd://[::1]:7788"),
            (
                Address::Unix("/run/a.sock".into()),
                "nbd+unix:///?socket=/run/a.sock",
            ),
            (
                Address::Unix("/run/a b,&c".into()),
                "nbd+unix:///?socket=/run/a%20b%2C%26c",
            ),
        ] {
            assert_eq!(address.uri(false), uri);
            assert_eq!(address.uri(true), uri.replacen("nbd", "nbds", 1));
        }
    }

    #[test]
    fn lines_for_tcp() {
        let lines = tcp("127.0.0.1:10809").connect_lines(Duration::from_secs(60), Clients::default());
        for line in [
            "sudo modprobe nbd && sudo nbd-client 127.0.0.1 10809 /dev/nbd0 -C 4 -t 90",
            "qemu-system-x86_64 -m 2G -drive file=nbd://127.0.0.1:10809,format=raw,if=virtio,cache=none,discard=unmap",
            "nbdcopy --progress nbd://127.0.0.1:10809 volume.img",
            "mkdir -p volume && nbdfuse volume nbd://127.0.0.1:10809",
        ] {
            assert!(lines.lines().any(|l| l == line), "{line}\nis not among\n{lines}");
        }
    }

    #[test]
    fn lines_for_tls_name_no_plain_connection() {
        let clients = Clients {
            tls: true,
            ..Clients::default()
        };
        let lines = tcp("127.0.0.1:1").connect_lines(Duration::from_secs(60), clients);
        assert!(
            lines.contains("nbdcopy --progress nbds://127.0.0.1:1") && !lines.contains("nbd://"),
            "{lines}"
        );
    }

    #[test]
    fn a_disk_of_a_read_only_server_is_read_only() {
        let address = tcp("127.0.0.1:10809");
        for (read_only, count) in [(true, 1), (false, 0)] {
            let clients = Clients {
                read_only,
                ..Clients::default()
            };
            let lines = address.connect_lines(Duration::from_secs(60), clients);
            assert_eq!(
                lines.matches("discard=unmap,readonly=on").count(),
                count,
                "{lines}"
            );
        }
    }

    #[test]
    fn lines_for_a_socket_are_quoted() {
        let lines =
            Address::Unix("/run/it's.sock".into()).connect_lines(Duration::from_secs(60), Clients::default());
        for line in [
            r"sudo modprobe nbd && sudo nbd-client -unix '/run/it'\''s.sock' /dev/nbd0 -C 4 -t 90",
            "nbdcopy --progress 'nbd+unix:///?socket=/run/it%27s.sock' volume.img",
        ] {
            assert!(lines.lines().any(|l| l == line), "{line}\nis not among\n{lines}");
        }
    }

    #[test]
    fn only_loopback_and_sockets_stay_inside() {
        for (address, outside) in [
            (tcp("127.0.0.1:1"), false),
            (tcp("[::1]:1"), false),
            (Address::Unix("/a".into()), false),
            (tcp("0.0.0.0:1"), true),
            (tcp("192.0.2.1:1"), true),
        ] {
            assert_eq!(address.is_reachable_from_outside(), outside, "{address:?}");
        }
    }
}

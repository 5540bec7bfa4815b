//! TLS below NBD. A thread carries a link's bytes between TLS and a pair of sockets, of which the relay has one: it reads and writes that
//! like any other.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::error::AttachError;
use crate::nbd::wire::lacks_memory;

const STACK_BYTES: usize = 256 << 10;
const PIECE_BYTES: usize = 64 << 10;
/// While so much waits for the relay, no more is read.
const WAITING_MAX_BYTES: usize = 1 << 20;

/// What a link is secured by. Its files are read once: when a server comes back they may lie on the device that waits for it.
#[derive(Debug, Clone)]
pub(crate) struct Tls {
    config: Arc<ClientConfig>,
    host: ServerName<'static>,
}

impl Tls {
    /// Reads a directory in the form of nbdkit's and libnbd's: `ca-cert.pem`, and `client-cert.pem` and `client-key.pem` if the server
    /// wants to know who comes.
    pub(crate) fn load(dir: &Path, host: &str) -> Result<Self, AttachError> {
        let failed = |path: &Path, why: &dyn std::fmt::Display| AttachError::Tls {
            path: path.to_owned(),
            why: why.to_string(),
        };
        let certificates = |name: &str| {
            let path = dir.join(name);
            let read = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            match read {
                Ok(read) if read.is_empty() => Err(failed(&path, &"it holds no certificate")),
                read => read.map_err(|error| failed(&path, &error)),
            }
        };
        let mut roots = RootCertStore::empty();
        for root in certificates("ca-cert.pem")? {
            roots.add(root).map_err(|error| failed(dir, &error))?;
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
        let builder = builder
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(dir, &error))?;
        let builder = builder.with_root_certificates(roots);
        let key = dir.join("client-key.pem");
        let config = match key.exists() {
            true => {
                let read = PrivateKeyDer::from_pem_file(&key).map_err(|error| failed(&key, &error))?;
                let chain = certificates("client-cert.pem")?;
                builder
                    .with_client_auth_cert(chain, read)
                    .map_err(|error| failed(&key, &error))?
            }
            false => builder.with_no_client_auth(),
        };
        let host = ServerName::try_from(host.to_owned()).map_err(|error| failed(dir, &error))?;
        Ok(Self {
            config: Arc::new(config),
            host,
        })
    }

    /// Secures a connection whose server has agreed to; gives what to speak through.
    pub(crate) fn secure(&self, mut socket: UnixStream) -> io::Result<UnixStream> {
        let mut tls =
            ClientConnection::new(self.config.clone(), self.host.clone()).map_err(io::Error::other)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut socket)?;
        }
        let (ours, relays) = UnixStream::pair()?;
        for socket in [&socket, &ours] {
            socket.set_nonblocking(true)?;
        }
        let thread = thread::Builder::new()
            .name("tls".to_owned())
            .stack_size(STACK_BYTES);
        thread.spawn(move || {
            if let Err(error) = carry(&mut tls, &socket, &ours) {
                log::debug!("the link ended: {error}");
            }
        })?;
        Ok(relays)
    }
}

/// Carries bytes until either side ends.
fn carry(tls: &mut ClientConnection, network: &UnixStream, relay: &UnixStream) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut received = Vec::new();
    tls.set_buffer_limit(None);
    loop {
        let wanted = |reads: bool, writes: bool| {
            let wanted = [(reads, PollFlags::IN), (writes, PollFlags::OUT)];
            wanted
                .iter()
                .filter(|(is, _)| *is)
                .fold(PollFlags::empty(), |all, (_, one)| all | *one)
        };
        let is_sent = !tls.wants_write();
        let mut sockets = [
            PollFd::new(network, wanted(received.len() < WAITING_MAX_BYTES, !is_sent)),
            PollFd::new(relay, wanted(is_sent, !received.is_empty())),
        ];
        match poll(&mut sockets, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // Nothing more is taken from a relay that has gone, and this network takes nothing more of what it left.
        if !is_sent && sockets[1].revents().contains(PollFlags::HUP) {
            return Ok(());
        }
        let is_over = received.len() < WAITING_MAX_BYTES && receive(tls, network, &mut received)?;
        if is_sent {
            match now(|| (&mut &*relay).read(&mut piece))? {
                Some(0) => {
                    tls.send_close_notify();
                    send(tls, network)?;
                    return Ok(());
                }
                Some(read) => tls.writer().write_all(&piece[..read])?,
                None => {}
            }
        }
        send(tls, network)?;
        while !received.is_empty()
            && let Some(written) = now(|| (&mut &*relay).write(&received))?
        {
            received.drain(..written);
        }
        if is_over {
            // What came before the end still counts.
            relay.set_nonblocking(false)?;
            return (&mut &*relay).write_all(&received);
        }
    }
}

/// Takes what the network has; whether it has ended.
fn receive(tls: &mut ClientConnection, mut network: &UnixStream, received: &mut Vec<u8>) -> io::Result<bool> {
    let is_over = now(|| tls.read_tls(&mut network))? == Some(0);
    let state = tls.process_new_packets().map_err(io::Error::other)?;
    let start = received.len();
    received.resize(start + state.plaintext_bytes_to_read(), 0);
    tls.reader().read_exact(&mut received[start..])?;
    Ok(is_over || state.peer_has_closed())
}

fn send(tls: &mut ClientConnection, mut network: &UnixStream) -> io::Result<()> {
    while tls.wants_write() && now(|| tls.write_tls(&mut network))?.is_some() {}
    Ok(())
}

/// What a socket does now; none if it would have to wait.
fn now(mut io: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match io() {
            Ok(done) => return Ok(Some(done)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if lacks_memory(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

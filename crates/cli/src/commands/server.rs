//! The server that a command is about, as people name it.

use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use hypernbd_volume::admin;
use hypernbd_volume::monitor::client::ServerAddress;
use hypernbd_volume::monitor::runtime_dir;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::url::VolumeUrl;
use rustix::net::sockopt::socket_peercred;

/// Where the server listens: the address of its metrics (`http://HOST:PORT`), the path of one of its sockets, the NBD socket
/// among them, or the URL of the volume that it serves on this machine.
pub async fn place(server: &str, store: &StoreOptions) -> Result<ServerAddress> {
    if let Some(address) = server.strip_prefix("http://") {
        return Ok(ServerAddress::Tcp(address.trim_end_matches('/').to_owned()));
    }
    if !server.contains("://") {
        return of_socket(Path::new(server));
    }
    let url = VolumeUrl::parse(server)?;
    let info = admin::info(&url, store).await?;
    let lease = info.lease.filter(|lease| lease.is_held());
    let lease = lease.with_context(|| {
        format!("no server holds {url}: one without clients gives it back, and is named by its socket")
    })?;
    match lease.control_here() {
        Some(path) => Ok(ServerAddress::Unix(path.into())),
        None if lease.holder.is_on_this_machine() => {
            bail!(
                "{}, which holds {url}, names no control socket in its lease: it has none, or serves many volumes, and is named by its \
                 socket then",
                lease.holder
            )
        }
        None => bail!("{url} is held by {}, which is not on this machine", lease.holder),
    }
}

/// The control socket of the server that listens at this one, or this one.
fn of_socket(path: &Path) -> Result<ServerAddress> {
    let stream =
        UnixStream::connect(path).with_context(|| format!("no server listens on {}", path.display()))?;
    let pid = socket_peercred(&stream)?.pid.as_raw_nonzero().get();
    let control = u32::try_from(pid).ok().and_then(runtime_dir::socket_of);
    Ok(ServerAddress::Unix(control.unwrap_or_else(|| path.to_owned())))
}

//! The server that has a volume open on this machine: it is asked for what its lease keeps others from doing.

use anyhow::{Result, bail};
use hypernbd_volume::admin;
use hypernbd_volume::lease::LeaseRecord;
use hypernbd_volume::monitor::client::{self, ClientError, ServerAddress};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::url::VolumeUrl;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The control socket of the server on this machine that has a volume with this lease open, as far as it has one.
pub fn place(lease: Option<&LeaseRecord>) -> Option<ServerAddress> {
    let lease = lease.filter(|lease| !lease.is_of_killed())?;
    Some(ServerAddress::Unix(lease.control_here()?.into()))
}

/// Tells the server that has the volume open to carry out a verb of its control socket, waits until it has, and gives its answer. `None`
/// where no server of this machine is known to have it open, or none answers: then the lease says what may be done.
///
/// # Errors
/// When the lease cannot be read; when the server refuses or fails, or breaks off.
pub async fn tell<T: DeserializeOwned>(
    url: &VolumeUrl,
    store: &StoreOptions,
    verb: &str,
    arguments: &impl Serialize,
) -> Result<Option<T>> {
    let lease = admin::lease_of(url, store).await?;
    let Some(place) = place(lease.as_ref()) else {
        return Ok(None);
    };
    let volume = lease.map(|lease| lease.volume_id);
    match client::tell_of(&place, volume, verb, arguments).await {
        Ok(answer) => Ok(Some(answer)),
        // It may be on its way out.
        Err(ClientError::Unreachable { .. }) => Ok(None),
        Err(ClientError::Foreign { why, .. }) => {
            bail!(
                "the server of {url} broke off before it answered ({why}): what it had done until then is in place"
            )
        }
        Err(ClientError::Refused { status: 404, .. }) => bail!(
            "the server of {url} is of an earlier release, which does not do that while it serves: stop it, then give the command again"
        ),
        Err(refused) => Err(refused.into()),
    }
}

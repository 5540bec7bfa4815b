//! `hypernbd report SERVER`: what helps somebody who was not there.

use anyhow::Result;
use hypernbd_volume::admin;
use hypernbd_volume::monitor::client::{self, ServerAddress};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::url::VolumeUrl;
use serde_json::{Value, json};

use super::server;
use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume, or the path of a socket of the server that is reported of
    pub server: String,
}

/// Prints one JSON object. What cannot be had is said in its place: a report is wanted most when something does not work.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let volume = match args.server.contains("://") && !args.server.starts_with("http://") {
        true => Some(volume(&args.server, store).await?),
        false => None,
    };
    let server = match server::place(&args.server, store).await {
        Ok(place) => of_server(&place).await,
        Err(error) => failure(&error),
    };
    let system = rustix::system::uname();
    let report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "system": {
            "kernel": system.release().to_string_lossy(),
            "machine": system.machine().to_string_lossy(),
        },
        "time": output::now(),
        "volume": volume,
        "server": server,
    });
    output::line(serde_json::to_string_pretty(&report)?)
}

/// # Errors
/// When it is no URL: then nothing can be reported of.
async fn volume(url: &str, store: &StoreOptions) -> Result<Value> {
    let url = VolumeUrl::parse(url)?;
    Ok(match admin::info(&url, store).await {
        Ok(info) => serde_json::to_value(info)?,
        Err(error) => json!({ "error": error.chain() }),
    })
}

async fn of_server(place: &ServerAddress) -> Value {
    match client::ask(place, "/v1/report").await {
        Ok(report) => report,
        // Metrics alone are less, and better than nothing.
        Err(refused) => match client::ask::<Value>(place, "/status").await {
            Ok(status) => json!({ "status": status }),
            Err(_) => failure(&refused.into()),
        },
    }
}

fn failure(error: &anyhow::Error) -> Value {
    json!({ "error": format!("{error:#}") })
}

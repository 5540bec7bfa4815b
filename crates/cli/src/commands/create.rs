//! `hypernbd create URL --size SIZE`.

use anyhow::Result;
use hypernbd_volume::admin::{self, CreateOptions, DEFAULT_BLOCK_SIZE_BYTES};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::{format_size, parse_size};
use hypernbd_volume::url::VolumeUrl;

use crate::flags::{block_size, check_size, warn_of_size};
use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the volume is made; nothing may be there yet
    pub url: VolumeUrl,

    /// Size of the device; space is taken only by what is written
    #[arg(long = "size", value_name = "SIZE", value_parser = parse_size)]
    pub size_bytes: u64,

    /// Size of the volume's blocks, for its whole life: a power of two, 4K or more
    #[arg(long = "block-size", value_name = "SIZE", value_parser = block_size, default_value_t = DEFAULT_BLOCK_SIZE_BYTES)]
    pub block_size_bytes: u32,
}

/// Makes the volume and says so.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    check_size(args.size_bytes)?;
    warn_of_size(args.size_bytes);
    let options = CreateOptions {
        size_bytes: args.size_bytes,
        block_size_bytes: args.block_size_bytes,
    };
    let volume = admin::create(&args.url, store, &options).await?;
    output::line(format_args!(
        "created {}: {} in blocks of {}",
        volume.url,
        format_size(volume.size_bytes),
        format_size(volume.block_size_bytes.into())
    ))?;
    Ok(())
}

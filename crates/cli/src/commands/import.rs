//! `hypernbd import FILE URL`.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use hypernbd_volume::VolumeError;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::transfer::{
    self, FileId, Image, Imported, Input, Pace, PipeReader, RawImage, Request, Source, TransferError,
};
use hypernbd_volume::units::{format_size, parse_size};
use hypernbd_volume::url::VolumeUrl;
use tokio::runtime::Runtime;

use crate::flags::{block_size, lease, warn_of_size};
use crate::image::format::{self, Format};
use crate::image::qemu::QemuImage;
use crate::output;
use crate::watch::{AtSignal, Watch, rate};

/// What stands for standard input and output.
pub const PIPE: &str = "-";

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image: a file, a block device, or - for standard input
    pub file: PathBuf,

    /// Where the volume is made; with --overwrite one may be there
    pub url: VolumeUrl,

    /// Format of the image, instead of what its content tells; a device and a pipe are raw
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Size of the volume, instead of the image's; needed for a pipe
    #[arg(long = "size", value_name = "SIZE", value_parser = parse_size)]
    pub size_bytes: Option<u64>,

    /// Size of the volume's blocks, for its whole life: a power of two, 4K or more [default: 4096]
    #[arg(long = "block-size", value_name = "SIZE", value_parser = block_size)]
    pub block_size_bytes: Option<u32>,

    /// Replace everything that is in a volume which is there; earlier checkpoints of it stay
    #[arg(long)]
    pub overwrite: bool,

    /// Import even while a server holds the volume; that server cannot write from then on
    #[arg(long)]
    pub takeover: bool,

    /// Do not read again what was written
    #[arg(long)]
    pub no_verify: bool,

    /// Copy at most so many bytes a second; 0 for no limit
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub limit_rate: Option<u64>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What the file is.
enum Opened {
    Image(Box<dyn Image>),
    Pipe(PipeReader),
}

/// Imports, and says what was imported.
pub fn run(args: &Args, store: &StoreOptions, runtime: &Runtime) -> Result<ExitCode> {
    let (opened, file) = open(args)?;
    if let Some(size_bytes) = args.size_bytes {
        warn_of_size(size_bytes);
    }
    let pace = args.limit_rate.filter(|rate| *rate > 0).map(Pace::new);
    let request = Request {
        url: &args.url,
        store_options: store,
        size_bytes: args.size_bytes,
        block_size_bytes: args.block_size_bytes,
        overwrites: args.overwrite,
        verifies: !args.no_verify,
        lease: lease(args.takeover),
        pace: pace.as_ref(),
    };
    let watch = Watch::start(runtime, AtSignal::Stop)?;
    let import = |source: Source<'_>| {
        let input = Input { source, file };
        transfer::import(input, &request, watch.control(), runtime.handle())
    };
    let imported = match opened {
        Opened::Image(image) => import(Source::Image(image.as_ref())),
        Opened::Pipe(pipe) => import(Source::Pipe(pipe)),
    };
    let stopped = watch.stopped();
    drop(watch);
    match imported {
        Ok(imported) => {
            if let Some(piped_bytes) = imported.piped_bytes.filter(|piped| *piped < imported.bytes) {
                log::warn!(
                    "{} ended after {piped_bytes} bytes, and the other {} of the volume read as zeros: if that is not all of the \
                     image, whatever wrote it broke off (set -o pipefail lets a shell say so); import it again",
                    name(&args.file),
                    imported.bytes - piped_bytes
                );
            }
            output::write(report(args, &imported)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(e) => ended(e, stopped),
    }
}

/// What becomes of work that failed or was stopped.
pub fn ended(error: TransferError, stopped: ExitCode) -> Result<ExitCode> {
    if error.is_stopped() {
        crate::complain(&error.to_string());
        return Ok(stopped);
    }
    Err(match error {
        // It writes out its causes itself.
        TransferError::Volume(e) => anyhow::Error::new::<VolumeError>(e),
        e => anyhow::Error::new(e),
    })
}

fn open(args: &Args) -> Result<(Opened, Option<(PathBuf, FileId)>)> {
    let path = &args.file;
    if path.as_os_str() == PIPE {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned()?;
        return Ok((Opened::Pipe(pipe(args, stdin.into(), "standard input")?), None));
    }
    let looked = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    let kind = looked.file_type();
    if kind.is_fifo() || kind.is_char_device() {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok((Opened::Pipe(pipe(args, file, &path.display().to_string())?), None));
    }
    let raw = RawImage::open(path)?;
    let image: Box<dyn Image> = match format_of(args, &raw)? {
        Format::Raw => Box::new(raw),
        other => Box::new(QemuImage::open(path, other)?),
    };
    let id = FileId::new(path, image.size_bytes(), &looked);
    Ok((Opened::Image(image), Some((path.clone(), id))))
}

fn pipe(args: &Args, file: File, name: &str) -> Result<PipeReader> {
    match args.format {
        None | Some(Format::Raw) => Ok(PipeReader::new(file.into(), name)),
        Some(other) => anyhow::bail!(
            "{name} cannot be read as {}: only raw images come through a pipe; give a file, or convert it with qemu-img",
            other.name()
        ),
    }
}

/// What the image is: as it is said, else by its content. What lies on a device is whatever was written to it as a disk.
fn format_of(args: &Args, image: &RawImage) -> Result<Format> {
    if let Some(format) = args.format {
        return Ok(format);
    }
    if image.is_device() {
        return Ok(Format::Raw);
    }
    let mut head = Vec::new();
    File::open(image.path())
        .and_then(|file| file.take(format::HEAD_BYTES as u64).read_to_end(&mut head))
        .with_context(|| format!("cannot read {}", image.path().display()))?;
    format::of_content(&head, image.path())
}

fn report(args: &Args, done: &Imported) -> Result<String> {
    if args.json {
        return Ok(format!("{}\n", serde_json::to_string_pretty(done)?));
    }
    let resumed = match done.resumed_bytes {
        0 => String::new(),
        bytes => format!(", going on after {}", format_size(bytes)),
    };
    Ok(format!(
        "imported {} into {}: {}\n{}",
        name(&args.file),
        args.url,
        amount(done.bytes, done.data_bytes, done.seconds) + &resumed,
        checksum(&done.checksum, done.is_verified)
    ))
}

/// What to call a file that may be a pipe.
pub fn name(path: &Path) -> String {
    match path.as_os_str() == PIPE {
        true => "the pipe".to_owned(),
        false => path.display().to_string(),
    }
}

/// How much was copied, and how fast.
pub fn amount(bytes: u64, data_bytes: u64, seconds: f64) -> String {
    format!(
        "{}, {} of it data, in {seconds:.1} s, {}",
        format_size(bytes),
        format_size(data_bytes),
        rate(data_bytes, seconds)
    )
}

/// The line that tells the checksum.
pub fn checksum(checksum: &str, is_verified: bool) -> String {
    let verified = match is_verified {
        true => "verified",
        false => "not verified",
    };
    format!("checksum {checksum}, {verified}\n")
}

//! `hypernbd export URL [AT] FILE`.

use std::fs::{File, OpenOptions};
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::At;
use hypernbd_volume::transfer::{
    self, Control, Exported, Image, NewFile, Opened, Pace, RawImage, Target, TransferError,
};
use hypernbd_volume::units::{format_size, parse_size};
use hypernbd_volume::url::VolumeUrl;
use rustix::fs::OFlags;
use rustix::io::Errno;
use tokio::runtime::Runtime;

use super::import::{PIPE, amount, checksum, ended, name};
use crate::image::format::{self, Format};
use crate::image::qemu::QemuImage;
use crate::output;
use crate::watch::{AtSignal, Watch};

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(allow_missing_positional = true)]
pub struct Args {
    /// The volume; a server may have it open
    pub url: VolumeUrl,

    /// The checkpoint to export, as @NUMBER, @TIME, @-AGO or @NAME; the newest published without it
    pub at: Option<At>,

    /// Where it goes: a file, a block device, or - for standard output
    pub file: PathBuf,

    /// Format of the file, instead of what its name tells; a device and a pipe are raw
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Replace a file that is there; always needed for a block device
    #[arg(long)]
    pub overwrite: bool,

    /// Do not read again what was written
    #[arg(long)]
    pub no_verify: bool,

    /// Copy at most so many bytes a second; 0 for no limit
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub limit_rate: Option<u64>,

    /// Print JSON; where the volume goes to standard output, on standard error
    #[arg(long)]
    pub json: bool,
}

/// Where a volume goes.
enum Destination {
    Pipe(File),
    Device(RawImage),
    Raw(NewFile),
    Qemu(NewFile, Format),
}

/// Exports, and says what was exported.
pub fn run(args: &Args, store: &StoreOptions, runtime: &Runtime) -> Result<ExitCode> {
    // A name alone is read as the file: an export of another checkpoint than was meant would look right.
    if args.at.is_none()
        && let Some(word) = args
            .file
            .to_str()
            .filter(|word| word.starts_with('@') && word.parse::<At>().is_ok())
    {
        crate::complain(&format!(
            "{word} names a checkpoint, and no file is named: add the file, or write ./{word} for a file of that name"
        ));
        return Ok(ExitCode::from(crate::USAGE));
    }
    // What is in the way of writing is said before anything is read.
    let destination = destination(args)?;
    let at_signal = match destination {
        Destination::Pipe(_) => AtSignal::End,
        _ => AtSignal::Stop,
    };
    let left = left(&destination, args);
    let is_pipe = matches!(destination, Destination::Pipe(_));
    let opened = runtime.block_on(transfer::open_for_export(&args.url, store, args.at.as_ref()))?;
    let watch = Watch::start(runtime, at_signal)?;
    let exported = export(args, &opened, destination, watch.control());
    let stopped = watch.stopped();
    drop(watch);
    match exported {
        Ok(done) => {
            let report = report(args, &done)?;
            // Standard output may be that pipe by another name.
            match is_pipe {
                true => output::write_aside(report)?,
                false => output::write(report)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(e) => match e.downcast::<TransferError>() {
            Ok(cause) => {
                let cause = Box::new(cause);
                ended(TransferError::Unfinished { cause, left }, stopped)
            }
            Err(e) => Err(e),
        },
    }
}

/// What a failure leaves of an export.
fn left(destination: &Destination, args: &Args) -> String {
    let file = name(&args.file);
    match destination {
        Destination::Device(_) => format!("{file} is half written"),
        Destination::Pipe(_) => "what was written so far is not all of the volume: discard it".to_owned(),
        Destination::Raw(_) | Destination::Qemu(..) => format!("{file} was not made, or is what it was"),
    }
}

/// Looks at what the file names, and begins it.
fn destination(args: &Args) -> Result<Destination> {
    let path = &args.file;
    if path.as_os_str() == PIPE {
        raw_only(args, "standard output")?;
        if std::io::stdout().is_terminal() {
            bail!("standard output is a terminal: send it into a pipe or a file");
        }
        return Ok(Destination::Pipe(
            std::io::stdout().as_fd().try_clone_to_owned()?.into(),
        ));
    }
    let kind = std::fs::metadata(path).ok().map(|looked| looked.file_type());
    let shown = path.display();
    match kind {
        Some(kind) if kind.is_fifo() || kind.is_char_device() => {
            raw_only(args, &shown.to_string())?;
            let file = OpenOptions::new().write(true).open(path);
            Ok(Destination::Pipe(
                file.with_context(|| format!("cannot write {shown}"))?,
            ))
        }
        Some(kind) if kind.is_block_device() => {
            raw_only(args, &shown.to_string())?;
            if !args.overwrite {
                bail!("{shown} is a block device: add --overwrite to replace everything that is on it");
            }
            device(path).map(Destination::Device)
        }
        Some(kind) if kind.is_dir() => bail!("{shown} is a directory: name a file in it"),
        Some(kind) if !kind.is_file() => {
            bail!("{shown} is nothing that a volume can be written to: name a file")
        }
        _ => {
            let format = match args.format {
                Some(format) => format,
                None => format::of_name(path)?,
            };
            let file = NewFile::begin(path, args.overwrite)?;
            Ok(match format {
                Format::Raw => Destination::Raw(file),
                other => Destination::Qemu(file, other),
            })
        }
    }
}

fn raw_only(args: &Args, name: &str) -> Result<()> {
    match args.format {
        None | Some(Format::Raw) => Ok(()),
        Some(other) => bail!("{name} cannot be written as {}: that takes a file", other.name()),
    }
}

/// Opens a device that nothing else has in use.
fn device(path: &Path) -> Result<RawImage> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(path);
    let file = match opened {
        Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => bail!(
            "{} is in use, mounted for instance: end that first",
            path.display()
        ),
        opened => opened.with_context(|| format!("cannot write {}", path.display()))?,
    };
    Ok(RawImage::of(file, path)?)
}

fn export(args: &Args, opened: &Opened, destination: Destination, control: &Control) -> Result<Exported> {
    let pace = args.limit_rate.filter(|rate| *rate > 0).map(Pace::new);
    let size_bytes = opened.volume.size_bytes();
    let copy = |target: Target<'_>| transfer::export(opened, target, pace.as_ref(), control);
    match destination {
        Destination::Pipe(file) => Ok(copy(Target::Pipe(Box::new(file)))?),
        Destination::Device(image) => {
            if image.size_bytes() < size_bytes {
                bail!(
                    "{} has {}, and the volume {}: it does not fit",
                    image.path().display(),
                    format_size(image.size_bytes()),
                    format_size(size_bytes)
                );
            }
            let done = copy(Target::Image {
                image: &image,
                is_blank: false,
            })?;
            image.sync()?;
            Ok(verified(
                args,
                done,
                &image.path().display().to_string(),
                &image,
                control,
            )?)
        }
        Destination::Raw(new) => {
            let path = new.part_path().to_owned();
            let failed = |e| TransferError::io(format!("cannot write {}", path.display()), e);
            new.file().set_len(size_bytes).map_err(failed)?;
            let image = RawImage::of(new.file().try_clone()?, &path)?;
            let done = copy(Target::Image {
                image: &image,
                is_blank: true,
            })?;
            image.sync()?;
            let done = verified(args, done, &args.file.display().to_string(), &image, control)?;
            new.finish()?;
            Ok(done)
        }
        Destination::Qemu(new, format) => {
            let image = QemuImage::create(new.part_path(), format, size_bytes)?;
            let done = copy(Target::Image {
                image: &image,
                is_blank: true,
            })?;
            image.close()?;
            let written = RawImage::of(new.file().try_clone()?, new.part_path())?;
            written.sync()?;
            let done = match args.no_verify {
                true => done,
                false => {
                    let image = QemuImage::open(new.part_path(), format)?;
                    verified(args, done, &args.file.display().to_string(), &image, control)?
                }
            };
            new.finish()?;
            Ok(done)
        }
    }
}

/// Reads again what was written, unless that is not wanted.
fn verified(
    args: &Args,
    done: Exported,
    what: &str,
    image: &dyn Image,
    control: &Control,
) -> Result<Exported, TransferError> {
    if args.no_verify {
        return Ok(done);
    }
    let started = Instant::now();
    transfer::verify(what, image, done.bytes, &done.checksum, control)?;
    Ok(Exported {
        seconds: done.seconds + started.elapsed().as_secs_f64(),
        is_verified: true,
        ..done
    })
}

fn report(args: &Args, done: &Exported) -> Result<String> {
    if args.json {
        return Ok(format!("{}\n", serde_json::to_string_pretty(done)?));
    }
    let state = match done.checkpoint {
        Some(number) => format!("checkpoint {number}"),
        None => "the state before anything was written".to_owned(),
    };
    Ok(format!(
        "exported {} at {state} to {}: {}\n{}",
        args.url,
        name(&args.file),
        amount(done.bytes, done.data_bytes, done.seconds),
        checksum(&done.checksum, done.is_verified)
    ))
}

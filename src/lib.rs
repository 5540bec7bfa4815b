//! nbdkit plugin serving a Hypernbd volume.
//!
//! A thin shell: each callback is one line on the volume, wrapped so that neither a panic nor an odd error text gets
//! out. Nothing here knows about S3 or caching, and nothing below here knows about nbdkit.

mod closing;
mod endpoints;
mod errno;
mod giving_back;
mod lifecycle;
mod limits;
mod logging;
mod memory;
mod nbdkit_ext;
mod opening;
mod params;
mod past_exports;
mod registry;
mod served;

use std::sync::Arc;

use errno::{guard, in_errno};
use hypernbd_volume::metrics::requests::Kind;
use hypernbd_volume::past::export_name::Export;
use hypernbd_volume::{ExtentKind, Volume, VolumeError};
use nbdkit::{CacheFlags, ExtentHandle, ExtentType, Flags, FuaFlags, Result, Server, ThreadModel};

/// One client's connection to the volume, or to a checkpoint of it, that all of them share.
struct Connection {
    volume: Arc<Volume>,
    readonly: bool,
    /// What the client asked for.
    export: Export,
}

impl Connection {
    /// Serves a request, which is about `len_bytes`, and counts it.
    fn serve<T>(
        &self,
        kind: Kind,
        len_bytes: u64,
        work: impl FnOnce(&Volume) -> std::result::Result<T, VolumeError>,
    ) -> Result<T> {
        guard(kind.name(), || {
            let requests = &self.volume.metrics().requests;
            requests
                .count(kind, len_bytes, || work(&self.volume))
                .map_err(in_errno)
        })
    }
}

// nbdkit calls a connection from any of its threads, several at a time, though the binding does not ask for this.
const _: fn() = || {
    fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<Connection>();
};

impl Server for Connection {
    fn name() -> &'static str {
        "hypernbd"
    }

    fn longname() -> Option<&'static str> {
        Some("Hypernbd")
    }

    fn version() -> Option<&'static str> {
        Some(env!("CARGO_PKG_VERSION"))
    }

    fn description() -> Option<&'static str> {
        Some("read/write block device kept on S3 (or in a local directory) in the Hyperfile format")
    }

    fn magic_config_key() -> Option<&'static str> {
        Some("backend_url")
    }

    fn config_help() -> Option<&'static str> {
        Some(params::help())
    }

    fn load() {
        logging::start();
        hypernbd_volume::descriptors::raise_limits();
    }

    fn config(key: &str, value: &str) -> Result<()> {
        guard("config", || params::set(key, value))
    }

    fn config_complete() -> Result<()> {
        guard("config_complete", params::complete)
    }

    fn thread_model() -> Result<ThreadModel> {
        guard("thread_model", || Ok(params::thread_model()))
    }

    fn dump_plugin() {
        params::dump();
    }

    fn get_ready() -> Result<()> {
        guard("get_ready", lifecycle::check_volume)
    }

    fn after_fork() -> Result<()> {
        guard("after_fork", lifecycle::start)
    }

    fn unload() {
        lifecycle::stop();
    }

    fn preconnect(_readonly: bool) -> Result<()> {
        guard("preconnect", limits::check_connection)
    }

    fn open(readonly: bool) -> Result<Box<dyn Server>> {
        guard("open", || {
            let export = nbdkit_ext::export()?;
            let volume = match &export.at {
                None => lifecycle::connect(&export.volume, readonly)?,
                Some(at) => lifecycle::connect_past(&export.volume, at)?,
            };
            Ok(Box::new(Self {
                volume,
                readonly: readonly || export.at.is_some(),
                export,
            }) as Box<dyn Server>)
        })
    }

    fn get_size(&self) -> Result<i64> {
        guard("get_size", || {
            Ok(i64::try_from(self.volume.size_bytes()).unwrap_or(i64::MAX))
        })
    }

    fn can_write(&self) -> Result<bool> {
        Ok(!self.readonly)
    }

    fn can_flush(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_fua(&self) -> Result<FuaFlags> {
        Ok(FuaFlags::Native)
    }

    fn can_trim(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_zero(&self) -> Result<bool> {
        Ok(true)
    }

    /// Zeroes are kept as ranges, never as bytes: always faster than writing them.
    fn can_fast_zero(&self) -> Result<bool> {
        Ok(true)
    }

    /// All connections share one volume: a write is seen by all, and a flush covers all.
    fn can_multi_conn(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_cache(&self) -> Result<CacheFlags> {
        Ok(CacheFlags::Native)
    }

    fn can_extents(&self) -> Result<bool> {
        Ok(true)
    }

    fn is_rotational(&self) -> Result<bool> {
        Ok(false)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len_bytes = buf.len() as u64;
        self.serve(Kind::Read, len_bytes, |volume| volume.read(offset, buf))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let fua = flags.contains(Flags::FUA);
        let kind = if fua { Kind::Fua } else { Kind::Write };
        self.serve(kind, buf.len() as u64, |volume| volume.write(offset, buf, fua))
    }

    fn flush(&self) -> Result<()> {
        self.serve(Kind::Flush, 0, |volume| volume.flush())
    }

    fn trim(&self, count: u32, offset: u64, flags: Flags) -> Result<()> {
        let fua = flags.contains(Flags::FUA);
        let kind = if fua { Kind::Fua } else { Kind::Trim };
        self.serve(kind, count.into(), |volume| {
            volume.trim(offset, count.into(), fua)
        })
    }

    /// With or without `MAY_TRIM`: blocks of zeroes take no space on the store either way, and read as zeroes.
    fn zero(&self, count: u32, offset: u64, flags: Flags) -> Result<()> {
        let fua = flags.contains(Flags::FUA);
        let kind = if fua { Kind::Fua } else { Kind::Zero };
        self.serve(kind, count.into(), |volume| {
            volume.zero(offset, count.into(), fua)
        })
    }

    fn cache(&self, count: u32, offset: u64) -> Result<()> {
        self.serve(Kind::Cache, count.into(), |volume| {
            volume.prefetch(offset, count.into())
        })
    }

    /// Extents are clipped to the request: old servers abort on one that reaches further (CVE-2025-47711).
    fn extents(&self, count: u32, offset: u64, flags: Flags, handle: &mut ExtentHandle) -> Result<()> {
        let one_only = flags.contains(Flags::REQ_ONE);
        let extents = self.serve(Kind::Extents, count.into(), |volume| {
            volume.extents(offset, count.into(), one_only)
        })?;
        guard("extents", || {
            let end = offset + u64::from(count);
            for extent in extents {
                let from = extent.offset_bytes.max(offset);
                let to = (extent.offset_bytes + extent.len_bytes).min(end);
                if from < to {
                    handle.add(from, to - from, extent_type(extent.kind))?;
                }
            }
            Ok(())
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Export { volume, at } = &self.export;
        match at {
            None => lifecycle::disconnect(volume),
            Some(at) => lifecycle::disconnect_past(volume, at),
        }
    }
}

fn extent_type(kind: ExtentKind) -> ExtentType {
    match kind {
        ExtentKind::Data => ExtentType::Allocated,
        ExtentKind::Zero => ExtentType::Zero,
        ExtentKind::Hole => ExtentType::HoleZero,
    }
}

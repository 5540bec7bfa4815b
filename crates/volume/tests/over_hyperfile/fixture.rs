//! A volume in a directory of its own, for the tests over the real engine.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use hyperfile::config::{
    HyperFileConfig, HyperFileConfigBuilder, HyperFileMetaConfig, HyperFileRuntimeConfig,
};
use hyperfile::file::flags::{FileFlags, HyperFileFlags};
use hyperfile::file::hyper::Hyper;
use hyperfile::file::mode::{FileMode, HyperFileMode};
use hyperfile::meta_format::BlockPtrFormat;
use hyperfile::staging::config::StagingConfig;
use hypernbd_volume::lease::LeaseRecord;
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::store::{self, Store};
use hypernbd_volume::{Volume, VolumeError, VolumeUrl, admin};

/// Bytes that differ by seed and position.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

pub struct Fixture {
    runtime: tokio::runtime::Runtime,
    dir: tempfile::TempDir,
    pub url: VolumeUrl,
    pub store_options: StoreOptions,
}

impl Fixture {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path: PathBuf = dir.path().join("vol");
        let url = VolumeUrl::parse(&format!("file://{}/", path.display())).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        Self {
            runtime,
            dir,
            url,
            store_options: StoreOptions::default(),
        }
    }

    pub fn run<R>(&self, future: impl Future<Output = R>) -> R {
        self.runtime.block_on(future)
    }

    /// To run something on another thread.
    pub fn handle(&self) -> tokio::runtime::Handle {
        self.runtime.handle().clone()
    }

    pub fn create(&self, size_bytes: u64, block_size_bytes: u32) {
        let options = admin::CreateOptions {
            size_bytes,
            block_size_bytes,
        };
        let info = self
            .run(admin::create(&self.url, &self.store_options, &options))
            .unwrap();
        assert_eq!(
            (info.size_bytes, info.block_size_bytes),
            (size_bytes, block_size_bytes)
        );
    }

    pub fn try_open(&self) -> Result<Arc<Volume>, VolumeError> {
        self.run(Volume::open(
            &self.url,
            &self.store_options,
            &VolumeOptions::default(),
        ))
    }

    pub fn open(&self) -> Arc<Volume> {
        self.try_open().unwrap()
    }

    /// Nothing is published by its age, however slow the machine is: checkpoints are made by flushes alone.
    pub fn open_unaged(&self) -> Arc<Volume> {
        let options = VolumeOptions {
            checkpoint_interval: std::time::Duration::from_secs(3600),
            ..VolumeOptions::default()
        };
        self.run(Volume::open(&self.url, &self.store_options, &options))
            .unwrap()
    }

    pub fn try_open_with(&self, lease: LeaseOptions) -> Result<Arc<Volume>, VolumeError> {
        let options = VolumeOptions {
            lease,
            ..VolumeOptions::default()
        };
        self.run(Volume::open(&self.url, &self.store_options, &options))
    }

    pub fn take_over(&self) -> Arc<Volume> {
        self.try_open_with(LeaseOptions {
            takeover: true,
            ..LeaseOptions::default()
        })
        .unwrap()
    }

    pub fn lease(&self) -> Option<LeaseRecord> {
        self.run(admin::info(&self.url, &self.store_options))
            .unwrap()
            .lease
    }

    /// Puts a lease there, whatever there was.
    pub fn put_lease(&self, lease: &LeaseRecord) {
        let store = self.store().unwrap();
        let body = serde_json::to_vec(lease).unwrap();
        self.run(store.put(&store.meta_key("lease"), body)).unwrap();
    }

    pub fn open_read_only(&self) -> Arc<Volume> {
        let options = VolumeOptions {
            read_only: true,
            ..VolumeOptions::default()
        };
        self.run(Volume::open(&self.url, &self.store_options, &options))
            .unwrap()
    }

    pub fn read(&self, volume: &Volume, offset_bytes: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0xEE; len];
        volume.read(offset_bytes, &mut out).unwrap();
        out
    }

    pub fn store(&self) -> Option<Store> {
        self.run(store::connect(&self.url, &self.store_options)).ok()
    }

    fn list(&self, prefix: impl Fn(&Store) -> String) -> Vec<String> {
        let Some(store) = self.store() else {
            return Vec::new();
        };
        let found = self.run(store.list(&prefix(&store))).unwrap();
        found.into_iter().map(|o| o.key).collect()
    }

    /// Keys of everything stored for the volume.
    pub fn objects(&self) -> Vec<String> {
        let mut keys = self.list(|s| s.data_key(""));
        keys.extend(self.list(|s| s.meta_key("")));
        keys
    }

    pub fn meta_objects(&self, name: &str) -> Vec<String> {
        self.list(|s| s.meta_key(name))
    }

    pub fn remove(&self, name: &str) {
        let store = self.store().unwrap();
        self.run(store.delete(&store.data_key(name))).unwrap();
    }

    pub fn put(&self, name: &str) {
        let store = self.store().unwrap();
        self.run(store.put(&store.data_key(name), "x")).unwrap();
    }

    /// A directory beside the volume's, or that itself.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn url_of(&self, name: &str) -> VolumeUrl {
        VolumeUrl::parse(&format!("file://{}/", self.path_of(name).display())).unwrap()
    }

    /// The file of an object; its data comes first.
    pub fn object_file(&self, key: &str) -> PathBuf {
        self.dir.path().join("vol/objects").join(key.replace('/', "%2F"))
    }

    /// Cuts every stored file in half.
    pub fn damage_everything(&self) {
        for file in std::fs::read_dir(self.dir.path().join("vol/objects")).unwrap() {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(file.unwrap().path())
                .unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        }
    }

    pub fn remove_meta(&self, key: &str) {
        let store = self.store().unwrap();
        self.run(store.delete(key)).unwrap();
    }

    fn hyper_config(&self, store: &Store, meta: &HyperFileMetaConfig) -> HyperFileConfig {
        let root = format!("s3://{}/{}", store.bucket, store.root);
        HyperFileConfigBuilder::new()
            .with_meta_config(meta)
            .with_staging_config(&StagingConfig::new_s3_uri(&root, None))
            .with_runtime_config(&HyperFileRuntimeConfig::default())
            .build()
    }

    /// Creates a container with plain Hyperfile calls.
    pub fn with_hyper_created<R: Send + 'static, Fut: Future<Output = R>>(
        &self,
        data_block_size: usize,
        block_ptr_format: BlockPtrFormat,
        f: impl FnOnce(Hyper<'static>) -> Fut + Send + 'static,
    ) -> R {
        let store = self
            .run(store::connect_for_create(&self.url, &self.store_options))
            .unwrap();
        let meta = HyperFileMetaConfig {
            data_block_size,
            block_ptr_format,
            ..Default::default()
        };
        let config = self.hyper_config(&store, &meta);
        self.on_thread(move || async move {
            let flags = HyperFileFlags::from_flags(FileFlags::rdwr());
            let mode = HyperFileMode::from_mode(FileMode::default_file());
            f(Hyper::create(store.client, config, flags, mode).await.unwrap()).await
        })
    }

    /// Opens the container with plain Hyperfile calls.
    pub fn with_hyper_opened<R: Send + 'static, Fut: Future<Output = R>>(
        &self,
        f: impl FnOnce(Hyper<'static>) -> Fut + Send + 'static,
    ) -> R {
        let store = self.store().unwrap();
        let config = self.hyper_config(&store, &HyperFileMetaConfig::default());
        self.on_thread(move || async move {
            let flags = HyperFileFlags::from_flags(FileFlags::rdwr());
            f(Hyper::open(store.client, config, flags).await.unwrap()).await
        })
    }

    fn on_thread<R: Send + 'static, Fut: Future<Output = R>>(
        &self,
        f: impl FnOnce() -> Fut + Send + 'static,
    ) -> R {
        let handle = self.runtime.handle().clone();
        std::thread::spawn(move || handle.block_on(f())).join().unwrap()
    }
}

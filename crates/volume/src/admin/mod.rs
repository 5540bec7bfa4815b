//! The life of a volume outside of serving it.

mod create;
mod delete;
mod info;
pub mod label;
mod resize;
pub mod wal;

pub use create::{CreateOptions, DEFAULT_BLOCK_SIZE_BYTES, create};
pub use delete::{DeletePlan, delete, delete_plan};
pub(crate) use info::of_store as info_of;
pub use info::{VolumeInfo, info};
pub use resize::resize;

/// Runs an engine operation, whose futures are not `Send`, on a thread of its own and waits for it.
async fn on_owner_thread<F, Fut, R>(operation: F) -> std::io::Result<R>
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = std::io::Result<R>>,
    R: Send + 'static,
{
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || runtime.block_on(operation()))
        .await
        .map_err(std::io::Error::other)?
}

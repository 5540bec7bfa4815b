//! Attaches an NBD export to the kernel, through a relay that outlives the server.
//!
//! The kernel's driver gives up a device whose connection ends. So it gets one that does not end: a socket to a process on
//! the same machine, the relay, which keeps what the server has not answered and not flushed, connects again when the server
//! is back, and sends that again. `docs/attaching.md` says what is promised.
#![deny(unsafe_code)]

mod attach;
mod background;
mod detach;
mod device;
mod dial;
mod error;
mod flush;
mod held;
mod locks;
mod machine;
pub mod nbd;
mod netlink;
mod outage;
mod owner;
mod protect;
mod refresh;
mod relay;
mod state;
mod tls;
mod uri;

pub use attach::{Options, attach};
pub use background::{READY_VARIABLE, in_background};
pub use detach::{attached, detach};
pub use error::AttachError;
pub use flush::hold_flushed;
pub use refresh::refresh;
pub use state::Attached;
pub use uri::Uri;

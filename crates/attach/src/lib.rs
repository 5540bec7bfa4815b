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
mod handshake;
mod held;
mod machine;
mod netlink;
mod protect;
mod relay;
mod state;
mod uri;
mod wire;

pub use attach::{Options, attach};
pub use background::{READY_VARIABLE, in_background};
pub use detach::{attached, detach};
pub use error::AttachError;
pub use handshake::Export;
pub use state::Attached;
pub use uri::Uri;

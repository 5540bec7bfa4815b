//! The one NBD client: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>. The relay speaks it from a loop over
//! sockets that do not block, [`Client`] one request at a time.

mod client;
pub(crate) mod handshake;
pub(crate) mod wire;

pub use client::Client;
pub use handshake::Export;

//! Attaches an NBD export to the kernel, through a relay that outlives the server.
#![deny(unsafe_code)]
#![allow(dead_code)]

mod handshake;
mod machine;
mod wire;

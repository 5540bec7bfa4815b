//! Links the plugin so that its code stays mapped after nbdkit closes it: destructors of thread-local values may
//! still run then (rust-lang/rust#59629).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}

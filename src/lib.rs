//! nbdkit plugin serving a Hypernbd volume.

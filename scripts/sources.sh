#!/usr/bin/env bash
# Prints one checksum of all that the plugin and the command line are made of. `make build` keeps it beside them, and an
# installation has it too: so it can be told whether binaries are those of this tree, whatever the times of files say.
. "$(dirname "$0")/lib.sh"

cd "$(dirname "$0")/.."
find Cargo.toml Cargo.lock build.rs src crates/*/Cargo.toml crates/*/src -type f -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1

#!/usr/bin/env bash
# Prints the path of the cargo-deny that checks licences, sources and duplicate crates, building it where the
# cache has none.
. "$(dirname "$0")/lib.sh"

version=0.20.2

directory=$HYPERNBD_CACHE/cargo-deny-$version
if [ ! -x "$directory/bin/cargo-deny" ]; then
    need cargo "install Rust (https://rustup.rs)"
    say "building cargo-deny $version (about two minutes)"
    work=$(mktemp -d "$HYPERNBD_CACHE/build-cargo-deny.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    # A target directory of its own: the project's must not be filled, nor locked, by this build.
    CARGO_TARGET_DIR=$work/target CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=1 \
        quietly "$work/install.log" cargo install cargo-deny --version "$version" --locked --root "$work/root"
    rm -rf "$directory"
    mv "$work/root" "$directory"
    say "cargo-deny is in $directory"
fi
echo "$directory/bin/cargo-deny"

#!/usr/bin/env bash
# Prints the path of a program that crates.io has and this project needs, building it where the cache has none:
# build-cargo-tool.sh cargo-deb|cargo-deny|cargo-generate-rpm|mdbook
. "$(dirname "$0")/lib.sh"

program=${1:-}
options=()
case $program in
cargo-deb) version=3.8.0 ;;
cargo-deny) version=0.20.2 ;; # licences, sources and duplicate crates
cargo-generate-rpm) version=0.21.1 ;;
mdbook)
    version=0.5.4
    # No server, no watching: it makes the book once.
    options=(--no-default-features --features search)
    ;;
*) die "say cargo-deb, cargo-deny, cargo-generate-rpm or mdbook" ;;
esac

directory=$HYPERNBD_CACHE/$program-$version
if [ ! -x "$directory/bin/$program" ]; then
    need cargo "install Rust (https://rustup.rs)"
    say "building $program $version (a few minutes)"
    work=$(mktemp -d "$HYPERNBD_CACHE/build-$program.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    # A target directory of its own: the project's must not be filled, nor locked, by this build.
    CARGO_TARGET_DIR=$work/target CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=1 \
        quietly "$work/install.log" \
        cargo install "$program" --version "$version" --locked "${options[@]}" --root "$work/root"
    rm -rf "$directory"
    mv "$work/root" "$directory"
    say "$program is in $directory"
fi
echo "$directory/bin/$program"

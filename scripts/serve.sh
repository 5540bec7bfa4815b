#!/usr/bin/env bash
# Serves a volume in the foreground: serve.sh [URL [OPTION…]]
# Without a URL it is a 10 GiB volume in ./data, made the first time. A volume named by URL is never created.
#
# What was built or installed of this very tree is used as it is; otherwise it is built first.
. "$(dirname "$0")/lib.sh"

project=$(cd "$(dirname "$0")/.." && pwd)
built=${CARGO_TARGET_DIR:-$project/target}/release
url=${1:-}
shift || true

sources=$("$project/scripts/sources.sh")
# is_current PROGRAM NOTE: whether the program is there, and is no younger than the note, which says that it is of this tree.
is_current() {
    [ -x "$1" ] && [ -e "$2" ] && [ ! "$1" -nt "$2" ] && [ "$(cat "$2")" = "$sources" ]
}

is_built() {
    is_current "$built/hypernbd" "$built/hypernbd.sources" && is_current "$built/libhypernbd.so" "$built/hypernbd.sources"
}

installed=$(command -v hypernbd || true)
if ! is_built && [ -n "$installed" ] && is_current "$installed" "$(dirname "$installed")/../share/hypernbd/sources"; then
    say "using $installed, which was made of this tree"
    hypernbd=$installed
else
    is_built || make --no-print-directory -C "$project" build
    hypernbd=$built/hypernbd
    # nbdkit 1.32 serves, too: a newer one is used where there is one, and not built for this.
    NBDKIT=$("$project/scripts/build-nbdkit.sh" 32)
    export NBDKIT
fi

if [ -z "$url" ]; then
    url=file://$project/data/
    if ! "$hypernbd" info "$url" >/dev/null 2>&1; then
        say "creating a 10 GiB volume in $project/data"
        "$hypernbd" create "$url" --size 10G
    fi
fi
exec "$hypernbd" serve "$url" "$@"

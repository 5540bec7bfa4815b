#!/usr/bin/env bash
# Serves a volume in the foreground: serve.sh [URL [OPTION…]]
# Without a URL it is a 10 GiB volume in ./data, made the first time. A volume named by URL is never created.
. "$(dirname "$0")/lib.sh"

project=$(cd "$(dirname "$0")/.." && pwd)
hypernbd=${CARGO_TARGET_DIR:-$project/target}/release/hypernbd
url=${1:-}
shift || true

NBDKIT=$("$project/scripts/build-nbdkit.sh")
export NBDKIT

if [ -z "$url" ]; then
    url=file://$project/data/
    if ! "$hypernbd" info "$url" >/dev/null 2>&1; then
        say "creating a 10 GiB volume in $project/data"
        "$hypernbd" create "$url" --size 10G
    fi
fi
exec "$hypernbd" serve "$url" "$@"

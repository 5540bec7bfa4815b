#!/usr/bin/env bash
# A file system on a served volume through the kernel's nbd driver: mkfs, mount, files, fstrim, fsck, and all of
# it again after the server was restarted. Needs root and nbd.ko; expects `make build` to have run.
set -euo pipefail

project=$(cd "$(dirname "$0")/../.." && pwd)
target=${CARGO_TARGET_DIR:-$project/target}/release
hypernbd=$target/hypernbd
[ -x "$hypernbd" ] || { echo "run 'make build' first: $hypernbd is missing" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "must run as root" >&2; exit 1; }
[ -d /sys/module/nbd ] || modprobe nbd || { echo "the kernel has no nbd driver" >&2; exit 1; }

work=$(mktemp -d)
url=file://$work/volume/
socket=$work/socket
server=""
device=""

cleanup() {
    status=$?
    mountpoint -q "$work/mnt" && umount "$work/mnt"
    [ -z "$device" ] || nbd-client -d "$device" || true
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ "$status" = 0 ] || cat "$work/server.log" || true
    rm -rf "$work"
    exit "$status"
}
trap cleanup EXIT

step() { echo "--- $*"; }

serve() {
    rm -f "$socket"
    "$hypernbd" serve "$url" --socket "$socket" >>"$work/server.log" 2>&1 &
    server=$!
    for _ in $(seq 300); do
        nbdinfo --size "nbd+unix:///?socket=$socket" >/dev/null 2>&1 && return
        kill -0 "$server"
        sleep 0.1
    done
    echo "the server does not answer" >&2
    exit 1
}

stop() {
    kill -TERM "$server"
    wait "$server" || true
    server=""
}

# The first nbd device nobody uses.
connect() {
    for candidate in /dev/nbd{0..15}; do
        [ -e "/sys/block/$(basename "$candidate")/pid" ] && continue
        nbd-client -unix "$socket" "$candidate" -C 4 -t 120
        device=$candidate
        return
    done
    echo "every nbd device is in use" >&2
    exit 1
}

disconnect() {
    nbd-client -d "$device"
    device=""
}

mkdir "$work/mnt"
"$hypernbd" create "$url" --size 4G

step "make a file system and fill it"
serve
connect
mkfs.ext4 -q "$device"
mount -o discard "$device" "$work/mnt"
dd if=/dev/urandom of="$work/mnt/data" bs=1M count=64 status=none
mkdir "$work/mnt/tree"
for i in $(seq 500); do echo "file $i" >"$work/mnt/tree/$i"; done
sync
(cd "$work/mnt" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$work/sums"
dd if=/dev/zero of="$work/mnt/trash" bs=1M count=64 conv=fsync status=none
rm "$work/mnt/trash"
fstrim -v "$work/mnt"
umount "$work/mnt"
fsck.ext4 -fn "$device"

step "restart the server and look again"
disconnect
stop
serve
connect
fsck.ext4 -fn "$device"
mount "$device" "$work/mnt"
(cd "$work/mnt" && sha256sum --quiet -c "$work/sums")
umount "$work/mnt"
disconnect
stop
step "ok"

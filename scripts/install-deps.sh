#!/usr/bin/env bash
# Installs the Debian (12, 13) or Ubuntu packages that building, serving and testing need: install-deps.sh [build|serve|test]…
# Quick when all are there; uses sudo when not root. Rust and Go are prerequisites and are not installed here.
. "$(dirname "$0")/lib.sh"

# The plugin's C dependencies, and nbdkit where the system's is too old.
build=(build-essential pkg-config cmake ca-certificates git perl libgnutls28-dev liblzma-dev zlib1g-dev)
# To serve and connect.
serve=(nbdkit libnbd-bin nbd-client qemu-utils fuse3)
test=(
    python3 python3-pytest python3-pytest-xdist python3-boto3 python3-yaml python3-libnbd fio e2fsprogs xfsprogs
    btrfs-progs util-linux procps
)
packages=()
[ $# -gt 0 ] || set -- build serve test
for group; do
    case $group in
    build) packages+=("${build[@]}") ;;
    serve) packages+=("${serve[@]}") ;;
    test) packages+=("${test[@]}") ;;
    *) die "say what for: build, serve or test" ;;
    esac
done

need dpkg-query "only Debian and its derivatives are supported by this script; install by hand: ${packages[*]}"

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" != 0 ]; then
    need sudo "run this script as root, or install by hand: ${missing[*]}"
    as_root=(sudo)
fi
say "installing packages: ${missing[*]}"
"${as_root[@]}" apt-get update -q >&2
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "${missing[@]}" >&2

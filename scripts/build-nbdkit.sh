#!/usr/bin/env bash
# Prints the path of an nbdkit that is new enough (1.34), building one only where the system's is older:
# build-nbdkit.sh [LEAST]
#
# With LEAST, as in 32 for 1.32, an older one of the system is taken rather than building one.
#
# Before 1.34 a client that disconnects with replies pending aborts the whole server, so the plugin has to
# serialise the requests of a connection there. The build is Debian 13's source package, fetched and verified by
# apt from the mirror this machine already uses, with apt's state kept apart from the system's.
. "$(dirname "$0")/lib.sh"

wanted_minor=34
least_minor=${1:-$wanted_minor}

# is_current NBDKIT [MINOR]: true when the program runs and is at least 1.34, or 1.MINOR.
is_current() {
    local version major minor least=${2:-$wanted_minor}
    version=$("$1" --version 2>/dev/null) || return 1
    version=${version#nbdkit }
    IFS=. read -r major minor _ <<<"$version"
    [ "$major" -gt 1 ] || { [ "$major" -eq 1 ] && [ "$minor" -ge "$least" ]; }
}

if [ -n "${NBDKIT:-}" ]; then
    command -v "$NBDKIT" || die "NBDKIT=$NBDKIT is not a program"
    exit 0
fi
if system=$(command -v nbdkit) && is_current "$system"; then
    echo "$system"
    exit 0
fi
for built in "$HYPERNBD_CACHE"/nbdkit-*/sbin/nbdkit; do
    if is_current "$built"; then
        echo "$built"
        exit 0
    fi
done
if [ -n "$system" ] && is_current "$system" "$least_minor"; then
    echo "$system"
    exit 0
fi

say "no nbdkit 1.$wanted_minor or newer here; building Debian 13's"
need apt-get "install nbdkit 1.$wanted_minor or newer by hand and put it first in PATH, or name it in NBDKIT"
need make "run scripts/install-deps.sh first"

# The address of the main Debian archive, as this machine's own sources have it.
mirror=$(apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' |
    sed -n 's/^Debian|Debian|//p' | head -n 1)
[ -n "$mirror" ] || mirror=$(apt-get indextargets --no-release-info --format '$(COMPONENT)|$(REPO_URI)' \
    'Created-By: Packages' | sed -n 's/^main|//p' | head -n 1)
[ -n "$mirror" ] || die "apt's sources name no Debian archive; install nbdkit 1.$wanted_minor or newer by hand"

work=$(mktemp -d "$HYPERNBD_CACHE/build-nbdkit.XXXXXX")
trap 'rm -rf "$work"' EXIT

mkdir -p "$work"/{lists/partial,cache/archives/partial,source}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
signed_by=""
[ ! -e "$keyring" ] || signed_by="[signed-by=$keyring] "
echo "deb-src ${signed_by}${mirror} trixie main" >"$work/sources.list"
apt_options=(
    -o Dir::Etc::sourcelist="$work/sources.list"
    -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State::lists="$work/lists"
    -o Dir::Cache="$work/cache"
    -o APT::Sandbox::User="$(id -un)"
)
quietly "$work/update.log" apt-get "${apt_options[@]}" update -q
(cd "$work/source" && quietly "$work/source.log" apt-get "${apt_options[@]}" source -q --download-only nbdkit)

archives=("$work"/source/nbdkit_*.orig.tar.*z*)
archive=$(printf '%s\n' "${archives[@]}" | grep -v '\.asc$' | head -n 1)
[ -e "$archive" ] || die "Debian 13's nbdkit source package holds no original archive"
version=$(basename "$archive" | sed 's/^nbdkit_\(.*\)\.orig\.tar.*/\1/')
tar -xf "$archive" -C "$work"
cd "$work/nbdkit-$version"

say "building nbdkit $version (about two minutes)"
prefix=$HYPERNBD_CACHE/nbdkit-$version
quietly "$work/configure.log" ./configure --prefix="$prefix" --disable-static \
    --disable-golang --disable-lua --disable-ocaml --disable-perl --disable-python --disable-ruby \
    --disable-rust --disable-tcl --disable-torrent --without-libvirt --without-libguestfs --without-ext2 \
    --without-iso --disable-vddk --without-selinux --without-bash-completions
quietly "$work/make.log" make -j"$(nproc)"
# Installed beside its place and moved there whole: a half-installed nbdkit is never found.
quietly "$work/install.log" make install DESTDIR="$work/root"
rm -rf "$prefix"
mv "$work/root$prefix" "$prefix"
is_current "$prefix/sbin/nbdkit" || die "the nbdkit just built in $prefix does not run"
say "nbdkit $version is in $prefix"
echo "$prefix/sbin/nbdkit"

#!/usr/bin/env bash
# Makes a Debian package and an RPM in target/package, and tries each: package.sh [--no-build] [deb|rpm]…
#
# --no-build packs what is there: HYPERNBD_CLI and HYPERNBD_PLUGIN, or what `make build` left in target/release.
# Tried is what is in them: the plugin is loaded, and a volume is made and served from the package's own files.
. "$(dirname "$0")/lib.sh"

project=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$project/target}
# Where Cargo.toml says that the packages' files are.
staged=$project/target/package
profile=dist
kinds=()
for word; do
    case $word in
    --no-build) profile="" ;;
    deb | rpm) kinds+=("$word") ;;
    *) die "say --no-build, deb or rpm" ;;
    esac
done
[ ${#kinds[@]} -gt 0 ] || kinds=(deb rpm)
cd "$project"

if [ -n "$profile" ]; then
    scripts/install-deps.sh build serve
    sources=$(scripts/sources.sh)
    cargo build --profile "$profile" --locked
    echo "$sources" >"$target/$profile/hypernbd.sources"
    export HYPERNBD_CLI=$target/$profile/hypernbd HYPERNBD_PLUGIN=$target/$profile/libhypernbd.so
fi

# stage KIND PLUGIN_DIR: the files of a package, as `make install` lays them out.
stage() {
    rm -rf "${staged:?}/$1"
    DESTDIR=$staged/$1 PREFIX=/usr NBDKIT_PLUGIN_DIR=$2 scripts/install.sh install
    # A package knows its files itself.
    rm "$staged/$1/usr/share/hypernbd/installed"
    gzip -9n "$staged/$1"/usr/share/man/man1/*.1
}

# try_files ROOT: what is unpacked below ROOT serves a volume.
try_files() {
    local root=$1 plugin work
    plugin=$(find "$root" -name nbdkit-hypernbd-plugin.so)
    [ -n "$plugin" ] || die "the package has no plugin"
    work=$(mktemp -d)
    "${NBDKIT:-nbdkit}" --dump-plugin "$plugin" | grep -qx "name=hypernbd" || die "$plugin is no plugin of nbdkit"
    "$root/usr/bin/hypernbd" create "file://$work/volume/" --size 64M >&2
    # nbdkit runs the command once it serves, and ends with it.
    "${NBDKIT:-nbdkit}" -U - "$plugin" "file://$work/volume/" --run 'nbdinfo --size "$uri"' | grep -qx $((64 << 20)) ||
        die "the package's plugin does not serve a volume"
    rm -rf "$work"
    for file in bin/hypernbd lib/systemd/system/hypernbd@.service share/man/man1/hypernbd-create.1.gz \
        share/doc/hypernbd/copyright share/bash-completion/completions/hypernbd; do
        [ -s "$root/usr/$file" ] || die "the package has no /usr/$file"
    done
}

make_deb() {
    need dpkg-deb "install dpkg, or make the RPM alone: package.sh rpm"
    local tool package unpacked
    tool=$(scripts/build-cargo-tool.sh cargo-deb)
    stage deb "/usr/lib/$(dpkg-architecture -q DEB_HOST_MULTIARCH)/nbdkit/plugins"
    package=$(PATH=$(dirname "$tool"):$PATH cargo deb --no-build --no-strip --output "$staged/")
    unpacked=$(mktemp -d)
    dpkg-deb --contents "$package" >"$staged/deb.contents"
    dpkg-deb --field "$package" Depends | grep -q 'nbdkit (>= 1.32)' || die "$package does not depend on nbdkit"
    dpkg-deb --extract "$package" "$unpacked"
    try_files "$unpacked"
    rm -rf "$unpacked"
    say "made and tried $package"
}

make_rpm() {
    local tool package unpacked
    tool=$(scripts/build-cargo-tool.sh cargo-generate-rpm)
    stage rpm /usr/lib64/nbdkit/plugins
    package=$staged/hypernbd.$(uname -m).rpm
    PATH=$(dirname "$tool"):$PATH cargo generate-rpm --output "$package" >&2
    if command -v rpm2cpio >/dev/null && command -v cpio >/dev/null; then
        unpacked=$(mktemp -d)
        rpm -qlp "$package" >"$staged/rpm.contents"
        rpm -qp --requires "$package" | grep -q '^nbdkit-server >= 1.32' || die "$package does not require nbdkit"
        (cd "$unpacked" && rpm2cpio "$package" | cpio --quiet -idm)
        try_files "$unpacked"
        rm -rf "$unpacked"
        say "made and tried $package"
    else
        say "made $package, which was not tried: there is no rpm, or no cpio"
    fi
}

for kind in "${kinds[@]}"; do
    "make_$kind"
done

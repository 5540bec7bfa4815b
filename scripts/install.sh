#!/usr/bin/env bash
# Installs what was built, or takes it away again: install.sh install|uninstall
#
# PREFIX (/usr/local)         where the command line, manual pages, completions and units go
# NBDKIT_PLUGIN_DIR           where the plugin goes; the directory in which nbdkit looks for plugins by their names
# DESTDIR                     a directory that stands for / meanwhile, for packages
# HYPERNBD_CLI, HYPERNBD_PLUGIN   what is installed (target/release)
. "$(dirname "$0")/lib.sh"

project=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$project/target}/release
prefix=${PREFIX:-/usr/local}
destdir=${DESTDIR:-}
cli=${HYPERNBD_CLI:-$target/hypernbd}
plugin=${HYPERNBD_PLUGIN:-$target/libhypernbd.so}
# Every file that was installed, a path a line: those are taken away again, and nothing else.
manifest=$prefix/share/hypernbd/installed

[[ $prefix = /* ]] || die "PREFIX=$prefix is no absolute path"

plugin_dir() {
    local dir=${NBDKIT_PLUGIN_DIR:-}
    [ -n "$dir" ] || dir=$("${NBDKIT:-nbdkit}" --dump-config 2>/dev/null | sed -n 's/^plugindir=//p')
    [ -n "$dir" ] || dir=$(pkg-config nbdkit --variable=plugindir 2>/dev/null || true)
    [[ $dir = /* ]] || die "no nbdkit says where its plugins are: install nbdkit, or set NBDKIT_PLUGIN_DIR"
    printf '%s\n' "$dir"
}

# put MODE SOURCE PATH: notes it down; nothing is written before all of it is known.
put() { printf '%s\t%s\t%s\n' "$@" >>"$work/table"; }

# The list of files comes first, so that an installation that breaks off can be taken away, too.
write_all() {
    cut -f3 "$work/table" | LC_ALL=C sort >"$work/installed"
    local path mode source
    if [ -e "$destdir$manifest" ]; then
        LC_ALL=C comm -23 "$destdir$manifest" "$work/installed" | while IFS= read -r path; do rm -f "$destdir$path"; done
    fi
    install -D -m 644 "$work/installed" "$destdir$manifest"
    # install(1) makes a new file and never writes into an old one: a server may be running on that.
    while IFS=$'\t' read -r mode source path; do
        install -D -m "$mode" "$source" "$destdir$path"
    done <"$work/table"
}

do_install() {
    [ -x "$cli" ] || die "$cli is missing: run 'make build' first, without being root"
    [ -e "$plugin" ] || die "$plugin is missing: run 'make build' first, without being root"
    local dir
    dir=$(plugin_dir)
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT

    # Made before anything is installed, so that a command line which does not run here leaves nothing behind.
    mkdir "$work/man"
    "$cli" man "$work/man"
    local shell
    for shell in bash zsh fish; do
        "$cli" completions "$shell" >"$work/completions.$shell"
    done

    put 755 "$cli" "$prefix/bin/hypernbd"
    put 755 "$plugin" "$dir/nbdkit-hypernbd-plugin.so"
    local page unit
    for page in "$project"/docs/man/*.1 "$work"/man/*.1; do
        put 644 "$page" "$prefix/share/man/man1/$(basename "$page")"
    done
    put 644 "$work/completions.bash" "$prefix/share/bash-completion/completions/hypernbd"
    put 644 "$work/completions.zsh" "$prefix/share/zsh/site-functions/_hypernbd"
    put 644 "$work/completions.fish" "$prefix/share/fish/vendor_completions.d/hypernbd.fish"
    for unit in "$project"/contrib/systemd/*; do
        put 644 "$unit" "$prefix/lib/systemd/system/$(basename "$unit")"
    done
    put 644 "$project/contrib/udev/60-hypernbd.rules" "$prefix/lib/udev/rules.d/60-hypernbd.rules"
    put 644 "$project/contrib/packaging/copyright" "$prefix/share/doc/hypernbd/copyright"
    put 644 "$project/contrib/packaging/GPL-3" "$prefix/share/doc/hypernbd/GPL-3"
    put 644 "$project/LICENSE" "$prefix/share/doc/hypernbd/Apache-2.0"
    [ ! -e "$(dirname "$cli")/hypernbd.sources" ] ||
        put 644 "$(dirname "$cli")/hypernbd.sources" "$prefix/share/hypernbd/sources"
    write_all
    say "installed below $destdir$prefix, and the plugin in $destdir$dir"
}

do_uninstall() {
    [ -e "$destdir$manifest" ] ||
        die "$destdir$manifest is missing: nothing was installed there by 'make install'; is PREFIX the same?"
    local path
    while IFS= read -r path; do
        rm -f "$destdir$path"
    done <"$destdir$manifest"
    rm -f "$destdir$manifest"
    # What is ours alone; a directory with anything else in it stays.
    rmdir --ignore-fail-on-non-empty "$destdir$prefix/share/hypernbd" "$destdir$prefix/share/doc/hypernbd"
    say "removed from $destdir$prefix"
}

case ${1:-} in
install) do_install ;;
uninstall) do_uninstall ;;
*) die "say install or uninstall" ;;
esac

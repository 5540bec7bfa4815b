#!/usr/bin/env bash
# Prints the path of the MinIO server the tests run against, building it with Go where the cache has none.
. "$(dirname "$0")/lib.sh"

version=v0.0.0-20260212201848-7aac2a2c5b7c

if [ -n "${MINIO:-}" ]; then
    command -v "$MINIO" || die "MINIO=$MINIO is not a program"
    exit 0
fi
directory=$HYPERNBD_CACHE/minio-$version
if [ ! -x "$directory/minio" ]; then
    need go "install Go 1.24 or newer (https://go.dev/doc/install)"
    say "building MinIO $version (about five minutes on two cores)"
    work=$(mktemp -d "$HYPERNBD_CACHE/build-minio.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    GOBIN=$work/bin quietly "$work/install.log" go install "github.com/minio/minio@$version"
    mkdir -p "$directory"
    mv "$work/bin/minio" "$directory/minio"
    say "MinIO is in $directory"
fi
echo "$directory/minio"

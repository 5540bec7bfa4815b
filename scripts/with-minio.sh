#!/usr/bin/env bash
# Runs a command with a MinIO server of its own beside it: with-minio.sh COMMAND [ARGUMENT…]
#
# The command finds the server in HYPERNBD_TEST_S3_ENDPOINT, HYPERNBD_TEST_S3_BUCKET and the AWS_* variables. The
# server listens on a free port of the loopback interface, keeps its data in a temporary directory, and both are
# gone when the command has ended.
. "$(dirname "$0")/lib.sh"

[ $# -gt 0 ] || die "name the command to run"
minio=$("$(dirname "$0")/build-minio.sh")
work=$(mktemp -d)
server=""
finish() {
    [ -z "$server" ] || { kill "$server" && wait "$server"; } 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export AWS_ACCESS_KEY_ID=unit-tests AWS_SECRET_ACCESS_KEY=$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')
export AWS_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true
export HYPERNBD_TEST_S3_ENDPOINT=http://127.0.0.1:$port HYPERNBD_TEST_S3_BUCKET=hypernbd-unit

mkdir "$work/data"
MINIO_ROOT_USER=$AWS_ACCESS_KEY_ID MINIO_ROOT_PASSWORD=$AWS_SECRET_ACCESS_KEY MINIO_BROWSER=off MINIO_UPDATE=off \
    HOME=$work "$minio" server --quiet --address "127.0.0.1:$port" "$work/data" >"$work/log" 2>&1 &
server=$!
ready() {
    python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
        "$HYPERNBD_TEST_S3_ENDPOINT/minio/health/ready" 2>/dev/null
}
for _ in $(seq 300); do
    ready && break
    kill -0 "$server" 2>/dev/null || { cat "$work/log" >&2; die "MinIO did not start"; }
    sleep 0.1
done
ready || die "MinIO does not answer at $HYPERNBD_TEST_S3_ENDPOINT"

"$@"

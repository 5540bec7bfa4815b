# Shared by the scripts beside it; sourced, not run.
#
# Everything built or downloaded is kept in one cache directory, in a directory named after the version, so that
# a second run finds it at once and a version bump never meets an older artefact.

set -euo pipefail

HYPERNBD_CACHE=${HYPERNBD_CACHE:-$HOME/.cache/hypernbd}
mkdir -p "$HYPERNBD_CACHE"
HYPERNBD_CACHE=$(cd "$HYPERNBD_CACHE" && pwd)

# Progress goes to stderr: the scripts' stdout is a path for the caller.
say() { printf '==> %s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# need COMMAND WHAT-TO-DO
need() { command -v "$1" >/dev/null || die "the command '$1' is missing: $2"; }

# Runs a command with its output in a log file that is shown only when the command fails.
quietly() {
    local log=$1
    shift
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        die "'$*' failed; the whole output is in $log"
    fi
}

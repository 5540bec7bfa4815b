#!/usr/bin/env bash
# Puts a program and the shared libraries that it needs into a root directory: put.sh ROOT PROGRAM [NAME]
set -euo pipefail
root=$1 program=$2 name=${3:-$(basename "$2")}
rm -f "$root/bin/$name"
cp -L "$program" "$root/bin/$name"
ldd "$program" 2>/dev/null | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$root$(dirname "$library")"
    cp -Ln "$library" "$root$library"
done

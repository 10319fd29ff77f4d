#!/usr/bin/env bash
# Makes release tarballs of the client and of the node, with SHA256SUMS, under target/dist.
#   deploy/tarballs.sh            builds --release first
#   deploy/tarballs.sh DIR        takes the binaries that lie in DIR
set -euo pipefail
cd "$(dirname "$0")/.."
target_dir=${CARGO_TARGET_DIR:-target}
version=$(cargo metadata --no-deps --format-version 1 | sed -n 's/.*"name":"kinoflock-node","version":"\([^"]*\)".*/\1/p')
triple=$(rustc -vV | sed -n 's/^host: //p')
bins=${1:-}
if [ -z "$bins" ]; then
    cargo build --release --locked --bin kinoflockd --bin kinoflock
    bins=$target_dir/release
fi
dist=$target_dir/dist
rm -rf "$dist"
mkdir -p "$dist"

pack() { # name, files...
    local name=$1 stage
    shift
    stage=$dist/$name
    mkdir -p "$stage"
    cp "$@" README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE "$stage/"
    # Same bytes for the same input: names sorted, owners and times fixed.
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime='2026-01-01 00:00Z' -C "$dist" -cf - "$name" \
        | gzip -n9 >"$dist/$name.tar.gz"
    rm -r "$stage"
}

pack "kinoflock-$version-$triple" "$bins/kinoflock"
pack "kinoflockd-$version-$triple" "$bins/kinoflockd" deploy/systemd/kinoflockd.service
(cd "$dist" && sha256sum -- *.tar.gz >SHA256SUMS && cat SHA256SUMS)

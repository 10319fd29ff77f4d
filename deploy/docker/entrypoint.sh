#!/bin/sh
# Makes the key and the configuration on the first start, then becomes the daemon.
# KINOFLOCK_DEVICES, set in the image with CUDA, names the devices of a new configuration.
set -eu
config=/etc/kinoflock/node.toml
new=no
[ -e "$config" ] || new=yes
kinoflockd --system init --if-missing
if [ "$new" = yes ]; then
    for device in ${KINOFLOCK_DEVICES:-}; do
        printf '\n[[device]]\nkind = "%s"\n' "$device" >>"$config"
    done
fi
exec kinoflockd --system run "$@"

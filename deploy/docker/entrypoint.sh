#!/bin/sh
# Makes the key and the configuration on the first start, then becomes the daemon.
set -eu
kinoflockd --system init --if-missing
exec kinoflockd --system run "$@"

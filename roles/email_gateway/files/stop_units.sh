#!/bin/sh
# Stops unit $1, now and at boot, and removes the unit files $2 and so on.
set -eu
systemctl --quiet disable --now "$1"
shift
systemctl --quiet stop "$@"
for file; do rm -f "/etc/systemd/system/$file"; done
systemctl daemon-reload

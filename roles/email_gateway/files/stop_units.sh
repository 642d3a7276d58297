#!/bin/sh
# Stops unit $1, now and at boot, and removes the unit files $2 and so on.
set -eu
systemctl --quiet disable --now "$1"
shift
systemctl --quiet stop "$@"
# One that has failed would be listed on without its file.
systemctl --quiet reset-failed "$@" 2>/dev/null || true
for file; do rm -f "/etc/systemd/system/$file"; done
systemctl daemon-reload

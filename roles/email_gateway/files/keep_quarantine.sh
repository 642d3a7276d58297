#!/bin/sh
# Keeps the copies of refused mail in folder $1, if there are any, when the gateway goes.
set -eu
[ -n "$(ls -A "$1" 2>/dev/null)" ] || exit 0
kept=/var/backups/zulip-email-gateway-quarantine
install -d -m 700 "$kept"
cp -a "$1/." "$kept/"
chown -R root:root "$kept"
echo "copies of refused mail are kept in $kept"

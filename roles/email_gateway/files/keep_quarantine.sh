#!/bin/sh
# Keeps the copies of refused mail in folder $2, if there are any, when the gateway goes. Its user $1
# reads them: root would go where a link leads.
set -eu
umask 077
kept=/var/backups/zulip-email-gateway-quarantine
mkdir -p "$kept"
runuser -u "$1" -- sh -euc 'cd "$1"; find . -maxdepth 1 -type f -name "*.mail" | tar --create --files-from -' sh "$2" > "$kept.tar"
if [ -n "$(tar --list --file "$kept.tar")" ]; then
  tar --extract --no-same-owner --file "$kept.tar" --directory "$kept"
  echo "copies of refused mail are kept in $kept"
fi
rm "$kept.tar"
rmdir --ignore-fail-on-non-empty "$kept"

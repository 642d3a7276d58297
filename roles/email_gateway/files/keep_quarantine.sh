#!/bin/sh
# Keeps the copies of refused mail in folder $2, if there are any, when the gateway goes. Its user $1
# reads them: root would go where a link leads. When that user is gone they have been kept before.
set -eu
umask 077
id "$1" >/dev/null 2>&1 || exit 0
kept=/var/backups/zulip-email-gateway-quarantine
mkdir -p "$kept"
copies='cd "$1"; find . -maxdepth 1 -type f -name "*.mail" -printf "%P\n" | tar --create --files-from -'
runuser -u "$1" -- sh -euc "$copies" sh "$2" > "$kept.tar"
tar --extract --no-same-owner --no-same-permissions --no-overwrite-dir --file "$kept.tar" --directory "$kept" --wildcards '*.mail' \
  2>/dev/null || [ -z "$(tar --list --file "$kept.tar")" ]
rm "$kept.tar"
if [ -n "$(ls -A "$kept")" ]; then echo "copies of refused mail are kept in $kept"; else rmdir "$kept"; fi

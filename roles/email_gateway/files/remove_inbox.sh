#!/bin/sh
# Removes what polling has left in folder $1 (configuration) and $2 (state), and the IMAP
# library if it came with polling.
set -eu
# Unless something else has come to need it.
if [ -e "$1/imap-library-is-ours" ] &&
  ! apt-get purge --simulate python3-imap-tools | grep '^Purg ' | grep -qv '^Purg python3-imap-tools '; then
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 purge --yes --quiet python3-imap-tools
fi
rm -f "$2/refresh-token" "$2/inbox.lock" "$1/imap-library-is-ours" "$1/imap-secret"  # of a link, the link

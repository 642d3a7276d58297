#!/bin/sh
# Records in file $1 which packages come with the others, before they are installed, and lets no rspamd start
# that comes by this: Debian's package would scan mail for spam. (What is only upgraded has its version before
# the new one in parentheses.)
set -eu
note=$1
shift
come=$(apt-get install --simulate --no-install-recommends "$@")
printf '%s\n' "$come" | sed -n 's/^Inst \([^ ]*\) (.*/\1/p' > "$note.new"
if grep -qx rspamd "$note.new"; then systemctl --quiet mask rspamd.service 2>/dev/null; fi
mv "$note.new" "$note"

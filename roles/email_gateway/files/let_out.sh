#!/bin/sh
# Takes back what let_in.sh has done for user $1, as noted in folder $2.
set -eu
if command -v setfacl >/dev/null; then
  while read -r folder; do
    [ -d "$folder" ] || continue
    setfacl --remove "user:$1" "$folder"
    # With the last named entry the mask goes, too; then it is a folder without an ACL again.
    getfacl --omit-header "$folder" 2>/dev/null | grep -Eq '^(user|group):[^:]+:' || setfacl --no-mask --remove mask:: "$folder"
  done < "$2/let-in"
fi
rm -f "$2/let-in"
if [ -e "$2/acl-is-ours" ]; then
  DEBIAN_FRONTEND=noninteractive apt-get purge --yes --quiet acl
  rm -f "$2/acl-is-ours"
fi

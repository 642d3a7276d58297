#!/bin/sh
# Revokes what grant_access.sh has done for user $1, as noted in folder $2.
set -eu
if command -v setfacl >/dev/null; then
  while read -r folder; do
    [ -d "$folder" ] || continue
    # As its owner, see grant_access.sh.
    as_owner=''
    if id "$(stat -c %U "$folder")" >/dev/null 2>&1; then as_owner="runuser -u $(stat -c %U "$folder") --"; fi
    $as_owner setfacl --remove "user:$1" "$folder" 2>/dev/null || true
    # With the last named entry the mask goes, too: it is a folder without an ACL again.
    getfacl --omit-header "$folder" 2>/dev/null | grep -Eq '^(user|group):[^:]+:' ||
      $as_owner setfacl --no-mask --remove mask:: "$folder"
  done < "$2/let-in"
fi
# Unless something else has come to need it.
if [ -e "$2/acl-is-ours" ] && ! apt-get purge --simulate acl | grep '^Purg ' | grep -qv '^Purg acl '; then
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 purge --yes --quiet acl
fi
rm -f "$2/acl-is-ours" "$2/let-in"

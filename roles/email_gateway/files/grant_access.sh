#!/bin/sh
# Grants user $1 access through the folders $3 and so on, which Zulip's Puppet keeps to the user
# zulip. By ACLs: Puppet, which sets owner and mode, leaves them alone. What was done is
# noted in folder $2 before it is done, for revoke_access.sh.
set -eu
user=$1 notes=$2
shift 2
if ! command -v setfacl >/dev/null; then
  touch "$notes/acl-is-ours"
  export DEBIAN_FRONTEND=noninteractive
  wait='-o DPkg::Lock::Timeout=600'
  apt-get $wait install --yes --quiet --no-install-recommends acl ||
    { apt-get $wait update --quiet || true; apt-get $wait install --yes --quiet --no-install-recommends acl; }
fi
for folder; do
  grep -qsFx "$folder" "$notes/let-in" || echo "$folder" >> "$notes/let-in"
  # As the folder's owner, who might have put a link in its place.
  runuser -u "$(stat -c %U "$folder")" -- setfacl --modify "user:$user:x" "$folder"
done

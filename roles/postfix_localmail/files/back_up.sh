#!/bin/sh
# Copies to folder $1 what the role is about to replace. Made beside its place and
# moved there when complete, so an interrupted run cannot leave half a copy.
set -eu
export LC_ALL=C
umask 077
new=$1.new
rm -rf "$new"
mkdir -p "$new"
# An archive of these paths alone: it does not touch the folders they stand in.
cd /
find etc/postfix etc/exim4 etc/default/exim4 etc/mailname etc/aliases etc/aliases.* -maxdepth 0 2>/dev/null |
  tar --create --file "$new/files.tar" --files-from -
# All packages (not in a pipe: none would count as all that are there), and which mail
# system ran, and would at boot.
packages=$(dpkg-query --show --showformat='${db:Status-Status} ${Package}\n')
printf '%s\n' "$packages" | sed -n 's/^installed //p' | sort > "$new/packages"
for unit in postfix exim4; do
  if systemctl --quiet is-active "$unit"; then echo "$unit"; fi
done > "$new/active"
for unit in postfix exim4; do
  if systemctl --quiet is-enabled "$unit" 2>/dev/null; then echo "$unit"; fi
done > "$new/enabled"
touch "$new/complete"
mv -T "$new" "$1"

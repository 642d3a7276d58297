#!/bin/sh
# Starts Postfix with its configuration, if that is sound, now and at boot, or reloads it. Notes in folder $1 when.
set -eu
postfix check
# Postfix reads on which addresses to listen only when it starts (postconf(5),
# inet_interfaces), and with another configuration it may have listened on loopback.
if systemctl --quiet is-active postfix && postfix status 2>/dev/null &&
  ss -Hltn 'sport = :25' | grep -Fq -e ' 0.0.0.0:25 ' -e ' *:25 ' -e ' [::]:25 '; then
  postfix reload
else
  # Also one that systemd does not know of, which would run on with what it has read.
  ! postfix status 2>/dev/null || postfix stop
  systemctl restart postfix
fi
systemctl --quiet is-enabled postfix || systemctl --quiet enable postfix
touch "$1/reloaded"

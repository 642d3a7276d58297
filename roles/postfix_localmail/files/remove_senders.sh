#!/bin/sh
# Stops rspamd's checks of senders, which Postfix asks for no longer, and removes what came with them. The
# note in folder $1 goes last: an interrupted run is finished by the next one.
set -eu
noted=$1/senders-packages unit=zulip-email-gateway-senders.service
export DEBIAN_FRONTEND=noninteractive
systemctl --quiet disable --now $unit 2>/dev/null || true
rm -f /etc/systemd/system/$unit
systemctl daemon-reload
rm -rf /var/lib/zulip-email-gateway-senders
# What nothing else has come to need, rspamd first, as it needs the others.
is_needed() { apt-get purge --simulate "$1" | sed -n 's/^Purg \([^ ]*\) .*/\1/p' | grep -qvx "$1"; }
again=yes
while [ "$again" = yes ]; do
  again=no
  for package in $(cat "$noted" 2>/dev/null); do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || continue
    if is_needed "$package"; then continue; fi
    apt-get -o DPkg::Lock::Timeout=600 purge --yes --quiet "$package"
    again=yes
  done
done
if grep -qsx rspamd "$noted"; then systemctl --quiet unmask rspamd.service; fi
rm -f /etc/zulip-email-gateway-senders.conf
rm -f "$noted"

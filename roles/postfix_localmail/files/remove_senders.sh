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
purge() { apt-get -o DPkg::Lock::Timeout=600 purge --yes --quiet "$@"; }
# What would go with these packages.
going() { apt-get purge --simulate "$@" | sed -n 's/^Purg \([^ ]*\) .*/\1/p'; }
are_needed() { going "$@" | grep -qvxF "$(printf '%s\n' "$@")"; }
# What nothing else has come to need. apt takes a second for each question: so it is asked first what came for nothing
# but those of the packages that were installed by name; then of each that is left, rspamd first.
# shellcheck disable=SC2046,SC2086 # lists
if [ -s "$noted" ]; then
  there=$(dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' $(cat "$noted") 2>/dev/null | sed -n 's/^installed //p')
  named=$([ -z "$there" ] || apt-mark showmanual $there)
  unneeded=$([ -z "$named" ] || going --auto-remove $named | grep -xF "$there" || true)
  if [ -n "$unneeded" ] && ! are_needed $unneeded; then purge $unneeded; fi
fi
again=yes
while [ "$again" = yes ]; do
  again=no
  for package in $(cat "$noted" 2>/dev/null); do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || continue
    if are_needed "$package"; then continue; fi
    purge "$package"
    again=yes
  done
done
if grep -qsx rspamd "$noted"; then systemctl --quiet unmask rspamd.service; fi
rm -f /etc/zulip-email-gateway-senders.conf
rm -f "$noted"

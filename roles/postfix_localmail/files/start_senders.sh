#!/bin/sh
# Starts rspamd's checks of senders, now and at boot, where they do not run as they are written, and waits
# until Postfix can ask at socket $1. Prints what it did.
set -eu
unit=zulip-email-gateway-senders.service
[ "$(systemctl show --property=NeedDaemonReload --value $unit)" = no ] || systemctl daemon-reload
systemctl --quiet is-enabled $unit 2>/dev/null || { systemctl --quiet enable $unit; echo "$unit enabled"; }
# Without the name of the weekday, which find does not understand.
since=$(systemctl show --timestamp=us+utc --property=ActiveEnterTimestamp --value $unit | cut -d' ' -f2-)
files="/etc/systemd/system/$unit /etc/zulip-email-gateway-senders.conf"
# shellcheck disable=SC2086 # two files
if ! systemctl --quiet is-active $unit || [ -z "$since" ] || [ -n "$(find $files -newerct "$since" -print -quit)" ]; then
  systemctl restart $unit
  echo "$unit started"
fi
# At its first start it compiles the list of domains, which takes a busy host long.
for _ in $(seq 1800); do
  if [ -S "$1" ] && systemctl --quiet is-active $unit; then exit; fi
  sleep 0.1
done
echo "rspamd does not check senders; look at: journalctl -u $unit" >&2
exit 1

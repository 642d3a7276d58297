#!/bin/sh
# Starts the socket at which smtpd asks, now and at boot, if it does not run as it is written.
# Prints what it did. The service takes over sockets only when it starts itself; meanwhile what
# comes waits in them.
set -eu
unit=zulip-email-gateway-policy.socket
service=zulip-email-gateway.service
file=/etc/systemd/system/$unit
# Whether it was written since it was started. Without the name of the weekday, which find does not understand.
changed() {
  since=$(systemctl show --timestamp=us+utc --property=ActiveEnterTimestamp --value "$unit" | cut -d' ' -f2-)
  [ -z "$since" ] || [ -n "$(find "$file" -newerct "$since" -print -quit)" ]
}
systemctl --quiet is-enabled "$unit" 2>/dev/null || { systemctl --quiet enable "$unit"; echo "$unit enabled"; }
if ! systemctl --quiet is-active "$unit" || changed; then
  systemctl daemon-reload
  systemctl stop "$unit" "$service"
  systemctl start "$unit"
  systemctl start "$service"
  echo "$unit started"
fi

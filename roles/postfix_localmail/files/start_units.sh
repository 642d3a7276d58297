#!/bin/sh
# Starts the socket at which smtpd asks and the timer that looks at the certificate, now and at boot,
# where they do not run as they are written. Prints what it did.
set -eu
socket=zulip-email-gateway-policy.socket timer=zulip-email-gateway-certificate.timer
# Whether one of a unit's files was written since it was started. Without the name of the weekday,
# which find does not understand.
changed() {
  since=$(systemctl show --timestamp=us+utc --property=ActiveEnterTimestamp --value "$1" | cut -d' ' -f2-)
  [ -z "$since" ] || [ -n "$(find "/etc/systemd/system/${1%.*}".* -newerct "$since" -print -quit)" ]
}
for unit in $socket $timer; do
  systemctl --quiet is-enabled $unit 2>/dev/null || { systemctl --quiet enable $unit; echo "$unit enabled"; }
  if systemctl --quiet is-active $unit && ! changed $unit; then continue; fi
  systemctl daemon-reload
  if [ $unit = $socket ]; then
    # The service takes over sockets only when it starts itself; meanwhile what comes waits in them.
    systemctl stop $socket zulip-email-gateway.service
    systemctl start $socket
    systemctl start zulip-email-gateway.service
  else
    systemctl restart $timer
  fi
  echo "$unit started"
done

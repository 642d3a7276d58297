#!/bin/sh
# Starts units, now and at boot. Arguments: UNIT=FILE,FILE... with the files a unit
# runs by: one that was started before a change of them is restarted. Prints what it did.
set -eu
for argument; do
  unit=${argument%%=*}
  files=$(echo "${argument#*=}" | tr , ' ')
  [ "$(systemctl show --property=NeedDaemonReload --value "$unit")" = no ] || systemctl daemon-reload
  systemctl --quiet is-enabled "$unit" 2>/dev/null || { systemctl --quiet enable "$unit"; echo "$unit enabled"; }
  systemctl --quiet is-active "$unit" || { systemctl start "$unit"; echo "$unit started"; }
  # Without the name of the weekday, which find does not understand.
  since=$(systemctl show --timestamp=us+utc --property=ActiveEnterTimestamp --value "$unit" | cut -d' ' -f2-)
  if [ -n "$since" ] && [ -n "$(find $files -newerct "$since" -print -quit)" ]; then
    systemctl restart "$unit"
    echo "$unit restarted"
  fi
done

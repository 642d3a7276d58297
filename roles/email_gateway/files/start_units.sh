#!/bin/sh
# Starts units, now and at boot. Arguments: UNIT=FILE,FILE... with the files a unit
# runs by: one that was started before a change of them is restarted. Prints what it did.
set -eu
active() { systemctl --quiet is-active "$1"; }
# Whether one of the files $2 and so on has changed since unit $1 was started.
changed() {
  # Without the name of the weekday, which find does not understand.
  since=$(systemctl show --timestamp=us+utc --property=ActiveEnterTimestamp --value "$1" | cut -d' ' -f2-)
  shift
  [ -n "$since" ] && [ -n "$(find "$@" -newerct "$since" -print -quit)" ]
}
for argument; do
  unit=${argument%%=*}
  files=$(echo "${argument#*=}" | tr , ' ')
  # The unit that a path, a socket or a timer starts may have changed alone.
  for file in $files; do
    case $file in
      /etc/systemd/system/*)
        [ "$(systemctl show --property=NeedDaemonReload --value "${file##*/}")" = no ] || systemctl daemon-reload ;;
    esac
  done
  systemctl --quiet is-enabled "$unit" 2>/dev/null || { systemctl --quiet enable "$unit"; echo "$unit enabled"; }
  case $unit in
    *.socket)
      # systemd does not start a socket whose service runs. They are stopped together, so
      # that no connection starts the service in between.
      service=${unit%.socket}.service
      did=''
      if ! active "$unit"; then did=started
      elif changed "$unit" "/etc/systemd/system/$unit"; then did=restarted; fi
      if [ -n "$did" ]; then
        systemctl stop "$unit" "$service"
        systemctl start "$unit"
        echo "$unit $did"
      fi
      # Connections wait in the socket meanwhile.
      if active "$service" && changed "$service" $files; then
        systemctl restart "$service"
        echo "$service restarted"
      fi ;;
    *)
      active "$unit" || { systemctl start "$unit"; echo "$unit started"; }
      if changed "$unit" $files; then
        systemctl restart "$unit"
        echo "$unit restarted"
      fi ;;
  esac
done

#!/bin/sh
# Closes port 25 and waits until what waits in the queue is delivered: the mail for Zulip,
# or with the argument "all" everything, bounces included, because Postfix is about to go.
# If some is left, opens the port again and fails: nothing is lost. The configuration
# that follows opens the port again by itself.
set -eu
domain=$(postconf -h virtual_mailbox_domains)
waiting() {
  if [ "${1:-}" = all ]; then postqueue -j | wc -l
  else postqueue -j | grep -ic "\"address\": \"[^\"]*@\($domain\|localhost\)\"" || true; fi
}
open_again() { postconf -e 'master_service_disable ='; postfix reload 2>/dev/null || true; echo "port 25 is open again"; }

# Debian 12's unit does not know that Postfix has died: it would not start it.
postfix status 2>/dev/null || systemctl restart postfix
trap open_again EXIT
# A shell that is ended by a signal does not run that trap by itself.
trap 'exit 1' HUP INT TERM PIPE
postconf -e 'master_service_disable = inet'
postfix reload 2>/dev/null
echo "port 25 is closed"
tries=60
while [ "$(waiting "$@")" -gt 0 ] && [ "$tries" -gt 0 ]; do
  [ $((tries % 20)) -ne 0 ] || postqueue -f
  sleep 1
  tries=$((tries - 1))
done
left=$(waiting "$@")
if [ "$left" -eq 0 ]; then
  trap - EXIT
  exit 0
fi
echo "$left mails still wait in Postfix' queue, so $domain stays its mail domain. See mailq and" \
  "zulip-email-gateway status; run this again when the queue is empty, or give mails up with" \
  "postsuper -d QUEUE_ID." >&2
exit 1

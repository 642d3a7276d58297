#!/bin/sh
# Closes port 25 and waits until what waits in the queue is delivered: the mail for Zulip,
# or with the argument "all" everything, bounces included, because Postfix is about to go.
# If some is left, or if nobody can tell, opens the port again and fails: nothing is lost.
# The configuration that follows opens the port again by itself.
set -eu
domains=$(postconf -h virtual_mailbox_domains)
domain=${domains%% *}
# The lines of "postqueue -j" that count, each of which is a mail. \" may stand in an address.
if [ "${1:-}" = all ]; then counts='^{'
else counts="\"address\": \"\\([^\"\\]\\|\\\\.\\)*@\\($(echo "$domains" | sed 's/ /\\|/g')\\|localhost\\)\""; fi
# Not in a pipe, where a queue that cannot be read would count as an empty one.
waiting() {
  queue=$(postqueue -j 2>/dev/null) || {
    echo "Postfix's queue cannot be read (postqueue ended with $?: $(postqueue -j 2>&1 >/dev/null)), so nobody knows" \
      "whether mail waits in it, and $domain stays its mail domain. Mend what mailq complains of, then run this again." >&2
    return 1
  }
  printf '%s\n' "$queue" | grep -ic "$counts" || [ $? -eq 1 ]
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
# Each count is an assignment of its own: only there set -e ends the script when it fails.
left=$(waiting)
while [ "$left" -gt 0 ] && [ "$tries" -gt 0 ]; do
  [ $((tries % 20)) -ne 0 ] || postqueue -f
  sleep 1
  tries=$((tries - 1))
  left=$(waiting)
done
if [ "$left" -eq 0 ]; then
  trap - EXIT
  exit 0
fi
echo "$left mails still wait in Postfix's queue, so $domain stays its mail domain. See mailq and" \
  "zulip-email-gateway status; run this again when the queue is empty, or give mails up with" \
  "postsuper -d QUEUE_ID." >&2
exit 1

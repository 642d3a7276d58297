#!/bin/sh
# Prints as JSON what stands on this host: who holds port 25, whether Postfix is
# installed, configured, and configured by us and for which mail domain, how many mails
# wait in another mail system's queue, whether a copy of what was before is kept in folder
# $1, and whether the delivery program is there. Changes nothing.
yes_if() { if "$@"; then echo true; else echo false; fi; }
holder=$(ss --no-header --listening --numeric --tcp --processes 'sport = :25' |
  grep -o '("[^"]*"' | tr -d '("' | sort -u | paste -sd, -)
# Postfix' master shares the port with its smtpd processes.
case ",$holder," in *,master,*) holder=master ;; esac
# Without CAP_SYS_PTRACE, in some containers, ss does not know the names of others' processes.
if [ -z "$holder" ] && [ -n "$(ss --no-header --listening --numeric --tcp 'sport = :25')" ]; then
  for name in exim4 master unknown; do holder=$name; ! pgrep -x "$name" >/dev/null || break; done
fi
ours=$(yes_if grep -qs 'Zulip email gateway' /etc/postfix/main.cf)
waiting=0
if [ -x /usr/sbin/postfix ] && [ "$ours" = false ]; then waiting=$(postqueue -j 2>/dev/null | wc -l)
elif [ -x /usr/sbin/exim4 ]; then waiting=$(exim4 -bpc 2>/dev/null || echo 0); fi
printf '{"holder": "%s", "installed": %s, "configured": %s, "ours": %s, "waiting": %s, "kept": %s, "program": %s, "domain": "%s"}\n' \
  "$holder" \
  "$(yes_if test -x /usr/sbin/postfix)" \
  "$(yes_if test -e /etc/postfix/main.cf)" \
  "$ours" \
  "$waiting" \
  "$(yes_if test -e "$1/complete")" \
  "$(yes_if test -x /usr/local/bin/zulip-email-gateway)" \
  "$(sed -n 's/^virtual_mailbox_domains = //p' /etc/postfix/main.cf 2>/dev/null)"

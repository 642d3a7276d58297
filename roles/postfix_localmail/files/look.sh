#!/bin/sh
# Prints as JSON what stands on this host. Changes nothing. Arguments: the folder with the
# copy of what was before; the packages that are needed.
before=$1
shift
yes_if() { if "$@"; then echo true; else echo false; fi; }

# Who holds port 25.
holder=$(ss --no-header --listening --numeric --tcp --processes 'sport = :25' |
  grep -o '("[^"]*"' | tr -d '("' | sort -u | paste -sd, -)
# Postfix's master shares the port with its smtpd processes.
case ",$holder," in *,master,*) holder=master ;; esac
# Without CAP_SYS_PTRACE, in some containers, ss does not know the names of others' processes.
if [ -z "$holder" ] && [ -n "$(ss --no-header --listening --numeric --tcp 'sport = :25')" ]; then
  for name in exim4 master unknown; do holder=$name; ! pgrep -x "$name" >/dev/null || break; done
fi

# How many mails wait in the queue of a mail system that is not ours, or why nobody can
# tell, and which one it is (but for Postfix), whether it runs or not. Not in a pipe, where
# a queue that cannot be read would count as an empty one.
ours=$(yes_if grep -qs 'Zulip email gateway' /etc/postfix/main.cf)
waiting=0 unreadable=''
# Without main.cf there is no mail system to replace, and postqueue does not run.
if [ -x /usr/sbin/postfix ] && [ -e /etc/postfix/main.cf ] && [ "$ours" = false ]; then
  queue=$(postqueue -j 2>&1) || unreadable="postqueue ended with $?"
  waiting=$(printf '%s\n' "$queue" | grep -c '^{')
elif [ -x /usr/sbin/exim4 ]; then
  queue=$(exim4 -bpc 2>&1) || unreadable="exim4 -bpc ended with $?"
  waiting=$(printf '%s\n' "$queue" | tail -n 1)
  case $waiting in *[!0-9]* | '') waiting=0 unreadable=${unreadable:-exim4 -bpc tells no number} ;; esac
fi
# With its last words, fit for JSON.
[ -z "$unreadable" ] || unreadable="$unreadable: $(printf '%s\n' "$queue" | grep -v '^{' | tail -n 3 |
  LC_ALL=C tr '[:cntrl:]' ' ' | tr -d '"\\' | sed 's/ *$//')"
other=$(dpkg-query --show --showformat='${db:Status-Status} ${Package} ${Provides}\n' |
  sed -n 's/^installed \([^ ]*\) .*\bmail-transport-agent\b.*/\1/p' | grep -vx postfix | paste -sd, -)
packages=$(dpkg-query --show --showformat='${db:Status-Status}\n' "$@" 2>/dev/null | grep -cx installed)
# Through which host mail leaves this one, by a configuration that is not ours.
relayhost=''
if [ -e /etc/postfix/main.cf ] && [ "$ours" = false ]; then
  relayhost=$(postconf -h relayhost 2>/dev/null | tr -d '"\\')
elif [ -x /usr/sbin/exim4 ] && grep -Eqs "^dc_eximconfig_configtype='(smarthost|satellite)'" /etc/exim4/update-exim4.conf.conf; then
  relayhost=$(sed -n "s/^dc_smarthost='\([^'\"\\]*\)'.*/\1/p" /etc/exim4/update-exim4.conf.conf)
fi
# Whether Zulip's certificate and its key belong together. Without openssl nobody can tell yet.
key=/etc/ssl/private/zulip.key chain=/etc/ssl/certs/zulip.combined-chain.crt certificate_fault=''
if [ -e "$key" ] && [ -e "$chain" ] && command -v openssl >/dev/null; then
  if ! of_key=$(openssl pkey -in "$key" -pubout -passin pass: 2>/dev/null); then
    certificate_fault="$key has no key that can be read without a passphrase"
  elif ! of_chain=$(openssl x509 -in "$chain" -noout -pubkey 2>/dev/null); then
    certificate_fault="$chain has no certificate"
  elif [ "$of_key" != "$of_chain" ]; then
    certificate_fault="$key is not the key of $chain"
  fi
fi
cat <<JSON
{
  "holder": "$holder",
  "other": "$other",
  "installed": $(yes_if test -x /usr/sbin/postfix),
  "packages": $(yes_if test "$packages" = $#),
  "configured": $(yes_if test -e /etc/postfix/main.cf),
  "ours": $ours,
  "pattern": "$(sed -n 's/^# EMAIL_GATEWAY_PATTERN\( =\|, and former ones:\) //p' /etc/postfix/main.cf 2>/dev/null)",
  "relayhost": "$relayhost",
  "waiting": $waiting,
  "unreadable": "$unreadable",
  "kept": $(yes_if test -e "$before/complete"),
  "program": $(yes_if test -x /usr/local/bin/zulip-email-gateway),
  "zulips_certificate": $(yes_if test -e "$key" -a -e "$chain"),
  "certificate_fault": "$certificate_fault"
}
JSON

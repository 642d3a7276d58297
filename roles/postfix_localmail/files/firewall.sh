#!/bin/sh
# Prints a line for each active firewall: "ufw open" (to everybody), "ufw ours" (this
# gateway's own rule), "ufw closed", "firewalld open", "firewalld closed". Changes nothing.
export LC_ALL=C
if command -v ufw >/dev/null; then
  rules=$(ufw status)
  # Our rule also stands while ufw is not active.
  if ufw show added | grep -q '25/tcp.*Zulip email gateway'; then echo "ufw ours"
  else
    case $rules in
      "Status: active"*)
        if echo "$rules" | grep -Eq '^(25|25/tcp|Postfix|Postfix SMTP.*|Mail submission) +ALLOW( IN)? +Anywhere'; then
          echo "ufw open"
        else echo "ufw closed"; fi ;;
    esac
  fi
fi
if command -v firewall-cmd >/dev/null && firewall-cmd --quiet --state 2>/dev/null; then
  if firewall-cmd --quiet --query-service=smtp || firewall-cmd --quiet --query-port=25/tcp; then
    echo "firewalld open"
  else
    echo "firewalld closed"
  fi
fi
exit 0

#!/bin/sh
# Puts back what keep.sh has kept in folder $1. Every step can be done twice, and the
# copy goes last: an interrupted run is finished by the next one.
set -eu
export LC_ALL=C
before=$1
export DEBIAN_FRONTEND=noninteractive
installed() { dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p' | sort; }
put_back() { tar --extract --preserve-permissions --file "$before/files.tar" --directory /; }

if [ -x /usr/sbin/postfix ]; then systemctl stop postfix; fi
# Packages that came with Postfix and that nothing else has come to need.
came='postfix|ssl-cert|cpio|lib(icu[0-9]+|sasl2-(2|modules|modules-db)|nsl2|db5\.3(t64)?|tirpc(-common|3|3t64)|lmdb0|ssl3(t64)?)'
added=$(installed | comm -13 "$before/packages" - | grep -Ex "$came" || true)
gone=$(installed | comm -23 "$before/packages" - | grep -E '^exim4' || true)
# What would be left without any mail system, and so be removed with Postfix.
needed_by=$(apt-get purge --simulate postfix 2>/dev/null | sed -n 's/^Purg \([^ ]*\) .*/\1/p' | grep -vx postfix || true)
case " $(echo $added) " in *" postfix "*)
  if [ -n "$gone" ]; then
    # One for the other in one step, so that what needs a mail system stays. exim4's files
    # first: it would ask what it finds.
    apt-get update --quiet
    put_back
    apt-get install --yes --quiet --no-install-recommends -o Dpkg::Options::=--force-confold $gone postfix-
    apt-get purge --yes --quiet postfix
  elif [ -n "$needed_by" ]; then
    echo "Postfix stays installed, without a configuration: $(echo $needed_by) can not do without a mail system"
    systemctl --quiet disable postfix
  else
    apt-get purge --yes --quiet postfix
  fi
  for package in $added; do
    if [ "$package" != postfix ] && ! apt-get purge --simulate "$package" | grep '^Purg ' | grep -qv "^Purg $package "; then
      apt-get purge --yes --quiet "$package"
    fi
  done
  [ -x /usr/sbin/postfix ] || rm -rf /var/spool/postfix /var/lib/postfix ;;
esac
rm -rf /etc/postfix /etc/mailname /etc/aliases /etc/aliases.db
put_back
if [ -x /usr/sbin/postfix ] && ! grep -qx postfix "$before/enabled"; then systemctl --quiet disable postfix; fi
# firewalld has written the zone into a file of its own when port 25 was opened. It goes
# unless it was there before, or holds more by now.
if [ -e "$before/firewalld" ]; then
  # While it does not run the rule stands in its default zone's file; its own tool for that
  # case writes the zone without what it does not know (<forward/>).
  if ! firewall-cmd --quiet --state 2>/dev/null; then
    zone=/etc/firewalld/zones/$(sed -n 's/^DefaultZone=//p' /etc/firewalld/firewalld.conf).xml
    [ ! -e "$zone" ] || sed -i '/<service name="smtp"\/>/d' "$zone"
  fi
  for zone in /etc/firewalld/zones/*.xml; do
    name=$(basename "$zone")
    if ! grep -Fxq "$name" "$before/firewalld" && cmp -s "$zone" "/usr/lib/firewalld/zones/$name"; then
      rm -f "$zone" "$zone.old"
    fi
  done
fi
while read -r unit; do systemctl restart "$unit"; done < "$before/active"
rm -rf "$before"

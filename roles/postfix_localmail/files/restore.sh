#!/bin/sh
# Puts back what back_up.sh has copied in folder $1. Every step can be done twice, and the
# copy goes last: an interrupted run is finished by the next one.
set -eu
export LC_ALL=C
before=$1
apt='apt-get -o DPkg::Lock::Timeout=600'
export DEBIAN_FRONTEND=noninteractive
# Not in a pipe, where a failure would count as no package at all.
packages=$(dpkg-query --show --showformat='${db:Status-Status} ${Package}\n')
installed() { printf '%s\n' "$packages" | sed -n 's/^installed //p' | sort; }
# Whether mail is left in the queue; also where that cannot be told.
mail_is_left() {
  [ -d /var/spool/postfix ] || return 1
  found=$(find /var/spool/postfix -regextype posix-extended \
    -regex '/var/spool/postfix/(incoming|active|deferred|hold|maildrop|corrupt)/.*' -type f -print -quit) || return 0
  [ -n "$found" ]
}
put_back() { tar --extract --preserve-permissions --file "$before/files.tar" --directory /; }

if [ -x /usr/sbin/postfix ]; then systemctl stop postfix; fi
# Where Postfix asked the gateway, and what looked at the certificate.
for unit in policy.socket certificate.timer certificate.service; do
  unit=zulip-email-gateway-$unit
  [ -e "/etc/systemd/system/$unit" ] || continue
  systemctl --quiet disable --now "$unit"
  rm "/etc/systemd/system/$unit"
done
systemctl daemon-reload
rm -rf /run/zulip-email-gateway-certificate
# Packages that came with Postfix and that nothing else has come to need.
came='postfix|ssl-cert|ca-certificates|cpio|lib(icu[0-9]+|sasl2-(2|modules|modules-db)|nsl2|db5\.3(t64)?|tirpc(-common|3|3t64)|lmdb0|ssl3(t64)?)'
added=$(installed | comm -13 "$before/packages" - | grep -Ex "$came" || true)
gone=$(installed | comm -23 "$before/packages" - | grep -E '^exim4' || true)
case " $(echo $added) " in *" postfix "*)
  # What would be left without any mail system, and so be removed with Postfix.
  purged=$(apt-get purge --simulate postfix)
  needed_by=$(printf '%s\n' "$purged" | sed -n 's/^Purg \([^ ]*\) .*/\1/p' | grep -vx postfix || true)
  if [ -n "$gone" ]; then
    # One for the other in one step, so that what needs a mail system stays. exim4's files
    # first: it would ask what it finds.
    $apt update --quiet || true
    put_back
    $apt install --yes --quiet --no-install-recommends -o Dpkg::Options::=--force-confold $gone postfix-
  elif [ -n "$needed_by" ]; then
    echo "Postfix stays installed, without a configuration: $(echo $needed_by) cannot do without a mail system"
    systemctl --quiet disable postfix
  else
    $apt remove --yes --quiet postfix
  fi
  # All at once where nothing else needs any of them, as apt takes a second for each question.
  others=$(printf '%s\n' $added | grep -vx postfix || true)
  if [ -n "$others" ] && purged=$(apt-get purge --simulate $others) &&
    ! printf '%s\n' "$purged" | sed -n 's/^Purg \([^ ]*\) .*/\1/p' | grep -qvxF "$others"; then
    $apt purge --yes --quiet $others
    others=''
  fi
  for package in $others; do
    # After an upgrade of the system one may have the name of another that was there before: then apt has
    # no solution without it.
    purged=$(apt-get purge --simulate "$package") || continue
    if ! printf '%s\n' "$purged" | grep '^Purg ' | grep -qv "^Purg $package "; then
      $apt purge --yes --quiet "$package"
    fi
  done ;;
esac
# From here on nothing writes to the queue any more. Purging the package deletes it as well.
if [ ! -x /usr/sbin/postfix ] && ! grep -qx postfix "$before/packages"; then
  if mail_is_left; then
    echo "Mail is left in Postfix's queue, so /var/spool/postfix stays. To have it delivered switch local delivery on" \
      "again; to give it up: apt-get purge postfix"
  else
    $apt purge --yes --quiet postfix
    rm -rf /var/spool/postfix /var/lib/postfix
  fi
fi
# As long as dpkg knows the package its own files have to stay: it would not install them again.
own=$(dpkg-query --show --showformat='${Conffiles}\n' postfix 2>/dev/null |
  sed -n 's|^ *\(/etc/postfix/[^ ]*\) .*|! -path \1|p')
[ ! -d /etc/postfix ] || find /etc/postfix -depth \( ! -type d $own -o -type d -empty \) -delete
rm -rf /etc/mailname /etc/aliases /etc/aliases.db /etc/aliases.lmdb
put_back
if [ -x /usr/sbin/postfix ] && ! grep -qx postfix "$before/enabled"; then systemctl --quiet disable postfix; fi
# firewalld has written the zone into a file of its own when port 25 was opened. It goes
# unless it was there before, or holds more by now.
if [ -e "$before/firewalld" ]; then
  # While it does not run the rule stands in the zone's file; its own tool for that
  # case writes the zone without what it does not know (<forward/>).
  if ! firewall-cmd --quiet --state 2>/dev/null; then
    zones=$(cat "$before/firewalld-zones" 2>/dev/null || sed -n 's/^DefaultZone=//p' /etc/firewalld/firewalld.conf)
    for zone in $zones; do
      zone=/etc/firewalld/zones/$zone.xml
      [ ! -e "$zone" ] || sed -i '/<service name="smtp"\/>/d' "$zone"
    done
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

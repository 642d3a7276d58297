#!/bin/sh
# A Dovecot with the user zulip, password and OAuth 2, a token endpoint, and an SMTP server for users.
set -eu
export DEBIAN_FRONTEND=noninteractive
# In a container stopping it can hang; the package's own scripts restart it, too.
mkdir -p /etc/systemd/system/dovecot.service.d
printf '[Service]\nTimeoutStopSec=2\n' > /etc/systemd/system/dovecot.service.d/tests.conf
apt-get install --yes --quiet --no-install-recommends dovecot-imapd >/dev/null
# Without key identifiers, as certificates of many a private authority.
openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj "/CN=$(hostname)" -config /opt/imap/certificate.conf \
  -addext "subjectAltName=DNS:$(hostname)" -keyout /etc/ssl/imap.key -out /etc/ssl/imap.crt 2>/dev/null
useradd --system --create-home --home-dir /srv/mail vmail
# One has its folders below the inbox, as many have; another one has a name for them in its own language, a
# second place for large folders, and takes passwords without TLS.
case $(hostname) in
  imap2.*) sed -i 's/^  inbox = yes/&\n  prefix = INBOX.\n  separator = ./' /opt/imap/dovecot.conf ;;
  imap3.*)
    sed -i 's/^  inbox = yes/&\n  prefix = Persönliche Post\/\n  separator = \//; s/^ssl = required/ssl = yes/' /opt/imap/dovecot.conf
    cat >> /opt/imap/dovecot.conf <<'C'
disable_plaintext_auth = no
namespace second {
  prefix = Second/
  separator = /
  location = mbox:~/second
  hidden = yes
}
C
    ;;
esac
cp /opt/imap/dovecot.conf /opt/imap/oauth2.conf /etc/dovecot/
printf '%s:{PLAIN}the password\n' "zulip@$(hostname)" zulip > /etc/dovecot/users
for name in token_endpoint submission; do
  cat > /etc/systemd/system/$name.service <<S
[Service]
ExecStart=/usr/bin/python3 /opt/imap/$name.py
[Install]
WantedBy=multi-user.target
S
done
systemctl enable --quiet --now token_endpoint submission dovecot
systemctl restart dovecot

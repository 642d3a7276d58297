#!/bin/sh
# A Dovecot with the user zulip, password and OAuth 2, and a token end point.
set -eu
export DEBIAN_FRONTEND=noninteractive
# In a container stopping it can hang; the package's own scripts restart it, too.
mkdir -p /etc/systemd/system/dovecot.service.d
printf '[Service]\nTimeoutStopSec=2\n' > /etc/systemd/system/dovecot.service.d/tests.conf
apt-get install --yes --quiet --no-install-recommends dovecot-imapd >/dev/null
openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj "/CN=$(hostname)" \
  -addext "subjectAltName=DNS:$(hostname)" -keyout /etc/ssl/imap.key -out /etc/ssl/imap.crt 2>/dev/null
useradd --system --create-home --home-dir /srv/mail vmail
# One of the two has its folders below the inbox, as many have.
case $(hostname) in imap2.*) sed -i 's/^  inbox = yes/&\n  prefix = INBOX.\n  separator = ./' /opt/imap/dovecot.conf ;; esac
cp /opt/imap/dovecot.conf /opt/imap/oauth2.conf /etc/dovecot/
echo "zulip@$(hostname):{PLAIN}the password" > /etc/dovecot/users
cat > /etc/systemd/system/token-endpoint.service <<'S'
[Service]
ExecStart=/usr/bin/python3 /opt/imap/token_endpoint.py
[Install]
WantedBy=multi-user.target
S
systemctl enable --quiet --now token-endpoint dovecot
systemctl restart dovecot

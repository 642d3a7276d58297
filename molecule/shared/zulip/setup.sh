#!/bin/sh
# Runs inside the image while it is built: puts the stand-in where Zulip has its
# files and commands. Arguments: none. Nothing here is part of the bundle.
set -eu
useradd --create-home --shell /bin/bash zulip
chmod 755 /home/zulip
mkdir -p /etc/zulip /var/lib/zulip-standin /var/log/zulip/queue_stats /var/log/zulip/queue_error
mkdir -p /etc/supervisor/conf.d/zulip
sh /opt/zulip-standin/deploy 6.0
cat > /etc/sudoers.d/zulip-standin <<'S'
zulip ALL=(root) NOPASSWD: /usr/bin/systemctl, /usr/bin/systemd-run
S

cat > /etc/zulip/zulip.conf <<'S'
[machine]
puppet_classes = zulip::profile::standalone
deploy_type = production

[postgresql]
version = 14
S
cat > /etc/zulip/settings.py <<'S'
# Settings for the stand-in, in the shape of Zulip's own template.
EXTERNAL_HOST = "zulip.example.com"
ZULIP_ADMINISTRATOR = "zulip-admin@example.com"

## Email gateway
# EMAIL_GATEWAY_PATTERN = "%s@emaildomain.example.com"
EMAIL_GATEWAY_PATTERN = ""
EMAIL_GATEWAY_LOGIN = ""
EMAIL_GATEWAY_IMAP_SERVER = ""
EMAIL_GATEWAY_IMAP_PORT = 993
EMAIL_GATEWAY_IMAP_FOLDER = "INBOX"

AUTHENTICATION_BACKENDS = ("zproject.backends.EmailAuthBackend",)
S
cat > /etc/zulip/zulip-secrets.conf <<S
[secrets]
secret_key = $(head -c 25 /dev/urandom | od -An -tx1 | tr -d ' \n')
shared_secret = $(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
S
# As Zulip's Puppet keeps them (puppet/zulip: profile/base.pp).
chown zulip:zulip /etc/zulip /etc/zulip/*
chmod 640 /etc/zulip/zulip-secrets.conf
chown -R zulip:zulip /home/zulip /var/lib/zulip-standin /var/log/zulip
# As Zulip's Puppet keeps them (puppet/zulip: profile/base.pp, app_frontend_base.pp).
chmod 750 /var/log/zulip /var/log/zulip/queue_stats /var/log/zulip/queue_error

cat > /etc/systemd/system/zulip-web.service <<'S'
[Unit]
Description=Zulip's application server (stand-in)
StartLimitIntervalSec=0
[Service]
# "systemctl start" returns when it listens; Zulip's restart-server does not wait for it.
Type=notify
User=zulip
UMask=0000
WorkingDirectory=/opt/zulip-standin
RuntimeDirectory=zulip-web
ExecStart=/usr/bin/gunicorn --preload --workers 2 --threads 4 --bind unix:/run/zulip-web/socket --limit-request-field_size 0 web:app
Restart=on-failure
[Install]
WantedBy=multi-user.target
S
cat > /etc/systemd/system/zulip-worker.service <<'S'
[Unit]
Description=Zulip's email_mirror queue worker (stand-in)
StartLimitIntervalSec=0
[Service]
User=zulip
WorkingDirectory=/opt/zulip-standin
# With the arguments of Zulip's own.
ExecStart=/usr/bin/python3 -u worker.py process_queue --queue_name=email_mirror --skip-checks
Restart=on-failure
[Install]
WantedBy=multi-user.target
S
# Zulip 11's own mail server, which supervisor runs there as root.
cat > /etc/systemd/system/zulip-email-mirror.service <<'S'
[Unit]
Description=Zulip's own mail server on port 25 (stand-in)
ConditionPathExists=/etc/supervisor/conf.d/zulip/email-mirror.conf
[Service]
WorkingDirectory=/home/zulip/deployments/current
ExecStart=/home/zulip/deployments/current/manage.py email_server --listen 0.0.0.0:25 --user zulip --group zulip
# Supervisor's stdout_logfile.
StandardOutput=append:/var/log/zulip/email_server.log
StandardError=append:/var/log/zulip/email_server.log
Restart=on-failure
[Install]
WantedBy=multi-user.target
S
cat > /usr/lib/tmpfiles.d/zulip-standin.conf <<'S'
d /run/zulip-standin 0755 zulip zulip
S
cat > /etc/nginx/sites-available/zulip <<'S'
# The web server as Zulip sets it up: its own certificate, bodies up to 80 MB.
server {
    listen 443 ssl;
    listen [::]:443 ssl;
    server_name _;
    ssl_certificate /etc/ssl/certs/zulip.combined-chain.crt;
    ssl_certificate_key /etc/ssl/private/zulip.key;
    client_max_body_size 80m;
    location / {
        proxy_pass http://unix:/run/zulip-web/socket;
        proxy_set_header Host $http_host;
        proxy_set_header X-Real-IP $remote_addr;
        proxy_read_timeout 60s;
    }
}
S
mkdir -p /etc/systemd/system/nginx.service.d
printf "[Unit]\nStartLimitIntervalSec=0\n" > /etc/systemd/system/nginx.service.d/tests.conf
rm /etc/nginx/sites-enabled/default
ln -s /etc/nginx/sites-available/zulip /etc/nginx/sites-enabled/zulip
openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=zulip.example.com \
  -addext subjectAltName=DNS:*.example.com \
  -keyout /etc/ssl/private/zulip.key -out /etc/ssl/certs/zulip.combined-chain.crt 2>/dev/null
chmod 640 /etc/ssl/private/zulip.key

cd /opt/zulip-standin
python3 - <<'S'
import secrets
import store

database = store.connect()
for name, slug in (("general", "general"), ("support", "support"), ("日本語", "")):
    database.execute("INSERT INTO channel VALUES (?, ?, ?)", (name, slug, secrets.token_hex(16)))
# An administrator, and a bot of hers.
for number, name, owner in ((1, "admin", None), (2, "alerts-bot", 1)):
    user = (number, f"{name}@zulip.example.com", f"api-key-of-{name}", owner)
    database.execute("INSERT INTO user VALUES (?, ?, ?, ?)", user)
database.execute("INSERT INTO reply VALUES (?, ?, ?, ?)", ("mm" + secrets.token_hex(16), "general", "lunch", "the user who was notified"))
S
chown -R zulip:zulip /var/lib/zulip-standin
systemctl disable nginx dnsmasq ufw firewalld 2>/dev/null || true

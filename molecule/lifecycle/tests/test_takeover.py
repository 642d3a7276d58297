"""Another mail system was there: Zulip's own, or exim4. It comes back."""

from __future__ import annotations

import pytest
from conftest import ZulipHost, changed, wait
from life import OFF, changed_tasks, off, on, same, tree


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mxb")


# What Zulip's Puppet leaves on a server (ZULIP.md and zulip/zulip: puppet/zulip), as
# far as it matters here: its files, its transport, its way of aliasing everything.
PUPPET = r"""
export DEBIAN_FRONTEND=noninteractive
echo 'postfix postfix/main_mailer_type select No configuration' | debconf-set-selections
apt-get install --yes --quiet --no-install-recommends postfix >/dev/null 2>&1
cp /usr/share/postfix/master.cf.dist /etc/postfix/master.cf
printf 'zulip unix - n n - - pipe user=zulip argv=/bin/false -r ${original_recipient}\n' >> /etc/postfix/master.cf
printf '/\\..*@DOMAIN/ zulip@localhost\n/^mm.{32}@DOMAIN/ zulip@localhost\n' > /etc/postfix/virtual
echo 'zulip@localhost zulip:' > /etc/postfix/transport
echo '/./ OK' > /etc/postfix/access
postmap /etc/postfix/transport
echo DOMAIN > /etc/mailname
cat > /etc/postfix/main.cf <<'EOF'
# Written by Puppet
compatibility_level = 3.6
myhostname = mxb.example.com
myorigin = /etc/mailname
mydestination = localhost, DOMAIN
transport_maps = hash:/etc/postfix/transport
virtual_alias_maps = regexp:/etc/postfix/virtual
alias_maps = hash:/etc/aliases
zulip_destination_recipient_limit = 1
default_transport = error
pipe_delivery_status_filter = regexp:{{/^5(.*)/ 4$1}}
EOF
newaliases
systemctl restart postfix
"""


def test_takeover_from_zulips_puppet_and_back(mx, subject):
    conf = "/etc/zulip/zulip.conf"
    mx.sh(f"sed -i 's/^puppet_classes.*/# why\\npuppet_classes = zulip::postfix_localmail,  {OFF}/' {conf}")
    mx.sh(PUPPET.replace("DOMAIN", mx.domain))
    # Zulip's own gateway cannot deliver this one (its script is /bin/false): it waits.
    token = mx.address().partition("@")[0]
    mx.sh(f"printf 'From: user@example.org\nSubject: {subject}\n\nwaits\n' | sendmail {token}@{mx.domain}")
    assert wait(lambda: "zulip@localhost" in mx.sh("mailq"), 10), mx.journal()
    mx.sh("systemctl start firewalld")
    before = tree(mx)

    text = mx.refusal()
    assert "email_gateway_takeover: true" in text and "Zulip's Puppet owns Postfix" in text
    same(before, tree(mx))

    foretold = changed_tasks(on(mx, "--check", "--diff", email_gateway_takeover=True))
    same(before, tree(mx))
    done = changed_tasks(on(mx, email_gateway_takeover=True))
    assert "email_gateway : takeover | Take the class out of zulip.conf" in done & foretold
    assert "# why\npuppet_classes = zulip::profile::standalone\ndeploy_type" in mx.sh(f"sed 's/=  */= /' {conf}")
    mx.sh("postqueue -f")
    mx.wait_for(subject)
    assert changed(on(mx)) == 0
    # firewalld is active: from outside only what it lets through arrives.
    mx.sh("firewall-cmd --query-service=smtp && firewall-cmd --permanent --query-service=smtp")
    assert mx.send(mx.address(), subject=f"{subject} outside")["accepted"] == 1
    mx.wait_for(f"{subject} outside")

    assert changed(off(mx)) > 0
    same(before, tree(mx))
    assert mx.sh("systemctl is-active postfix").strip() == "active"
    assert mx.host.run("firewall-cmd --query-service=smtp").rc == 1
    mx.sh("systemctl stop firewalld")
    mx.sh("DEBIAN_FRONTEND=noninteractive apt-get purge --yes --quiet postfix >/dev/null; rm -rf /etc/postfix")
    mx.sh(f"sed -i '/^# why/d; s/^puppet_classes.*/puppet_classes = zulip::profile::standalone/' {conf}")


def test_exim_is_named_and_can_be_replaced_and_comes_back(mx):
    mx.sh(
        "DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends exim4-daemon-light 2>&1"
    )
    # It cannot do without a mail system, and has to stay.
    mx.sh("DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends bsd-mailx 2>&1")
    mx.sh("sed -i 's/^dc_eximconfig_configtype=.*/dc_eximconfig_configtype=local/' /etc/exim4/update-exim4.conf.conf")
    mx.sh("update-exim4.conf; systemctl restart exim4")
    packages = "dpkg-query -W -f '${db:Status-Status} ${Package}\n' | grep ^installed"
    before, installed = tree(mx), mx.sh(packages)
    text = mx.refusal()
    assert "is held by exim4" in text and "postfix_localmail_adopt: true" in text
    mx.sh("systemctl stop exim4")
    text = mx.refusal()
    assert "has the mail system exim4-daemon-light" in text and "postfix_localmail_adopt: true" in text
    mx.sh("printf 'Subject: x\n\nx\n' | exim4 -odq user@example.org")
    assert "1 mails wait in the queue of the mail system" in mx.refusal(postfix_localmail_adopt=True)
    mx.sh("find /var/spool/exim4/input -type f -delete; systemctl start exim4")
    assert changed(on(mx, postfix_localmail_adopt=True)) > 0
    assert changed(off(mx)) > 0
    same(before, tree(mx))
    assert mx.sh(packages) == installed
    assert mx.sh("systemctl is-active exim4").strip() == "active"
    mx.sh("DEBIAN_FRONTEND=noninteractive apt-get purge --yes --quiet bsd-mailx 'exim4*' >/dev/null 2>&1")


# For outgoing mail only, as Debian's package configures a "satellite system".
RELAY = r"""
export DEBIAN_FRONTEND=noninteractive
echo 'postfix postfix/main_mailer_type select No configuration' | debconf-set-selections
apt-get install --yes --quiet --no-install-recommends postfix >/dev/null 2>&1
cp /usr/share/postfix/master.cf.dist /etc/postfix/master.cf
cat > /etc/postfix/main.cf <<'EOF'
compatibility_level = 3.6
inet_interfaces = loopback-only
relayhost = smtp.example.com
EOF
newaliases
systemctl restart postfix
"""


def test_a_foreign_postfix_is_adopted_and_comes_back(mx, subject):
    """From off. It listened on loopback only, which Postfix reads once, when it starts."""
    mx.sh(RELAY)
    mx.sh("systemctl start firewalld")
    before = tree(mx)
    text = mx.refusal()
    assert "was not written by this gateway" in text and "postfix_localmail_adopt: true" in text
    assert "sends all mail through smtp.example.com" in mx.refusal(postfix_localmail_adopt=True)
    relay = {"postfix_localmail_adopt": True, "postfix_localmail_relayhost": "smtp.example.com"}
    assert changed(on(mx, **relay)) > 0
    assert mx.sh("postconf -h relayhost smtp_tls_security_level").split() == ["smtp.example.com", "may"]
    assert mx.send(mx.address(), subject=subject)["accepted"] == 1
    mx.wait_for(subject)
    mx.sh("systemctl stop firewalld")  # its rule goes all the same
    assert changed(off(mx)) > 0
    same(before, tree(mx))
    assert mx.host.socket("tcp://127.0.0.1:25").is_listening
    assert not mx.host.socket("tcp://0.0.0.0:25").is_listening
    mx.sh("DEBIAN_FRONTEND=noninteractive apt-get purge --yes --quiet postfix >/dev/null; rm -rf /etc/postfix")


def test_a_mail_system_that_could_not_come_back_is_named(mx):
    mx.sh("DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends msmtp-mta 2>&1")
    text = mx.refusal(postfix_localmail_adopt=True)
    assert "has the mail system msmtp-mta" in text and "Remove it, then run this again." in text
    mx.sh("DEBIAN_FRONTEND=noninteractive apt-get purge --yes --quiet msmtp-mta 'msmtp*' >/dev/null 2>&1")

"""Something changes while local delivery is on. Each test but the first starts from on."""

from __future__ import annotations

import pytest
from conftest import ZulipHost, changed, wait
from figures import ACCEPTING
from life import FOLLOW_UP, changed_tasks, off, on, same, tree


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mxc")


def test_another_mail_name_is_followed_in_one_run(mx, subject):
    """From off; mail for the former domain is delivered before it is given up."""
    assert changed(on(mx)) > 0
    mx.sh("systemctl stop zulip-web")
    mx.send(mx.address().upper(), subject=subject)
    assert wait(lambda: "HTTP 502" in mx.sh("mailq"), 20)

    changes = {"email_gateway_mailname": "other.example.com", "email_gateway_mx_check": "warn"}
    before = tree(mx)
    foretold = changed_tasks(on(mx, "--check", "--diff", **changes))
    same(before, tree(mx))
    stopped = on(mx, **changes)
    assert stopped.returncode != 0 and "still wait in Postfix's queue" in stopped.stdout, stopped.stdout[-2000:]
    assert mx.host.socket("tcp://0.0.0.0:25").is_listening
    mx.sh("systemctl start zulip-web")

    done = changed_tasks(on(mx, **changes))
    assert done - FOLLOW_UP <= foretold <= done
    assert [message["rcpt_to"].partition("@")[2] for message in mx.messages(subject)] == [mx.domain]
    assert mx.sh("cat /etc/mailname").strip() == "other.example.com"
    assert mx.pattern() == "%s@other.example.com"
    assert mx.sh("postconf -h myhostname virtual_mailbox_domains").split() == ["other.example.com"] * 2
    local = mx.address().partition("@")[0]
    assert mx.send(f"{local}@other.example.com", subject=f"{subject} new")["accepted"] == 1
    mx.wait_for(f"{subject} new")
    assert changed_tasks(on(mx, **changes)) == set()


def test_another_pattern_is_followed_too(mx, subject):
    """From on; mail for the former addresses is delivered before Zulip no longer knows them."""
    changes = {"email_gateway_mailname": "other.example.com", "email_gateway_mx_check": "warn"}
    local = mx.address().partition("@")[0]
    mx.sh("systemctl stop zulip-web")
    assert mx.send(f"{local}@other.example.com", subject=subject)["accepted"] == 1
    assert wait(lambda: "HTTP 502" in mx.sh("mailq"), 20)
    mx.sh("systemctl start zulip-web")
    assert changed(on(mx, **changes, email_gateway_pattern="user+%s@other.example.com")) > 0
    mx.wait_for(subject)
    assert mx.send(f"user+{local}@other.example.com", subject=f"{subject} new")["accepted"] == 1
    mx.wait_for(f"{subject} new")


def test_mail_name_from_zulip_conf_else_the_fqdn(mx):
    """From on, and a Postfix that systemd does not know of. Set to null: as if the inventory did not set it."""
    mx.sh("systemctl stop postfix@- postfix; postfix start")
    unset = {"email_gateway_mailname": None, "email_gateway_mx_check": "skip"}
    mx.sh("printf '\n[postfix]\nmailname = From-Conf.example.com\n' >> /etc/zulip/zulip.conf")
    assert changed(on(mx, **unset)) > 0
    assert mx.sh("cat /etc/mailname").strip() == "from-conf.example.com"
    assert mx.banner() == "220 from-conf.example.com ESMTP" and mx.host.service("postfix@-").is_running
    mx.sh("sed -i '/^$/,$d' /etc/zulip/zulip.conf")
    assert changed(on(mx, **unset)) > 0
    assert mx.sh("cat /etc/mailname").strip() == mx.fqdn
    half = on(mx, "--tags", "zulip")
    assert half.returncode != 0 and "Run the playbook without --tags" in half.stdout


def test_http_only_on_another_port(mx, subject):
    """From on, and the FQDN as the mail domain."""
    nginx = "/etc/nginx/sites-available/zulip"
    mx.sh(f"cp {nginx} /root/nginx; sed -i 's/443 ssl/8080/; /ssl_cert/d' {nginx}; systemctl reload nginx")
    mx.sh("cp /etc/zulip/zulip.conf /root/")
    mx.sh("printf '\n[application_server]\nhttp_only = true\nnginx_listen_port = 8080\n' >> /etc/zulip/zulip.conf")
    assert changed(on(mx)) > 0
    mx.send(mx.address(), subject=subject)
    mx.wait_for(subject)
    mx.sh(f"cp /root/nginx {nginx}; cp /root/zulip.conf /etc/zulip/zulip.conf; systemctl reload nginx")
    assert changed(on(mx)) > 0


def test_a_new_secret_is_taken_over_and_no_mail_is_lost_meanwhile(mx, subject):
    """From on."""
    mx.sh("sed -i 's/^shared_secret = ..../shared_secret = 0000/' /etc/zulip/zulip-secrets.conf")
    mx.sh("systemctl restart zulip-web")
    mx.send(mx.address(), subject=subject)
    assert wait(lambda: "shared secret has changed" in mx.sh("mailq"), 20)
    done = on(mx, "-vvv", "--diff")
    assert changed_tasks(done) == {"email_gateway : configure | Write gateway.conf, the addresses and the credentials"}
    secret = mx.sh("sed -n 's/^shared_secret = //p' /etc/zulip/zulip-secrets.conf").strip()
    assert secret not in done.stdout
    mx.sh("postqueue -f")
    mx.wait_for(subject)


# All in one settings.py, one below the other.
PATTERNS = '''
EMAIL_GATEWAY_PATTERN = "%s@elsewhere.example.com"
EMAIL_GATEWAY_PATTERN = (
    "%s"
    "@elsewhere.example.com"
)
# EMAIL_GATEWAY_PATTERN = "%s@elsewhere.example.com"
if True:
    EMAIL_GATEWAY_PATTERN = "%s@elsewhere.example.com"'''


def test_settings_that_have_a_pattern_already(mx):
    """From on: the block is taken out and these stand in its place."""
    settings = "/etc/zulip/settings.py"
    mx.sh(f"sed -i '/^# BEGIN Zulip/,/^# END Zulip/d' {settings}")
    mx.sh(f"cat >> {settings} <<'EOF'\n{PATTERNS}\nEOF\n")
    assert changed(mx.play("--tags", "zulip")) > 0
    values: dict[str, object] = {}
    exec(mx.sh(f"cat {settings}"), values)
    assert values["EMAIL_GATEWAY_PATTERN"] == f"%s@{mx.domain}"


def test_a_pattern_below_the_block_is_refused_with_its_line(mx):
    """From on."""
    mx.sh("echo 'EMAIL_GATEWAY_PATTERN = \"%s@elsewhere.example.com\"' >> /etc/zulip/settings.py")
    text = mx.refusal()
    assert "overrides the gateway's block" in text and "%s@elsewhere.example.com" in text
    mx.sh("sed -i '$d' /etc/zulip/settings.py")


def test_switched_off_with_mail_in_the_queue(mx, subject):
    """From on: it stays on, and says why; delivered, it goes off. What was refused is kept."""
    mx.sh(ACCEPTING.spoil)
    mx.send(f"new.{'1' * 32}@{mx.domain}", subject=f"{subject} refused", sender=f"root@{mx.domain}")
    assert wait(lambda: mx.sh("zulip-email-gateway quarantine list"), 20)
    mx.sh("systemctl stop zulip-web")
    mx.send(mx.address(), subject=subject)
    assert wait(lambda: "HTTP 502" in mx.sh("mailq"), 20)
    stopped = off(mx)
    assert stopped.returncode != 0 and "mails still wait" in stopped.stdout
    assert mx.send(mx.address(), subject=subject)["accepted"] == 1
    mx.sh("systemctl start zulip-web; systemctl stop postfix")
    assert changed(off(mx)) > 0
    assert len(mx.messages(subject)) == 2
    kept = "/var/backups/zulip-email-gateway-quarantine"
    assert mx.sh(f"stat -c '%U %a' {kept}").strip() == "root 700"
    assert f"{subject} refused" in mx.sh(f"cat {kept}/*")

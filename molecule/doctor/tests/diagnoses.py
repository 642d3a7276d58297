"""What is broken, and what doctor, the metrics and the alerts say of it."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import pytest
from conftest import ZulipHost, wait
from figures import JOURNAL, SOCKETS, STATE, Fault, broken
from zulip import store

SITE = "run playbooks/site.yml"
CONF = "/etc/zulip-email-gateway/gateway.conf"
KEY, CHAIN = "/etc/ssl/private/zulip.key", "/etc/ssl/certs/zulip.combined-chain.crt"
TIMER = "zulip-email-gateway-certificate.timer"
TOPIC = "Email gateway"


class Diagnosis(NamedTuple):
    """What breaks it and what mends it (shell), doctor's line and its remedy. metric: a line of `status
    --prometheus` meanwhile; alert: what is posted in Zulip, and then that it is over; only: a version of Zulip."""

    spoil: str
    mend: str
    line: str
    remedy: str = ""
    metric: str = ""
    alert: tuple[str, str] = ("", "")
    only: int = 0


def replaced(path: str, expression: str) -> tuple[str, str]:
    """Edit a file, and put it back."""
    name = path.rpartition("/")[2]
    return f"cp -p {path} /root/{name}; sed -i '{expression}' {path}", f"cp -p /root/{name} {path}"


def certificate(days: int, names: str = "*.example.com", reload: bool = True) -> str:
    """Another key and certificate; Postfix is not to notice by itself if it is not reloaded."""
    make = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days {days} -subj /CN=x -addext subjectAltName=DNS:{names} "
        f"-keyout /root/new.key -out /root/new.crt 2>/dev/null; cat /root/new.key > {KEY}; cat /root/new.crt > {CHAIN}"
    )
    keep = f"cp -p {KEY} /root/kept.key; cp -p {CHAIN} /root/kept.crt"
    if reload:
        return f"{keep}; {make}; postfix reload 2>/dev/null; sleep 1"
    # Processes that have read the former one go on for a while.
    greet = "(echo QUIT; sleep 1) | openssl s_client -connect 127.0.0.1:25 -starttls smtp >/dev/null 2>&1 &"
    return f"systemctl stop {TIMER}; {keep}; for i in 1 2 3 4 5 6; do {greet} done; wait; {make}"


RENEWED = (
    f"cp -p /root/kept.key {KEY}; cp -p /root/kept.crt {CHAIN}; postfix reload 2>/dev/null; sleep 1; "
    f"systemctl start {TIMER}"
)
IN_ZULIP = (
    f"python3 -c 'import sqlite3, sys; d = sqlite3.connect(\"{store.DATABASE}\"); d.execute(sys.argv[1]); d.commit()'"
)
TURNED = "UPDATE channel SET token = {} WHERE name = 'support'"
PROBE = "echo help@$(cat /etc/mailname) | zulip-email-gateway probe --wait 2"
# As the timer sends it, which is noted; and with less patience.
TIMED = "runuser -u zulip-email-gateway -- zulip-email-gateway probe --timed --wait 2"
# The service has asked Zulip for the address just now, and does not ask again so soon.
AGAIN = f"systemctl restart zulip-email-gateway; {PROBE}; postqueue -f; sleep 1"
POSTFIX_AGAIN = "cp -p /root/main.cf /etc/postfix/; postfix reload 2>/dev/null; sleep 1"


def in_main_cf(*settings: str) -> str:
    words = " ".join(f"'{setting}'" for setting in settings)
    return f"cp -p /etc/postfix/main.cf /root/; postconf -e {words}; postfix reload 2>/dev/null; sleep 1"


DIAGNOSES = {
    # --- Postfix
    "Postfix stopped": Diagnosis(
        "systemctl stop postfix", "systemctl start postfix", "WRONG  Postfix does not run", "systemctl status postfix"
    ),
    "Postfix cannot start": Diagnosis(
        "mv /etc/postfix/master.cf /root/", "mv /root/master.cf /etc/postfix/", "WRONG  postfix check: ", SITE
    ),
    "main.cf was edited": Diagnosis(
        "cp -p /etc/postfix/main.cf /root/; echo '# mine' >> /etc/postfix/main.cf",
        "cp -p /root/main.cf /etc/postfix/",
        "WRONG  /etc/postfix/main.cf: not what playbooks/site.yml has written",
        "run it, first with --check --diff; what is to stay goes into postfix_localmail_settings",
    ),
    "no checksums": Diagnosis(
        "mv /etc/postfix/zulip-email-gateway.sha256 /root/",
        "mv /root/zulip-email-gateway.sha256 /etc/postfix/",
        "warn   there is no /etc/postfix/zulip-email-gateway.sha256",
        SITE,
    ),
    "another greeting": Diagnosis(
        in_main_cf("smtpd_banner=other.example.com ESMTP"),
        POSTFIX_AGAIN,
        "WRONG  port 25 greets with '220 other.example.com ESMTP'",
        SITE,
    ),
    "nobody asks the gateway": Diagnosis(
        "chgrp root /run/zulip-email-gateway.policy; postfix reload 2>/dev/null; sleep 1",
        "chgrp postfix /run/zulip-email-gateway.policy",
        "WRONG  port 25 answers ",
        "systemctl status zulip-email-gateway-policy.socket",
    ),
    "no mail for postmaster": Diagnosis(
        in_main_cf("smtpd_recipient_restrictions=reject"),
        POSTFIX_AGAIN,
        "WRONG  port 25 refuses mail to postmaster@",
        SITE,
    ),
    "root's mailbox is nearly full": Diagnosis(
        "truncate -s 600M /var/mail/root",
        "rm /var/mail/root",
        "WRONG  /var/mail/root, where mail to postmaster@",
        "read and empty it",
    ),
    "other sender checks": Diagnosis(
        *replaced(CONF, "s/^sender_checks = mark/sender_checks = off/"),
        "WRONG  gateway.conf has sender_checks = off, and Postfix is configured otherwise",
        SITE,
        only=10,
    ),
    "senders are not checked": Diagnosis(
        "systemctl stop zulip-email-gateway-senders",
        "systemctl start zulip-email-gateway-senders",
        "WRONG  zulip-email-gateway-senders.service does not run",
        "systemctl status zulip-email-gateway-senders.service",
        only=10,
    ),
    # --- The certificate
    "a certificate that expires": Diagnosis(
        certificate(3),
        RENEWED,
        f"WRONG  the certificate {CHAIN} is good until ",
        "for 3 days; renew it",
        r"certificate_expiry_timestamp_seconds \d+$",
        ("The certificate that senders of mail are shown expires within 7 days", "The certificate was renewed"),
    ),
    "a certificate of other names": Diagnosis(
        certificate(90, "other.example.org"),
        RENEWED,
        f"warn   the certificate {CHAIN} names neither ",
        "have it name the host that the MX record names",
    ),
    "a certificate that is not used yet": Diagnosis(
        certificate(90, reload=False),
        RENEWED,
        f"WRONG  STARTTLS at port 25 works with another certificate than {CHAIN}",
        "systemctl reload postfix",
    ),
    "a key of another certificate": Diagnosis(
        f"{certificate(90)}; cp -p /root/kept.key {KEY}; systemctl restart postfix",
        f"{RENEWED}; systemctl restart postfix",
        f"{KEY} is not the key of {CHAIN}), so senders use none",
        "put both in place again, then run: systemctl reload postfix",
    ),
    "no certificate": Diagnosis(
        f"mv {CHAIN} /root/",
        f"mv /root/zulip.combined-chain.crt {CHAIN}; postfix reload 2>/dev/null; sleep 1",
        f"WRONG  the certificate {CHAIN} cannot be read",
    ),
    # --- The system, and Zulip
    "gateway.conf is broken": Diagnosis(*replaced(CONF, "s/^.zulip.$/[zulip/"), f"cannot use {CONF}: ", SITE),
    "the system was upgraded": Diagnosis(
        *replaced(CONF, "s/^system = .*/system = Debian 11/"),
        "WRONG  the system was upgraded from Debian 11 to Debian 1",
        SITE,
    ),
    "Zulip was upgraded": Diagnosis(
        *replaced(CONF, "s/^version = .*/version = 9.4/"),
        "warn   Zulip was upgraded from 9.4 to 1",
        SITE,
    ),
    "Zulip's upgrade was interrupted": Diagnosis(
        "mkdir -p /home/zulip/deployments/2099; ln -nsf 2099 /home/zulip/deployments/next",
        "ln -nsf $(readlink -f /home/zulip/deployments/current) /home/zulip/deployments/next",
        "warn   an upgrade of Zulip was begun and has not ended",
        SITE.removeprefix("run "),
    ),
    "dpkg was interrupted": Diagnosis(
        *replaced("/var/lib/dpkg/status", "/^Package: ufw$/,/^$/s/^Status: .*/Status: install ok unpacked/"),
        "warn   dpkg has not finished with all packages",
        "dpkg --configure -a",
    ),
    "Zulip's Puppet has Postfix": Diagnosis(
        *replaced("/etc/zulip/zulip.conf", "s/^puppet_classes.*/&, zulip::postfix_localmail/"),
        "WRONG  /etc/zulip/zulip.conf lists ",
        "email_gateway_takeover: true",
    ),
    "zulip.conf cannot be parsed": Diagnosis(
        *replaced("/etc/zulip/zulip.conf", "s/^.machine.$/machine/"),
        "WRONG  /etc/zulip/zulip.conf cannot be parsed",
        SITE,
    ),
    "another pattern": Diagnosis(
        "cp -p /etc/zulip/settings.py /root/; echo 'EMAIL_GATEWAY_PATTERN = \"%s@elsewhere.example.com\"' >> "
        "/etc/zulip/settings.py; sleep 2",
        "cat /root/settings.py > /etc/zulip/settings.py; sleep 2",
        'has EMAIL_GATEWAY_PATTERN = "%s@elsewhere.example.com"',
        "take that line out (or set email_gateway_pattern, if it is meant), then run playbooks/site.yml",
    ),
    "another shared secret": Diagnosis(
        *replaced("/etc/zulip/zulip-secrets.conf", "s/^shared_secret = ..../shared_secret = 0000/"),
        "WRONG  /etc/zulip/zulip-secrets.conf has another shared secret than the gateway",
        SITE,
        only=10,
    ),
    "Zulip's web server stopped": Diagnosis(
        "systemctl stop nginx",
        "systemctl start nginx",
        "WRONG  4.4.1 nothing listens on 127.0.0.1:443",
        "systemctl status nginx",
        only=10,
    ),
    "Zulip's mail server stopped": Diagnosis(
        # Its path unit may be about to restart it.
        "sleep 3; systemctl stop zulip-email-gateway-server",
        "systemctl start zulip-email-gateway-server; sleep 3",
        "WRONG  zulip-email-gateway-server.service does not run",
        "systemctl status zulip-email-gateway-server.service",
        only=11,
    ),
    "the worker stopped": Diagnosis(
        "systemctl stop zulip-worker",
        "systemctl start zulip-worker",
        "WRONG  Zulip's email_mirror worker does not run: mail is accepted, and waits",
        "run: supervisorctl start 'zulip-workers:*'",
    ),
    "an alias without its channel": Diagnosis(
        f'{IN_ZULIP} "{TURNED.format("substr(token, 2) || substr(token, 1, 1)")}"; ! {PROBE}',
        f'{IN_ZULIP} "{TURNED.format("substr(token, -1) || substr(token, 1, 31)")}"; {AGAIN}',
        "WRONG  mail for help@",
        SITE,
    ),
    "no log of the worker": Diagnosis(
        "mkdir /root/logs; mv /var/log/zulip/*.log /root/logs/",
        "mv -n /root/logs/* /var/log/zulip/; rm -r /root/logs",
        "WRONG  no log of Zulip's email_mirror worker can be read in /var/log/zulip",
        SITE,
        "worker_log_readable 0",
    ),
    "a log that is for others": Diagnosis(
        "setfacl -x u:zulip-email-gateway /var/log/zulip",
        "setfacl -m u:zulip-email-gateway:x /var/log/zulip",
        "WRONG  the user zulip-email-gateway cannot read /var/log/zulip/",
        "getfacl /var/log/zulip",
        "worker_log_readable 0",
    ),
    # --- The gateway itself
    "the service stopped": Diagnosis(
        f"systemctl stop {SOCKETS} zulip-email-gateway.service",
        f"systemctl start {SOCKETS} zulip-email-gateway.service",
        "WRONG  zulip-email-gateway.socket does not run",
        "systemctl status zulip-email-gateway.socket",
        "up 0",
    ),
    "no metrics": Diagnosis(
        "systemctl stop zulip-email-gateway-metrics.timer",
        "systemctl start zulip-email-gateway-metrics.timer",
        "WRONG  zulip-email-gateway-metrics.timer does not run",
        "systemctl status zulip-email-gateway-metrics.timer",
    ),
    "the journal was damaged": Diagnosis(
        f"systemctl stop zulip-email-gateway; cp -p {JOURNAL} /root/; echo garbage > {JOURNAL}; "
        "systemctl start zulip-email-gateway; sleep 1; zulip-email-gateway check || true",
        f"systemctl stop zulip-email-gateway.service; rm {JOURNAL}*; mv /root/journal.sqlite {JOURNAL}; "
        "systemctl start zulip-email-gateway.service",
        "the journal was damaged and began anew",
        "journalctl -k",
        "damaged_journals 1",
    ),
    "a file of root's": Diagnosis(
        f"chown root {JOURNAL}",
        f"chown zulip-email-gateway {JOURNAL}",
        f"WRONG  {JOURNAL} is not zulip-email-gateway's: all mail waits",
        f"chown -R zulip-email-gateway: {STATE}",
    ),
    # --- Mail
    "a probe that is not posted": Diagnosis(
        f"systemctl stop zulip-worker; ! {TIMED}; systemctl start zulip-worker; sleep 2",
        TIMED,
        "WRONG  the last probe, a mail through port 25, was not posted in time",
        "journalctl -u zulip-email-gateway-probe; then: systemctl start zulip-email-gateway-probe",
        "probe_success 0",
        (
            "A mail that was sent to see whether mail works was not posted in time",
            "The mail that was sent to see whether mail works was posted",
        ),
    ),
}


def doctor(mx: ZulipHost) -> tuple[int, str]:
    done = mx.host.run("zulip-email-gateway doctor")
    return int(done.rc), str(done.stdout + done.stderr)


def metrics(mx: ZulipHost) -> str:
    return mx.sh("zulip-email-gateway status --prometheus || true")


def alerts(mx: ZulipHost) -> list[str]:
    """What was posted, as the service does when it starts and once a minute."""
    mx.sh("systemctl restart zulip-email-gateway.service")
    return [message["content"] for message in mx.messages(TOPIC) if message["topic"] == TOPIC]


@pytest.fixture(scope="module", autouse=True)
def fresh(request) -> None:
    """Nothing to complain of, also where these tests have run before: a probe was posted, and no alert today."""
    mx = ZulipHost("doctor", {"test_zulip10": "mx1", "test_zulip11": "mx2"}[request.module.__name__.rpartition(".")[2]])
    forget = "DELETE FROM queued; DELETE FROM note WHERE name LIKE 'alerts%'"
    service = "zulip-email-gateway.service"
    # The timer's own probe, two to seven minutes after site.yml, would come while something is broken.
    mx.sh(
        """
        timer=zulip-email-gateway-probe.timer; mkdir -p /run/systemd/system/$timer.d
        printf '[Timer]\nOnActiveSec=\nOnActiveSec=1d\n' > /run/systemd/system/$timer.d/later.conf
        systemctl daemon-reload; systemctl restart $timer
        """
    )
    mx.sh("set -e; zulip-email-gateway quarantine purge --all; systemctl start zulip-email-gateway-probe")
    mx.sh(f"systemctl stop {service}")
    mx.python("import sqlite3, sys; sqlite3.connect(sys.argv[1]).executescript(sys.argv[2])", JOURNAL, forget)
    mx.sh(f"systemctl start {service}")


def test_a_healthy_host_shows_only_ok(mx):
    status, told = doctor(mx)
    assert status == 0 and {line.split()[0] for line in told.splitlines()} == {"ok"}, told
    findings = json.loads(mx.sh("zulip-email-gateway doctor --json"))
    assert len(findings) == len(told.splitlines()) and {one["level"] for one in findings} == {"ok"}
    for line in ("up 1", "probe_success 1", "worker_log_readable 1", "damaged_journals 0"):
        assert f"zulip_email_gateway_{line}\n" in metrics(mx)
    # Also as the timer writes them, from a unit that may do little.
    mx.sh("systemctl start zulip-email-gateway-metrics.service")
    written = mx.sh("cat /srv/zulip-email-gateway.prom")
    assert "zulip_email_gateway_queue_mails 0\n" in written and "zulip_email_gateway_up 1\n" in written
    assert alerts(mx) == alerts(mx)  # nothing new


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.zulip(one.only)] if one.only else []) for name, one in DIAGNOSES.items()],
)
def test_what_is_broken_is_told(mx, name):
    diagnosis = DIAGNOSES[name]
    settled(mx)
    before = len(alerts(mx)) if diagnosis.alert[0] else 0
    with broken(mx, Fault(diagnosis.spoil, diagnosis.mend)):
        status, told = doctor(mx)
        lines = [line for line in told.splitlines() if diagnosis.line in line]
        assert lines and diagnosis.remedy in lines[0], told
        assert (status == 0) == lines[0].startswith("warn"), told
        if diagnosis.alert[0]:
            assert wait(lambda: any(diagnosis.alert[0] in text for text in alerts(mx)[before:]), 20), alerts(mx)
        if diagnosis.metric:
            assert re.search(f"^zulip_email_gateway_{diagnosis.metric}", metrics(mx), re.MULTILINE), metrics(mx)
    if diagnosis.alert[0]:
        assert wait(lambda: diagnosis.alert[1] in "\n".join(alerts(mx)[before:]), 20), alerts(mx)
        assert len(alerts(mx)) == before + 2


def settled(mx: ZulipHost) -> None:
    """Zulip 11's mail server is restarted two seconds after its settings were changed, and so by the test before."""
    restarts = "systemctl show -P ActiveState zulip-email-gateway-server-restart.service | grep -qx activating"
    assert wait(lambda: mx.host.run(f"! {restarts} && zulip-email-gateway check").rc == 0, 60)


AGED = r"""
import glob, os, re, sqlite3, sys
[mail] = glob.glob("/var/spool/postfix/deferred/*/*")

def aged(found):
    return b"%s%d%s" % (found[1], int(found[2]) - 7200, found[3])

with open(mail, "r+b") as file:
    text = file.read()
    # The time of arrival: a record's type, its length, seconds and microseconds.
    new = re.sub(rb"(T.)(\d{10})( \d+)", aged, text, count=1)
    assert new != text
    file.seek(0); file.write(new)
database = sqlite3.connect(sys.argv[1])
aged = "UPDATE queued SET at = at - 7200, accepted = accepted - 7200 WHERE queue_id = ?"
database.execute(aged, (os.path.basename(mail),))
database.commit()
"""


def test_mail_that_has_waited_for_two_hours(mx, subject):
    before = len(alerts(mx))
    mx.sh(in_main_cf("defer_transports=zulip"))
    try:
        assert mx.send(mx.address(), subject=subject)["accepted"] == 1
        assert wait(lambda: "deferred transport" in mx.sh("mailq"), 20)
        mx.python(AGED, JOURNAL)
        status, told = doctor(mx)
        assert status == 1 and re.search(
            r"WRONG  1 mails wait in Postfix's queue, the oldest for 72\d\d s: deferred", told
        )
        assert "docs/troubleshooting.md has each reason" in told
        assert re.search(r"^zulip_email_gateway_queue_oldest_seconds 72\d\d", metrics(mx), re.MULTILINE)
        assert wait(lambda: "Mail waits for more than 1 hour" in "\n".join(alerts(mx)[before:]), 20), alerts(mx)
    finally:
        mx.sh(f"{POSTFIX_AGAIN}; postqueue -f")
    mx.wait_for(subject)
    assert wait(lambda: "No mail waits for long any more" in "\n".join(alerts(mx)[before:]), 20), alerts(mx)


def test_mail_that_zulip_has_lost(mx, subject):
    """Its reply address is gone when the worker comes back, and nobody else can be told."""
    before = len(alerts(mx))
    mx.sh("systemctl stop zulip-worker")
    try:
        mx.send(mx.reply_address(), text=subject)
        assert wait(lambda: 'quarantine_mails{kind="waiting"} 1' in metrics(mx), 40)
        line = "WRONG  1 mails are with Zulip, whose email_mirror worker has not taken them yet; look at: supervisorctl"
        told = doctor(mx)[1]
        assert line in told, told
        mx.sh(f"{IN_ZULIP} 'CREATE TABLE kept AS SELECT * FROM reply'; {IN_ZULIP} 'DELETE FROM reply'")
    finally:
        mx.sh("systemctl start zulip-worker")
    try:
        assert wait(lambda: 'quarantine_mails{kind="lost"} 1' in metrics(mx), 30)
    finally:
        mx.sh(f"{IN_ZULIP} 'INSERT INTO reply SELECT * FROM kept'; {IN_ZULIP} 'DROP TABLE kept'")
    line = (
        "WRONG  1 mails that Zulip accepted and did not post are in quarantine; look at: zulip-email-gateway quarantine"
    )
    assert line in doctor(mx)[1]
    assert wait(lambda: "Zulip has accepted 1 mails and not posted them" in "\n".join(alerts(mx)[before:]), 20), alerts(
        mx
    )
    number = mx.sh("zulip-email-gateway quarantine list").split()[0]
    assert "posted in Zulip" in mx.sh(f"zulip-email-gateway quarantine replay {number}")
    assert wait(lambda: "No mail that Zulip has lost" in "\n".join(alerts(mx)[before:]), 20), alerts(mx)


def test_much_mail_is_refused(mx, subject):
    before, refused = len(alerts(mx)), r'mails_total{outcome="refused",cause="no text"} (\d+)'
    assert not re.search(refused, metrics(mx)), "these tests need a host of their own"
    mx.send(mx.address(), subject=subject, text="", count=25)
    assert wait(lambda: re.findall(refused, metrics(mx)) == ["25"], 60), metrics(mx)
    assert wait(lambda: "25 mails were refused within two hours" in "\n".join(alerts(mx)[before:]), 20), alerts(mx)


def test_everything_is_right_again(mx):
    mx.sh("rm -f /var/lib/zulip-email-gateway/*.damaged-*; postsuper -d ALL 2>/dev/null || true")
    assert mx.play().returncode == 0
    status, told = doctor(mx)
    assert status == 0 and {line.split()[0] for line in told.splitlines()} == {"ok"}, told

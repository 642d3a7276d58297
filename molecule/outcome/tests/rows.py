"""What Zulip's worker makes of a mail is what its sender, the quarantine and status are told.

These tests run for each generation of Zulip, see the files that import them.
"""

from __future__ import annotations

import base64
import json
import time

import pytest
from conftest import ZulipHost, tell, wait
from figures import REDIS_DOWN, SCALED, STATE, WIDE, broken, clean, flush_until, limits, report, stopped, twice


def fresh(mx: ZulipHost, version: int) -> ZulipHost:
    """Nothing is left over, and the limits do not matter."""
    limits(clean(mx), WIDE)
    mx.version = version
    mx.began = mx.sh("date +%s.%N").strip()
    return mx


def told(mx: ZulipHost) -> list[str]:
    """What Postfix was told of each mail since the test began, as "dsn status (text)"."""
    lines = mx.sh(f"journalctl -o cat -u 'postfix*' --since=@{mx.began} | grep 'relay=zulip' || true").splitlines()
    return [line.partition("dsn=")[2] for line in lines]


def status(mx: ZulipHost) -> dict[str, object]:
    return json.loads(mx.sh("zulip-email-gateway status --json"))


def raw(text: str) -> str:
    return base64.b64encode(text.replace("\n", "\r\n").encode()).decode()


def quarantine(mx: ZulipHost) -> str:
    return mx.sh("zulip-email-gateway quarantine list").strip()


def test_posted(mx, subject):
    mx.send(mx.address(), subject=subject)
    mx.send(mx.reply_address(), text=subject)
    mx.wait_for(subject)
    assert wait(lambda: len(told(mx)) == 2, 10)
    assert all("2.0.0, status=sent" in one and "posted in Zulip" in one for one in told(mx)), told(mx)
    facts = status(mx)
    assert facts["counts"] == {"delivered": {"posted": 2}} and facts["under_way"] == 0 and quarantine(mx) == ""


BLANK = "Subject: {}\nFrom: a@sender.example.org\n\n \n"
# Nothing in it that could be posted.
EMPTY = "Subject: {}\nFrom: a@sender.example.org\nContent-Type: multipart/mixed; boundary=x\n\n--x--\n"
QUOTED = "Subject: Re: {}\nFrom: a@sender.example.org\n\nOn Monday, b wrote:\n> hello\n> world\n"
CLOSED = "INSERT INTO closed VALUES ('general', 'Not authorized to send to channel general')"
INACTIVE = "INSERT INTO inactive SELECT user FROM reply"

# What is sent, whether to a reply address, what is changed in Zulip before, and what the sender is told.
REFUSED = {
    "blank": (BLANK, False, [], "5.6.0", "Zulip finds no text in it"),
    "no text part": (EMPTY, False, [], "5.6.0", "Zulip finds no text in it"),
    "a reply of nothing but quoted text": (QUOTED, True, [], "5.6.0", "or nothing but quoted text"),
    "a channel that may not be posted to": (None, False, [CLOSED], "5.7.1", "Not authorized to send"),
    "a deactivated user": (None, True, [INACTIVE], "5.2.1", "is deactivated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_dropped_because_of_the_mail_itself(mx, subject, name):
    text, is_reply, changes, code, words = REFUSED[name]
    text = text or "Subject: {}\nFrom: a@sender.example.org\n\nhello\n"
    if changes:
        mx.in_zulip(*changes)
    try:
        sent = mx.send(mx.reply_address() if is_reply else mx.address(), raw=raw(text.format(subject)))
        if changes == [CLOSED] and mx.version >= 11:  # its server says so at RCPT
            assert sent["refused"][0][1] == 550 and words in sent["refused"][0][2], sent
            return
        assert wait(lambda: told(mx), 20)
        assert f"{code}, status=bounced" in told(mx)[0] and words in told(mx)[0], told(mx)
    finally:
        mx.in_zulip("DELETE FROM closed", "DELETE FROM inactive")
    assert mx.state()["messages"] == []
    assert words in quarantine(mx) and len(quarantine(mx).splitlines()) == 1
    facts = status(mx)
    assert sum(facts["counts"]["refused"].values()) == 1 and facts["lost"] == 0


PDF = """Subject: {}
From: a@sender.example.org
MIME-Version: 1.0
Content-Type: application/pdf
Content-Transfer-Encoding: base64

JVBERi0xLjQK
"""
ATTACHED = """Subject: {}
From: a@sender.example.org
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: text/plain

see the other mail
--b
Content-Type: message/rfc822

Subject: the other mail
From: b@sender.example.org

hello
--b--
"""
INVITATION = """Subject: {}
From: a@sender.example.org
MIME-Version: 1.0
Content-Type: text/calendar; charset=utf-8

BEGIN:VCALENDAR
BEGIN:VEVENT
SUMMARY:Lunch
DTSTART:20261201T120000Z
LOCATION:Kitchen
END:VEVENT
END:VCALENDAR
"""
# What Zulip would drop, in whole or in part, and what is posted of it.
POSTABLE = {
    "a scan": (PDF, ["(no text)", "[file.pdf](/user_uploads/"]),
    "an attached mail": (ATTACHED, ["see the other mail", "[the other mail.eml](/user_uploads/"]),
    "an invitation": (INVITATION, ["Lunch", "2026-12-01 12:00 UTC", "Kitchen", "[invite.ics](/user_uploads/"]),
    "nothing but quoted text": (QUOTED, ["> hello"]),
}


@pytest.mark.parametrize("name", POSTABLE)
def test_what_zulip_would_drop_is_made_postable(mx, subject, name):
    text, words = POSTABLE[name]
    mx.send(mx.address(), raw=raw(text.format(subject)))
    [message] = wait(lambda: [one for one in mx.state()["messages"] if subject in one["topic"]], 20) or pytest.fail(
        mx.journal()
    )
    assert all(word in message["content"] for word in words), message["content"]
    assert status(mx)["counts"] == {"delivered": {"posted": 1}} and quarantine(mx) == ""


AUTOMATIC = "Subject: Out of office\nFrom: a@sender.example.org\nAuto-Submitted: auto-replied\n\n{}\n"


def test_automatic_replies_are_dropped_and_counted(mx, subject):
    mx.send(mx.reply_address(), raw=raw(AUTOMATIC.format(subject)))
    mx.send(mx.address(), raw=raw(AUTOMATIC.format(subject)))
    assert wait(lambda: len(told(mx)) == 2, 20)
    assert wait(lambda: status(mx)["counts"] == {"delivered": {"dropped": 1, "posted": 1}}, 10), status(mx)
    assert [one["channel"] for one in mx.state()["messages"]] == ["general"]
    assert quarantine(mx) == "" and all("status=sent" in one for one in told(mx))


def test_loops_are_refused(mx, subject):
    """Zulip's own notification, and what has passed here three times before."""
    received = f"Received: from x (x [192.0.2.1])\n\tby {mx.domain} (Postfix) with ESMTP id X\n" * 3
    for field in (f"Reply-To: {mx.reply_address()}\n", received):
        mx.send(mx.address(), raw=raw(f"{field}Subject: {subject}\nFrom: a@sender.example.org\n\nhello\n"))
    assert wait(lambda: len(told(mx)) == 2, 20)
    assert all("5.4.6, status=bounced" in one and "a mail loop" in one for one in told(mx)), told(mx)
    assert mx.state()["messages"] == [] and status(mx)["counts"] == {"refused": {"loop": 2}}


def test_dropped_by_the_time_limit_it_is_handed_over_again(mx, subject):
    mx.sh("echo 6 > /run/zulip-standin/consume-seconds")
    mx.send(mx.address(), subject=subject)
    assert wait(lambda: "it took Zulip's worker too long" in mx.sh("mailq"), 30), mx.sh("mailq")
    mx.sh("rm /run/zulip-standin/consume-seconds")
    flush_until(mx, subject, 1, 30)
    assert len(mx.messages(subject)) == 1 and quarantine(mx) == ""
    assert status(mx)["counts"] == {"deferred": {"Zulip's time limit": 1}, "delivered": {"posted": 1}}


def test_over_zulips_limit_it_is_handed_over_again(mx, subject):
    """Somebody else uses it up."""
    limits(mx, WIDE, zulip="3/5")
    mx.send(mx.address(), subject=subject, count=6)
    flush_until(mx, subject, 6, 90)
    assert len(mx.messages(subject)) == 6 and twice(mx, subject) == 0
    assert status(mx)["counts"]["deferred"]["rate limit"] >= 1


def test_failed_with_redis_down_it_is_handed_over_again_once(mx, subject):
    with broken(mx, REDIS_DOWN):
        mx.send(mx.address(), subject=subject, count=3)
        words = "failed in Zulip" if mx.fqdn.startswith("mx1") else "SMTP 500"
        assert wait(lambda: words in status(mx)["counts"].get("deferred", {}), 30)
    flush_until(mx, subject, 3, 60)
    time.sleep(7)  # Zulip's file of failed mail is looked at every 5 s
    report(mx, "redis down", subject, 3)
    assert twice(mx, subject) == 0


def test_what_rabbitmq_gives_again_is_posted_once(mx, subject):
    """PostgreSQL is restarted while the worker has a reply and a mail: it ends, and the next one posts both."""
    mx.sh("echo 2 > /run/zulip-standin/consume-seconds")
    mx.send(mx.reply_address(), text=subject)
    mx.send(mx.address(), subject=subject)
    time.sleep(0.7)
    mx.sh("touch /run/zulip-standin/database-restart")
    assert wait(lambda: "SIGUSR1" in mx.sh("cat /var/log/zulip/errors.log 2>/dev/null || true"), 20)
    mx.wait_for(subject, seconds=40)
    mx.sh("rm /run/zulip-standin/consume-seconds")
    time.sleep(15)
    assert len(mx.messages(subject)) == 1 and len(mx.messages("lunch")) == 1
    assert wait(lambda: status(mx)["counts"]["delivered"] == {"posted": 2}, 20), status(mx)
    assert quarantine(mx) == "" and status(mx)["under_way"] == 0


def test_worker_stopped_for_a_minute(mx, subject):
    with broken(mx, stopped("zulip-worker")):
        mx.send(mx.address(), subject=subject, count=5)
        mx.send(mx.reply_address(), text=subject)
        assert wait(lambda: "has not posted it yet" in quarantine(mx), 30)
        facts = status(mx)
        assert facts["counts"].get("delivered") is None and facts["waiting"] >= 1
        assert "whose email_mirror worker has not taken them yet" in mx.host.run("zulip-email-gateway doctor").stdout
        assert "2.0.0, status=sent" in told(mx)[0] and "has not posted it yet" in told(mx)[0]
        time.sleep(max(0.0, float(mx.began) + 60 - time.time()))
        waiting = mx.state()["waiting"]
    flush_until(mx, subject, 5, 60)
    tell(f"{mx.fqdn}: worker stopped for 60 s: {waiting} of 6 mails in RabbitMQ meanwhile")
    assert waiting <= 3
    assert wait(lambda: quarantine(mx) == "", 20)
    report(mx, "worker stopped", subject, 5)
    assert status(mx)["counts"]["delivered"] == {"posted": 6} and twice(mx, subject) == 0


@pytest.mark.zulip(11)
def test_late_and_dropped_it_stays_in_quarantine(mx, subject):
    """The reply address is gone when the worker comes back: nobody else can be told."""
    with broken(mx, stopped("zulip-worker")):
        mx.send(mx.reply_address(), text=subject)
        assert wait(lambda: status(mx)["waiting"] == 1, 30)
        mx.in_zulip("CREATE TABLE kept AS SELECT * FROM reply", "DELETE FROM reply")
    try:
        assert wait(lambda: status(mx)["lost"] == 1, 30), status(mx)
    finally:
        mx.in_zulip("INSERT INTO reply SELECT * FROM kept", "DROP TABLE kept")
    assert "the address is gone" in quarantine(mx)
    assert "mails that Zulip accepted and did not post" in mx.host.run("zulip-email-gateway doctor").stdout
    number = quarantine(mx).split()[0]
    assert "posted in Zulip" in mx.sh(f"zulip-email-gateway quarantine replay {number}")
    assert any(subject in message["content"] for message in mx.messages("lunch")) and quarantine(mx) == ""


def test_worker_restarted_in_the_middle(mx, subject):
    limits(mx, SCALED)
    mx.send(mx.address(), subject=subject, count=60)
    for number in range(1, 4):
        wait(lambda number=number: len(mx.messages(subject)) >= 12 * number, 30)
        mx.sh("systemctl kill --signal=KILL zulip-worker; sleep 1; systemctl restart zulip-worker")
    flush_until(mx, subject, 60, 120)
    report(mx, "worker restarted", subject, 60)
    assert wait(lambda: status(mx)["counts"]["delivered"].get("posted") == 60, 20), status(mx)
    assert quarantine(mx) == ""


@pytest.mark.zulip(10)
@pytest.mark.parametrize("how", ["by logrotate", "by supervisor", "while the service is restarted"])
def test_log_rotated_in_the_middle(mx, subject, how):
    logs = "/var/log/zulip"
    if how == "by supervisor":
        # The log of all workers cannot be read: the other one is followed.
        mx.sh(f"chmod 600 {logs}/workers.log; echo 2000 > /run/zulip-standin/log-bytes")
    mx.send(mx.address(), subject=subject, count=40)
    for number in range(1, 4):
        wait(lambda number=number: len(mx.messages(subject)) >= 10 * number, 30)
        if how == "by logrotate":
            mx.sh(f"mv {logs}/workers.log {logs}/workers.log.{number} || true")
        elif how != "by supervisor":
            mx.sh(f"mv {logs}/workers.log {logs}/workers.log.{number}; systemctl restart zulip-email-gateway.service")
    flush_until(mx, subject, 40, 60)
    report(mx, f"log rotated {how}", subject, 40)
    assert wait(lambda: status(mx)["counts"]["delivered"] == {"posted": 40}, 20), status(mx)
    assert quarantine(mx) == "" and twice(mx, subject) == 0


@pytest.mark.zulip(11)
def test_log_unreadable(mx, subject):
    """Accepted is all that is known then, and everybody says so."""
    mx.send(mx.address(), subject=subject + " before")
    mx.wait_for(subject)
    mx.sh("chmod 600 /var/log/zulip/workers.log /var/log/zulip/events_email_mirror.log")
    mx.send(mx.address(), subject=subject, count=5)
    mx.wait_for(subject, 6)
    assert wait(lambda: len(told(mx)) == 6, 10)
    assert all("2.0.0 accepted by Zulip" in one for one in told(mx)[1:]), told(mx)
    assert status(mx)["counts"] == {"delivered": {"accepted": 5, "posted": 1}} and status(mx)["worker_log"] is None
    assert "whether mail was posted is not known" in mx.sh("zulip-email-gateway status")
    doctor = mx.host.run("zulip-email-gateway doctor")
    assert doctor.rc == 1 and "cannot read /var/log/zulip/workers.log" in doctor.stdout
    mx.sh("chmod 644 /var/log/zulip/workers.log /var/log/zulip/events_email_mirror.log")
    mx.send(mx.address(), subject=subject + "again")
    assert wait(lambda: status(mx)["counts"]["delivered"] == {"accepted": 5, "posted": 2}, 20)


def test_another_producers_mail_is_not_taken_for_ours(mx, subject):
    """Mail that others give to Zulip at the same time, half of it blank: ours are posted and told so."""
    limits(mx, SCALED)
    other = base64.b64encode(b"Subject: other\n\nhello\n").decode()
    blank = base64.b64encode(b"Subject: other\n\n \n").decode()
    mx.send(mx.address(), subject=subject + " first")
    mx.wait_for(subject)
    address = mx.address("support")
    mx.send(mx.address(), subject=subject, count=10)
    for text in (other, blank) * 5:
        mx.in_zulip(f"INSERT INTO queue (rcpt_to, msg_base64) VALUES ('{address}', '{text}')")
    flush_until(mx, subject, 11, 60)
    assert len(mx.messages(subject)) == 11 and twice(mx, subject) == 0
    assert wait(lambda: status(mx)["counts"]["delivered"].get("posted") == 11, 20), status(mx)
    assert status(mx)["counts"].get("refused") is None and quarantine(mx) == ""


def test_service_killed_it_is_not_posted_twice(mx, subject):
    """While mail waits for its line."""
    mx.sh("echo 0.5 > /run/zulip-standin/consume-seconds")
    mx.send(mx.address(), subject=subject, count=5)
    for _ in range(6):
        time.sleep(0.6)
        mx.sh("systemctl kill --signal=KILL zulip-email-gateway.service; postqueue -f")
    mx.sh("rm /run/zulip-standin/consume-seconds")
    flush_until(mx, subject, 5, 60)
    report(mx, "service killed", subject, 5)
    assert twice(mx, subject) == 0


def test_nothing_is_left_over(mx):
    assert mx.sh(f"find {STATE}/spool {STATE}/quarantine -type f 2>/dev/null || true").strip() == ""

"""What strangers may send.

These tests run for each generation of Zulip, see the files that import them.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import threading
import time
from typing import Any

import pytest
from attacks import doctor, envelope, outside, talk, waiting
from conftest import ZulipHost, tell, wait
from figures import ACCEPTING, Fault, broken


def forms(mx: ZulipHost) -> list[str]:
    """Ways to ask for mail to somebody else."""
    domain = mx.domain
    others = ("user@other.example.org", f"user@sub.{domain}", f"user@{mx.fqdn}", "user@[192.0.2.1]", "user@localhost")
    shapes = (
        *("{0}", '"{0}"', '"{0}"@{1}', "{0}@{1}", "@{1}:{0}", "@{1},@other.example.org:{0}", "{2}%{3}@{1}"),
        *("{2}%{3}", "{3}!{2}", "{3}!{2}@{1}", "{1}!{3}!{2}", '"{2}%{3}"@{1}', "{0}.", "{0}@", "<{0}>"),
    )
    return [shape.format(other, domain, *other.split("@")) for shape, other in itertools.product(shapes, others)]


def test_it_relays_for_nobody(mx):
    recipients = forms(mx)
    senders = ("", f"user@{mx.domain}", "root@localhost", "user@sender.example.org")
    script = f"""
accepted, codes = [], set()
for sender in {senders!r}:
    with smtplib.SMTP(SERVER, 25, timeout=60) as server:
        server.ehlo()
        for number, recipient in enumerate({recipients!r}):
            if number % 8 == 0:
                server.docmd("QUIT"); server.close(); server.connect(SERVER, 25); server.ehlo()
            server.docmd(f"MAIL FROM:<{{sender}}>")
            code, text = server.docmd(f"RCPT TO:<{{recipient}}>")
            codes.add(code); server.docmd("RSET")
            if code < 400: accepted.append([sender, recipient])
print(json.dumps([accepted, sorted(codes)]))
"""
    accepted, codes = outside(mx, script)
    tell(f"{len(recipients) * len(senders)} attempts to relay: accepted {len(accepted)}, codes {codes}")
    assert accepted == [] and mx.sh("mailq") == "Mail queue is empty\n"


ENDS = [
    *(b"\n.\n", b"\r.\r", b"\n.\r\n", b"\r\n.\n", b"\r\n.\r", b"\r.\r\n", b"\n\n.\n\n", b"\r\n\0.\r\n", b"\r\n.\0\r\n"),
    *(
        b"\r\n. \r\n",
        b"\r\n .\r\n",
        b"\r\n..\r\n",
        b"\n.\r",
        b"\r.\n",
        b"\r\r\n.\r\r\n",
        b"\r\n\x0b.\r\n",
        b"\x85.\x85",
    ),
    *(b"\xe2\x80\xa8.\xe2\x80\xa8", b"\r\n.\x00\x0a", b"\r\n.=0D=0A"),
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.hex())
def test_no_mail_is_smuggled_in_another(mx, subject, end):
    """CVE-2023-51764: one mail goes in, and one comes out."""
    inner = b"".join(envelope(mx.address("support"))) + b"Subject: smuggled\r\n\r\nx"
    mail = b"Subject: " + subject.encode() + b"\r\n\r\ntext" + end + inner + b"\r\n.\r\n"
    *_, accepted, _ = talk(mx, *envelope(mx.address()), mail)
    if accepted.startswith("250"):
        mx.wait_for(subject)
    assert not mx.messages("smuggled") and len(mx.messages(subject)) == accepted.startswith("250")


def test_nobody_talks_ahead(mx):
    """A client that does not wait for its turn."""
    ahead = b"MAIL FROM:<user@sender.example.org>\r\n" + f"RCPT TO:<{mx.address()}>\r\nDATA\r\n".encode()
    said = talk(mx, ahead, first=b"HELO client.example.org\r\n")
    assert re.search("503 5.5.0 .*pipelining|554 5.5.0 .*synchronization", " ".join(said)), said


@pytest.mark.zulip(11)
@pytest.mark.parametrize("text", ["\x1b]0;x\x07", "a\rforged: line", "a\x0bb", "\u2028forged", "\u202eforged"])
def test_nothing_steers_the_journal_or_a_terminal(mx, subject, text):
    mail = f"From: x\r\nSubject: {subject} {text}\r\n\r\n \r\n.\r\n".encode()
    with broken(mx, ACCEPTING):
        for recipient in (mx.address(), f"x.{'e' * 32}@{mx.domain}"):
            sender, to, data = envelope(recipient)
            talk(mx, sender.replace(b"user", f'"{text}"'.encode()), to, data, mail)
    assert wait(lambda: waiting(mx) == 0, 30)
    shown = mx.sh("zulip-email-gateway status; zulip-email-gateway quarantine list; zulip-email-gateway doctor || true")
    kept = [json.loads(line) for line in mx.sh("journalctl -o json -n 60 -u 'zulip-email*'").splitlines()]
    shown += "".join(str(entry["MESSAGE"]) for entry in kept)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]", shown), repr(shown)
    assert not re.search("(?m)^forged", shown)
    mx.sh("zulip-email-gateway quarantine purge --all")


LINES = {
    # Of more Postfix makes a file that is too large by itself.
    "header lines": "b'A:\\r\\n' * (900_000 // PART)",
    "continuations": "b'A: x\\r\\n' + b' x\\r\\n' * (3_600_000 // PART)",
    "newlines": "b'\\r\\n' + b'\\r\\n' * (8_000_000 // PART)",
    "one line": "b'\\r\\n' + b'x' * (16_000_000 // PART)",
    "parts": "b'Content-Type: multipart/x; boundary=b\\r\\n\\r\\n' + b'--b\\r\\n\\r\\nx\\r\\n' * (1_200_000 // PART)",
    "encoded words": "b'Subject: ' + b'=?utf-8?q?a?=\\r\\n ' * (1_000_000 // PART)",
}


def usage(mx: ZulipHost) -> tuple[float, float]:
    """CPU (s) that the service has used so far, and the most memory (MiB) it has had."""
    process = mx.sh("systemctl show -P MainPID zulip-email-gateway.service").strip()
    ticks = sum(map(int, mx.sh(f"cut -d' ' -f14,15 /proc/{process}/stat").split()))
    return ticks / 100, int(mx.sh(f"grep VmHWM /proc/{process}/status").split()[1]) / 1024


def bombs(mx: ZulipHost, recipient: str, number: int, part: int = 1) -> Any:
    """That many within some seconds, or a part of each; what was said to each."""
    script = f"""
from concurrent.futures import ThreadPoolExecutor
PART = {part}
BOMBS = [{", ".join(LINES.values())}]
def throw(number):
    try:
        with smtplib.SMTP(SERVER, 25, timeout=120) as server:
            server.sendmail("user@sender.example.org", [{recipient!r}], BOMBS[number % len(BOMBS)] + b"\\r\\n")
        return "250"
    except smtplib.SMTPException as error:
        return repr(error)[:200]
with ThreadPoolExecutor(6) as pool:
    print(json.dumps(list(pool.map(throw, range({number})))))
"""
    return outside(mx, script, mx.neighbour)


@pytest.mark.zulip(11)
def test_bombs_delay_no_reply_and_fill_no_memory(mx, subject):
    """To an address of the right form that nobody has, all of them accepted: the worst that strangers can do."""
    mx.sh("systemctl restart zulip-email-gateway.service")
    before, _ = usage(mx)
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.extend(bombs(mx, f"x.{'f' * 32}@{mx.domain}", 12)))
    delays, together = [], [0]

    def reply() -> float:
        text = f"{subject} {time.monotonic_ns()}"
        sent = mx.send(mx.reply_address(), subject=text, text=text)
        found = wait(lambda: [one for one in mx.state()["messages"] if text in one["content"]], 60)
        return float(found[0]["at"] - sent["began"])

    usual = max(reply() for _ in range(3))
    with broken(mx, ACCEPTING):
        thread.start()
        while thread.is_alive():
            delays.append(reply())
            together += [sum(map(int, mx.sh("ps -u zulip-email-gateway -o rss=").split())) for _ in range(3)]
        assert wait(lambda: waiting(mx) == 0, 60), mx.sh("mailq")
    cpu, memory = usage(mx)
    tell(
        f"12 bombs: {cpu - before:.2f} s of the service's CPU, {memory:.0f} MiB, all our processes "
        f"{max(together) >> 10} MiB at most, slowest of {len(delays)} replies {max(delays):.1f} s ({usual:.1f} before)"
    )
    assert said == ["250"] * 12
    assert max(delays) <= 2 + 2 * usual and max(together) <= 96 * 1024 and memory <= 60 and cpu - before <= 12


@pytest.mark.zulip(10)
def test_bombs_to_a_channel_cost_us_no_more(mx, subject):
    """What Zulip's worker makes of them is its own affair; what was accepted is accounted for."""
    before, _ = usage(mx)
    said = bombs(mx, mx.address(), 6, part=8)
    assert wait(lambda: waiting(mx) == 0, 400), mx.sh("mailq")
    cpu, memory = usage(mx)

    def accounted() -> tuple[int, int] | None:
        found = len(mx.state()["messages"]), len(mx.sh("zulip-email-gateway quarantine list").splitlines())
        return found if sum(found) == 6 else None

    # Of what the worker is slow with there is a copy until it has told what became of it.
    posted, kept = wait(accounted, 60) or pytest.fail(mx.journal())
    cost = f"{cpu - before:.2f} s of the service's CPU, {memory:.0f} MiB"
    tell(f"6 bombs to a channel: {cost}, posted {posted}, refused {kept}")
    assert said == ["250"] * 6
    assert memory <= 60 and cpu - before <= 6
    mx.sh("zulip-email-gateway quarantine purge --all")


LAST_DEFENCE = "/run/systemd/system/zulip-email-gateway.service.d/test.conf"


@pytest.mark.zulip(11)
def test_without_memory_mail_only_waits(mx, subject):
    """The last line of defence (LimitAS=): what cannot be had defers the mail that asks for it."""
    restart = "systemctl daemon-reload; systemctl restart zulip-email-gateway.service"
    # Of one that has just been started: the test before may have left more threads, whose stacks would be enough.
    mx.sh(f"{restart}; sleep 1")
    size = mx.sh("grep VmSize /proc/$(systemctl show -P MainPID zulip-email-gateway.service)/status").split()[1]
    spoil = f"mkdir -p $(dirname {LAST_DEFENCE}); printf '[Service]\\nLimitAS={int(size) + 512}K\\n' > {LAST_DEFENCE}"
    with broken(mx, Fault(f"{spoil}; {restart}", f"rm {LAST_DEFENCE}; {restart}")):
        recipients = [mx.address(options=f".word{number}") for number in range(10)]
        assert mx.send(*recipients, subject=subject)["accepted"] == 10
        assert wait(lambda: "(" in mx.sh("mailq"), 60), mx.sh("mailq")
        assert mx.sh("systemctl show -P NRestarts zulip-email-gateway.service").strip() == "0"
    assert wait(lambda: mx.sh("postqueue -f") or len(mx.messages(subject)) >= 10, 90), mx.journal()
    assert len(mx.messages(subject)) == 10


FORGED = """Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\ntext of it\r\n--b\r
Content-Type: multipart/alternative; boundary=c\r
Content-Disposition: attachment; filename*=utf-8''x{lines}\r\n\r\n--c\r\n\r\nx\r\n--c--\r\n--b--\r\n"""


def test_a_stranger_cannot_write_lines_into_zulips_log(mx, subject):
    """By a line end in a file name: neither is somebody's reply refused, nor the limit used up."""
    stamp = mx.sh("date -u +'%Y-%m-%d %H:%M:%S.000'").strip()
    line = f"\n{stamp} INFO [zerver.lib.email_mirror] {{}}"
    texts = ["Sending user is not active. Ignoring this message notification email."] * 3
    texts += ["Successfully processed email to general (zulip)"] * 15
    encoded = "".join(f"%{octet:02X}" for octet in "".join(line.format(text) for text in texts).encode())
    raw = f"From: user@sender.example.org\r\nSubject: {subject}\r\n{FORGED.format(lines=encoded)}"
    mx.send(mx.address("support"), raw=base64.b64encode(raw.encode()).decode())
    words = [f"{subject} reply {number}" for number in range(8)]
    for text in words:
        mx.send(mx.reply_address(), subject=text, text=text)
    assert wait(lambda: all(any(text in one["content"] for one in mx.state()["messages"]) for text in words), 30)
    [refused] = mx.sh("zulip-email-gateway quarantine list").splitlines()
    assert "it would write into Zulip's log: " in refused
    assert "not active" not in mx.sh("cat /var/log/zulip/workers.log") and waiting(mx) == 0
    status = json.loads(mx.sh("zulip-email-gateway status --json"))
    assert max(window["used"] for window in status["windows"]) <= 3, status["windows"]
    mx.sh("zulip-email-gateway quarantine purge --all")


@pytest.mark.zulip(10)
def test_postmaster_is_reachable_and_doctor_notices_when_not(mx, subject):
    postmaster = f"postmaster@{mx.domain}"
    # One client writes too much; another one may write all the same.
    mx.send(postmaster, subject=subject, count=12)
    script = f"""
with smtplib.SMTP(SERVER, 25, timeout=60) as server:
    server.sendmail("user@sender.example.org", [{postmaster!r}], b"Subject: {subject} other\\r\\n\\r\\nx\\r\\n")
print("[]")"""
    outside(mx, script, mx.neighbour)
    assert wait(lambda: mx.sh(f"grep -c '^Subject: {subject} other' /var/mail/root || true").strip() == "1", 20)
    assert wait(lambda: mx.sh(f"grep -c '^Subject: {subject} [0-9]' /var/mail/root || true").strip() == "5", 20)
    assert f"port 25 takes mail to {postmaster}" in doctor(mx, 0)
    with broken(
        mx, Fault("cp /var/mail/root /root/mail; truncate -s 600M /var/mail/root", "cat /root/mail > /var/mail/root")
    ):
        assert f"/var/mail/root, where mail to {postmaster} goes, has 600 of at most 1024 MiB" in doctor(mx, 1)
    spoil = "cp -p /etc/postfix/zulip_recipients /root/; sed -i '/postmaster/d' /etc/postfix/zulip_recipients"
    with broken(mx, Fault(f"{spoil}; postfix reload", "cp -p /root/zulip_recipients /etc/postfix/; postfix reload")):
        assert f"WRONG  port 25 refuses mail to {postmaster}" in doctor(mx, 1)

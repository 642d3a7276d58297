"""What the tests of faults share: limits, ways to break Zulip, and the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import testhosts
from conftest import ZulipHost, tell, wait

# Zulip's limits scaled down, so that a test is short.
SCALED = "12/2 40/8 400/600"
# Limits that do not matter.
WIDE = "90/3 900/60 9000/600"
STATE = "/var/lib/zulip-email-gateway"
JOURNAL = f"{STATE}/journal.sqlite"
# With only one of them left, Postfix would start the service, and the service the other.
SOCKETS = "zulip-email-gateway.socket zulip-email-gateway-policy.socket"
# What failed inside Zulip.
ERRORS = "/var/log/zulip/queue_error/email_mirror.errors"
SERVICE, CLIENT = "zulip-email-gateway serve", "zulip-email-gateway deliver"


def clean(mx: ZulipHost) -> ZulipHost:
    """Nothing is left over from the test before."""
    mx.sh("postsuper -d ALL 2>/dev/null || true")
    limits(mx, "50/60 120/300 600/3600")
    mx.bounced_before = bounces(mx)
    return mx


def bounces(mx: ZulipHost) -> int:
    return int(mx.sh("journalctl -u 'postfix*' | grep -c 'status=bounced' || true"))


def limits(mx: ZulipHost, windows: str, zulip: str = "") -> None:
    """Limits for the gateway and (the same, or `zulip`) for Zulip's limiter, and a clean slate."""
    rules = [tuple(int(part) for part in reversed(window.split("/"))) for window in (zulip or windows).split()]
    mx.sh(
        f"""
        systemctl stop zulip-email-gateway.service zulip-worker
        sed -i 's#^windows = .*#windows = {windows}#' /etc/zulip-email-gateway/gateway.conf
        rm -f /run/zulip-standin/*
        rm -rf {JOURNAL}* {STATE}/failures-position.json {STATE}/quarantine {ERRORS}
        rm -f /var/log/zulip/workers.log* /var/log/zulip/events_email_mirror.log*
        """
    )
    mx.in_zulip(*(f"DELETE FROM {table}" for table in ("limiter", "queue", "message", "dropped", "taken")))
    mx.sh(
        f"""
        {set_in_zulip("RATE_LIMITING_MIRROR_REALM_RULES", rules)}
        systemctl restart zulip-worker  # Zulip's restart-server may just have started it
        # Without a log the service does not know what Zulip has counted, and waits for an hour.
        for i in $(seq 300); do test -e /var/log/zulip/workers.log && break; sleep 0.1; done
        test -e /var/log/zulip/workers.log || exit 1
        # A client whose mail is gone may have started it meanwhile, by asking again.
        systemctl stop zulip-email-gateway.service; rm -rf {JOURNAL}*
        systemctl start zulip-email-gateway.service
        for i in $(seq 100); do zulip-email-gateway check >/dev/null && break; sleep 0.2; done
        """
    )


def set_in_zulip(name: str, value: object) -> str:
    """A script that sets one of Zulip's settings, and waits until its mail server has it."""
    server = "zulip-email-gateway-server"
    return f"""
        line='{name} = {value}'
        if ! grep -qxF "$line" /etc/zulip/settings.py; then
          before=$(systemctl show -P MainPID {server})
          sed '/^{name} /d' /etc/zulip/settings.py > /root/settings.py; echo "$line" >> /root/settings.py
          cat /root/settings.py > /etc/zulip/settings.py
          if systemctl --quiet is-active {server}.path; then
            for i in $(seq 300); do
              now=$(systemctl show -P MainPID {server})
              [ "$now" = 0 -o "$now" = "$before" ] || break
              sleep 0.1
            done
          fi
        fi
    """


def flush_until(mx: ZulipHost, subject: str, count: int, seconds: float) -> None:
    """Let Postfix try again, as its queue run does, until all is posted."""
    wait(lambda: mx.sh("postqueue -f") or len({one["topic"] for one in mx.messages(subject)}) >= count, seconds)


def report(mx: ZulipHost, name: str, subject: str, sent: int) -> None:
    """Print the figures, and assert that nothing was lost."""
    posted = len({message["topic"] for message in mx.messages(subject)})
    dropped = dropped_by_zulip(mx)
    bounced = bounces(mx) - mx.bounced_before
    tell(
        f"{name}: sent {sent}, posted {posted}, twice {twice(mx, subject)}, dropped by Zulip {dropped}, "
        f"bounced {bounced}"
    )
    assert (posted, dropped, bounced) == (sent, 0, 0)


def dropped_by_zulip(mx: ZulipHost) -> int:
    """How many mails; the empty ones were questions whether it knows an address."""
    return sum(one["why"] != "nothing in it at all" for one in mx.state()["dropped"])


def twice(mx: ZulipHost, subject: str) -> int:
    return sum(count - 1 for count in Counter(message["topic"] for message in mx.messages(subject)).values())


class Fault(NamedTuple):
    """Two shell scripts: what breaks, and what mends it."""

    spoil: str
    mend: str


@contextmanager
def broken(mx: ZulipHost, fault: Fault) -> Iterator[None]:
    mx.sh(fault.spoil)
    try:
        yield
    finally:
        mx.sh(fault.mend)


def stopped(unit: str) -> Fault:
    return Fault(f"systemctl stop {unit}", f"systemctl start {unit}")


def instead_of(unit: str, port: int, script: Path, mode: str) -> Fault:
    """A script on the unit's port that answers wrongly; see there for its modes."""
    spoil = f"""
        systemctl stop {unit}; cat > /root/faulty.py <<'EOF'\n{script.read_text()}\nEOF
        systemd-run --quiet --unit faulty python3 /root/faulty.py {mode}
        for i in $(seq 300); do ss -Hltn 'sport = :{port}' | grep -q . && exit; sleep 0.1; done; exit 1
    """
    return Fault(spoil, f"systemctl stop faulty; systemctl start {unit}")


NGINX_DOWN = stopped("nginx")
ZULIP_DOWN = stopped("zulip-web")
# Mail for an address that Zulip does not know gets as far as its delivery.
ACCEPTING = Fault(
    "sed -i 's/^unknown_addresses = ask/unknown_addresses = accept/' /etc/zulip-email-gateway/gateway.conf",
    "sed -i 's/^unknown_addresses = accept/unknown_addresses = ask/' /etc/zulip-email-gateway/gateway.conf",
)
REDIS_DOWN = Fault("touch /run/zulip-standin/redis-down", "rm /run/zulip-standin/redis-down")


def all_posted_after(mx: ZulipHost, subject: str, name: str, fault: Fault, words: str) -> None:
    """20 mails during the fault are deferred with these words, and posted once it is over."""
    limits(mx, WIDE)
    with broken(mx, fault):
        assert mx.send(mx.address(), subject=subject, count=20)["accepted"] == 20
        assert wait(lambda: words in mx.sh("mailq"), 30), mx.sh("mailq")
    flush_until(mx, subject, 20, 90)
    report(mx, name, subject, 20)


IN_A_FLOOD = {
    "service restarted": "systemctl restart zulip-email-gateway.service",
    "service killed": "systemctl kill --signal=KILL zulip-email-gateway.service",
    "journal deleted": f"rm {JOURNAL}*",
    "journal deleted and service restarted": f"rm {JOURNAL}*; systemctl restart zulip-email-gateway.service",
    "journal corrupted": f"systemctl kill --signal=KILL zulip-email-gateway.service; echo garbage > {JOURNAL}",
}


def in_a_flood(mx: ZulipHost, subject: str, name: str) -> None:
    """60 mails and replies; every two seconds something happens to the service or its journal."""
    limits(mx, SCALED)
    assert mx.send(mx.address(), subject=subject, count=60)["accepted"] == 60
    for number in range(1, 4):
        wait(lambda number=number: len(mx.messages(subject)) >= 12 * number, 20)
        mx.sh(IN_A_FLOOD[name])
        replies_in_a_flood(mx, 1)
    flush_until(mx, subject, 60, 120)
    report(mx, name, subject, 60)
    # Killed with its journal lost: what Zulip has just then is not known, each time.
    most = {"service restarted": 0, "journal deleted and service restarted": 0, "journal corrupted": 3}
    assert twice(mx, subject) <= most.get(name, 1)


# On the host itself and from before the first mail on, so that a slow test machine kills
# as often as a fast one. By user: the name stands in the command line of pipe(8) as well.
KILLER = r"""
import random, subprocess, time
rng, kills, end, flushed = random.Random(2), 0, time.monotonic() + 60, 0
while kills < 20 and time.monotonic() < end:
    time.sleep(rng.uniform(0.02, 0.15))
    # Postfix leaves a transport that failed alone for a minute.
    if time.monotonic() - flushed > 0.5:
        flushed = time.monotonic()
        subprocess.run(["postqueue", "-f"])
    if subprocess.run(["pkill", "-KILL", "-u", "zulip-email-gateway", "-f", "VICTIM"]).returncode == 0:
        kills += 1
print(kills)
"""


def killed_at_random_moments(mx: ZulipHost, subject: str, victim: str) -> None:
    limits(mx, WIDE)
    mx.write("/root/killer.py", KILLER.replace("VICTIM", victim))
    mx.sh("systemd-run --quiet --unit killer --property StandardOutput=file:/root/kills python3 /root/killer.py")
    assert mx.send(mx.address(), subject=subject, count=100)["accepted"] == 100
    wait(lambda: mx.host.run("systemctl is-active killer").rc != 0, 70)
    flush_until(mx, subject, 100, 120)
    kills = int(mx.sh("cat /root/kills"))
    tell(f"{victim} killed {kills} times, {twice(mx, subject)} of 100 twice")
    assert kills >= 10
    report(mx, f"{victim} killed", subject, 100)
    # A client: nothing. The service: at most what Zulip took in just then, though its line came too late.
    assert twice(mx, subject) <= (1 if victim == SERVICE else 0)


def postfix_stopped_and_host_restarted(mx: ZulipHost, subject: str, fault: Fault, words: str) -> None:
    """50 mails in the queue during a fault that the restart ends."""
    limits(mx, WIDE)
    mx.sh(fault.spoil)
    assert mx.send(mx.address(), subject=subject, count=50)["accepted"] == 50
    assert wait(lambda: words in mx.sh("mailq"), 20), mx.sh("mailq")
    mx.sh("systemctl stop postfix")
    assert bounces(mx) == mx.bounced_before
    testhosts.restart(mx.prefix, mx.container.rpartition("-")[2])
    mx.bounced_before = 0  # the journal begins anew
    flush_until(mx, subject, 50, 90)
    report(mx, "restart", subject, 50)
    # Postfix still gets through to the service.
    [[_, code, text]] = mx.send(f"nobody.{'e' * 32}@{mx.domain}", subject=subject)["refused"]
    assert (code, "Bad destination mailbox address" in text) == (550, True), text


def replies_in_a_flood(mx: ZulipHost, number: int) -> float:
    """Replies one after the other; how long the slowest took (seconds)."""
    slowest, before = 0.0, len(mx.messages("lunch"))
    for count in range(1, number + 1):
        sent = mx.send(mx.reply_address(), text=f"reply {count}")
        assert sent["accepted"] == 1, sent
        posted = mx.wait_for("lunch", before + count)[-1]["at"]
        slowest = max(slowest, posted - sent["began"])
    return slowest

"""Runs on the host of make bench and prints its figures: JSON, in the last line."""

from __future__ import annotations

import json
import os
import smtplib
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

GATEWAY = "/usr/local/bin/zulip-email-gateway"
BARE = ("/usr/bin/python3", "-I", "-S", "-c", "pass")
STATE = json.loads(subprocess.run(["python3", "/opt/zulip-standin/store.py"], capture_output=True, check=True).stdout)
REPLY = f"{STATE['replies'][0]['token']}@mx.mail.example.com"
is_flooded = threading.Event()
DELIVERIES, DRAINED, CONVERSATIONS, OFFERED, MIB = 300, 500, 20, 50_000, 2**20
LINE = f"Return-Path: <user@sender.example.org>\nDelivered-To: {REPLY}\n".encode()
MAIL = b"From: user@sender.example.org\r\nSubject: bench\r\n\r\nHello\r\n"


def sh(script: str) -> str:
    return subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=True).stdout.strip()


def service() -> int:
    return int(sh("systemctl show -P MainPID zulip-email-gateway.service"))


def cpu_of(process: int) -> float:
    """CPU seconds of a process and its threads so far (clock_getcpuclockid(3))."""
    return time.clock_gettime((~process << 3) | 2)


def peak_of(process: int) -> int:
    """The most memory that a process has taken up so far (bytes; proc(5), VmHWM)."""
    with open(f"/proc/{process}/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), 0)


class Cost:
    """CPU (s) and memory (bytes): of the service and of the clients that were run."""

    def __init__(self) -> None:
        self.process = service()
        with open(f"/proc/{self.process}/clear_refs", "w") as file:
            file.write("5")  # proc(5): begin the peak anew
        self.before = cpu_of(self.process)
        self.clients_cpu, self.clients_peak = 0.0, 0

    def run(self, command: tuple[str, ...], content: str) -> None:
        """One client; `content` is a file, which comes through a pipe as from Postfix."""
        reading, writing = os.pipe()
        feeder = subprocess.Popen(["cat", content], stdout=writing)
        client = subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL)
        os.close(reading)
        os.close(writing)
        # Not ru_maxrss, which begins with what this program takes up itself.
        peak = 0
        while os.waitid(os.P_PID, client.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            peak = max(peak, peak_of(client.pid))
            time.sleep(0.002)
        _, _, usage = os.wait4(client.pid, 0)
        client.returncode = 0
        feeder.wait()
        self.clients_cpu += usage.ru_utime + usage.ru_stime
        self.clients_peak += peak

    def cpu(self) -> float:
        return self.clients_cpu + cpu_of(self.process) - self.before

    def peak(self) -> int:
        """Bytes: the peaks of all processes added up, as if they came at the same moment."""
        return self.clients_peak + peak_of(self.process)


def deliver(number: object) -> tuple[str, ...]:
    return (GATEWAY, "deliver", f"--queue-id=bench{number}")


def stored(pieces: Iterator[bytes]) -> str:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(LINE)
        for piece in pieces:
            file.write(piece)
    return file.name


def repeated(head: bytes, text: bytes, size: int) -> Iterator[bytes]:
    yield head
    block = text * 10_000
    for _ in range(size // len(block)):
        yield block


def nested() -> Iterator[bytes]:
    for depth in range(10_000):
        yield b'Content-Type: multipart/mixed; boundary="%d"\r\n\r\n--%d\r\n' % (depth, depth)
    yield b"Content-Type: text/plain\r\n\r\nHello\r\n"
    for depth in reversed(range(10_000)):
        yield b"--%d--\r\n" % depth


BOMBS: dict[str, Callable[[], Iterator[bytes]]] = {
    "header lines": lambda: repeated(b"", b"A:\r\n", 18_000_000),
    "continuation lines": lambda: repeated(b"A: x\r\n", b" x\r\n", 18_000_000),
    "header lines and a reserved field": lambda: repeated(b"X-RcptTo: x\r\n", b"A:\r\n", 18_000_000),
    "100,000 MIME parts": lambda: repeated(
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n", b"--b\r\n\r\nx\r\n", 1_000_000
    ),
    "parts nested 10,000 deep": nested,
}


def post_at_once() -> None:
    """In the place of Zulip's worker, which takes longer than all of ours: says at once that all was posted,
    until it is told to end."""
    queue = sqlite3.connect("/var/lib/zulip-standin/zulip.sqlite", timeout=60, isolation_level=None)
    while not is_flooded.is_set():
        number, last = queue.execute("SELECT count(*), max(id) FROM queue").fetchone()
        if number:
            queue.execute("DELETE FROM queue WHERE id <= ?", (last,))
            stamp = time.strftime("%Y-%m-%d %H:%M:%S.000", time.gmtime())
            line = f"{stamp} INFO [zerver.lib.email_mirror] Successfully processed email from user 9 to general\n"
            with open("/var/log/zulip/workers.log", "a") as log:
                log.write(line * number)
        time.sleep(0.002)


def delivery_cpu() -> float:
    small = stored(iter([MAIL]))
    bare = Cost()
    cost = Cost()
    for number in range(DELIVERIES):
        bare.run(BARE, small)
        cost.run(deliver(number), small)
    return cost.cpu() / bare.clients_cpu


def memory(at_once: int) -> float:
    large = stored(repeated(MAIL, b"letters letters letters letters letters letters letters letters\r\n", 18_000_000))
    cost = Cost()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda number: cost.run(deliver(f"large{at_once}.{number}"), large), range(at_once)))
    return cost.peak() / MIB


def bombs() -> tuple[float, float]:
    worst_memory = worst_cpu = 0.0
    for name, pieces in BOMBS.items():
        cost = Cost()
        cost.run(deliver(name.replace(" ", "")), stored(pieces()))
        print(f"  {name}: {cost.cpu():.3f} s, {cost.peak() / MIB:.0f} MiB", file=sys.stderr)
        worst_memory, worst_cpu = max(worst_memory, cost.peak() / MIB), max(worst_cpu, cost.cpu())
    return worst_memory, worst_cpu


def made_conversations() -> list[str]:
    """Reply addresses, for which Zulip need not be asked."""
    zulip = sqlite3.connect("/var/lib/zulip-standin/zulip.sqlite", timeout=60, isolation_level=None)
    tokens = [f"mm{number:032x}" for number in range(CONVERSATIONS)]
    zulip.executemany("INSERT OR IGNORE INTO reply SELECT ?, channel, topic, user FROM reply LIMIT 1", zip(tokens))
    sh("sed -i 's/^unknown_addresses = .*/unknown_addresses = accept/' /etc/zulip-email-gateway/gateway.conf")
    return [f"{token}@mx.mail.example.com" for token in tokens]


def drained_a_second(command: str, conversations: list[str]) -> float:
    """500 replies in the queue, delivered by this command of Postfix's pipe(8)."""
    pipe = f"zulip-reply unix - n n - 4 pipe flags=DORX user=zulip-email-gateway argv={command}"
    sh(f"postconf -M 'zulip-reply/unix={pipe}'")
    sh("postconf -e defer_transports=zulip-reply; postfix reload 2>/dev/null; sleep 1")

    def send(conversation: str) -> None:
        with smtplib.SMTP("127.0.0.1") as server:
            for _ in range(DRAINED // CONVERSATIONS):
                server.sendmail("user@sender.example.org", [conversation], MAIL)

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(send, conversations))
    waiting = "find /var/spool/postfix/incoming /var/spool/postfix/active /var/spool/postfix/deferred -type f | wc -l"
    while int(sh("find /var/spool/postfix/deferred -type f | wc -l")) < DRAINED:
        time.sleep(0.2)
    sh("postconf -e defer_transports=; postfix reload 2>/dev/null; sleep 2")
    started = time.monotonic()
    sh("postqueue -f")
    while int(sh(waiting)):
        time.sleep(0.05)
    return DRAINED / (time.monotonic() - started)


def channel(name: str) -> str:
    found = next(row for row in STATE["channels"] if row["name"] == name)
    return f"{found['slug']}.{found['token']}@mx.mail.example.com"


def seconds_until_posted(recipient: str, text: str) -> float:
    """From sending a mail to its message in Zulip."""
    zulip = sqlite3.connect("/var/lib/zulip-standin/zulip.sqlite", timeout=60)
    began = time.time()
    with smtplib.SMTP("127.0.0.1") as server:
        server.sendmail("user@sender.example.org", [recipient], MAIL + text.encode())
    while time.time() < began + 120:
        row = zulip.execute("SELECT at FROM message WHERE content LIKE ?", (f"%{text}%",)).fetchone()
        if row is not None:
            return float(row[0]) - began
        time.sleep(0.02)
    return 120.0


def flood() -> dict[str, float]:
    """50,000 mails offered to one channel over 20 connections, and what others wait meanwhile."""
    lifted = "smtpd_error_sleep_time=0 smtpd_hard_error_limit=1000000 smtpd_client_message_rate_limit=0"
    sh(f"postconf -e {lifted} smtpd_client_connection_rate_limit=0 smtpd_client_recipient_rate_limit=0")
    sh("sed -i 's/^unknown_addresses = .*/unknown_addresses = ask/' /etc/zulip-email-gateway/gateway.conf")
    sh("postfix reload 2>/dev/null; systemctl start zulip-worker; sleep 2")
    before = cpu_of(service())
    command = f"python3 /root/flood.py --server 127.0.0.1 --count {OFFERED} --to {channel('general')}"
    flooding = subprocess.Popen(command.split(), stdout=subprocess.PIPE, text=True)
    others, replies, number = [0.0], [0.0], 0
    while flooding.poll() is None:
        number += 1
        replies.append(seconds_until_posted(REPLY, f"reply {number}."))
        if number % 10 == 1:  # it has a place in Zulip's limits, but not many
            others.append(seconds_until_posted(channel("support"), f"other {number}."))
        time.sleep(1)
    assert flooding.stdout is not None
    told = json.loads(flooding.stdout.read())
    refused = sum(told["refused"].values())
    waiting = int(sh(f"postqueue -j | grep -c {channel('general')}"))
    what = f"{told['accepted']} accepted, {waiting} waiting, {refused} refused in {told['seconds']:.0f} s"
    print(f"  flood: {what}", file=sys.stderr)
    cost = 1000 * (cpu_of(service()) - before) / refused
    return {"flood_other_channel_s": max(others), "flood_reply_s": max(replies), "refused_cpu_ms": cost}


def main() -> None:
    ours = f"{GATEWAY} deliver --queue-id=${{queue_id}}"
    sh("for i in $(seq 100); do zulip-email-gateway check && exit; sleep 0.2; done")
    sh("systemctl stop zulip-worker")
    threading.Thread(target=post_at_once, daemon=True).start()
    figures = {"delivery_cpu_ratio": delivery_cpu()}
    conversations = made_conversations()
    # Measured in turns: the machine may be slower for a while.
    rates: dict[str, list[float]] = {"/bin/true": [], " ".join(BARE): [], ours: []}
    for _ in range(3):
        for command, measured in rates.items():
            measured.append(drained_a_second(command, conversations))
    true, bare, gateway = (statistics.median(measured) for measured in rates.values())
    print(f"  drained a second: /bin/true {true:.0f}, bare Python {bare:.0f}, ours {gateway:.0f}", file=sys.stderr)
    figures |= {"drain_ratio": gateway / true, "drain_ratio_bare_python": bare / true}
    figures |= {"memory_18mb_mib": memory(1), "memory_5x18mb_mib": memory(5)}
    figures["bomb_mib"], figures["bomb_cpu_s"] = bombs()
    time.sleep(10)
    before = cpu_of(service())
    time.sleep(60)
    figures["idle_cpu_s"] = cpu_of(service()) - before
    is_flooded.set()
    figures |= flood()
    print(json.dumps(figures))


main()

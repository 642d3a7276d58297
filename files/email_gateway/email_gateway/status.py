"""What the gateway has done and where it stands, for the operator."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from . import worker_log
from .addresses import redact
from .config import Config
from .finding import run
from .journal import FAILED_INSIDE, REJECTED, UNDELIVERABLE, Journal
from .pace import Pace, backoff_left, usage, windows_of
from .quarantine import ALARM, NAMED, described
from .revival import RESTARTED

# Our own poller, and not Zulip's.
POLLER = Path("/etc/systemd/system/zulip-email-gateway-poll.service")
# How long something will take, or took, is different for each mail.
_SECONDS = re.compile(r"\b\d+(?:\.\d+)? s\b")


def collect(config: Config) -> dict[str, Any]:
    """Everything `status` tells, as plain data. Changes nothing; raises Trouble."""
    now = time.time()
    journal = Journal(config.state_dir, create=False)
    units = Pace(config, journal).units()
    counts = journal.counts()
    copies, lost, waiting = journal.number_of_copies()
    lost_bytes = journal.lost_bytes()
    log = worker_log.find(config.logs)
    return {
        "now": now,
        "since": journal.note("since"),
        "failed_inside_zulip": counts.pop(FAILED_INSIDE, {}),
        "undeliverable_bounces": sum(counts.pop(UNDELIVERABLE, {}).values()),
        "accepted": journal.accepted(),
        "counts": counts,
        "quarantine": copies,
        "server_restarts": sum(counts.pop(RESTARTED, {}).values()),
        "lost": lost,
        "lost_bytes": lost_bytes,
        "next_to_go": [
            described(copy)
            for copy in (journal.lost_copies(NAMED) if lost_bytes > ALARM * config.quarantine_bytes else [])
        ],
        "waiting": waiting,
        "windows": [
            {"limit": window.limit, "seconds": window.seconds, "used": used}
            for window, used in usage(units, windows_of(config), now)
        ],
        "posted": journal.posted(),
        "delays": journal.delays(),
        "last_posted": journal.note("last posted"),
        "probe": journal.note("probe") if config.addresses.probe else None,
        "last_poll": journal.note("last poll") if POLLER.exists() else None,
        "certificate_until": journal.note("certificate until"),
        "runs": _runs(),
        "queued": journal.queued(),
        "under_way": sum(not flight.kind and not flight.is_question for flight in journal.flights()),
        "worker_log": None if log is None else str(log),
        "backoff": backoff_left(journal.note("backoff"), now),
        "damaged": journal.damaged(),
        "queue": _queue(),
    }


def render(facts: dict[str, Any], logs: object) -> str:
    """The same for reading."""
    lines = [f"Since {time.strftime('%Y-%m-%d %H:%M', time.localtime(facts['since']))}:"]
    for kind in ("delivered", "deferred", "refused", REJECTED):
        causes = facts["counts"].get(kind, {})
        why = ", ".join(f"{cause} {number}" for cause, number in sorted(causes.items()))
        lines.append(f"  {kind:<10} {sum(causes.values()):>6}" + (f"  ({why})" if why else ""))
    for outcome, number in sorted(facts["failed_inside_zulip"].items()):
        lines.append(f"  failed inside Zulip, {outcome}: {number}")
    if facts["undeliverable_bounces"]:
        lines.append(f"  senders who could not be told of a refusal: {facts['undeliverable_bounces']}")
    if facts["server_restarts"]:
        what = "Zulip's mail server was restarted because it answered nothing but 500"
        lines.append(f"  {what}: {facts['server_restarts']}")
    lines.append(f"With Zulip, not yet posted: {facts['under_way']}")
    why = ", ".join(f"{name} {facts[name]}" for name in ("lost", "waiting") if facts[name])
    lines.append(f"In quarantine: {facts['quarantine']}" + (f"  ({why})" if why else ""))
    lines.append("Rate limit (mails that count now):")
    for window in facts["windows"]:
        lines.append(f"  {window['used']:>4} of {window['limit']} in {window['seconds']:g} s")
    if facts["worker_log"] is None:
        lines.append(f"No log of Zulip's worker can be read in {logs}: whether mail was posted is not known here")
    if facts["backoff"]:
        why = "Zulip says that its limit is used up, or does not answer"
        lines.append(f"  {why}; the next try is in {facts['backoff']:.0f} s")
    queue = facts["queue"]
    if queue is None and shutil.which("postqueue"):
        lines.append("Postfix queue: not known: is Postfix stopped? Only root may ask it")
    elif queue is not None:
        age = f", the oldest for {queue['oldest']:.0f} s" if queue["mails"] else ""
        lines.append(f"Postfix queue: {queue['mails']} mails{age}")
        lines += [f"  {number:>4} {reason}" for reason, number in sorted(queue["reasons"].items())]
    return "\n".join(lines)


def _runs() -> bool:
    """Whether the service does (systemctl(1))."""
    return run("systemctl", "is-active", "--quiet", "zulip-email-gateway.service", seconds=20).returncode == 0


def _queue() -> dict[str, Any] | None:
    """Postfix's queue by reason of delay, from postqueue(1); None if it cannot be read."""
    try:
        output = subprocess.run(["postqueue", "-j"], capture_output=True, timeout=20, check=True, text=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    mails = [json.loads(line) for line in output.splitlines()]
    reasons: dict[str, int] = {}
    for mail in mails:
        for recipient in mail["recipients"]:
            reason = recipient.get("delay_reason", "") or f"in the {mail['queue_name']} queue"
            reason = _SECONDS.sub("some s", redact(reason))
            reasons[reason] = reasons.get(reason, 0) + 1
    oldest = time.time() - min(mail["arrival_time"] for mail in mails) if mails else 0.0
    return {"mails": len(mails), "oldest": oldest, "reasons": reasons}

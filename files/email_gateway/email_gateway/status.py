"""What the gateway has done and where it stands, for the operator."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from typing import Any

from .addresses import redact
from .config import Config
from .journal import Journal
from .pace import Pace, seconds_on_hold, usage, windows_of


def collect(config: Config) -> dict[str, Any]:
    """Everything `status` tells, as plain data. Changes nothing; raises Trouble."""
    now = time.time()
    journal = Journal(config.state_dir, create=False)
    units, statistics = Pace(config, journal).look()
    counts = journal.counts()
    copies, lost = journal.number_of_copies()
    return {
        "since": journal.note("since"),
        "failed_inside_zulip": counts.pop("failed inside zulip", {}),
        "counts": counts,
        "quarantine": copies,
        "lost": lost,
        "windows": [
            {"limit": window.limit, "seconds": window.seconds, "used": used}
            for window, used in usage(units, windows_of(config, statistics), now)
        ],
        "in_flight": sum(unit.consumed is None for unit in units),
        "worker_statistics": statistics is not None or not config.worker_counts,
        "hold": seconds_on_hold(journal.note("hold"), now),
        "damaged": journal.damaged(),
        "queue": _queue(),
    }


def render(facts: dict[str, Any], queue_stats: object) -> str:
    """The same for reading."""
    lines = [f"Since {time.strftime('%Y-%m-%d %H:%M', time.localtime(facts['since']))}:"]
    for kind in ("delivered", "deferred", "refused"):
        causes = facts["counts"].get(kind, {})
        why = ", ".join(f"{cause} {number}" for cause, number in sorted(causes.items()))
        lines.append(f"  {kind:<10} {sum(causes.values()):>6}" + (f"  ({why})" if kind != "delivered" and why else ""))
    for outcome, number in sorted(facts["failed_inside_zulip"].items()):
        lines.append(f"  failed inside Zulip, {outcome}: {number}")
    lines.append(f"In quarantine: {facts['quarantine']}")
    lines.append("Rate limit (mails that count now):")
    for window in facts["windows"]:
        lines.append(f"  {window['used']:>4} of {window['limit']} in {window['seconds']:g} s")
    lines.append(
        f"  {facts['in_flight']:>4} of them not yet known to be consumed by Zulip's worker (normal for the last ones)"
    )
    if not facts["worker_statistics"]:
        lines.append(f"  {queue_stats} is missing or makes no sense: windows are stretched instead")
    if facts["hold"]:
        why = "Zulip says that its limit is used up, or does not answer"
        lines.append(f"  {why}; the next try is in {facts['hold']:.0f} s")
    queue = facts["queue"]
    if queue is None and shutil.which("postqueue"):
        lines.append("Postfix queue: not known: is Postfix stopped? Only root may ask it")
    elif queue is not None:
        age = f", the oldest for {queue['oldest']:.0f} s" if queue["mails"] else ""
        lines.append(f"Postfix queue: {queue['mails']} mails{age}")
        lines += [f"  {number:>4} {reason}" for reason, number in sorted(queue["reasons"].items())]
    return "\n".join(lines)


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
            reason = redact(recipient.get("delay_reason", "") or f"in the {mail['queue_name']} queue")
            reasons[reason] = reasons.get(reason, 0) + 1
    oldest = time.time() - min(mail["arrival_time"] for mail in mails) if mails else 0.0
    return {"mails": len(mails), "oldest": oldest, "reasons": reasons}

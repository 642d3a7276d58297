"""What the gateway has done and where it stands, for the operator."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from typing import Any

from .addresses import redact
from .delivery import Gateway
from .pace import hold, usage, windows_of


def collect(gateway: Gateway) -> dict[str, Any]:
    """Everything `status` tells, as plain data. Changes nothing."""
    now = time.time()
    data = gateway.state.look()
    statistics = gateway.pace.refresh(data, now)
    return {
        "since": data["since"],
        "counts": data["counts"],
        "recovery": gateway.recovered.look().get("recovery", {}).get("counts", {}),
        "quarantine": len(gateway.quarantine.items()),
        "lost": sum(item.lost for item in gateway.quarantine.items()),
        "windows": [
            {"limit": window.limit, "seconds": window.seconds, "used": used}
            for window, used in usage(data, windows_of(gateway.config, statistics), now)
        ],
        "in_flight": sum(slot["consumed"] is None for slot in data["slots"]),
        "worker_statistics": statistics is not None or not gateway.config.worker_counts,
        "hold": max(0.0, hold(data, now)),
        "queue": _queue(),
    }


def render(facts: dict[str, Any], queue_stats: object) -> str:
    """The same for reading."""
    lines = [f"Since {time.strftime('%Y-%m-%d %H:%M', time.localtime(facts['since']))}:"]
    for kind in ("delivered", "deferred", "refused"):
        causes = facts["counts"].get(kind, {})
        why = ", ".join(f"{cause} {number}" for cause, number in sorted(causes.items()))
        lines.append(f"  {kind:<10} {sum(causes.values()):>6}" + (f"  ({why})" if kind != "delivered" and why else ""))
    for outcome, number in sorted(facts["recovery"].items()):
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
        lines.append(f"  Zulip says that its limit is used up; the next try is in {facts['hold']:.0f} s")
    queue = facts["queue"]
    if queue is None and shutil.which("postqueue"):
        lines.append("Postfix queue: not known: is Postfix stopped? Only root may ask it")
    elif queue is not None:
        age = f", the oldest for {queue['oldest']:.0f} s" if queue["mails"] else ""
        lines.append(f"Postfix queue: {queue['mails']} mails{age}")
        lines += [f"  {number:>4} {reason}" for reason, number in sorted(queue["reasons"].items())]
    return "\n".join(lines)


def _queue() -> dict[str, Any] | None:
    """Postfix's queue by reason of delay, from postqueue(1); None if it can not be read."""
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

"""What `status` tells, for Prometheus (its text format, version 0.0.4; for node_exporter's textfile collector).

Each metric stands here once; the alert rules and the dashboard (files/monitoring) name no other, which a test
checks. Channels are called what Zulip calls them, and never by their addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_PREFIX = "zulip_email_gateway_"
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})


class Metric(NamedTuple):
    """name: without the prefix; kind: counter, gauge or histogram."""

    name: str
    kind: str
    help: str


WRITTEN = Metric("written_timestamp_seconds", "gauge", "When these metrics were written")
UP = Metric("up", "gauge", "1 if the service runs")
ACCEPTED = Metric("accepted_total", "counter", "Mails that came, by source: postfix or inbox")
MAILS = Metric(
    "mails_total",
    "counter",
    "Outcomes of deliveries, by cause; a mail may be deferred several times",
)
FAILED = Metric("failed_inside_zulip_total", "counter", "Mails that Zulip accepted and failed with, by what was done")
POSTED = Metric("posted_total", "counter", "Mails posted, by channel; accepted, where Zulip's log cannot be read")
DELAY = Metric("delay_seconds", "histogram", "Time from acceptance by Postfix, or the first try, to posted")
LAST = Metric("last_posted_timestamp_seconds", "gauge", "When the last mail was posted")
PROBED = Metric("probe_timestamp_seconds", "gauge", "When a probe was last sent, or looked for")
PROBE_GOOD = Metric("probe_success", "gauge", "1 if it was posted within two minutes")
PROBE_TIME = Metric("probe_duration_seconds", "gauge", "How long that took, if it was")
POLLED = Metric("last_poll_timestamp_seconds", "gauge", "When the inbox was last looked through")
CERTIFICATE = Metric("certificate_expiry_timestamp_seconds", "gauge", "When the certificate shown at port 25 expires")
QUARANTINE = Metric("quarantine_mails", "gauge", "Copies in quarantine: refused, lost by Zulip, or with Zulip still")
UNDER_WAY = Metric("under_way_mails", "gauge", "Mails that Zulip has accepted and not posted yet")
QUEUE = Metric("queue_mails", "gauge", "Mails in Postfix's queue")
OLDEST = Metric("queue_oldest_seconds", "gauge", "How long the oldest of them has waited")
QUEUED = Metric("queued_mails", "gauge", "Mails in Postfix's queue, by channel")
FREE = Metric("window_free_mails", "gauge", "Mails that Zulip's rate limit still admits, by the window's seconds")
BACKOFF = Metric("backoff_seconds", "gauge", "How long channel mail waits for Zulip, which is over its limit or silent")
LOG = Metric("worker_log_readable", "gauge", "1 if Zulip's log tells what became of mail")
DAMAGED = Metric("damaged_journals", "gauge", "Journals that were damaged and moved aside")
RESTARTS = Metric("zulip_server_restarts_total", "counter", "How often Zulip's own mail server had to be restarted")
UNTOLD = Metric("undeliverable_bounces_total", "counter", "Senders who could not be told of a refusal")


def render(facts: Mapping[str, Any]) -> str:
    """facts: as status.collect gives them."""
    return "\n".join(_lines(facts)) + "\n"


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    outcomes = [
        ({"outcome": outcome, "cause": cause}, number)
        for outcome, causes in sorted(facts["counts"].items())
        for cause, number in sorted(causes.items())
    ]
    yield from _metric(WRITTEN, _one(facts["now"]))
    yield from _metric(UP, _one(int(facts["runs"])))
    yield from _metric(ACCEPTED, _by("source", facts["accepted"]))
    yield from _metric(MAILS, outcomes)
    yield from _metric(FAILED, _by("action", facts["failed_inside_zulip"]))
    yield from _metric(POSTED, _by("channel", facts["posted"]))
    yield from _histogram(DELAY, *facts["delays"])
    yield from _metric(LAST, _one(facts["last_posted"]))
    probe = facts["probe"] or {"looked": None, "seconds": None}
    yield from _metric(PROBED, _one(probe["looked"]))
    yield from _metric(PROBE_GOOD, _one(None if probe["looked"] is None else int(probe["seconds"] is not None)))
    yield from _metric(PROBE_TIME, _one(probe["seconds"]))
    yield from _metric(POLLED, _one(facts["last_poll"]))
    yield from _metric(CERTIFICATE, _one(facts["certificate_until"]))
    kept = {"lost": facts["lost"], "waiting": facts["waiting"]}
    refused = facts["quarantine"] - sum(kept.values())
    yield from _metric(QUARANTINE, _by("kind", {"refused": refused, **kept}))
    yield from _metric(UNDER_WAY, _one(facts["under_way"]))
    if facts["queue"] is not None:
        yield from _metric(QUEUE, _one(facts["queue"]["mails"]))
        yield from _metric(OLDEST, _one(facts["queue"]["oldest"]))
    yield from _metric(QUEUED, _by("channel", facts["queued"]))
    free = [
        ({"seconds": f"{window['seconds']:g}"}, max(0, window["limit"] - window["used"])) for window in facts["windows"]
    ]
    yield from _metric(FREE, free)
    yield from _metric(BACKOFF, _one(facts["backoff"]))
    yield from _metric(LOG, _one(int(facts["worker_log"] is not None)))
    yield from _metric(DAMAGED, _one(len(facts["damaged"])))
    yield from _metric(RESTARTS, _one(facts["server_restarts"]))
    yield from _metric(UNTOLD, _one(facts["undeliverable_bounces"]))


Samples = Iterable[tuple[Mapping[str, str], float]]


def _one(value: float | None) -> Samples:
    return [] if value is None else [({}, value)]


def _by(label: str, values: Mapping[str, float]) -> Samples:
    return [({label: name}, number) for name, number in sorted(values.items())]


def _metric(metric: Metric, samples: Samples) -> Iterator[str]:
    yield f"# HELP {_PREFIX}{metric.name} {metric.help}"
    yield f"# TYPE {_PREFIX}{metric.name} {metric.kind}"
    for labels, value in samples:
        yield _sample(metric.name, labels, value)


def _histogram(metric: Metric, found: Mapping[float, int], seconds: float) -> Iterator[str]:
    yield from _metric(metric, [])
    number = 0
    for bound, more in sorted(found.items()):
        number += more
        yield _sample(f"{metric.name}_bucket", {"le": "+Inf" if bound == float("inf") else f"{bound:g}"}, number)
    yield _sample(f"{metric.name}_sum", {}, seconds)
    yield _sample(f"{metric.name}_count", {}, number)


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{label}="{text.translate(_ESCAPES)}"' for label, text in labels.items())
    return f"{_PREFIX}{name}{{{inside}}} {value:.15g}" if inside else f"{_PREFIX}{name} {value:.15g}"

"""Ansible filter: what playbooks/report.yml shows of a host, as charts and tables.

Charts are SVG from pygal, without scripts; their colours are variables of the page (report.html.j2).
"""

from __future__ import annotations

import datetime
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from ansible.errors import AnsibleFilterError

try:
    import pygal
    import pygal.style
except ImportError:
    pygal = None

HOURS, DAYS = 48, 30
# Of the busiest channels, and of the reasons, so many.
MOST = 10
QUANTILES = (0.5, 0.95, 0.99)

# Outcomes in the order in which they are stacked, with what they are called and their colours.
_KINDS = {
    "delivered": ("posted", "var(--posted)"),
    "refused": ("refused", "var(--refused)"),
    "rejected": ("rejected at port 25", "var(--rejected)"),
}
# Causes; the second where Zulip's log cannot be read, and accepted is all that is known.
_POSTED = ("posted", "accepted")
_HOUR = 3600
# On the axis of delays (seconds).
_MARKS = [
    *({"label": "0.1 s", "value": 0.1}, {"label": "1 s", "value": 1}, {"label": "10 s", "value": 10}),
    *({"label": "1 min", "value": 60}, {"label": "10 min", "value": 600}, {"label": "1 h", "value": 3600}),
    {"label": "1 d", "value": 86400},
]


def report(asked: Mapping[str, Any]) -> dict[str, Any]:
    """asked: what the host said, as `status` (status --json) and `history` (status --history). Raises
    AnsibleFilterError where the chart library is missing."""
    if pygal is None:
        raise AnsibleFilterError(
            "playbooks/report.yml draws with the Python library pygal on the machine that runs Ansible; install it "
            f"with {sys.executable} -m pip install pygal"
        )
    history, this = asked["history"], int(asked["status"]["now"] // _HOUR)
    today = this // 24
    hours = range(this - HOURS + 1, this + 1)
    days = range(today - DAYS + 1, today + 1)
    by_hour = _outcomes(history["outcomes"], hours, 1)
    by_day = _outcomes(history["outcomes"], days, 24)
    bounds, rows = history["bounds"], history["delays"]
    delays = [_delays(bounds, rows, day * 24, day * 24 + 23) for day in days]
    month = (days[0] * 24, this)
    return {
        "per_hour": _stacked(by_hour, _labels(hours, 1)),
        "per_day": _stacked(by_day, _labels(days, 24)),
        "delays": _lines(delays, _labels(days, 24)),
        "last_day": {what: sum(counts[-24:]) for what, counts in by_hour.items()},
        "quantiles": dict(zip(QUANTILES, _quantiles(_delays(bounds, rows, this - 23, this)), strict=True)),
        "reasons": _most(
            (f"{cause} ({_KINDS[outcome][0]})", number)
            for hour, outcome, cause, number in history["outcomes"]
            if month[0] <= hour and outcome in ("refused", "rejected")
        ),
        "channels": _most((channel, number) for hour, channel, number in history["posted"] if month[0] <= hour),
    }


def quantile(found: Sequence[tuple[float, int]], part: float) -> float | None:
    """Of a histogram (upper bounds and numbers), as Prometheus' histogram_quantile reckons it: linear within a
    bucket, and the last bound but one for what has none. None where nothing was counted."""
    total = sum(number for _, number in found)
    below, seen, wanted = 0.0, 0, part * total
    for bound, number in found:
        if number and seen + number >= wanted:
            return below if bound == float("inf") else below + (bound - below) * (wanted - seen) / number
        below, seen = (below if bound == float("inf") else bound), seen + number
    return None


def _outcomes(rows: Sequence[Sequence[Any]], periods: range, length: int) -> dict[str, list[int]]:
    """Numbers by outcome for each period of so many hours."""
    found: dict[str, Counter[int]] = {outcome: Counter() for outcome in _KINDS}
    for hour, outcome, cause, number in rows:
        # What is delivered may also have been dropped, as an automatic reply is.
        if outcome in found and (outcome != "delivered" or cause in _POSTED):
            found[outcome][hour // length] += number
    return {outcome: [counter[period] for period in periods] for outcome, counter in found.items()}


def _delays(
    bounds: Sequence[float | None], rows: Sequence[Sequence[Any]], first: int, last: int
) -> list[tuple[float, int]]:
    """Numbers by all bounds; the last one is None."""
    found: Counter[float | None] = Counter()
    for hour, bound, number, _ in rows:
        found[bound] += number if first <= hour <= last else 0
    return [(float("inf") if bound is None else bound, found[bound]) for bound in bounds]


def _quantiles(found: Sequence[tuple[float, int]]) -> list[float | None]:
    return [quantile(found, part) for part in QUANTILES]


def _most(pairs: Any) -> list[tuple[str, int]]:
    found: Counter[str] = Counter()
    for name, number in pairs:
        found[name] += number
    return found.most_common(MOST)


def _labels(periods: range, length: int) -> list[str]:
    """Of periods of so many hours; only those at noon, at midnight, and of each fifth day are to be seen."""
    form, shown = ("%a %H:%M", 12) if length == 1 else ("%m-%d", 5)
    return [
        datetime.datetime.fromtimestamp(number * length * _HOUR, datetime.timezone.utc).strftime(form)
        if number % shown == 0
        else ""
        for number in periods
    ]


def _stacked(found: Mapping[str, list[int]], labels: Sequence[str]) -> str:
    chart = pygal.StackedBar(**_settings([colour for _, colour in _KINDS.values()], labels))
    for outcome, (name, _) in _KINDS.items():
        chart.add(name, found[outcome])
    return _svg(chart)


def _lines(found: Sequence[Sequence[tuple[float, int]]], labels: Sequence[str]) -> str:
    colours = ["var(--posted)", "var(--rejected)", "var(--refused)"]
    chart = pygal.Line(
        **_settings(colours, labels), logarithmic=True, dots_size=2, stroke_style={"width": 3}, y_labels=_MARKS
    )
    of_days = [_quantiles(one) for one in found]
    for number, part in enumerate(QUANTILES):
        # Zero has no logarithm.
        values = [None if day[number] is None else max(0.01, float(day[number] or 0)) for day in of_days]
        chart.add(f"{part:.0%}", values, allow_interruptions=True)
    return _svg(chart)


def _settings(colours: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    style = pygal.style.Style(
        background="transparent",
        plot_background="transparent",
        foreground="var(--text)",
        foreground_strong="var(--text)",
        foreground_subtle="var(--line)",
        colors=tuple(colours),
        opacity="1",
        font_family="inherit",
        label_font_size=17,
        major_label_font_size=17,
        legend_font_size=18,
        no_data_font_size=30,
    )
    return {
        "style": style,
        "js": [],
        "disable_xml_declaration": True,
        "explicit_size": False,
        "width": 600,
        "height": 340,
        "margin": 8,
        "legend_at_bottom": True,
        "x_labels": list(labels),
        "truncate_label": -1,
        "no_data_text": "nothing yet",
        "print_values": False,
    }


def _svg(chart: Any) -> str:
    """Without the scripts for tooltips, which need one from elsewhere: browsers show titles as well."""
    root = chart.render_tree()
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "script":
                parent.remove(child)
            elif child.tag == "desc" and child.get("class") == "value":
                child.tag = "title"
    return ElementTree.tostring(root, encoding="unicode")


class FilterModule:
    """The plugin."""

    def filters(self) -> dict[str, Any]:
        return {"email_gateway_report": report}

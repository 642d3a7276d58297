"""What an invitation to an event (iCalendar, RFC 5545) says, as text."""

from __future__ import annotations

import re

# The longest line made here (characters).
_MAX_LINE = 300
_DATE = re.compile(r"(\d{4})(\d\d)(\d\d)(?:T(\d\d)(\d\d)\d\d(Z?))?")


def described(calendar: str) -> str:
    """Summary, time and place of its first event, a line each; empty if it has none of them."""
    event = re.sub(r"\r?\n[ \t]", "", calendar).partition("BEGIN:VEVENT")[2]
    summary, place = _property(event, "SUMMARY")[1], _property(event, "LOCATION")[1]
    (zone, start), end = _property(event, "DTSTART"), _property(event, "DTEND")[1]
    time = _time(start) + (f" to {_time(end)}" if end else "") + (f" ({zone})" if zone else "")
    lines = (("Calendar event", summary), ("Time", time if start else ""), ("Place", place))
    return "\n".join(f"{what}: {value[:_MAX_LINE]}" for what, value in lines if value)


def _property(event: str, name: str) -> tuple[str, str]:
    """The time zone and the value of a property; empty where there is none."""
    found = re.search(rf'(?im)^{name}((?:;(?:[^:"\n]|"[^"\n]*")*)?):(.*)', event)
    if found is None:
        return "", ""
    zone = re.search(r'(?i);TZID="?([^;"]*)', found[1])
    value = re.sub(r"\\(.)", lambda escaped: " " if escaped[1] in "nN" else escaped[1], found[2])
    return (zone[1] if zone else ""), " ".join(value.split())


def _time(value: str) -> str:
    found = _DATE.fullmatch(value)
    if found is None:
        return value
    year, month, day, hour, minute, utc = found.groups()
    return f"{year}-{month}-{day}" + (f" {hour}:{minute}" if hour else "") + (" UTC" if utc else "")

#!/usr/bin/env python3
"""make bench: what a delivery and site.yml cost, next to what they are compared with in the same run.

Throw-away hosts are set up by playbooks/site.yml, as in make demo; measure.py runs on the first one.
Prints a table and writes bench/results.json, a flat object of figures.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "molecule/shared"))
import testhosts  # noqa: E402 - found by the path above

PREFIX = "zeg-bench"
HOSTS = ("mx", "mx2", "mx3", "mx4", "mx5")


class Figure(NamedTuple):
    """What a key means, what is good enough, and what was measured of others.

    target: at most that; None where there is none. at_least: the other way round.
    """

    meaning: str
    target: float | None
    baseline: str
    at_least: bool = False


FIGURES = {
    "delivery_cpu_ratio": Figure(
        "CPU of one delivery, client and service, in units of python3 -I -S -c pass", 2.3, "Zulip's own script 13"
    ),
    "memory_18mb_mib": Figure("an 18 MB mail: peak memory of all our processes, MiB", 48, ""),
    "memory_5x18mb_mib": Figure("five of them at once", 96, "one program each before: 5 x 78"),
    "bomb_mib": Figure("the worst of the bombs: the same", 96, "one program before: 854"),
    "bomb_cpu_s": Figure("the worst of the bombs: CPU, s", 0.5, "one program before: 6"),
    "drain_ratio": Figure(
        "500 queued replies: delivered a second, in units of /bin/true as the pipe command", 0.5, "/bin/true 1", True
    ),
    "drain_ratio_bare_python": Figure("the same for python3 -I -S -c pass: what no Python program exceeds", None, ""),
    "flood_other_channel_s": Figure(
        "50,000 mails offered to one channel: until another channel's is posted, s", 5, "one after the other 924"
    ),
    "flood_reply_s": Figure("meanwhile, until a reply is posted, s", 2, ""),
    "refused_cpu_ms": Figure("CPU of the service for each mail of the flood that is refused, ms", 1, ""),
    "idle_cpu_s": Figure("the service, idle for 60 s: CPU, s", 0.02, "Zulip's own polling 1.8"),
    "site_noop_s": Figure("site.yml with nothing to change, over SSH, s", 7, "before: 15"),
    "site_first_s": Figure("site.yml on a new host, without what apt takes, s", 35, "before: 65, on a real server"),
    "site_five_hosts_ratio": Figure("site.yml with nothing to change on five hosts, in units of one", 1.6, ""),
}


def main() -> None:
    testhosts.use_settings()
    testhosts.say("Starting five hosts with systemd and a stand-in for Zulip, and a DNS server ...")
    testhosts.up(PREFIX, [f"{host}:bookworm" for host in HOSTS])
    try:
        testhosts.say("Running playbooks/site.yml ...")
        figures = of_site()
        testhosts.say("Measuring (about six minutes) ...")
        with (testhosts.SHARED / "flood.py").open() as script:
            testhosts.run(*testhosts.inside(f"{PREFIX}-mx"), "sh", "-c", "cat > /root/flood.py", stdin=script)
        with (HERE / "measure.py").open() as script:
            command = [*testhosts.inside(f"{PREFIX}-mx"), "python3", "-u", "-"]
            measured = subprocess.run(command, stdin=script, stdout=subprocess.PIPE, text=True, check=True).stdout
    finally:
        testhosts.down(PREFIX)
    figures |= json.loads(measured.splitlines()[-1])
    results = {key: round(value, 4) for key, value in figures.items()}
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{'key':24} {'figure':>8} {'target':>8}   what it is (what it is compared with)")
    for key, figure in FIGURES.items():
        print(f"{key:24} {results[key]:8.4g} {verdict(figure, results[key])}   {described(figure)}")


def of_site() -> dict[str, float]:
    """What site.yml takes: for the first time, with nothing to change, and with that on five hosts."""
    whole, in_apt = site("mx.example.com")
    site("all")
    one, five = ([site(hosts)[0] for _ in range(3)] for hosts in ("mx.example.com", "all"))
    return {
        "site_first_s": whole - in_apt,
        "site_noop_s": statistics.median(one),
        "site_five_hosts_ratio": statistics.median(five) / statistics.median(one),
    }


def site(hosts: str) -> tuple[float, float]:
    """Seconds of one run, and those of its tasks with apt. Exits where it fails."""
    with tempfile.NamedTemporaryFile() as durations:
        callback = {
            "ANSIBLE_CALLBACK_PLUGINS": str(HERE / "callback_plugins"),
            "ANSIBLE_CALLBACKS_ENABLED": "durations",
        }
        play = ("ansible-playbook", "-i", "inventory/demo", "-i", "bench/inventory.yml", "--limit", hosts)
        started = time.monotonic()
        done = subprocess.run(
            (*play, "playbooks/site.yml"),
            env={**os.environ, **callback, "DURATIONS": durations.name},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - started
        if done.returncode:
            sys.exit(f"playbooks/site.yml failed:\n{done.stdout}{done.stderr}")
        by_module = json.loads(Path(durations.name).read_text())
    return seconds, by_module.get("ansible.builtin.apt", 0)


def verdict(figure: Figure, value: float) -> str:
    if figure.target is None:
        return " " * 8
    good = value >= figure.target if figure.at_least else value <= figure.target
    return f"{'>=' if figure.at_least else '<='} {figure.target:<5g}" + ("" if good else " MISSED")


def described(figure: Figure) -> str:
    return figure.meaning + (f" ({figure.baseline})" if figure.baseline else "")


if __name__ == "__main__":
    try:
        main()
    except testhosts.Failed as error:
        sys.exit(f"bench: {error}")

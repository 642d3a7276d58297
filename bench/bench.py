#!/usr/bin/env python3
"""make bench: what a delivery costs, next to what it is compared with in the same run.

A throw-away host is set up by playbooks/site.yml, as in make demo; measure.py runs on it.
Prints a table and writes bench/results.json, a flat object of figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "molecule/shared"))
import testhosts  # noqa: E402 - found by the path above

PREFIX = "zeg-bench"


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
}


def main() -> None:
    testhosts.use_settings()
    testhosts.say("Starting a host with systemd and a stand-in for Zulip, and a DNS server ...")
    testhosts.up(PREFIX, ["mx:bookworm"])
    try:
        testhosts.say("Running playbooks/site.yml ...")
        play = ("ansible-playbook", "-i", "inventory/demo", "-i", "bench/inventory.yml", "playbooks/site.yml")
        done = subprocess.run(play, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"playbooks/site.yml failed:\n{done.stdout}{done.stderr}")
        testhosts.say("Measuring (about six minutes) ...")
        with (testhosts.SHARED / "flood.py").open() as script:
            testhosts.run(*testhosts.inside(f"{PREFIX}-mx"), "sh", "-c", "cat > /root/flood.py", stdin=script)
        with (HERE / "measure.py").open() as script:
            command = [*testhosts.inside(f"{PREFIX}-mx"), "python3", "-u", "-"]
            measured = subprocess.run(command, stdin=script, stdout=subprocess.PIPE, text=True, check=True).stdout
    finally:
        testhosts.down(PREFIX)
    results = {key: round(value, 4) for key, value in json.loads(measured.splitlines()[-1]).items()}
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{'key':24} {'figure':>8} {'target':>8}   what it is (what it is compared with)")
    for key, figure in FIGURES.items():
        print(f"{key:24} {results[key]:8.4g} {verdict(figure, results[key])}   {described(figure)}")


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

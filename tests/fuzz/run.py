#!/usr/bin/env python3
"""make fuzz: atheris looks for what breaks a promise of one target (see targets.py).

run.py TARGET SECONDS [CORPUS]: what covers something new is added to the corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["email_gateway", "zulip_info"]):
    from targets import TARGETS

HERE = Path(__file__).parent


def main() -> None:
    name, seconds = sys.argv[1:3]
    corpus = Path(sys.argv[3]) if len(sys.argv) > 3 else HERE / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        "-max_len=4096",
        "-rss_limit_mb=1024",
        "-timeout=20",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}/crash-", str(corpus)], TARGETS[name])
    atheris.Fuzz()


main()

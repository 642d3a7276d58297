#!/usr/bin/env python3
"""make fuzz: atheris looks for what breaks a promise of one target (see targets.py).

run.py TARGET SECONDS [CORPUS]: begins with the words of its language and with the corpus, to which
is added what covers something new.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["email_gateway", "zulip_info"]):
    from targets import TARGETS

HERE = Path(__file__).parent


def main() -> None:
    name, seconds = sys.argv[1:3]
    words = HERE / "words" / name
    corpus = Path(sys.argv[3]) if len(sys.argv) > 3 else HERE / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = Path(tempfile.mkdtemp(prefix="zeg-fuzz-"))
    found = [ast.literal_eval(f"b{line}") for line in words.read_text().splitlines()]
    for number, text in enumerate((b"".join(found), b"".join(found * 3), *found)):
        (seeds / str(number)).write_bytes(text)
    options = [f"-max_total_time={seconds}", "-max_len=8192", "-len_control=0", "-rss_limit_mb=1024", "-timeout=60"]
    options += [f"-dict={words}", f"-artifact_prefix={corpus}/crash-", "-verbosity=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus), str(seeds)], TARGETS[name])
    atheris.Fuzz()


main()

"""playbooks/report.yml: what it draws of what hosts tell, and what it says of those that tell nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import report
from ansible.errors import AnsibleFilterError
from email_gateway.gateway import Envelope
from email_gateway.journal import add_to_count
from email_gateway.verdict import Refused
from mails import mail
from test_config import rendered, write_addresses
from test_gateway import CHANNEL, FROM_POSTFIX

PROJECT = Path(__file__).parents[1]
PROGRAM = PROJECT / "files/email_gateway/zulip-email-gateway"


@pytest.mark.parametrize(
    ("found", "part", "seconds"),
    [
        ([], 0.5, None),
        ([(1.0, 0), (float("inf"), 0)], 0.5, None),
        ([(1.0, 10), (2.0, 10)], 0.5, 1.0),
        ([(1.0, 10), (2.0, 10)], 0.75, 1.5),
        ([(1.0, 10), (2.0, 0), (4.0, 10)], 0.99, 3.96),
        ([(1.0, 1), (60.0, 1), (float("inf"), 8)], 0.95, 60.0),
    ],
)
def test_quantiles_of_a_histogram(found, part, seconds):
    assert report.quantile(found, part) == (None if seconds is None else pytest.approx(seconds))


def test_what_was_counted_is_found_again():
    now = time.time()
    hour = int(now // 3600)
    outcomes = [[hour, "delivered", cause, 5] for cause in ("posted", "accepted", "dropped", "copy")]
    history = {"bounds": [30.0, 60.0, None], "outcomes": outcomes, "posted": [], "delays": [[hour, 60.0, 50, 2000.0]]}
    found = report.report({"status": {"now": now}, "history": history})
    assert found["last_day"] == {"delivered": 10, "refused": 0, "rejected": 0}
    assert found["quantiles"][0.5] == pytest.approx(45)  # as Prometheus has it


def test_without_the_chart_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(report, "pygal", None)
    with pytest.raises(AnsibleFilterError, match="pip install pygal"):
        report.report({})


def test_charts_of_nothing_yet():
    history = {"bounds": [1.0, None], "outcomes": [], "posted": [], "delays": []}
    found = report.report({"status": {"now": time.time()}, "history": history})
    assert found["reasons"] == found["channels"] == [] and set(found["quantiles"].values()) == {None}
    assert "nothing yet" in found["delays"] and all("<svg" in found[chart] for chart in ("per_day", "per_hour"))


def written(folder: Path, **programs: str) -> str:
    """The report of hosts with these programs (shell), and of one that cannot be reached."""
    inventory = "[zulip]\ngone ansible_host=127.0.0.1 ansible_port=1\n"
    for name, program in programs.items():
        (folder / name).mkdir()
        shell = f'PATH={folder / name}:$PATH exec /bin/sh "$@"'
        for path, text in ((folder / name / "zulip-email-gateway", program), (folder / name / "sh", shell)):
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        inventory += f"{name} ansible_connection=local ansible_shell_executable={folder / name / 'sh'}\n"
    (folder / "inventory").write_text(inventory)
    done = subprocess.run(
        (
            *("ansible-playbook", "-i", folder / "inventory", "-e", "ansible_become=false"),
            *("-e", f"report_file={folder}/r.html", PROJECT / "playbooks/report.yml"),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and f"msg: {folder}/r.html" in done.stdout, done.stdout + done.stderr
    return (folder / "r.html").read_text()


def test_a_report(gateway, tmp_path):
    """With the program itself, on a journal with some history; of one that tells nothing; and of no host."""
    for number in range(3):
        gateway.deliver(FROM_POSTFIX._replace(queue_id=f"Q{number}"), mail(b"%d" % number))
    gateway.answers = [Refused("5.1.1", "unknown address", "no <b>such</b> address")]
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    with gateway.journal.change() as database:
        add_to_count(database, "rejected", "<i>odd</i> cause", 4)
        add_to_count(database, "delivered", "posted", 900, int(time.time() // 3600) - 24 * 60)
    gateway.journal.close()
    (tmp_path / "gateway.conf").write_text(rendered(tmp_path))
    write_addresses(tmp_path)
    page = written(
        tmp_path,
        here=f'exec {sys.executable} {PROGRAM} --config {tmp_path}/gateway.conf "$@"',
        silent="echo 'zulip-email-gateway: no <journal> yet' >&2; exit 75",
    )
    assert re.search(r"<strong>3</strong>posted in 24 hours", page)
    assert re.search(r"<strong>5</strong>refused or rejected in 24 hours", page)
    assert '<td>general (zulip)</td><td class="number">3</td>' in page
    assert '<td>unknown address (refused)</td><td class="number">1</td>' in page
    assert "<td>&lt;i&gt;odd&lt;/i&gt; cause (rejected at port 25)</td>" in page
    assert page.count("<svg") == 3 and '<span class="WRONG">WRONG</span>' in page
    assert "900" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    # It needs nothing from elsewhere, and runs no script.
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert {url for url in re.findall(r"(?:src|href)=\"([^\"]*)\"", page) if not url.startswith("#")} == set()
    assert "default-src 'none'" in page

    assert "This host could not be asked: zulip-email-gateway: no &lt;journal&gt; yet" in page
    assert page.count("This host could not be asked:") == 2 and "it cannot be reached, or the gateway" in page

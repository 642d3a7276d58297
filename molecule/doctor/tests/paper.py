"""playbooks/report.yml in a browser (Chromium), on a wide screen and on a phone, by day and by night."""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

import pytest
from conftest import PROJECT, ZulipHost

BROWSER = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
# The page in a frame of a phone's width tells how wide it would like to be, and what its colours are.
PHONE = """<iframe width="375" height="3000" srcdoc="{}"></iframe><script>
onload = () => {{
    const page = document.querySelector("iframe").contentDocument, style = getComputedStyle(page.body);
    document.title = [page.documentElement.scrollWidth, style.backgroundColor, style.color].join("|");
}};
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    mx = ZulipHost("doctor", "mx2")
    done = mx.play(playbook="report", report_file=str(path))
    assert done.returncode == 0 and str(path) in done.stdout, done.stdout + done.stderr
    return path


def seen(page: Path, scheme: int) -> tuple[int, str, str]:
    """Width, and colours of background and text. scheme: 0 is dark, 1 light."""
    frame = page.with_name("phone.html")
    frame.write_text(PHONE.format(html.escape(page.read_text())))
    command = (*BROWSER, f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", f"file://{frame}")
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    width, background, text = re.search(r"<title>(.*?)</title>", done.stdout)[1].split("|")
    return int(width), background, text


def brightness(colour: str) -> float:
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 3


def test_it_fits_a_phone_by_day_and_by_night(page):
    light, dark = seen(page, 1), seen(page, 0)
    assert light[0] == dark[0] == 375
    assert brightness(light[1]) > 200 and brightness(light[2]) < 80
    assert brightness(dark[1]) < 60 and brightness(dark[2]) > 200


def test_it_draws_something(page, mx):
    """A picture of the page has its charts' colours in it."""
    picture = page.with_suffix(".png")
    command = (*BROWSER, "--window-size=1200,1800", f"--screenshot={picture}", f"file://{page}")
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    assert picture.stat().st_size > 50_000
    text = page.read_text()
    assert mx.fqdn in text and "posted in 24 hours" in text and "support (zulip)" in text
    assert text.count("<svg") == 3 and PROJECT.name not in text

"""Fixtures for the scenarios' tests: the hosts, and what the tests do with them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from testinfra.backend.base import BaseBackend, CommandResult
from testinfra.host import Host

sys.path.insert(0, str(Path(__file__).parent / "shared"))
import testhosts

# Modules of tests: what they assert is shown in full as well.
pytest.register_assert_rewrite(
    *("figures", "floods", "rows", "attacks", "strangers", "network", "neighbours", "unusual", "names", "forged"),
    *("diagnoses", "outside", "paper"),
)

PROJECT = Path(__file__).resolve().parents[1]


class Inside(BaseBackend):
    """testinfra's way into a test host (testhosts.inside)."""

    NAME = "inside"

    def __init__(self, container: str) -> None:
        super().__init__(container)
        self.container = container

    def run(self, command: str, *args: str, **_: Any) -> CommandResult:
        script = self.get_command(command, *args)
        return self.run_local(shlex.join([*testhosts.inside(self.container), "sh", "-c", script]))


class ZulipHost:
    """A Zulip server of the scenario: its container, its mail domain, its channels."""

    def __init__(self, scenario: str, name: str) -> None:
        self.scenario = scenario
        self.prefix = f"zeg-{scenario}"
        self.container = f"{self.prefix}-{name}"
        self.fqdn = f"{name}.example.com"
        self.domain = f"{name}.mail.example.com"
        self.bounced_before = 0
        self.version = 0
        self.host = Host(Inside(self.container))

    def sh(self, script: str) -> str:
        """Run a script as root; its output. Fails with all it printed."""
        done = self.host.run(script)
        assert done.rc == 0, f"{script}: {done.rc}\n{done.stdout}\n{done.stderr}"
        return str(done.stdout)

    def _run(self, command: Sequence[str], text: str) -> str:
        done = subprocess.run(
            [*testhosts.inside(self.container), *command], input=text, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(self, script: str, *arguments: str) -> str:
        """Run a Python script as root; its output. Fails with all it printed."""
        return self._run(("python3", "-", *arguments), script)

    def write(self, path: str, text: str) -> None:
        """Write a file of root's."""
        self._run(("sh", "-c", 'cat > "$1"', "sh", path), text)

    def in_zulip(self, *statements: str) -> None:
        """Change something in Zulip's database."""
        with testhosts.zulip_database(self.container) as database:
            for statement in statements:
                database.execute(statement)

    def banner(self) -> str:
        """What port 25 says first."""
        return self.python(
            "import socket; print(socket.create_connection(('127.0.0.1', 25), 5).recv(200).decode())"
        ).strip()

    def state(self) -> dict[str, Any]:
        return testhosts.zulip_state(self.container)

    def pattern(self) -> str:
        """EMAIL_GATEWAY_PATTERN, as Zulip's settings have it."""
        return self.python(
            "import sys; sys.path.insert(0, '/opt/zulip-standin'); import store\n"
            "print(store.settings().get('EMAIL_GATEWAY_PATTERN', ''))"
        ).strip()

    def address(self, channel: str = "general", options: str = "") -> str:
        found = next(row for row in self.state()["channels"] if row["name"] == channel)
        slug = f"{found['slug']}." if found["slug"] else ""
        return f"{slug}{found['token']}{options}@{self.domain}"

    def reply_address(self) -> str:
        return f"{self.state()['replies'][0]['token']}@{self.domain}"

    def send(self, *recipients: str, **options: object) -> dict[str, Any]:
        """Send from outside; see send.py for the options."""
        arguments = ["--server", self.fqdn]
        for recipient in recipients:
            arguments += ["--to", recipient]
        for name, value in options.items():
            for each in value if isinstance(value, list) else [value]:
                arguments += [f"--{name}"] if each is True else [f"--{name}", str(each)]
        return testhosts.send(self.prefix, *arguments)

    def messages(self, subject: str) -> list[dict[str, Any]]:
        """The messages whose topic starts with `subject`."""
        return [message for message in self.state()["messages"] if message["topic"].startswith(subject)]

    def wait_for(self, subject: str, count: int = 1, seconds: float = 30) -> list[dict[str, Any]]:
        """Wait until that many messages stand in Zulip; fails with the journal."""
        return wait(lambda: found if len(found := self.messages(subject)) >= count else None, seconds) or pytest.fail(
            f"{len(self.messages(subject))} of {count} messages {subject!r} after {seconds} s\n{self.journal()}"
        )

    def journal(self) -> str:
        script = "journalctl --no-pager --lines 40 -o short-iso -u 'postfix*' -u 'zulip-*'; mailq | tail -n 20"
        return str(self.host.run(f"{script}; systemctl --failed --no-legend").stdout)

    def play(self, *arguments: str, playbook: str = "site", **variables: object) -> subprocess.CompletedProcess[str]:
        """Run a playbook on this host alone, with these variables on top."""
        inventories = ["-i", "molecule/shared/inventory", "-i", f"molecule/{self.scenario}/inventory.yml"]
        command = ["ansible-playbook", *inventories, "--limit", self.fqdn, f"playbooks/{playbook}.yml", *arguments]
        for name, value in variables.items():
            command += ["-e", json.dumps({name: value})]
        environment = {
            **os.environ,
            "MOLECULE_SCENARIO_NAME": self.scenario,
            "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_FORCE_COLOR": "0",  # molecule asks for it
        }
        # A session of its own: a test may kill the run with all its processes.
        return subprocess.run(
            command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False, start_new_session=True
        )

    def refusal(self, **variables: object) -> str:
        """The one message of a run that has to stop before it changes anything."""
        return refused(self.play(**variables), self.fqdn)

    def variants(
        self, variants: Sequence[Mapping[str, object]], playbook: str = "site"
    ) -> subprocess.CompletedProcess[str]:
        """One run, in which this host has another name for each set of variables: variant0, variant1, ..."""
        scenario = yaml.safe_load((PROJECT / f"molecule/{self.scenario}/inventory.yml").read_text())
        own = scenario["zulip"]["hosts"][self.fqdn]
        hosts = {
            f"variant{number}": {**own, "host": self.fqdn.partition(".")[0], **variables}
            for number, variables in enumerate(variants)
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json") as inventory:
            json.dump({"zulip": {"hosts": hosts}}, inventory)
            inventory.flush()
            return self.play("-i", inventory.name, "--limit", "variant*", playbook=playbook)

    def refusals(self, variants: Sequence[Mapping[str, object]]) -> list[str]:
        """The messages of as many runs that have to stop before they change anything, all in one."""
        done = self.variants(variants)
        return [refused(done, f"variant{number}") for number, _ in enumerate(variants)]


def wait(check: Callable[[], Any], seconds: float) -> Any:
    """The first true answer of `check`, or its last. Asks the less often the longer it takes: each time costs CPU."""
    began = time.monotonic()
    while not (answer := check()) and time.monotonic() < began + seconds:
        time.sleep(min(0.2 + (time.monotonic() - began) / 30, 1.0))
    return answer


def refused(done: subprocess.CompletedProcess[str], host: str) -> str:
    """The message with which a run has stopped for a host before it changed anything there."""
    assert re.search(rf"^{host} .*changed=0 .*failed=1 ", done.stdout, re.MULTILINE), done.stdout[-3000:]
    fatal = done.stdout.partition(f"fatal: [{host}]: FAILED! => ")[2]
    assert fatal, done.stdout[-3000:]
    return str(json.JSONDecoder().raw_decode(fatal)[0]["msg"])


def changed(done: subprocess.CompletedProcess[str]) -> int:
    """How many tasks changed something."""
    found = re.search(r"changed=(\d+)", done.stdout)
    assert found and done.returncode == 0, done.stdout[-3000:]
    return int(found[1])


_figures: list[str] = []


def tell(text: str) -> None:
    """Print a figure at the end of the run, from any of pytest-xdist's processes."""
    _figures.append(text)


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Callable[[str], ZulipHost]:
    """host("mx12"): a host of the scenario the test belongs to."""
    return lambda name: ZulipHost(request.path.parents[1].name, name)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> str:
    """A subject that no other test uses."""
    return f"{request.node.name[:36]} {time.monotonic_ns() % 10**8}"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "zulip(version): run in front of this Zulip only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked for the other generation; the file tells which one it is."""

    def is_elsewhere(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("zulip")
        return marker is not None and item.path.name != f"test_zulip{marker.args[0]}.py"

    left_out = [item for item in items if is_elsewhere(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Hand on the figures, and the journal of the host under test when a test fails."""
    report = yield
    if report.when == "call":
        report.user_properties += [("figure", text) for text in _figures]
        _figures.clear()
    mx = getattr(item, "funcargs", {}).get("mx")
    if report.failed and isinstance(mx, ZulipHost):
        with suppress(testhosts.Failed):
            report.sections.append((f"journal of {mx.container}", mx.journal()))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in (*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])):
        for name, text in getattr(report, "user_properties", []):
            if name == "figure":
                terminalreporter.write_line(f"FIGURES {text}")

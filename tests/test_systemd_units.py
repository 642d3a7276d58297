"""systemd_units: a folder stands for /etc/systemd/system, and a program for systemctl that asks a test's systemd."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import systemd_units
from ansible.module_utils.testing import patch_module_args

# What stands for the program: it hands its arguments on, and ends as it is told.
PROGRAM = """#!/bin/bash
exec 3<>/dev/tcp/127.0.0.1/PORT
echo "$*" >&3
read -r status <&3
IFS= read -r -d "" said <&3
if [ "$status" = 0 ]; then printf %s "$said"; else printf %s "$said" >&2; fi
exit "$status"
"""


class Systemd:
    """Does as systemd does with the units in a folder, when its program is called.

    state has by unit "active", "since", "enabled", and what systemd has read, until it reloads: "read", the text, and
    "known", whether it is enabled. calls are those since they were emptied. A call of the verb `fails` does; what is
    started `becomes` that.
    """

    def __init__(self, units: Path, program: Path) -> None:
        self._units = units
        self.state: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.fails, self.becomes = "", "active"
        self._socket = socket.create_server(("127.0.0.1", 0))
        program.write_text(PROGRAM.replace("PORT", str(self._socket.getsockname()[1])))
        program.chmod(0o755)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Only then is the descriptor free for another one's socket, to which the thread might listen."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                with self._socket.accept()[0] as connection, connection.makefile("rw") as lines:
                    verb, *words = lines.readline().split()
                    status, said = self._call(verb, words)
                    lines.write(f"{status}\n{said}\n")

    def _call(self, verb: str, words: list[str]) -> tuple[int, str]:
        self.calls.append(" ".join([verb, *([] if verb == "show" else words)]))
        if verb == self.fails:
            return 1, "Job failed. See journalctl."
        names = [word for word in words if not word.startswith("-")]
        for name in names:
            if self.unit(name)["read"] is None:  # it looks again for what it has not found
                self.unit(name)["read"] = self._text(name)
        if verb == "show":
            return self._show(names, words[: -len(names)])
        try:
            for name in names or [""]:
                getattr(self, f"_{verb.replace('-', '_')}")(name)
            if verb in ("enable", "disable") and "--no-reload" not in words:
                self._daemon_reload("")
        except Refused as refused:
            return refused.args
        return 0, ""

    def unit(self, name: str) -> dict[str, Any]:
        new = {"active": "inactive", "since": "", "enabled": False, "read": None, "known": None}
        return self.state.setdefault(name, new)

    def _text(self, name: str) -> str | None:
        path = self._units / name
        return path.read_text() if path.exists() else None

    def _show(self, names: list[str], options: list[str]) -> tuple[int, str]:
        wanted = ["--timestamp=us+utc", "--property=ActiveState,UnitFileState,ActiveEnterTimestamp,NeedDaemonReload"]
        if options != wanted:
            return 1, "other options"
        told = []
        for name in names:
            one = self.state[name]
            if one["known"] is None:
                one["known"] = one["enabled"]
            is_there = {True: "enabled", False: "disabled"}[one["known"]] if one["read"] is not None else ""
            stale = "yes" if one["read"] is not None and one["read"] != self._text(name) else "no"
            told.append(
                f"ActiveEnterTimestamp={one['since']}\nActiveState={one['active']}\n"
                f"UnitFileState={is_there}\nNeedDaemonReload={stale}\n"
            )
        return 0, "\n".join(told)

    def _daemon_reload(self, _: str) -> None:
        for name, one in self.state.items():
            one["read"], one["known"] = self._text(name), None

    def _enable(self, name: str, enabled: bool = True) -> None:
        if self._text(name) is None:
            raise Refused(1, f"Unit file {name} does not exist.")
        self.state[name]["enabled"] = enabled

    def _disable(self, name: str) -> None:
        self._enable(name, False)

    def _stop(self, name: str) -> None:
        if self.state[name]["read"] is None and self.state[name]["active"] == "inactive":
            raise Refused(5, f"Unit {name} not loaded.")
        self.state[name]["active"] = "inactive"
        for other, one in self.state.items():
            if f"Requires={name}" in (one["read"] or "") and one["active"] == "active":
                self._stop(other)

    def _start(self, name: str) -> None:
        one = self.state[name]
        if one["read"] is None:
            raise Refused(5, f"Unit {name} not found.")
        if name.endswith(".socket"):
            found = re.search("^Service=(.*)", one["read"], re.MULTILINE)
            service = found[1] if found else name.replace(".socket", ".service")
            if self.state.get(service, {}).get("active") == "active":
                raise Refused(1, "Socket service already active, refusing.")
        if one["active"] != "active":
            seconds, rest = divmod(time.time_ns(), 10**9)
            one["since"] = time.strftime(f"%a %Y-%m-%d %H:%M:%S.{rest // 1000:06} UTC", time.gmtime(seconds))
            one["active"] = self.becomes
            one["runs"] = one["read"]

    def _restart(self, name: str) -> None:
        was = self.state[name]["active"]
        self.state[name]["active"] = "inactive"
        try:
            self._start(name)
        except Refused:
            self.state[name]["active"] = was
            raise

    def _reset_failed(self, name: str) -> None:
        self.state[name]["active"] = "inactive"


class Refused(Exception):
    """Status and words."""


class Host:
    """A host whose units are in a folder."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys
        for folder in ("units", "bin"):
            (root / folder).mkdir()
        self.systemd = Systemd(root / "units", root / "bin/systemctl")

    def run(self, *units: dict[str, Any], absent: Any = (), check: bool = False) -> dict[str, Any]:
        """What the module returns."""
        # The clock by which files are dated ticks every 10 ms, or more often.
        time.sleep(0.02)
        self.systemd.calls.clear()
        listed = [{**one, "files": list(one["files"])} for one in units] + [
            {**one, "state": "absent"} for one in absent
        ]
        contents = {file: content for one in units for file, content in one["files"].items()}
        arguments = {"files": contents, "units": listed, "_ansible_check_mode": check, "_ansible_diff": True}
        with patch_module_args(arguments), pytest.raises(SystemExit):
            systemd_units.main()
        result = dict(json.loads(self._capsys.readouterr().out))
        assert result.get("failed") or result["changed"] == bool(result["actions"])
        return result

    def does(self, *units: dict[str, Any], **options: Any) -> list[str]:
        result = self.run(*units, **options)
        assert not result.get("failed"), result
        return list(result["actions"])

    def calls(self) -> list[str]:
        """Those of the last run that change something."""
        return [call for call in self.systemd.calls if call != "show"]

    def asked(self) -> int:
        """How often it was asked in the last run."""
        return self.systemd.calls.count("show")

    def write(self, name: str, content: str) -> Path:
        """As a run that was interrupted leaves it, or somebody else."""
        time.sleep(0.02)
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o644)
        return path

    def state(self, unit: str, **changes: Any) -> dict[str, Any]:
        self.systemd.unit(unit).update({"known": None, **changes})
        return self.systemd.unit(unit)

    def there(self) -> set[str]:
        return {path.name for path in (self.root / "units").iterdir()}


@pytest.fixture
def host(tmp_path, monkeypatch, capsys) -> Iterator[Host]:
    made = Host(tmp_path, capsys)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(systemd_units, "UNITS", tmp_path / "units")
    # run_command asks for a function to be called in the new process (for a umask, which it has not here). Without
    # one all of pytest's memory need not be copied for it, which takes 20 ms each time.
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *command, **options: start(*command, **options | {"preexec_fn": None})
    )
    yield made
    made.systemd.close()


def unit(name: str, *others: str, text: str = "1", **options: Any) -> dict[str, Any]:
    return {"name": name, "files": dict.fromkeys((name, *others), f"{text}\n"), **options}


SERVICE, TIMER, PATH = unit("a.service"), unit("b.timer", "b.service"), unit("c.path", "c.service")
SOCKET, SERVED, POLL = unit("d.socket"), unit("d.service"), unit("e.service", text="Requires=d.socket")
ALL = (SERVICE, TIMER, PATH, SOCKET, SERVED, POLL)
OLD = {"name": "old.timer", "files": ["old.service", "old.timer"]}


class TestUnits:
    def test_all_are_written_enabled_and_started_in_their_order(self, host):
        names = [one["name"] for one in ALL]
        done = host.does(*ALL)
        assert host.calls() == [f"enable --no-reload {' '.join(names)}", "daemon-reload"] + [
            f"{'start' if name == 'd.socket' else 'restart'} {name}" for name in names
        ]
        assert done == [
            *(f"{file} written" for one in ALL for file in one["files"]),
            *(f"{name} enabled" for name in names),
            "daemon-reload",
            *(f"{name} started" for name in names),
        ]
        assert host.there() == {file for one in ALL for file in one["files"]}

    def test_where_nothing_is_to_change_systemctl_is_called_once(self, host):
        host.does(*ALL)
        result = host.run(*ALL, absent=[OLD])
        assert (result["changed"], result["actions"], result["diff"]) == (False, [], [])
        assert (host.calls(), host.asked()) == ([], 1)

    def test_nor_is_it_for_no_units(self, host):
        """systemctl show without units would be about systemd itself."""
        assert host.does() == [] and host.asked() == 0

    @pytest.mark.parametrize("wrong", [*ALL[:3], SERVED], ids=lambda one: one["name"])
    def test_a_changed_file_restarts_what_it_belongs_to(self, host, wrong):
        host.does(*ALL)
        name, *others = wrong["files"]
        file = (others or [name])[0]
        changed = {**wrong, "files": {**wrong["files"], file: "2\n"}}
        result = host.run(*(changed if one is wrong else one for one in ALL))
        assert result["actions"] == [f"{file} written", "daemon-reload", f"{name} restarted"]
        path = host.root / "units" / file
        headers = {"before_header": str(path), "after_header": str(path)}
        assert result["diff"] == [{**headers, "before": "1\n", "after": "2\n"}]
        assert path.read_text() == "2\n" and host.state(file)["read"] == "2\n"
        assert host.does(*(changed if one is wrong else one for one in ALL)) == []

    def test_files_can_be_read_by_all_and_are_no_links(self, host):
        host.does(SERVICE)
        path = host.root / "units/a.service"
        path.chmod(0o600)
        assert host.does(SERVICE) == ["a.service written", "daemon-reload", "a.service restarted"]
        assert path.stat().st_mode & 0o7777 == 0o644 and path.stat().st_uid == os.geteuid()
        path.rename(host.root / "elsewhere")
        path.symlink_to(host.root / "elsewhere")
        assert host.does(SERVICE)[0] == "a.service written"
        assert not path.is_symlink() and (host.root / "elsewhere").read_text() == "1\n"

    def test_what_it_reads_is_looked_at_in_all_its_depth(self, host):
        deep = host.write("folder/in/it", "1")
        file = host.write("file", "1")
        reads = [str(host.root / name) for name in ("file", "folder", "missing")]
        reader = unit("a.service", reads=reads)
        assert "a.service started" in host.does(reader, TIMER)
        assert host.does(reader, TIMER) == []
        for change in (
            lambda: file.write_text("2"),
            lambda: file.chmod(0o600),
            lambda: deep.write_text("2"),
            deep.unlink,
            lambda: host.write("missing", "1"),
        ):
            time.sleep(0.02)
            change()
            assert host.does(reader, TIMER) == ["a.service restarted"]
            assert host.does(reader, TIMER) == []
        file.unlink()
        assert host.does(reader, TIMER) == []

    @pytest.mark.parametrize(("one", "file"), [(SERVICE, "a.service"), (TIMER, "b.service"), (PATH, "c.service")])
    def test_an_interrupted_run_is_completed(self, host, one, file):
        host.does(one)
        changed = {**one, "files": {**one["files"], file: "2\n"}}
        host.write(f"units/{file}", "2\n")
        assert host.does(changed) == ["daemon-reload", f"{one['name']} restarted"]
        host.write(f"units/{file}", "3\n")
        host.state(file, read="3\n")  # it was reloaded, and no more
        assert host.does({**one, "files": {**one["files"], file: "3\n"}}) == [f"{one['name']} restarted"]

    def test_what_was_stopped_or_disabled_or_has_failed_comes_back(self, host):
        host.does(SERVICE, TIMER, PATH)
        host.state("a.service", active="failed")
        host.state("b.timer", active="inactive")
        host.state("c.path", enabled=False)
        assert host.does(SERVICE, TIMER, PATH) == [
            "c.path enabled",
            "daemon-reload",
            "a.service started",
            "b.timer started",
        ]
        assert host.calls() == ["enable --no-reload c.path", "daemon-reload", "restart a.service", "restart b.timer"]

    def test_what_systemd_still_knows_of_a_removed_unit_does_not_count(self, host):
        """That it was enabled, where a removal was interrupted before systemd reloaded."""
        host.state("a.service", active="active", read="0\n", known=True)
        assert "a.service enabled" in host.does(SERVICE) and host.state("a.service")["enabled"]

    def test_one_that_is_starting_may_have_read_something_older(self, host):
        host.does(SERVICE)
        host.state("a.service", active="activating")
        assert host.does(SERVICE) == ["a.service started"] and host.calls() == ["restart a.service"]


class TestSocket:
    def test_it_is_started_where_its_service_runs_already(self, host):
        host.does(SERVED)
        assert host.does(SOCKET)[-2:] == ["d.socket started", "d.service restarted"]
        assert host.calls()[-3:] == ["stop d.socket d.service", "start d.socket", "start d.service"]
        assert host.does(SOCKET, SERVED) == []

    def test_a_changed_one_is_started_again_with_what_needs_it(self, host):
        host.does(SOCKET, SERVED, POLL)
        changed = unit("d.socket", text="2")
        assert host.does(changed, SERVED, POLL) == [
            *("d.socket written", "daemon-reload", "d.socket restarted", "d.service restarted", "e.service started"),
        ]
        assert host.state("d.socket")["runs"] == "2\n"

    def test_its_service_stays_stopped_if_it_was(self, host):
        host.write("units/d.service", "1\n")
        host.does(SOCKET)
        assert host.does(unit("d.socket", text="2"))[-1] == "d.socket restarted"
        assert host.state("d.service")["active"] == "inactive"

    def test_the_service_may_have_another_name(self, host):
        host.does(SERVICE)
        other = unit("f.socket", text="[Socket]\nService=a.service")
        assert host.does(other)[-2:] == ["f.socket started", "a.service restarted"]

    @pytest.mark.parametrize("reads", [False, True])
    def test_a_changed_service_leaves_its_socket_alone(self, host, reads):
        """So that whoever connects meanwhile only waits."""
        file = host.write("read", "1")
        one = unit("d.socket", "d.service", reads=[str(file)])
        host.does(one)
        (file if reads else host.write("units/d.service", "1\n")).write_text("1\n")
        assert host.does(one) == []  # it starts with what is written
        host.does(SERVED)
        time.sleep(0.02)
        (file if reads else host.root / "units/d.service").write_text("1\n")
        assert host.does(one) == ["d.service restarted"] and host.calls() == ["restart d.service"]
        assert host.does(one) == []


class TestAbsent:
    def test_it_is_removed_before_others_are_started(self, host):
        for name in OLD["files"]:
            host.write(f"units/{name}", "1\n")
        host.state("old.timer", active="active", enabled=True, read="1\n")
        host.state("old.service", active="failed", read="1\n")
        result = host.run(SERVICE, absent=[OLD])
        assert host.calls() == [
            *("disable old.timer", "stop old.timer", "reset-failed old.service"),
            *("daemon-reload", "enable --no-reload a.service", "daemon-reload", "restart a.service"),
        ]
        assert result["actions"][:3] == ["old.timer removed", "a.service written", "daemon-reload"]
        assert [(one["before"], one["after"]) for one in result["diff"]] == [("1\n", ""), ("1\n", ""), ("", "1\n")]
        assert result["diff"][0]["before_header"] == result["diff"][0]["after_header"]
        assert host.there() == {"a.service"} and not host.state("old.timer")["enabled"]
        assert [host.state(name)["active"] for name in OLD["files"]] == ["inactive", "inactive"]
        assert host.does(SERVICE, absent=[OLD]) == [] and host.asked() == 1

    @pytest.mark.parametrize("active", ["active", "activating"])
    def test_what_it_has_started_is_stopped_after_it(self, host, active):
        for name in OLD["files"]:
            host.write(f"units/{name}", "1\n")
            host.state(name, active=active, read="1\n")
        assert host.does(absent=[OLD]) == ["old.timer removed", "daemon-reload"]
        assert host.calls() == ["disable old.timer", "stop old.timer", "stop old.service", "daemon-reload"]

    @pytest.mark.parametrize("left", OLD["files"])
    def test_an_interrupted_removal_is_completed(self, host, left):
        host.write(f"units/{left}", "1\n")
        assert host.does(absent=[OLD]) == ["old.timer removed", "daemon-reload"]
        assert host.there() == set() and host.does(absent=[OLD]) == []

    def test_one_whose_files_are_gone_is_stopped(self, host):
        """And systemd told so, if only that was left to do."""
        host.state("old.service", active="active", read="1\n")
        assert host.does(absent=[OLD]) == ["old.timer removed", "daemon-reload"]
        assert host.calls() == ["stop old.service", "daemon-reload"]
        host.state("old.service", read="1\n")
        assert host.does(absent=[OLD]) == ["daemon-reload"]

    def test_one_that_never_was_there_costs_nothing(self, host):
        assert host.does(absent=[OLD]) == []
        assert (host.calls(), host.asked()) == ([], 1)


class TestCheckMode:
    @staticmethod
    def compare(host: Host, *units: dict[str, Any], absent: Any = ()) -> None:
        """It says the same as a run does, and changes nothing."""
        kept = {name: (host.root / "units" / name).read_text() for name in host.there()}
        before = {name: one["active"] for name, one in host.systemd.state.items()}
        checked = host.run(*units, absent=absent, check=True)
        assert (host.calls(), host.asked()) == ([], 1)
        assert {name: (host.root / "units" / name).read_text() for name in host.there()} == kept
        assert {name: host.state(name)["active"] for name in before} == before
        done = host.run(*units, absent=absent)
        assert {key: checked[key] for key in ("changed", "actions", "diff")} == {
            key: done[key] for key in ("changed", "actions", "diff")
        }

    def test_of_a_host_without_any(self, host):
        self.compare(host, *ALL, absent=[OLD])

    def test_of_one_that_is_as_it_should_be(self, host):
        host.does(*ALL)
        self.compare(host, *ALL, absent=[OLD])

    def test_of_changes(self, host):
        host.does(*ALL)
        for name in OLD["files"]:
            host.write(f"units/{name}", "1\n")
        host.state("old.timer", active="active", read="1\n")
        socket, served = unit("d.socket", text="2"), unit("d.service", text="2")
        self.compare(host, SERVICE, unit("b.timer", "b.service", text="2"), socket, served, absent=[OLD])

    def test_nothing_is_waited_for(self, host):
        assert host.does(unit("a.service", wait_for=str(host.root / "listens")), check=True)[-1] == "a.service started"


class TestFailures:
    @pytest.mark.parametrize(
        ("verb", "words"),
        [
            (
                "restart",
                "systemctl restart a.service failed: Job failed. See journalctl.; look at: journalctl -u a.service",
            ),
            (
                "enable",
                "systemctl enable --no-reload a.service failed: Job failed. See journalctl.; "
                "look at: journalctl -u a.service",
            ),
            ("daemon-reload", "systemctl daemon-reload failed: Job failed. See journalctl."),
        ],
    )
    def test_a_call_that_fails_is_told(self, host, verb, words):
        host.systemd.fails = verb
        result = host.run(SERVICE)
        assert (result["failed"], result["msg"]) == (True, words)
        assert [one["after"] for one in result["diff"]] == ["1\n"]
        assert result["actions"][0] == "a.service written" and "a.service started" not in result["actions"]
        host.systemd.fails = ""
        assert host.does(SERVICE)[-1] == "a.service started"

    def test_a_systemd_that_does_not_answer_is_told(self, host):
        host.systemd.fails = "show"
        result = host.run(SERVICE, check=True)
        assert result["msg"].startswith("systemctl show --timestamp") and result["msg"].endswith("See journalctl.")

    def test_a_file_that_cannot_be_written_is_told(self, host):
        (host.root / "units/a.service").mkdir()
        result = host.run(SERVICE)
        assert result["failed"] and "a.service" in result["msg"] and str(host.root / "units") in result["msg"]
        assert host.calls() == []


class TestWaiting:
    @pytest.fixture
    def path(self, tmp_path) -> Path:
        return tmp_path / "listens"

    @staticmethod
    def listen(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))

    def test_for_a_socket_that_does_not_come(self, host, path, monkeypatch):
        monkeypatch.setattr(systemd_units, "PATIENCE", 0.3)
        one = unit("a.service", wait_for=str(path))
        words = (
            f"after 0.3 s a.service is active, and the socket {path} does not exist; look at: journalctl -u a.service"
        )
        path.touch()  # which is no socket
        for actions in (["a.service written", "a.service enabled", "daemon-reload", "a.service started"], []):
            result = host.run(one)
            assert (result["msg"], result["actions"]) == (words, actions)

    def test_until_the_socket_is_there_and_the_unit_is_active(self, host, path, monkeypatch):
        host.systemd.becomes = "activating"
        later = [lambda: self.listen(path), lambda: None, lambda: host.state("a.service", active="active")]
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: later.pop(0)())
        monkeypatch.setattr(systemd_units, "time", clock)
        one = unit("a.service", wait_for=str(path))
        assert host.does(one)[-1] == "a.service started" and later == []
        assert host.does(one) == [] and host.asked() == 1

    def test_for_a_unit_that_does_not_become_active(self, host, path, monkeypatch):
        """The socket may be left from before."""
        monkeypatch.setattr(systemd_units, "PATIENCE", 0.3)
        self.listen(path)
        host.systemd.becomes = "failed"
        result = host.run(unit("a.service", wait_for=str(path)))
        assert f"a.service is failed, and the socket {path} exists" in result["msg"]

#!/usr/bin/python
"""Ansible module: systemd units that belong together, written, started and stopped in one step.

ansible.builtin.template and ansible.builtin.systemd_service take half a second or more for each file and unit, and
restart only what the same run has changed: an interrupted run would leave units with what was written before.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: systemd_units
short_description: Write, start and stop systemd units
description:
  - Stops and removes units, writes the files of others into /etc/systemd/system, and starts these now and at boot.
  - A unit that runs is restarted if something that it runs by has changed since it became active, whoever changed it.
    So what an interrupted run has left is completed by the next one.
  - Where nothing is to change, systemctl is called once.
options:
  files:
    description: Names and contents of the unit files in /etc/systemd/system of all units that are to run.
    type: dict
    required: true
  units:
    description: >-
      The units, in the order in which they are started. Those that are absent are stopped and removed before others are
      written or started.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description:
          - The unit that is enabled and started, or stopped and disabled.
          - A socket is restarted only if its own file has changed, together with its service. If the service runs by
            other O(units[].files) or O(units[].reads), only the service is restarted, while connections wait.
        type: str
        required: true
      files:
        description: >-
          Names of its unit files: its own, and for example that of the service that a timer starts.
        type: list
        elements: str
        required: true
      state:
        description: Whether it is to run, or not to be there.
        type: str
        choices: [started, absent]
        default: started
      reads:
        description: >-
          Files, and folders with all in them, that the unit reads only when it starts. Those that do not exist do not
          count.
        type: list
        elements: path
        default: []
      wait_for:
        description: A socket; waits up to 180 seconds until it exists and the unit is active.
        type: path
author: The Zulip email gateway maintainers
"""

EXAMPLES = r"""
- name: Run a service behind its socket, and no longer by a timer
  systemd_units:
    files:
      example.socket: "{{ lookup('ansible.builtin.template', 'example.socket.j2') }}"
      example.service: "{{ lookup('ansible.builtin.template', 'example.service.j2') }}"
    units:
      - name: example.timer
        files: [example.timer, example-once.service]
        state: absent
      - name: example.socket
        files: [example.socket]
      - name: example.service
        files: [example.service]
        reads: [/etc/example.conf, /usr/local/lib/example]
"""

RETURN = r"""
actions:
  description: What was done, or in check mode would be; also where the module fails.
  type: list
  elements: str
  returned: always
  sample: [example.timer removed, example.service written, daemon-reload, example.service restarted]
"""

UNITS = Path("/etc/systemd/system")
# Seconds. rspamd compiles the list of domains at its first start, which takes a busy host long.
PATIENCE = 180.0
PROPERTIES = "ActiveState,UnitFileState,ActiveEnterTimestamp,NeedDaemonReload"
# For static and indirect ones there is nothing to enable.
ENABLED = ("enabled", "static", "indirect")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Failed(Exception):
    """What could not be done, and where to look."""


class State(NamedTuple):
    """What systemd knows of a unit; since: when it became active, in nanoseconds since 1970."""

    active: str
    enabled: bool
    since: float
    stale: bool

    @classmethod
    def of(cls, text: str) -> State:
        """By PROPERTIES as systemctl show --timestamp=us+utc prints them, with "Fri 1999-12-31 23:59:59.000000 UTC"."""
        told = dict(line.split("=", 1) for line in text.splitlines())
        since = 0
        if found := re.search(r"\d{4}-\d\d-\d\d [\d:.]+", told["ActiveEnterTimestamp"]):
            moment = datetime.strptime(f"{found[0]} +0000", "%Y-%m-%d %H:%M:%S.%f %z")
            since = (moment - EPOCH) // timedelta(microseconds=1) * 1000
        return cls(told["ActiveState"], told["UnitFileState"] in ENABLED, since, told["NeedDaemonReload"] == "yes")

    @property
    def runs(self) -> bool:
        """As systemctl is-active says."""
        return self.active in ("active", "reloading")

    @property
    def stopped(self) -> bool:
        return self.active in ("inactive", "failed")


def is_right(path: Path, content: str) -> bool:
    """Whether a file has this content, whoever runs this (root) as its owner, and mode 0644."""
    if not path.is_file() or path.is_symlink():
        return False
    status = path.stat()
    found = (status.st_mode & 0o7777, status.st_uid, status.st_gid, path.read_bytes())
    return found == (0o644, os.geteuid(), os.getegid(), content.encode())


def difference(path: Path, content: str) -> dict[str, str]:
    """For --diff."""
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {"before_header": str(path), "after_header": str(path), "before": before, "after": content}


def tree(path: Path) -> Iterator[Path]:
    """A path and, if it is a folder, all that is in it."""
    yield path
    for folder, folders, files in os.walk(path):
        yield from (Path(folder, name) for name in folders + files)


def service_of(socket: str, files: dict[str, str]) -> str:
    """The service that a socket starts (systemd.socket(5))."""
    found = re.search(r"^Service=(\S+)", files.get(socket, ""), re.MULTILINE)
    return found[1] if found else f"{socket.removesuffix('.socket')}.service"


class Run:
    """One run of the module; actions and diff are what it has done so far, or in check mode would have done."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module = module
        self._files: dict[str, str] = module.params["files"]
        self._units: list[dict[str, Any]] = [one for one in module.params["units"] if one["state"] == "started"]
        self._absent: list[dict[str, Any]] = [one for one in module.params["units"] if one["state"] == "absent"]
        services = [service_of(one["name"], self._files) for one in self._units if one["name"].endswith(".socket")]
        named = [unit for one in self._absent + self._units for unit in (one["name"], *one["files"])]
        self._names = list(dict.fromkeys(named + services))
        self._states: dict[str, State] = {}
        # What check mode has not written counts as changed.
        self._unwritten: set[Path] = set()
        self.actions: list[str] = []
        self.diff: list[dict[str, str]] = []

    def apply(self) -> None:
        """Everything, in its order; raises Failed and OSError."""
        for one in self._absent:
            self._remove(one["name"], one["files"])
        for one in self._units:
            for file in one["files"]:
                self._write(UNITS / file, self._files[file])
        # Until it reloads, systemd goes by what it has read of a unit, also of whether that is enabled. An earlier run
        # may have been interrupted before it.
        stale = any(self._state(unit).stale for unit in self._names)
        if stale:
            self._reload()
        disabled = [one["name"] for one in self._units if not self._state(one["name"]).enabled]
        if disabled:
            self._systemctl("enable", *disabled)
            self.actions += [f"{unit} enabled" for unit in disabled]
        if disabled or (self.diff and not stale):
            self._reload()
        for one in self._units:
            paths = [*(UNITS / file for file in one["files"]), *map(Path, one["reads"])]
            if one["name"].endswith(".socket"):
                self._keep_socket(one["name"], service_of(one["name"], self._files), paths)
            elif not self._state(one["name"]).runs or self._is_older(one["name"], paths):
                self._restart(one["name"])
            if one["wait_for"] and not self._module.check_mode:
                self._wait(one["name"], Path(one["wait_for"]))

    def _reload(self) -> None:
        self._systemctl("daemon-reload")
        self.actions.append("daemon-reload")

    def _remove(self, name: str, files: list[str]) -> None:
        units = list(dict.fromkeys([name, *files]))
        there = [UNITS / unit for unit in units if os.path.lexists(UNITS / unit)]
        if not there and all(self._state(unit).active == "inactive" for unit in units):
            return
        if UNITS / name in there:
            self._systemctl("disable", name)
        # One after the other: the first one would start the others.
        for unit in units:
            if not self._state(unit).stopped:
                self._systemctl("stop", unit)
        # One that has failed would be listed on without its file.
        failed = [unit for unit in units if self._state(unit).active == "failed"]
        if failed:
            self._systemctl("reset-failed", *failed)
        for path in there:
            self.diff.append(difference(path, ""))
            if not self._module.check_mode:
                path.unlink()
        self.actions.append(f"{name} removed")

    def _write(self, path: Path, content: str) -> None:
        if is_right(path, content):
            return
        self.diff.append(difference(path, content))
        if self._module.check_mode:
            self._unwritten.add(path)
        else:
            # systemd takes no file with such a name for a unit's.
            draft = path.with_name(path.name + ".new")
            draft.write_bytes(content.encode())
            draft.chmod(0o644)
            draft.replace(path)
        self.actions.append(f"{path.name} written")

    def _is_older(self, unit: str, paths: list[Path]) -> bool:
        """Whether something in these paths has changed since a unit became active."""
        since = self._state(unit).since
        return any(self._changed(path) > since for top in paths for path in tree(top))

    def _changed(self, path: Path) -> float:
        """When a file was last changed, in nanoseconds since 1970; 0 if there is none."""
        if path in self._unwritten:
            return math.inf
        try:
            return path.lstat().st_ctime_ns
        except FileNotFoundError:
            return 0

    def _restart(self, unit: str) -> None:
        """Also starts one that does not run; and one that is just starting may have read something older."""
        done = "restarted" if self._state(unit).runs else "started"
        self._systemctl("restart", unit)
        self.actions.append(f"{unit} {done}")

    def _keep_socket(self, socket: str, service: str, paths: list[Path]) -> None:
        """systemd does not start a socket whose service runs, and a service takes over sockets only when it starts."""
        if not self._state(socket).runs or self._is_older(socket, [UNITS / socket]):
            done = "restarted" if self._state(socket).runs else "started"
            served = not self._state(service).stopped
            if served or not self._state(socket).stopped:
                # Together, so that no connection starts the service in between.
                self._systemctl("stop", socket, service)
            self._systemctl("start", socket)
            self.actions.append(f"{socket} {done}")
            if served:
                self._systemctl("start", service)
                self.actions.append(f"{service} restarted")
        # Connections wait in the socket meanwhile; one that does not run will start with what is written.
        if self._state(service).runs and self._is_older(service, paths):
            self._restart(service)

    def _wait(self, unit: str, socket: Path) -> None:
        end = time.monotonic() + PATIENCE
        while not (socket.is_socket() and self._state(unit).runs):
            if time.monotonic() > end:
                raise Failed(
                    f"after {PATIENCE:g} s {unit} is {self._state(unit).active}, and the socket {socket} "
                    f"{'exists' if socket.is_socket() else 'does not exist'}; look at: journalctl -u {unit}"
                )
            time.sleep(0.1)
            self._states.clear()

    def _state(self, unit: str) -> State:
        if not self._states:
            # Of all at once, in the order of the names, with an empty line between them.
            told = self._run("show", "--timestamp=us+utc", f"--property={PROPERTIES}", *self._names)
            self._states = dict(zip(self._names, map(State.of, told.strip().split("\n\n")), strict=True))
        return self._states[unit]

    def _systemctl(self, verb: str, *units: str) -> None:
        """Have systemd change something, unless in check mode."""
        if self._module.check_mode:
            if verb in ("start", "restart"):
                for unit in units:
                    self._states[unit] = self._state(unit)._replace(active="active", since=math.inf)
            return
        # Units that need these are stopped and restarted with them.
        self._states.clear()
        # That reloads all units as well, which is about to be done anyway: with each reload Postfix's generator runs,
        # and takes a second to fail while there is no main.cf.
        self._run(verb, *(["--no-reload"] if verb == "enable" else []), units=units)

    def _run(self, *arguments: str, units: tuple[str, ...] = ()) -> str:
        """What systemctl prints; raises Failed, with the journal of these units."""
        command = ["systemctl", *arguments, *units]
        status, out, err = self._module.run_command(command)
        if status:
            journal = "; look at: journalctl" + "".join(f" -u {unit}" for unit in units) if units else ""
            raise Failed(f"{' '.join(command)} failed: {(err or out).strip()}{journal}")
        return str(out)


def main() -> None:
    unit = {
        "name": {"type": "str", "required": True},
        "files": {"type": "list", "elements": "str", "required": True},
        "state": {"type": "str", "choices": ["started", "absent"], "default": "started"},
        "reads": {"type": "list", "elements": "path", "default": []},
        "wait_for": {"type": "path"},
    }
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "dict", "required": True},
            "units": {"type": "list", "elements": "dict", "required": True, "options": unit},
        },
        supports_check_mode=True,
    )
    run = Run(module)
    try:
        run.apply()
    except Failed as error:
        module.fail_json(msg=str(error), actions=run.actions, diff=run.diff)
    except OSError as error:
        module.fail_json(msg=f"cannot put the unit files into {UNITS}: {error}", actions=run.actions, diff=run.diff)
    module.exit_json(changed=bool(run.actions), actions=run.actions, diff=run.diff)


if __name__ == "__main__":
    main()

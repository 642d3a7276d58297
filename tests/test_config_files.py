"""config_files: all or none, with owner and mode, and no secret that shows."""

from __future__ import annotations

import grp
import io
import json
import os
import pwd
import stat
import sys
import time
from pathlib import Path
from typing import Any

import config_files
import pytest
from ansible.module_utils import basic

ME = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The module as Ansible runs it, on files below tmp_path that belong to whoever runs the tests."""

    def run(check: bool = False, modes: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
        paths = [*options.get("files", {}), *options.get("secrets", {}), *options.get("folders", [])]
        paths += [options["checksums"]] if "checksums" in options else []
        access = {path: ME | ({"mode": modes[path]} if path in (modes or {}) else {}) for path in paths}
        given = options | {"access": access, "_ansible_check_mode": check, "_ansible_diff": True}
        given |= {"_ansible_remote_tmp": str(tmp_path), "_ansible_keep_remote_files": False}
        monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": given}).encode())
        monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy", raising=False)
        monkeypatch.setattr(sys, "stdout", out := io.StringIO())
        with pytest.raises(SystemExit):
            config_files.main()
        return dict(json.loads(out.getvalue()))

    return run


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_missing_is_written_and_a_second_run_changes_nothing(run, tmp_path):
    folder, file, secret = tmp_path / "etc", tmp_path / "etc/a.conf", tmp_path / "etc/secret"
    old = tmp_path / "old"
    old.touch()
    options = {
        "folders": [str(folder)],
        "files": {str(file): "a = 1\n"},
        "secrets": {str(secret): "s3cret\n"},
        "absent": [str(old)],
        "modes": {str(folder): "0750"},
    }
    done = run(**options)
    assert done["changed"] and sorted(done["replaced"]) == sorted(map(str, (file, secret)))
    assert (file.read_text(), secret.read_text(), old.exists()) == ("a = 1\n", "s3cret\n", False)
    assert (mode(folder), mode(file), mode(secret)) == (0o750, 0o644, 0o600)
    assert {path.name for path in folder.iterdir()} == {"a.conf", "secret"}
    again = run(**options)
    assert (again["changed"], again["replaced"], again["diff"]) == (False, [], [])


def test_a_secret_never_shows(run, tmp_path):
    """Neither the former one nor the new one, also where a file has the same text."""
    (tmp_path / "secret").write_text("former\n")
    done = run(secrets={str(tmp_path / "secret"): "s3cret\n"}, files={str(tmp_path / "a"): "x\n"})
    assert (tmp_path / "secret").read_text() == "s3cret\n"
    assert "s3cret" not in json.dumps(done) and "former" not in json.dumps(done)
    assert [part["after"] for part in done["diff"]] == ["x\n"]


def test_check_mode_says_what_it_would_do(run, tmp_path):
    (tmp_path / "a").write_text("former\n")
    (tmp_path / "old").touch()
    options = {"files": {str(tmp_path / name): "new\n" for name in "ab"}, "absent": [str(tmp_path / "old")]}
    done = run(check=True, folders=[str(tmp_path / "etc")], **options)
    assert done["changed"] and sorted(path.name for path in tmp_path.iterdir()) == ["a", "old"]
    assert (tmp_path / "a").read_text() == "former\n"
    assert [(part["before"], part["after"]) for part in done["diff"][:2]] == [("former\n", "new\n"), ("", "new\n")]
    assert {part["before_header"] for part in done["diff"] if part["after"] == ""} == {str(tmp_path / "old")}


def test_a_configuration_that_is_wrong_replaces_nothing(run, tmp_path):
    (tmp_path / "a").write_text("good\n")
    validate = 'if grep -q bad "$1"/*; then echo "a is bad" >&2; exit 1; fi'
    options = {"folders": [str(tmp_path / "etc")], "secrets": {str(tmp_path / "s"): "s3cret"}, "validate": validate}
    done = run(files={str(tmp_path / "b"): "good\n", str(tmp_path / "a"): "bad\n"}, **options)
    assert done["failed"] and done["msg"] == "the new configuration is wrong, nothing was replaced: a is bad"
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "good\n"
    assert run(files={str(tmp_path / "a"): "better\n"}, validate=validate)["replaced"] == [str(tmp_path / "a")]


def test_postfix_believes_a_file_at_once(run, tmp_path):
    """What looks younger than two seconds it reads again and again until it does not (load_file.c, dict.c)."""
    validate = """find "$1" -type f -newermt '-2 seconds' | grep -q . && exit 1; exit 0"""
    assert run(files={str(tmp_path / "a"): "x\n"}, validate=validate)["replaced"] == [str(tmp_path / "a")]
    assert (tmp_path / "a").stat().st_mtime <= time.time() - 2


@pytest.mark.parametrize("there", ["another mode", "a link", "a dangling link", "a draft"])
def test_what_is_not_as_it_should_be_is_put_right(run, tmp_path, there):
    file, other = tmp_path / "etc/a", tmp_path / "other"
    (tmp_path / "etc").mkdir()
    other.write_text("x\n")
    if there == "another mode":
        file.write_text("x\n")
        file.chmod(0o600)
    elif there == "a draft":  # of a run that was interrupted
        (tmp_path / "etc/.a.new").write_text("half of")
    else:
        file.symlink_to(other if there == "a link" else "nowhere")
    assert run(files={str(file): "x\n"})["replaced"] == [str(file)]
    assert (file.is_symlink(), file.read_text(), mode(file)) == (False, "x\n", 0o644)
    assert [path.name for path in (tmp_path / "etc").iterdir()] == ["a"] and other.read_text() == "x\n"


def test_a_folders_access_is_put_right(run, tmp_path):
    (tmp_path / "state").mkdir(mode=0o755)
    options = {"folders": [str(tmp_path / "state")], "modes": {str(tmp_path / "state"): "0700"}}
    assert run(**options)["changed"] and mode(tmp_path / "state") == 0o700
    assert not run(**options)["changed"]


def test_the_checksums_are_those_of_the_files(run, tmp_path):
    sums = tmp_path / "sums"
    options = {"files": {str(tmp_path / "a"): "x\n"}, "secrets": {str(tmp_path / "s"): "y\n"}, "checksums": str(sums)}
    assert run(**options)["replaced"][-1] == str(sums)
    assert sums.read_text() == f"73cb3858a687a8494ca3323053016282f3dad39d42cf62ca4e79dda2aac7d9ac  {tmp_path}/a\n"
    (tmp_path / "a").write_text("z\n")
    assert run(**options)["replaced"] == [str(tmp_path / "a")]


def test_what_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "a").mkdir()
    done = run(files={str(tmp_path / "a"): "x\n"})
    assert done["failed"] and "cannot write" in done["msg"] and "directory" in done["msg"]


def test_a_full_disk_is_told_with_the_file_and_leaves_no_draft(run, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(config_files.Access, "apply", full)
    done = run(secrets={str(tmp_path / "secret"): "s3cret\n"})
    assert done["msg"] == f"cannot write {tmp_path}/secret: No space left on device"
    assert list(tmp_path.iterdir()) == []

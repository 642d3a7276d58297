"""The machine that runs Ansible: any folder, ansible-core alone, a role that was copied.

With older versions of ansible-core: the scenario servers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

PROJECT = Path(__file__).parents[1]


def ansible(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """ansible-playbook in a folder that has nothing of the project's, on this machine itself."""
    (folder / "hosts").write_text("[zulip]\nlocalhost ansible_connection=local\n")
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(folder),
        "LC_ALL": "C.UTF-8",
        "ANSIBLE_NOCOLOR": "1",
    }
    return subprocess.run(
        (str(Path(sys.executable).with_name("ansible-playbook")), "-i", "hosts", *arguments),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_from_any_folder(tmp_path):
    """Without ansible.cfg, which Ansible looks for where it is called."""
    done = ansible(tmp_path, "--syntax-check", str(PROJECT / "playbooks/doctor.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    variables = ("-e", '{"zulip_puppet_classes": "zulip::postfix_localmail", "ansible_become": false}')
    done = ansible(tmp_path, *variables, str(PROJECT / "playbooks/site.yml"))
    assert "there is no Zulip on this host" in done.stdout, done.stdout + done.stderr
    assert re.search(r"changed=0 .*failed=1 ", done.stdout)


def test_a_role_that_was_copied_alone_says_so(tmp_path):
    """As cp -r copies it: with links that lead nowhere."""
    shutil.copytree(PROJECT / "roles/email_gateway", tmp_path / "roles/email_gateway", symlinks=True)
    play = [{"hosts": "zulip", "gather_facts": False, "roles": ["email_gateway"]}]
    (tmp_path / "own.yml").write_text(yaml.safe_dump(play))
    done = ansible(tmp_path, "-e", "zulip_puppet_classes=zulip::postfix_localmail", "own.yml")
    assert "zulip-email-gateway does not exist on the machine that runs Ansible" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "cp -RL" in done.stdout and re.search(r"changed=0 .*failed=1 ", done.stdout)


def test_a_role_that_was_copied_with_what_it_needs(tmp_path):
    shutil.copytree(PROJECT / "roles", tmp_path / "roles")
    assert (tmp_path / "roles/email_gateway/files/email_gateway/zulip-email-gateway").is_file()
    play = [{"hosts": "zulip", "gather_facts": False, "roles": ["email_gateway"]}]
    (tmp_path / "own.yml").write_text(yaml.safe_dump(play))
    done = ansible(tmp_path, "-e", "zulip_puppet_classes=zulip::postfix_localmail", "own.yml")
    assert "there is no Zulip on this host" in done.stdout, done.stdout + done.stderr


def test_the_execution_environment_can_be_built(tmp_path):
    """As far as without a registry of images."""
    builder = Path(sys.executable).with_name("ansible-builder")
    definition = str(PROJECT / "execution-environment.yml")
    command = (str(builder), "create", "--file", definition, "--context", str(tmp_path / "context"))
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert "dnspython" in (tmp_path / "context/_build/requirements.txt").read_text()


def test_roles_and_playbooks_use_the_collections_plugins():
    """Ansible looks for those of a collection in plugins/, and for a role's beside its tasks."""
    links = {
        "roles/email_gateway/library": "plugins/modules",
        "roles/email_gateway/action_plugins": "plugins/action",
        "roles/postfix_localmail/library": "plugins/modules",
        "playbooks/filter_plugins": "plugins/filter",
    }
    assert {path: (PROJECT / path).resolve() for path in links} == {a: PROJECT / b for a, b in links.items()}
    assert not any(path.is_symlink() for path in (PROJECT / "plugins").rglob("*"))


def test_every_script_is_run_by_its_interpreter():
    """Where it is copied to, nothing may be executable (noexec)."""
    for path in (PROJECT / "roles").glob("*/tasks/*.yml"):
        for task in yaml.safe_load(path.read_text()) or []:
            if "ansible.builtin.script" in task:
                assert task["ansible.builtin.script"]["executable"] == "/bin/sh", (path, task["name"])

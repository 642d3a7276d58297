"""The project as a collection, run by the newest ansible-core on the server itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cores
import pytest
import testhosts
from conftest import PROJECT, ZulipHost

COLLECTION = "zulip_email.gateway"
# By their full names, from a playbook of the operator's own.
OWN = f"""
- hosts: all
  become: true
  gather_facts: false
  vars_files: [{{{{ gateway }}}}/playbooks/vars/postfix.yml]
  tasks:
    - ansible.builtin.import_role: {{name: {COLLECTION}.email_gateway, tasks_from: preflight}}
    - ansible.builtin.import_role: {{name: {COLLECTION}.postfix_localmail, tasks_from: preflight}}
    - ansible.builtin.import_role: {{name: {COLLECTION}.email_gateway}}
    - ansible.builtin.import_role: {{name: {COLLECTION}.postfix_localmail}}
"""


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mx42")


@pytest.fixture(scope="module")
def tarball(tmp_path_factory) -> Path:
    """As ansible-galaxy builds it of a clone."""
    folder = tmp_path_factory.mktemp("collection")
    for command in (
        ("git", "clone", "--quiet", str(PROJECT), str(folder / "clone")),
        ("ansible-galaxy", "collection", "build", str(folder / "clone"), "--output-path", str(folder)),
    ):
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
    [built] = folder.glob("*.tar.gz")
    return built


def ansible(mx: ZulipHost, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the newest ansible-core on the host itself, in a folder with nothing in it."""
    script = (
        "sh",
        "-c",
        'mkdir -p /root/empty && cd /root/empty && PYTHONPATH=/opt/core exec python3 -m ansible "$@"',
        "sh",
    )
    command = (*testhosts.inside(mx.container), "env", "LC_ALL=C.UTF-8", "ANSIBLE_NOCOLOR=1", *script, *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def play(mx: ZulipHost, playbook: str, *arguments: str) -> str:
    dns = testhosts.address(f"{mx.prefix}-outside")
    variables = f"email_gateway_mailname={mx.domain} email_gateway_dns_servers={dns}"
    classes = '{"zulip_puppet_classes": "zulip::postfix_localmail"}'
    mx.sh(f"printf '[zulip]\\n{mx.fqdn}\\n' > /root/hosts")
    here = ("-i", "/root/hosts", "-c", "local", "-e", variables, "-e", classes)
    done = ansible(mx, "playbook", *here, playbook, *arguments)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_installed_and_run_by_its_name(mx, tarball, subject):
    for source, target in ((cores.newest("3.13"), "/opt/core"), (tarball, "/root/collection.tar.gz")):
        testhosts.run("podman", "cp", str(source), f"{mx.container}:{target}")
    done = ansible(mx, "galaxy", "collection", "install", "--offline", "/root/collection.tar.gz")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ansible(mx, "playbook", "--version").stdout.startswith("ansible-playbook [core 2.2")
    play(mx, f"{COLLECTION}.site")
    assert "changed=0" in play(mx, f"{COLLECTION}.site")
    mx.send(mx.address(), subject=subject)
    mx.wait_for(subject)
    assert "Everything is right" in play(mx, f"{COLLECTION}.doctor")


def test_roles_by_their_full_names(mx):
    folder = "/root/.ansible/collections/ansible_collections/zulip_email/gateway"
    mx.write("/root/own.yml", OWN.replace("{{ gateway }}", folder))
    assert "changed=0" in play(mx, "/root/own.yml")


def test_what_is_in_it(tarball):
    names = subprocess.run(("tar", "tf", str(tarball)), check=True, capture_output=True, text=True).stdout.splitlines()
    for needed in (
        "roles/email_gateway/tasks/main.yml",
        "files/email_gateway/zulip-email-gateway",
        "playbooks/site.yml",
    ):
        assert needed in names
    tops = {name.partition("/")[0] for name in names}
    assert not tops & {"molecule", "tests", "bench", ".ci", "Makefile"} and "LICENSE" in tops


def test_installed_from_the_repository(tmp_path):
    """By the oldest version."""
    command = (
        str(cores.older("2.17") / "ansible-galaxy"),
        "collection",
        "install",
        f"git+file://{PROJECT}",
        "-p",
        str(tmp_path),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    installed = tmp_path / "ansible_collections/zulip_email/gateway"
    assert (installed / "roles/email_gateway/files/email_gateway/zulip-email-gateway").is_file()
    assert (installed / "plugins/modules/zulip_info.py").is_file()

"""The roles' shell scripts, and the tasks behind them, without a host: a folder stands for its root,
and every command that would touch the host is a fake."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = Path(__file__).parents[1] / "roles"
# All that the scripts find of the real ones.
TOOLS = (
    *("basename", "cat", "cmp", "comm", "cut", "find", "grep", "mkdir", "mv", "paste", "rm", "sed", "sh", "sleep"),
    *("sort", "tail", "tar", "touch", "tr", "wc"),
)
MAIL = '{"queue_name": "deferred", "sender": "x@mail.example.com", "recipients": [{"address": "%s"}]}\n'


class Host:
    """A host whose root is a folder; `log` has the calls of its fake commands."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root / "log"
        (root / "bin").mkdir()
        self.log.touch()
        for tool in TOOLS:
            (root / "bin" / tool).symlink_to(str(shutil.which(tool)))

    def write(self, path: str, text: str = "") -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def fake(self, *names: str, does: str = "") -> None:
        for name in names:
            (self.root / "bin" / name).unlink(missing_ok=True)
            self.write(f"bin/{name}", f'#!/bin/sh\necho "{name} $*" >> {self.log}\n{does}\n').chmod(0o755)

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A script of a role ("ROLE/NAME"), its absolute paths moved below this root."""
        role, _, name = script.partition("/")
        text = (ROLES / role / "files" / name).read_text()
        moved = self.write(name, re.sub(r"(?<![\w/])/(?=(etc|usr|var)/)", f"{self.root}/", text))
        return subprocess.run(
            ["sh", str(moved), *arguments],
            env={"PATH": str(self.root / "bin")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def host(tmp_path) -> Host:
    return Host(tmp_path)


# What postqueue does, and its last words.
UNREADABLE = "echo 'postqueue: fatal: bad string length 0 < 1: \"x\\y\" =' >&2; exit 69"


class TestDrain:
    @pytest.fixture
    def mx(self, host: Host) -> Host:
        host.fake("postconf", does="[ $1 != -h ] || echo mail.example.com")
        host.fake("postfix", "systemctl", "sleep")
        return host

    @staticmethod
    def queue(mx: Host, *addresses: str) -> None:
        """One mail to each address, as postqueue(1) tells of it in JSON."""
        mx.write("queue", "".join(MAIL % address for address in addresses))
        mx.fake("postqueue", does=f"[ $1 != -j ] || {{ echo 'postqueue: warning: {{' >&2; cat {mx.root}/queue; }}")

    @pytest.mark.parametrize("argument", ["", "all"])
    def test_a_queue_that_cannot_be_read_is_not_empty(self, mx, argument):
        mx.fake("postqueue", does=UNREADABLE)
        done = mx.run("postfix_localmail/drain.sh", argument)
        assert done.returncode == 1
        assert "Postfix's queue cannot be read (postqueue ended with 69: postqueue: fatal: bad string" in done.stderr
        assert "run this again" in done.stderr and len(done.stderr.splitlines()) == 1
        assert done.stdout.splitlines() == ["port 25 is closed", "port 25 is open again"]
        assert mx.calls()[-2:] == ["postconf -e master_service_disable =", "postfix reload"]

    def test_nor_when_it_could_be_read_at_first(self, mx):
        self.queue(mx, "new@mail.example.com")
        mx.fake("sleep", does=f"printf '#!/bin/sh\\nexit 69' > {mx.root}/bin/postqueue")
        done = mx.run("postfix_localmail/drain.sh")
        assert done.returncode == 1 and "cannot be read (postqueue ended with 69" in done.stderr
        assert done.stdout.splitlines()[-1] == "port 25 is open again"

    @pytest.mark.parametrize(
        ("argument", "addresses", "left"),
        [
            ("", [], 0),
            ("", ["user@example.org"], 0),
            ("", ["user@example.org", "new@mail.example.com", "root@localhost", "mm1@MAIL.example.com"], 3),
            ("", [r"\"a, \\\"b\"@mail.example.com"], 1),
            ("", ["new@mail.example.com.example.org", "mail.example.com@example.org"], 0),
            ("all", [], 0),
            ("all", ["user@example.org", "new@mail.example.com"], 2),
        ],
    )
    def test_it_counts_the_mail_that_is_left(self, mx, argument, addresses, left):
        self.queue(mx, *addresses)
        done = mx.run("postfix_localmail/drain.sh", argument)
        assert done.returncode == bool(left)
        assert done.stderr.startswith(f"{left} mails still wait" if left else ""), done.stderr
        assert ("port 25 is open again" in done.stdout) == bool(left)

    def test_it_waits_until_the_queue_is_empty(self, mx):
        self.queue(mx, "new@mail.example.com")
        mx.fake("sleep", does=f": > {mx.root}/queue")
        done = mx.run("postfix_localmail/drain.sh", "all")
        assert (done.returncode, done.stdout.splitlines()) == (0, ["port 25 is closed"])
        assert mx.calls().count("sleep 1") == 1 and mx.calls().count("postqueue -f") == 1


class TestRestore:
    # What apt-get and dpkg do with Debian's package, whose postrm deletes the queue when it is purged.
    REMOVE = "case $* in *--simulate*) exit 0 ;; *postfix*) rm -f $root/usr/sbin/postfix ;; esac"
    PURGE = "case $* in *purge*postfix*) rm -rf $root/usr/sbin/postfix $root/var/spool/postfix ;; esac"

    @pytest.fixture
    def mx(self, host: Host) -> Host:
        """With Postfix, which was not there before."""
        root = f"root={host.root}; "
        host.fake("apt-get", does=root + f"{self.REMOVE}; {self.PURGE}")
        host.fake("dpkg", does=root + self.PURGE)
        host.fake("dpkg-query", does=f"case $* in *Conffiles*) {self.conffiles(host)} ;; *) {self.INSTALLED} ;; esac")
        host.fake("systemctl", "tar")
        host.write("usr/sbin/postfix").chmod(0o755)
        for name in ("main.cf", "postfix-files", "sasl/x"):
            host.write(f"etc/postfix/{name}")
        for name in ("packages", "active", "enabled"):
            host.write(f"before/{name}")
        for folder in ("incoming", "active", "deferred/1", "hold", "maildrop", "corrupt", "pid", "etc"):
            (host.root / "var/spool/postfix" / folder).mkdir(parents=True)
        host.write("var/spool/postfix/pid/master.pid")
        host.write("var/spool/postfix/etc/hosts")
        return host

    INSTALLED = "printf 'installed postfix\\n'"

    @staticmethod
    def conffiles(host: Host) -> str:
        """Known to dpkg until the package is purged."""
        told = f"printf '\\n {host.root}/etc/postfix/postfix-files 0123abc\\n'"
        return f"[ ! -e {host.root}/var/spool/postfix ] || {told}"

    @staticmethod
    def restore(mx: Host) -> subprocess.CompletedProcess[str]:
        return mx.run("postfix_localmail/restore.sh", str(mx.root / "before"))

    @staticmethod
    def files(mx: Host, folder: str) -> list[str]:
        return sorted(
            str(path.relative_to(mx.root / folder)) for path in (mx.root / folder).rglob("*") if path.is_file()
        )

    def test_without_mail_all_of_it_goes(self, mx):
        done = self.restore(mx)
        assert (done.returncode, done.stderr) == (0, "")
        left = [path for path in ("var/spool/postfix", "etc/postfix", "before") if (mx.root / path).exists()]
        assert left == [] and "queue" not in done.stdout

    @pytest.mark.parametrize("folder", ["incoming", "active", "deferred/1", "hold", "maildrop", "corrupt"])
    def test_a_queue_with_mail_in_it_stays(self, mx, folder):
        mail = mx.write(f"var/spool/postfix/{folder}/1ABC", "mail")
        done = self.restore(mx)
        assert done.returncode == 0, done.stderr
        assert mail.read_text() == "mail"
        assert "Mail is left in Postfix's queue" in done.stdout and "var/spool/postfix stays" in done.stdout
        # So that the package can be installed again.
        assert self.files(mx, "etc/postfix") == ["postfix-files"]
        assert not (mx.root / "before").exists() and not (mx.root / "usr/sbin/postfix").exists()

    def test_nor_goes_a_queue_that_cannot_be_looked_into(self, mx):
        mx.fake("find", does=f'case $1 in */spool/*) exit 1 ;; *) exec {shutil.which("find")} "$@" ;; esac')
        done = self.restore(mx)
        assert "Mail is left" in done.stdout and (mx.root / "var/spool/postfix/deferred").exists()

    def test_mail_that_comes_until_the_very_last(self, mx):
        """As from a cron job, while packages are being removed."""
        late = f"[ -e {mx.root}/usr/sbin/postfix ] && echo mail > {mx.root}/var/spool/postfix/maildrop/1ABC; "
        mx.fake("apt-get", does=f"root={mx.root}; {late} {self.REMOVE}; {self.PURGE}")
        assert "Mail is left" in self.restore(mx).stdout
        assert (mx.root / "var/spool/postfix/maildrop/1ABC").read_text() == "mail\n"

    def test_interrupted_between_removing_and_purging(self, mx):
        (mx.root / "usr/sbin/postfix").unlink()
        mx.fake("dpkg-query", does=f"case $* in *Conffiles*) {self.conffiles(mx)} ;; esac")
        assert self.restore(mx).returncode == 0
        assert not (mx.root / "var/spool/postfix").exists() and not (mx.root / "etc/postfix").exists()

    def test_a_postfix_that_was_there_before_keeps_everything(self, mx):
        mx.write("before/packages", "postfix\n")
        assert self.restore(mx).returncode == 0
        assert (mx.root / "var/spool/postfix").exists() and (mx.root / "usr/sbin/postfix").exists()
        assert not [call for call in mx.calls() if re.match(r"apt-get|dpkg --purge", call)]

    def test_without_a_list_of_packages_nothing_is_done(self, mx):
        mx.fake("dpkg-query", does="exit 2")
        assert self.restore(mx).returncode != 0
        assert (mx.root / "before").exists() and (mx.root / "etc/postfix/main.cf").exists()


def test_a_copy_without_the_list_of_packages_is_none(host):
    """All that is there would count as having come with Postfix."""
    host.fake("dpkg-query", does="exit 2")
    host.fake("tar", "systemctl", "find")
    assert host.run("postfix_localmail/back_up.sh", str(host.root / "before")).returncode != 0
    assert not (host.root / "before").exists()


def play(folder: Path, role: str, tasks: list[dict[str, Any]], hosts: dict[str, dict[str, object]]) -> dict[str, str]:
    """What Ansible says of each host after running tasks of a role: "" or why it stopped."""
    defaults = yaml.safe_load((ROLES / role / "defaults/main.yml").read_text())
    common = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "role_path": str(ROLES / role),
    }
    (folder / "inventory.json").write_text(json.dumps({"all": {"hosts": hosts, "vars": {**defaults, **common}}}))
    vars_files = sorted(str(path) for path in (ROLES / role / "vars/main").glob("*.yml"))
    plays = [{"hosts": "all", "gather_facts": False, "vars_files": vars_files, "tasks": tasks}]
    (folder / "play.json").write_text(json.dumps(plays))
    (folder / "templates").symlink_to(ROLES / role / "templates")
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-vvv", "-i", "inventory.json", "play.json"],
        cwd=folder,
        env={
            **os.environ,
            "ANSIBLE_LIBRARY": str(ROLES.parent / "plugins/modules"),
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "HOME": str(folder),
            "ANSIBLE_NOCOLOR": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    (folder / "out").write_text(done.stdout)
    assert re.search(r"^PLAY RECAP", done.stdout, re.MULTILINE), done.stdout + done.stderr
    said = dict.fromkeys(hosts, "")
    for name, text in re.findall(r"^fatal: \[(\w+)\]: FAILED! => (.*?^\})", done.stdout, re.MULTILINE | re.DOTALL):
        said[name] = str(json.loads(text)["msg"])
    return said


def tasks_of(role: str, file: str, words: str) -> list[dict[str, Any]]:
    """The tasks of a file, those whose names have these words."""
    tasks = yaml.safe_load((ROLES / role / "tasks" / file).read_text())
    return [task for task in tasks if re.search(words, task["name"])]


def test_an_unreadable_queue_stops_the_run_where_it_matters(tmp_path):
    # As postfix_info tells of another Postfix, on a host that has nothing else.
    host: dict[str, object] = dict.fromkeys(("ours", "has_backup", "installed", "configured"), True)
    host |= dict.fromkeys(
        ("port_25_holder", "other_mail_system", "relayhost", "network_fault", "certificate_fault"), ""
    )
    host |= {
        "ours": False,
        "has_program": True,
        "waiting": 0,
        "queue_fault": "postqueue ended with 69: postqueue: fatal: x",
    }
    wish = {"postfix_localmail_enabled": True, "postfix_localmail_adopt": True, "postfix_localmail_takeover": False}
    wish |= {"postfix_localmail_firewall": {"redirected": ""}, "__postfix_localmail_host": host}
    said = play(
        tmp_path,
        "postfix_localmail",
        tasks_of("postfix_localmail", "preflight.yml", "Stop if"),
        {
            "adopts": wish,
            "readable": {**wish, "__postfix_localmail_host": {**host, "queue_fault": ""}},
            "full": {**wish, "__postfix_localmail_host": {**host, "queue_fault": "", "waiting": 2}},
            "off": {**wish, "postfix_localmail_enabled": False},
            "takes": {**wish, "postfix_localmail_takeover": True},
            "leaves": {**wish, "postfix_localmail_adopt": False},
        },
    )
    assert {name for name, text in said.items() if text} == {"adopts", "full"}
    assert "mail system on adopts that" in said["adopts"] and "postqueue: fatal: x. Mend it" in said["adopts"]
    assert "2 mails wait" in said["full"]


def test_what_stays_is_said(tmp_path):
    """Ansible shows nothing of what a script prints."""
    done = {"stdout_lines": ["Removing postfix ...", "Mail is left in Postfix's queue, so ..."]}
    hosts: dict[str, dict[str, object]] = {"some": {"__postfix_localmail_restored": done}}
    hosts["nothing"] = {"__postfix_localmail_restored": {"skipped": True}}
    play(tmp_path, "postfix_localmail", tasks_of("postfix_localmail", "remove.yml", "what stays on"), hosts)
    said = (tmp_path / "out").read_text()
    assert "Mail is left in Postfix's queue" in said and "Removing" not in said and "skipping: [nothing]" in said


def test_the_secret_is_taken_over_as_zulip_reads_it(tmp_path):
    """As configparser does; and it never shows."""
    texts = {
        "bare": "[secrets]\nother = 1\nshared_secret=s3cret\r\n",
        "spaces": "[other]\nshared_secret = wrong\n[secrets]\n# shared_secret = wrong\nShared_Secret  :  s3cret  \n",
        "missing": "[secrets]\nother = 1\n",
    }
    hosts: dict[str, dict[str, object]] = {}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "zulip-secrets.conf").write_text(text, newline="")
        hosts[name] = {
            "folder": str(tmp_path / name),
            "__email_gateway_zulip": {"url": "https://127.0.0.1"},
            "__email_gateway_resolved": {"waits": True},
            "zulip_puppet_classes": "",
        }
    tasks = tasks_of("email_gateway", "configure.yml", "")
    del tasks[-1]["config_files"]["files"]
    here = {"__email_gateway_etc": "{{ folder }}", "__email_gateway_secrets": "{{ folder }}/zulip-secrets.conf"}
    here["__email_gateway_user"] = pwd.getpwuid(os.getuid()).pw_name  # whoever runs this need not be root
    said = play(tmp_path, "email_gateway", [{"vars": here, "block": tasks}], hosts)
    good = {name for name in texts if (tmp_path / name / "credential").exists()}
    assert good == {"bare", "spaces"}
    for name in texts:
        if name in good:
            credential = tmp_path / name / "credential"
            assert credential.read_text() == "s3cret\n" and stat.S_IMODE(credential.stat().st_mode) == 0o400
        else:
            assert re.search(rf"{name}/zulip-secrets.conf has no shared_secret under \[secrets\]", said[name]), said[
                name
            ]
    assert "s3cret" not in (tmp_path / "out").read_text()

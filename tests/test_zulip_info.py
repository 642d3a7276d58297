"""zulip_info: Zulip's files, understood as Zulip and Python themselves read them."""

from __future__ import annotations

import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import zulip_info

PROJECT = Path(__file__).parents[1]
USER = "zulip-email-gateway"


def make_zulip(folder: Path, **files: str | bytes) -> tuple[Path, Path]:
    texts: dict[str, str | bytes] = {
        "version.py": 'ZULIP_VERSION = "6.0-dev+git"\n',
        "zulip.conf": "[machine]\npuppet_classes = zulip::profile::standalone\n",
        "settings.py": "A = 1\n",
        "zulip-secrets.conf": "[secrets]\nshared_secret = abc\n",
        **files,
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder, folder


@pytest.mark.parametrize("name", ["zulip.conf", "settings.py", "zulip-secrets.conf"])
def test_another_users_link_or_pipe_is_not_followed(tmp_path, monkeypatch, name):
    """Root would read, and change, what it leads to."""
    zulip = make_zulip(tmp_path)
    kept = (tmp_path / name).rename(tmp_path / "kept")
    os.mkfifo(tmp_path / name)
    with pytest.raises(zulip_info.Unfit, match=f"{name} is no regular file"):
        zulip_info.zulip_info(*zulip, USER)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(zulip_info.Unfit, match=f"{name} is no regular file"):
        zulip_info.zulip_info(*zulip, USER)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(kept)
    if os.geteuid() == 0:
        assert zulip_info.zulip_info(*zulip, USER)["here"]  # root's own link is all right
        os.lchown(tmp_path / name, 1, 1)
    with pytest.raises(zulip_info.Unfit, match=f"{name} is a link that does not belong to root"):
        zulip_info.zulip_info(*zulip, USER)
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 2**40)
    with pytest.raises(zulip_info.Unfit, match=f"{name} has more than 1048576 bytes"):
        zulip_info.zulip_info(*zulip, USER)


def test_zulip_is_found(tmp_path):
    found = zulip_info.zulip_info(*make_zulip(tmp_path), USER)
    assert (found["version"], found["here"], found["url"]) == ("6.0-dev+git", True, "https://127.0.0.1")


@pytest.mark.parametrize(
    ("answer", "installed", "version", "url"),
    [
        (True, False, "9.4", "https://127.0.0.1"),
        (True, True, "11.0", "https://127.0.0.1"),  # what answers decides
        (None, False, "9.4", "https://127.0.0.1"),  # Zulip is down
        (None, True, "11.0", zulip_info.MAIL_SERVER_URL),
        (False, True, "12.2", zulip_info.MAIL_SERVER_URL),
        (False, True, "10.9-dev", zulip_info.MAIL_SERVER_URL),  # not the number
        (False, False, "9.4", None),
        (None, False, "11.0", None),
    ],
)
def test_the_way_into_zulip_is_found_by_looking(tmp_path, monkeypatch, answer, installed, version, url):
    monkeypatch.setattr(zulip_info, "has_endpoint", lambda _: answer)
    folders = make_zulip(tmp_path, **{"version.py": f'ZULIP_VERSION = "{version}"\n'})
    if installed:
        (tmp_path / zulip_info.MAIL_SERVER).parent.mkdir(parents=True)
        (tmp_path / zulip_info.MAIL_SERVER).touch()
    if url is None:
        with pytest.raises(zulip_info.Unfit, match=f"Zulip {version} has no mail endpoint"):
            zulip_info.zulip_info(*folders, USER)
    else:
        assert zulip_info.zulip_info(*folders, USER)["url"] == url


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ((405, 404), True),
        ((404, 405), True),
        ((502, 405), True),  # also behind an answer that tells nothing, or none
        ((None, 405), True),
        ((404, 404), False),
        ((404, 502), None),  # the second may be the one
        ((502, 404), None),
        ((502, 502), None),
    ],
)
def test_the_endpoint_is_probed(answers, found):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = answers[zulip_info.ENDPOINTS.index(self.path)]
            if status:
                self.send_error(status)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert zulip_info.has_endpoint(url) is found
    server.shutdown()
    server.server_close()
    assert zulip_info.has_endpoint(url) is None


def test_zulip_on_another_host(tmp_path):
    found = zulip_info.zulip_info(tmp_path / "current", tmp_path, USER, "zulip.example.com:25")
    assert (found["here"], found["url"]) == (False, "smtp://zulip.example.com:25")
    for wrong in ("zulip.example.com", "zulip.example.com:x", ":25", "a b:25"):
        with pytest.raises(zulip_info.Unfit, match="write it as HOST:PORT"):
            zulip_info.zulip_info(tmp_path / "current", tmp_path, USER, wrong)
    with pytest.raises(zulip_info.Unfit, match=r"Zulip 6\.0-dev.git takes mail from its own host only"):
        zulip_info.zulip_info(*make_zulip(tmp_path), USER, "zulip.example.com:25")
    with pytest.raises(zulip_info.Unfit, match=r"this host has Zulip 11\.1 itself"):
        zulip_info.zulip_info(*make_zulip(tmp_path, **{"version.py": 'ZULIP_VERSION = "11.1"'}), USER, "zulip:25")


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("", "https://127.0.0.1"),
        *((f"http_only = {true}", "http://127.0.0.1") for true in ("1", "y", "T", "yes", "True", "enable", "ENABLED")),
        ("http_only = true\nnginx_listen_port = 8080", "http://127.0.0.1:8080"),
        ("nginx_listen_port = 444", "https://127.0.0.1:444"),
        *((f"http_only = {false}", "https://127.0.0.1") for false in ("false", "on", "", "2")),
    ],
)
def test_http_only_and_port(tmp_path, server, url):
    conf = f"[machine]\npuppet_classes = x\n[application_server]\n{server}\n"
    assert zulip_info.zulip_info(*make_zulip(tmp_path, **{"zulip.conf": conf}), USER)["url"] == url


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("version.py", "nothing", "has no line ZULIP_VERSION"),
        ("zulip.conf", "nothing", "zulip.conf cannot be parsed: line 1 stands above the first [section]"),
        ("zulip.conf", "[application_server]\nnginx_listen_port = x\n", "nginx_listen_port = 'x' is no port number"),
        ("settings.py", 'A = 1\nB = "\n', "line 2, is not valid Python: 'B = \"'"),
        ("zulip.conf", b"\xef\xbb\xbf[machine]\npuppet_classes = x\n", "zulip.conf starts with a byte order mark"),
        ("zulip.conf", b"[machine]\npuppet_classes = \xe9\n", "zulip.conf is not UTF-8"),
        ("settings.py", b"A = '\xe9'\n", "settings.py is not valid Python: invalid or missing encoding"),
        ("settings.py", b"A = 1\n\nB = '\xe9'\n", "settings.py is not valid Python: 'utf-8' codec"),
        ("settings.py", "# coding: klingon\n", "settings.py is not valid Python: unknown encoding"),
        ("zulip-secrets.conf", "[secrets]\nother = 1\n", "zulip-secrets.conf has no shared_secret"),
        ("zulip-secrets.conf", "[secrets]\nshared_secret =\n", "zulip-secrets.conf has no shared_secret"),
        ("zulip-secrets.conf", "[other]\nshared_secret = abc\n", "zulip-secrets.conf has no shared_secret"),
        ("zulip-secrets.conf", "[secrets]\na = 1\na = 2\n", "option 'a' in section 'secrets' already exists"),
    ],
)
def test_faults_of_zulips_files_are_named(tmp_path, file, text, words):
    with pytest.raises(zulip_info.Unfit) as caught:
        zulip_info.zulip_info(*make_zulip(tmp_path, **{file: text}), USER)
    assert words in str(caught.value)


def test_no_zulip(tmp_path):
    with pytest.raises(zulip_info.Unfit, match="no Zulip on this host"):
        zulip_info.zulip_info(tmp_path / "current", tmp_path, USER)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("", ""),
        ('EMAIL_HOST = "localhost"\n', "localhost"),
        ('EMAIL_HOST: str = "localhost"\nEMAIL_PORT = 25\n', "localhost"),
        ('EMAIL_HOST = "localhost"\nEMAIL_PORT = "25"\n', "localhost"),
        ('EMAIL_HOST = "localhost"\nEMAIL_PORT = None\n', "localhost"),
        ('EMAIL_HOST = "localhost"\nEMAIL_PORT = 587\n', ""),
        ('EMAIL_HOST = "localhost"\nEMAIL_PORT = "587"\n', ""),
        ('EMAIL_HOST, EMAIL_PORT = "localhost", 25\n', "localhost"),
        ('EMAIL_HOST, EMAIL_PORT = "localhost", 587\n', ""),
        ('A, *B, (EMAIL_HOST, [C]) = f(), 1, 2, ("localhost", [3])\n', "localhost"),
        ('EMAIL_HOST, B, C = "localhost", *f()\n', "localhost"),
        ('A = EMAIL_HOST = (B := "localhost")\n', "localhost"),
        ('print(EMAIL_HOST := "localhost")\n', "localhost"),
        ('EMAIL_HOST = "local"\nEMAIL_HOST += "host"\n', "localhost"),
        ('if A:\n    EMAIL_HOST = "localhost"\nEMAIL_HOST = "smtp.example.com"\n', "smtp.example.com"),  # the last one
        ('EMAIL_HOST = "smtp.example.com"\nEMAIL_HOST = os.environ["X"]\n', "smtp.example.com"),
    ],
)
def test_where_zulip_sends_its_own_mail(tmp_path, text, host):
    zulip, etc = make_zulip(tmp_path, **{"settings.py": text})
    assert zulip_info.mail_host(zulip_info.check_settings(etc / "settings.py"), zulip) == host
    assert zulip_info.zulip_info(zulip, etc, USER)["sends_here"] == (host == "localhost")


def test_what_comes_from_another_file_zulip_is_asked_for(tmp_path, monkeypatch):
    text = 'EMAIL_HOST = "smtp.example.com"\nfrom zulip_local_settings import *\n'
    zulip, etc = make_zulip(tmp_path, **{"settings.py": text})
    values = zulip_info.check_settings(etc / "settings.py")
    assert zulip_info.mail_host(values, zulip) == "smtp.example.com"  # a Zulip that cannot be asked
    script = zulip / zulip_info.SETTING
    script.parent.mkdir()
    script.write_text("")
    answers = {"EMAIL_HOST": "localhost", "EMAIL_PORT": "None"}
    monkeypatch.setattr(zulip_info, "printed", lambda *command, seconds: answers[command[-1].split()[-1]])
    assert zulip_info.mail_host(values, zulip) == "localhost"
    answers["EMAIL_PORT"] = "587"
    assert zulip_info.mail_host(values, zulip) == ""


@pytest.mark.parametrize(
    ("name", "is_here"),
    [
        *[("localhost", True), ("127.0.0.1", True), ("::1", True), ("127.0.1.1", True), (socket.gethostname(), True)],
        *[("", False), ("192.0.2.1", False), ("no.such.name.invalid", False)],
    ],
)
def test_this_host_by_any_name_or_address(name, is_here):
    assert zulip_info.is_this_host(name) == is_here


def test_folders_that_are_closed_to_the_gateway(tmp_path):
    """By mode while there is no such user, by trying where there is one."""
    for name, mode in (("open", 0o755), ("closed", 0o750)):
        (tmp_path / name).mkdir(mode=mode)
    tmp_path.chmod(0o755)
    folders = [str(tmp_path / name) for name in ("open", "closed", "missing")]
    assert zulip_info.closed_to("no-such-user-here", folders) == [folders[1]]


@pytest.mark.parametrize("text", ["[secrets]\nshared_secret s3cret\n", "shared_secret = s3cret\n"])
def test_a_secret_in_a_broken_file_is_not_told(tmp_path, text):
    with pytest.raises(zulip_info.Unfit, match=r"zulip-secrets\.conf cannot be parsed: .*line [12]") as caught:
        zulip_info.zulip_info(*make_zulip(tmp_path, **{"zulip-secrets.conf": text}), USER)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("line", ["shared_secret: abc", "shared_secret=abc", "  Shared_Secret  :  abc"])
def test_the_secret_is_found_however_it_is_written(tmp_path, line):
    zulip_info.zulip_info(*make_zulip(tmp_path, **{"zulip-secrets.conf": f"[secrets]\n{line}\n"}), USER)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfEMAIL_HOST = 'localhost'\n# Zulip email gateway\n",
        b"# -*- coding: latin-1 -*-\n# caf\xe9\nEMAIL_HOST = 'localhost'\n# Zulip email gateway\n",
    ],
)
def test_settings_are_read_as_python_reads_them(tmp_path, text):
    found = zulip_info.zulip_info(*make_zulip(tmp_path, **{"settings.py": text}), USER)
    assert (found["sends_here"], found["has_block"]) == (True, True)


BLOCK = f"""\
EMAIL_GATEWAY_PATTERN = "%s@above.example.com"
EMAIL_GATEWAY_PATTERN = "%s@mail.example.com"
{zulip_info.END_OF_BLOCK}
"""


@pytest.mark.parametrize(
    "line",
    [
        "EMAIL_GATEWAY_PATTERN = (\n'')",
        "A, EMAIL_GATEWAY_PATTERN = 1, 'x'",
        "[A, (*EMAIL_GATEWAY_LOGIN, B)] = f()",
        "EMAIL_GATEWAY_PATTERN += 'x'",
        "EMAIL_GATEWAY_PATTERN: str = 'x'",
        "print(EMAIL_GATEWAY_PATTERN := 'x')",
        "A = EMAIL_GATEWAY_PATTERN = 'x'",
        "for EMAIL_GATEWAY_PATTERN in 'x': pass",
        "with f() as EMAIL_GATEWAY_PATTERN: pass",
        "from local import EMAIL_GATEWAY_PATTERN",
        "import local as EMAIL_GATEWAY_PATTERN",
        "def EMAIL_GATEWAY_PATTERN(): pass",
        "del EMAIL_GATEWAY_PATTERN",
        "if A: EMAIL_GATEWAY_PATTERN = 'x'",
    ],
)
@pytest.mark.parametrize("above", ["", "\f", "# \x0b\x1c\x1d\x1e\x85\u2028\u2029\r\n", "\r"])
def test_what_overrides_the_block_is_named_with_its_line(tmp_path, above, line):
    """Whatever binds a name; and a line is what Python takes for one."""
    number = 4 + ("\n" in above or "\r" in above)
    files = make_zulip(tmp_path, **{"settings.py": above + BLOCK + line})
    with pytest.raises(zulip_info.Unfit, match=f"line {number}, overrides") as caught:
        zulip_info.zulip_info(*files, USER)
    assert repr(line.split("\n")[0]) in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        *["", "EMAIL_GATEWAY_PATTERN: str", "A = EMAIL_GATEWAY_PATTERN", "A, B = 1, EMAIL_GATEWAY_PATTERN"],
        "EMAIL_GATEWAY_EXTRA_PATTERN_HACK = 'x'",  # one of Zulip's own, or of the operator's
    ],
)
def test_what_only_reads_it_overrides_nothing(tmp_path, line):
    zulip_info.zulip_info(*make_zulip(tmp_path, **{"settings.py": BLOCK + line}), USER)


def test_what_may_override_it_is_named_too(tmp_path):
    text = "from above import *\n" + BLOCK + "\nfrom local import *\n"
    with pytest.raises(zulip_info.Unfit, match=r"line 6, may override .*'from local import \*'; move that line above"):
        zulip_info.zulip_info(*make_zulip(tmp_path, **{"settings.py": text}), USER)


@pytest.mark.parametrize(
    "text",
    [
        "[other]\npuppet_classes = a\n[machine]\n\tPuppet_Classes: zulip::x\n",
        "[machine]\n# puppet_classes = a\nputpet = 1\n\tPuppet_Classes: zulip::x\n[other]\npuppet_classes = b\n",
    ],
)
def test_the_line_of_the_classes_is_the_one_that_zulip_reads(tmp_path, text):
    (tmp_path / "zulip.conf").write_text(text)
    assert zulip_info.classes_line(tmp_path / "zulip.conf") == "\tPuppet_Classes: zulip::x"


class TestHost:
    @pytest.mark.parametrize(
        ("os_release", "system"),
        [
            ('PRETTY_NAME="Debian GNU/Linux 12"\nNAME="Debian GNU/Linux"\nVERSION_ID="12"\nID=debian\n', "Debian 12"),
            ('NAME="Ubuntu"\nVERSION_ID="24.04"\n', "Ubuntu 24.04"),
            ("NAME=Fedora\nVERSION_ID=43\n", "Fedora 43"),
            ('NAME="Debian GNU/Linux"\n', "Debian"),  # testing has no number
            ("", "an unknown system"),
        ],
    )
    def test_the_system_is_named_with_its_version(self, os_release, system):
        assert zulip_info.system(os_release) == system

    def test_of_this_very_host(self, tmp_path):
        """No fake: its own tools, and its own name."""
        found = zulip_info.host_info(tmp_path / "zulip", None, "root", ["/", str(tmp_path / "none")])
        assert (found["dns_answers"], found["has_user"], found["there"]) == (True, True, ["/"])
        assert found["fqdn"] == socket.getfqdn()
        assert not [one for one in found["addresses"] if one.startswith(("127.", "fe80:")) or one == "::1"]
        assert not zulip_info.host_info(tmp_path / "zulip", None, "no-such-user", [])["has_user"]

    def test_dns_that_does_not_answer_is_told_and_not_asked_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(zulip_info, "answered", lambda *command, seconds: seconds != 4)
        monkeypatch.setattr(socket, "getfqdn", lambda: pytest.fail("it would wait"))
        found = zulip_info.host_info(tmp_path / "zulip", "mail.example.com", USER, [])
        assert (found["dns_answers"], found["fqdn"]) == (False, socket.gethostname())

    def test_a_command_that_takes_too_long_has_not_answered(self):
        assert zulip_info.answered("false", seconds=20)
        assert not zulip_info.answered("sleep", "60", seconds=0.1)

    def test_where_the_metrics_are_written(self, tmp_path):
        unit = tmp_path / zulip_info.METRICS_UNIT
        assert zulip_info.host_info(tmp_path / "zulip", None, USER, [])["metrics_file"] == ""
        unit.parent.mkdir(parents=True)
        template = PROJECT / "roles/email_gateway/templates/etc/systemd/system" / f"{unit.name}.j2"
        (line,) = re.findall("^ExecStart=.*", template.read_text(), re.MULTILINE)
        unit.write_text(f"[Service]\n{line.replace('{{ __email_gateway_metrics_file }}', '/var/lib/x/a.prom')}\n")
        assert zulip_info.host_info(tmp_path / "zulip", None, USER, [])["metrics_file"] == "/var/lib/x/a.prom"


def test_what_earlier_runs_have_left_is_told(tmp_path):
    block = 'EMAIL_GATEWAY_PATTERN = "%s@mail.example.com"\n'
    around = f"A = 1\n{zulip_info.BEGIN_OF_BLOCK}\n{block}{zulip_info.END_OF_BLOCK}\n"
    (tmp_path / "etc/zulip").mkdir(parents=True)
    zulip = (make_zulip(tmp_path)[0], make_zulip(tmp_path / "etc/zulip", **{"settings.py": around})[1])
    found = zulip_info.zulip_info(*zulip, USER)
    assert (found["has_block"], found["block"], found["runs_with"], found["has_own_server"]) == (True, block, "", False)
    ours = tmp_path / "etc/zulip-email-gateway"
    ours.mkdir()
    (ours / "zulip-runs-with").write_text(block)
    (tmp_path / "etc" / zulip_info.OWN_SERVER).parent.mkdir(parents=True)
    (tmp_path / "etc" / zulip_info.OWN_SERVER).touch()
    found = zulip_info.zulip_info(*zulip, USER)
    assert (found["runs_with"], found["has_own_server"]) == (block, True)
    (tmp_path / "etc/zulip/settings.py").write_text("A = 1\n")
    found = zulip_info.zulip_info(*zulip, USER)
    assert (found["has_block"], found["block"]) == (False, "")

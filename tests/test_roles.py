"""Roles: specs agree with defaults, everything documented, Zulip's files understood."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jinja2
import pytest
import yaml
import zulip_info
from email_gateway.delivery import Gateway
from test_config import make_config

PROJECT = Path(__file__).parents[1]
ROLES = ["email_gateway", "postfix_localmail"]
USER = "zulip-email-gateway"


def spec(role: str) -> dict[str, dict[str, object]]:
    entries = yaml.safe_load((PROJECT / f"roles/{role}/meta/argument_specs.yml").read_text())["argument_specs"]
    assert entries["preflight"] == entries["main"]
    return dict(entries["main"]["options"])


@pytest.mark.parametrize("role", ROLES)
def test_specs_agree_with_defaults(role):
    defaults = yaml.safe_load((PROJECT / f"roles/{role}/defaults/main.yml").read_text())
    assert defaults == {name: option["default"] for name, option in spec(role).items() if "default" in option}


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_is_documented(role):
    text = (PROJECT / "docs/variables.md").read_text()
    assert [name for name in spec(role) if f"`{name}`" not in text] == []


def make_zulip(folder: Path, **files: str) -> tuple[Path, Path]:
    texts = {
        "version.py": 'ZULIP_VERSION = "6.0-dev+git"\n',
        "zulip.conf": "[machine]\npuppet_classes = zulip::profile::standalone\n",
        "settings.py": "A = 1\n",
        "zulip-secrets.conf": "[secrets]\nshared_secret = abc\n",
        **files,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder, folder


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


@pytest.mark.parametrize(("status", "found"), [(405, True), (404, False), (502, None)])
def test_the_endpoint_is_probed(status, found):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status if self.path == zulip_info.ENDPOINTS[1] or status == 502 else 404)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
        ("http_only = true", "http://127.0.0.1"),
        ("http_only = true\nnginx_listen_port = 8080", "http://127.0.0.1:8080"),
        ("nginx_listen_port = 444", "https://127.0.0.1:444"),
        ("http_only = false", "https://127.0.0.1"),
    ],
)
def test_http_only_and_port(tmp_path, server, url):
    conf = f"[machine]\npuppet_classes = x\n[application_server]\n{server}\n"
    assert zulip_info.zulip_info(*make_zulip(tmp_path, **{"zulip.conf": conf}), USER)["url"] == url


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("version.py", "nothing", "has no line ZULIP_VERSION"),
        ("zulip.conf", "nothing", "can not be parsed"),
        ("zulip.conf", "[application_server]\nnginx_listen_port = x\n", "nginx_listen_port = 'x' is no port number"),
        ("settings.py", 'A = 1\nB = "\n', "line 2, is not valid Python: 'B = \"'"),
        (
            "settings.py",
            "A = 1\n# END Zulip email gateway (Ansible)\nEMAIL_GATEWAY_PATTERN = (\n'')",
            "line 3, overrides",
        ),
        ("zulip-secrets.conf", "[secrets]\nother = 1\n", "has no shared_secret"),
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
    ("line", "without"),
    [
        ("puppet_classes = a, zulip::postfix_localmail", "puppet_classes = a"),
        ("puppet_classes=zulip::postfix_localmail,b", "puppet_classes=b"),
        ("  puppet_classes: a,zulip::local_mailserver , b", "  puppet_classes: a , b"),
        ("puppet_classes = a, zulip::postfix_localmailer", "puppet_classes = a, zulip::postfix_localmailer"),
    ],
)
def test_the_class_is_taken_out_of_the_line(line, without):
    text = yaml.safe_load((PROJECT / "roles/email_gateway/vars/main.yml").read_text())["__email_gateway_class_in_line"]
    assert re.sub(jinja2.Environment().from_string(text).render(), "", line) == without


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("", ""),
        ('EMAIL_HOST = "localhost"\n', "localhost"),
        ('EMAIL_HOST: str = "localhost"\nEMAIL_PORT = 25\n', "localhost"),
        ('EMAIL_HOST = "localhost"\nEMAIL_PORT = 587\n', ""),
        ('EMAIL_HOST = "smtp.example.com"\nEMAIL_HOST = os.environ["X"]\n', "smtp.example.com"),
    ],
)
def test_where_zulip_sends_its_own_mail(tmp_path, text, host):
    found = zulip_info.zulip_info(*make_zulip(tmp_path, **{"settings.py": text}), USER)
    assert found["email_host"] == host


def test_the_deadline_is_the_same_on_both_sides(tmp_path):
    """Postfix ends a delivery after twice the time the program takes at most."""
    text = yaml.safe_load((PROJECT / "roles/email_gateway/vars/main.yml").read_text())["__email_gateway_facts"][
        "deadline"
    ]
    config = make_config(tmp_path)
    asked = {"email_gateway_rate_limit_max_wait": config.max_wait, "email_gateway_timeout": config.timeout}
    assert float(jinja2.Environment().from_string(text).render(asked)) == Gateway(config).deadline


def test_folders_that_are_closed_to_the_gateway(tmp_path):
    """By mode while there is no such user, by trying where there is one."""
    for name, mode in (("open", 0o755), ("closed", 0o750)):
        (tmp_path / name).mkdir(mode=mode)
    tmp_path.chmod(0o755)
    folders = [str(tmp_path / name) for name in ("open", "closed", "missing")]
    assert zulip_info.closed_to("no-such-user-here", folders) == [folders[1]]


def test_the_example_inventory_sets_what_there_is():
    """Also what it has in comments, to be switched on."""
    text = (PROJECT / "inventory/example/group_vars/zulip.yml").read_text()
    names = set(yaml.safe_load(text)) | set(re.findall(r"^# ([a-z_]+): ", text, re.MULTILINE))
    assert names <= spec("email_gateway").keys()
    assert {"zulip_puppet_classes", "email_gateway_mailname", "email_gateway_login"} <= names
    (host,) = yaml.safe_load((PROJECT / "inventory/example/hosts.yml").read_text())["zulip"]["hosts"]
    assert host == "zulip.example.com"

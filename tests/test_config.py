"""gateway.conf: every fault names the file, what was found and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from email_gateway import config
from email_gateway.address_book import AddressBook
from email_gateway.addresses import Pattern
from email_gateway.config import Config, Window
from email_gateway.verdict import Trouble

ROLE = Path(__file__).parents[1] / "roles/email_gateway"
TEMPLATE = (ROLE / "templates/etc/zulip-email-gateway/gateway.conf.j2").read_text()


def made_logs(folder: Path) -> Path:
    """Zulip's folder of logs; its worker has been there, and has consumed nothing."""
    for name in ("queue_error",):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "workers.log").touch()
    return folder


def make_config(folder: Path, **changes: Any) -> Config:
    (folder / "credential").write_text("s3cret\n")
    return Config(
        addresses=AddressBook(Pattern("", "mail.example.com")),
        post_automatic=False,
        sender_checks="off",
        state_dir=folder,
        credential=folder / "credential",
        url="http://127.0.0.1:1",
        timeout=2,
        logs=made_logs(folder / "logs"),
        windows=(Window(50, 60), Window(120, 300), Window(600, 3600)),
        hosts=1,
        share=4,
        slack=30,
        max_wait=1,
        asks=True,
        most_queued=480,
        quarantine_bytes=2**20,
        quarantine_days=30,
        history_mails=250_000,
    )._replace(**changes)


def write_addresses(folder: Path, **changes: Any) -> None:
    """addresses.json, as the role writes it."""
    empty = {"former": [], "aliases": {}, "senders": {}, "blocked": [], "sends_from": [], "probe": "", "alerts": ""}
    (folder / config.ADDRESSES).write_text(json.dumps(empty | changes))


def rendered(folder: Path) -> str:
    """The template as Ansible writes it with the role's defaults."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters["comment"] = lambda text: f"# {text}"
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    return environment.from_string(TEMPLATE).render(
        **defaults,
        ansible_managed="managed",
        email_gateway_plan={"pattern": "%s@mail.example.com", "polling": True},
        __email_gateway_state=str(folder),
        __email_gateway_sender_checks="off",
        __email_gateway_zulip={"version": "10.4", "url": "https://127.0.0.1", "system": "Debian 12"},
        __email_gateway_etc=str(folder),
        __email_gateway_secrets="/etc/zulip/zulip-secrets.conf",
        __email_gateway_imap={
            **{"server": "imap.example.com", "port": 993, "tls": "implicit", "folder": "INBOX"},
            **{"login": "zulip@example.com", "token_endpoint": "", "scope": "", "largest": 1000},
        },
    )


def test_template_is_what_the_program_reads(tmp_path):
    file = tmp_path / "gateway.conf"
    file.write_text(rendered(tmp_path))
    write_addresses(tmp_path)
    loaded = config.load(file)
    assert loaded.pattern == Pattern("", "mail.example.com")
    assert loaded.windows == (Window(50, 60), Window(120, 300), Window(600, 3600))
    assert loaded.quarantine_bytes == 100 * 2**20
    assert (
        loaded.imap is not None
        and loaded.imap.port == 993
        and loaded.imap.token_endpoint == ""
        and loaded.imap.largest == 1000
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("pattern = %s@", "pattern = ", "'mail.example.com' is no EMAIL_GATEWAY_PATTERN"),
        ("timeout = 30", "", "lacks 'timeout'"),
        ("replies = drop", "replies = no", "write it as 'drop' or 'post'"),
        ("timeout = 30", "timeout = -1", "'-1' is no positive number"),
        ("50/60 120/300", "50/60 120", "write it as '50/60 120/300 600/3600'"),
        ("hosts = 1", "hosts = 51", "leave one of 51 hosts no mail in a window"),
        ("[zulip]", "[zulip", "cannot use"),
        ("url = https://", "url = ", "write it as 'https://127.0.0.1' or 'smtp://HOST:PORT'"),
        ("url = https://127.0.0.1", "url = smtp://127.0.0.1:x", "cannot use"),
        ("login = zulip@example.com", "", "lacks 'login'"),
    ],
)
def test_fault_is_named(tmp_path, old, new, words):
    file = tmp_path / "gateway.conf"
    text = rendered(tmp_path)
    assert old in text
    file.write_text(text.replace(old, new))
    write_addresses(tmp_path)
    with pytest.raises(Trouble) as caught:
        config.load(file)
    assert caught.value.verdict.status == "4.3.5"
    assert words in str(caught.value) and str(file) in str(caught.value) and "site.yml" in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(Trouble, match="No such file or directory"):
        config.load(tmp_path / "gateway.conf")
    with pytest.raises(Trouble, match=r"cannot read .*nowhere: No such file"):
        make_config(tmp_path, credential=tmp_path / "nowhere").secret()

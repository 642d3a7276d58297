"""What has to be the same in two places, because they run on different machines or in different programs."""

from __future__ import annotations

import re
from pathlib import Path

import postfix_info
import pytest
import yaml
import zulip_info
from email_gateway import backend_http, backend_smtp, config, pace, postfix, verdict
from role_files import variables

PROJECT = Path(__file__).parents[1]
POSTFIX = PROJECT / "roles/postfix_localmail/templates/etc/postfix"
ZULIP = variables("email_gateway")
MAIL = variables("postfix_localmail")


def test_zulips_endpoints():
    """site.yml looks for them, and the program uses them."""
    assert zulip_info.ENDPOINTS == backend_http.PATHS


def test_where_zulips_own_mail_server_listens():
    assert f"smtp://127.0.0.1:{backend_smtp.OUR_PORT}" == zulip_info.MAIL_SERVER_URL


def test_the_signature_of_a_refusal():
    """Without it Postfix takes no bounce from the program: a mail that has to go back would wait for ever."""
    text = (POSTFIX / "zulip_delivery_status.j2").read_text()
    (pattern,) = re.findall(r"^if !/(.*)/$", text, re.MULTILINE)
    assert re.match(pattern, f"5.1.1 {verdict.SIGNATURE} no such channel")
    assert not re.match(pattern, "5.1.1 no such channel")


def test_the_mark_in_the_gateways_files(tmp_path, monkeypatch):
    """By it site.yml, doctor and the next version know what is theirs."""
    mark = zulip_info.MARK
    assert {mark, postfix_info.MARK, ZULIP["__email_gateway_mark"], MAIL["__postfix_localmail_mark"]} == {mark}
    assert mark in Path(postfix.__file__).read_text()
    zulip = yaml.safe_load((PROJECT / "roles/email_gateway/tasks/zulip.yml").read_text())
    (block,) = [task["ansible.builtin.blockinfile"] for task in zulip if "ansible.builtin.blockinfile" in task]
    lines = [
        block["marker"].replace("{{ __email_gateway_mark }}", mark).replace("{mark}", mark_of)
        for mark_of in ("BEGIN", "END")
    ]
    assert lines == [zulip_info.BEGIN_OF_BLOCK, zulip_info.END_OF_BLOCK]
    for template in (POSTFIX / "main.cf.j2", PROJECT / "roles/email_gateway/templates/etc/cron.d/email-mirror.j2"):
        assert re.search(r"^# \{\{ __\w+_mark \}\}: ", template.read_text(), re.MULTILINE)


WINDOWS = ["50/60", "0/60", "50/0", "050/60", "50", "50/", "/60", "-1/60", "50/60s", "5.5/60", "50 / 60", "a/b", ""]


@pytest.mark.parametrize("window", WINDOWS)
def test_how_a_rate_window_is_written(window):
    """What site.yml lets through the program can read, and the other way round."""
    text = (PROJECT / "roles/email_gateway/templates/faults_in_variables.j2").read_text()
    (pattern,) = re.findall(r"select\('match', '([^']*)'\)", text[text.index("sound_windows") :].split("\n")[0])
    try:
        readable = config._windows(window, 1) != ()
    except ValueError:
        readable = False
    assert bool(re.match(pattern, window)) == readable


def test_more_processes_of_postfix_than_mails_that_wait():
    """A mail for which no process is left would wait behind a flood of another channel."""
    (processes,) = re.findall(r"\('zulip', '(\d+)'\)", (POSTFIX / "master.cf.j2").read_text())
    assert int(processes) > pace._MOST_WAITING


def test_the_programs_user_and_paths():
    """Each role knows them for itself, so that it can be used alone."""
    assert ZULIP["__email_gateway_user"] == MAIL["__postfix_localmail_user"]
    assert ZULIP["__email_gateway_program"] == MAIL["__postfix_localmail_program"]
    assert f'"{MAIL["__postfix_localmail_program"][1:]}"' in Path(postfix_info.__file__).read_text()


@pytest.mark.parametrize(
    ("role", "others"), [("email_gateway", "__postfix_localmail"), ("postfix_localmail", "__email_gateway")]
)
def test_nothing_outside_a_role_reads_its_internal_variables(role, others):
    folders = [PROJECT / "roles" / role, PROJECT / "playbooks", PROJECT / "inventory", PROJECT / "docs"]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".yml", ".j2", ".md")]
    own = f"__{role}"
    for path in files:
        text = path.read_text()
        assert others not in text, path
        assert own not in text or path.is_relative_to(folders[0]), path

"""One mail's way through the gateway, and what is left behind."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from email_gateway import cli
from email_gateway.backend_http import HttpBackend
from email_gateway.delivery import Envelope, Gateway
from email_gateway.quarantine import Quarantine
from email_gateway.recovery import Recovery
from email_gateway.verdict import Deferred, Delivered, Refused, Trouble, bug
from test_addresses import TOKEN
from test_config import make_config, rendered

CHANNEL = f"general.{TOKEN}@mail.example.com"


@pytest.fixture
def gateway(tmp_path, monkeypatch):
    """A gateway whose Zulip answers what .answers says, the last answer again and again."""
    made = Gateway(make_config(tmp_path))
    made.answers, made.handed = [Delivered()], []

    def hand_over(self, recipient, message):
        made.handed.append((recipient, message))
        return made.answers[0] if len(made.answers) == 1 else made.answers.pop(0)

    monkeypatch.setattr(HttpBackend, "hand_over", hand_over)
    return made


def slots(gateway):
    return gateway.state.look()["slots"]


@pytest.mark.parametrize(
    ("verdict", "kept"),
    [
        (Delivered(), 1),
        (Refused("5.1.1", "unknown address", "no"), 0),
        (Deferred("4.3.2", "HTTP 502", "later"), 0),
        (Deferred("4.4.2", "no answer", "later", in_doubt=True), 1),
    ],
)
def test_only_what_zulip_may_have_holds_a_slot(gateway, verdict, kept):
    gateway.answers = [verdict]
    assert gateway.deliver(Envelope(CHANNEL), b"m") == verdict
    assert len(slots(gateway)) == kept


def test_zulips_own_rate_limit_holds_mail_back_longer_each_time(gateway):
    gateway.answers = [Deferred("4.7.28", "rate limit", "later")]
    gateway.config = gateway.config._replace(max_wait=1)
    assert gateway.deliver(Envelope(CHANNEL), b"m").cause == "rate limit"
    assert slots(gateway) == [] and len(gateway.handed) == 1
    held = gateway.deliver(Envelope(CHANNEL), b"m")
    assert held.cause == "rate limit" and len(gateway.handed) == 1  # Zulip was not asked again
    gateway.deliver(Envelope(f"mm{TOKEN}@mail.example.com"), b"m")
    assert len(gateway.handed) == 2  # a reply does not wait
    with gateway.state.change() as data:
        assert data["hold"]["seconds"] == 5
        data["hold"]["until"] = 0
    gateway.deliver(Envelope(CHANNEL), b"m")
    assert gateway.state.look()["hold"]["seconds"] == 10
    with gateway.state.change() as data:
        data["hold"]["until"] = 0
    gateway.answers = [Delivered()]
    assert gateway.deliver(Envelope(CHANNEL), b"m") == Delivered()
    assert "hold" not in gateway.state.look()


def test_replies_take_no_slot(gateway):
    gateway.deliver(Envelope(f"mm{TOKEN}@mail.example.com"), b"m")
    assert slots(gateway) == [] and len(gateway.handed) == 1


def test_refused_is_kept_and_counted(gateway):
    gateway.answers = [Refused("5.1.1", "unknown address", "no such")]
    gateway.deliver(Envelope(CHANNEL, "user@example.org", "QID"), b"the mail")
    [item] = gateway.quarantine.items()
    assert gateway.quarantine.message(item) == b"the mail"
    assert (item.recipient, item.sender, item.queue_id, item.reason) == (CHANNEL, "user@example.org", "QID", "no such")
    assert gateway.state.look()["counts"] == {"refused": {"unknown address": 1}}
    assert {path.stat().st_mode & 0o777 for path in (gateway.config.state_dir / "quarantine").iterdir()} == {0o600}


def test_no_gateway_address_is_refused_without_asking_zulip(gateway):
    assert isinstance(gateway.deliver(Envelope("info@mail.example.com"), b"m"), Refused)
    assert gateway.handed == []


def test_unwritable_state_defers_and_delivers_nothing(gateway, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    verdict = gateway.deliver(Envelope(CHANNEL), b"m")
    assert isinstance(verdict, Deferred) and "No space left on device" in verdict.reason
    assert str(gateway.config.state_dir) in verdict.reason and gateway.handed == []


def test_refused_without_room_for_its_copy_is_deferred(gateway, monkeypatch):
    gateway.answers = [Refused("5.1.1", "unknown address", "no")]
    monkeypatch.setattr(Quarantine, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert isinstance(gateway.deliver(Envelope(CHANNEL), b"m"), Deferred)


def test_what_zulip_accepted_stays_delivered(gateway, monkeypatch):
    original = HttpBackend.hand_over

    def then_full(self, *mail):
        verdict = original(self, *mail)
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        return verdict

    monkeypatch.setattr(HttpBackend, "hand_over", then_full)
    verdict = gateway.deliver(Envelope(CHANNEL), b"m")
    assert isinstance(verdict, Delivered) and "No space left" in verdict.note


def test_an_orphan_leaves_the_mail_alone(gateway, monkeypatch):
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert isinstance(gateway.deliver(Envelope(CHANNEL), b"m"), Deferred)
    assert gateway.handed == [] and slots(gateway) == []


def test_quarantine_is_bounded_by_size_and_age(tmp_path):
    store = Quarantine(tmp_path / "q", max_bytes=25, max_days=1)
    items = [store.keep(b"x" * 10, CHANNEL, "", "", "no") for _ in range(4)]
    assert [item.id for item in store.items()] == [item.id for item in items[2:]]
    old = json.loads((tmp_path / "q" / f"{items[2].id}.json").read_text())
    (tmp_path / "q" / f"{items[2].id}.json").write_text(json.dumps({**old, "refused": old["refused"] - 90000}))
    newest = store.keep(b"x", CHANNEL, "", "", "no")
    assert {item.id for item in store.items()} == {items[3].id, newest.id}
    assert store.keep(b"x" * 100, CHANNEL, "", "", "no").id in {item.id for item in store.items()}
    Quarantine(tmp_path / "q", max_bytes=25, max_days=1e-9).tidy()
    assert store.items() == []


def test_quarantine_leaves_nothing_of_a_copy_that_has_no_room(tmp_path, monkeypatch):
    store = Quarantine(tmp_path / "q", max_bytes=25, max_days=1)
    write = Quarantine._write

    def full(self, name, content):
        write(self, name, content)
        if name.endswith(".json"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Quarantine, "_write", full)
    with pytest.raises(Trouble, match="No space left on device"):
        store.keep(b"x", CHANNEL, "", "", "no")
    assert list((tmp_path / "q").iterdir()) == []


def test_quarantine_that_can_not_even_be_tidied_says_why_it_could_not_be_written(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Quarantine, "_write", denied)
    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(Trouble, match="cannot keep a copy"):
        Quarantine(tmp_path / "q", max_bytes=25, max_days=1).keep(b"x", CHANNEL, "", "", "no")


def failed(gateway, *mails):
    with gateway.config.queue_errors.open("a") as file:
        for mail in mails:
            line = json.dumps([{"rcpt_to": CHANNEL, "msg_base64": base64.b64encode(mail).decode().rstrip("=")}])
            file.write(f"Mon Nov 23 02:38:00 2026\t{line}\n")


def test_recovery_hands_over_once_and_quarantines_what_fails_twice(gateway):
    failed(gateway, b"before the installation")
    Recovery(gateway).run()
    failed(gateway, b"one", b"two")
    Recovery(gateway).run()
    Recovery(gateway).run()
    assert [message for _, message in gateway.handed] == [b"one", b"two"]
    failed(gateway, b"two")
    Recovery(gateway).run()
    assert len(gateway.handed) == 2
    assert [gateway.quarantine.message(item) for item in gateway.quarantine.items()] == [b"two"]
    assert gateway.recovered.look()["recovery"]["counts"] == {"handed over again": 2, "quarantined": 1}


def test_recovery_knows_a_mail_again_by_what_its_sender_wrote(gateway):
    """Zulip 11's server adds fields, X-Peer with another port each time."""
    Recovery(gateway).run()
    for port in (b"40001", b"40002"):
        failed(gateway, b"Subject: S\nX-Peer: ('127.0.0.1', " + port + b")\n\none")
        Recovery(gateway).run()
    assert [message for _, message in gateway.handed] == [b"Subject: S\n\none"]
    assert [item.lost for item in gateway.quarantine.items()] == [True]


def test_recovery_keeps_for_good_what_zulip_will_not_take_any_more(gateway):
    """The channel is gone since, or the mail domain: nobody was told, and nothing behind waits."""
    Recovery(gateway).run()
    gateway.answers = [Refused("5.1.1", "unknown address", "no"), Delivered()]
    failed(gateway, b"one")
    with gateway.config.queue_errors.open("a") as file:
        line = json.dumps([{"rcpt_to": CHANNEL.replace("mail.", "former."), "msg_base64": "dHdv"}])
        file.write(f"Mon Nov 23 02:38:00 2026\t{line}\n")
    failed(gateway, b"three")
    Recovery(gateway).run()
    assert [message for _, message in gateway.handed] == [b"one", b"three"]
    kept = {gateway.quarantine.message(item): item.lost for item in gateway.quarantine.items()}
    assert kept == {b"one": True, b"two": True}


def test_recovery_says_what_it_can_not_read(gateway, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(Trouble, match=r"cannot read .*email_mirror.errors: Permission denied"):
        Recovery(gateway).run()


def test_recovery_killed_between_two_mails_of_a_line_goes_on_with_the_next(gateway):
    Recovery(gateway).run()
    failed(gateway, b"one", b"two")
    text = gateway.config.queue_errors.read_text().splitlines()
    together = [json.loads(line.partition("\t")[2])[0] for line in text]
    gateway.config.queue_errors.write_text(f"Mon Nov 23 02:38:00 2026\t{json.dumps(together)}\n")
    gateway.answers = [Delivered(), Deferred("4.3.2", "HTTP 502", "down"), Delivered()]
    with pytest.raises(Trouble, match="down"):
        Recovery(gateway).run()
    Recovery(gateway).run()
    Recovery(gateway).run()
    assert [message for _, message in gateway.handed] == [b"one", b"two", b"two"]
    assert gateway.quarantine.items() == []


def test_recovery_waits_for_zulip_and_goes_on(gateway):
    Recovery(gateway).run()
    failed(gateway, b"one", b"two")
    gateway.answers = [Delivered(), Deferred("4.3.2", "HTTP 502", "down"), Delivered()]
    with pytest.raises(Trouble, match="down"):
        Recovery(gateway).run()
    Recovery(gateway).run()
    assert [message for _, message in gateway.handed] == [b"one", b"two", b"two"]


def test_recovery_takes_up_a_new_file_and_no_half_line(gateway):
    failed(gateway, b"old")
    Recovery(gateway).run()
    gateway.config.queue_errors.rename(gateway.config.queue_errors.with_suffix(".1"))
    failed(gateway, b"new")
    with gateway.config.queue_errors.open("a") as file:
        file.write("not a line of Zulip's\nMon Nov\t[{")
    Recovery(gateway).run()
    assert [message for _, message in gateway.handed] == [b"new"]


def run_program(tmp_path: Path, *arguments: str, config: str | None = None) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "gateway.conf"
    file.write_text(rendered(tmp_path) if config is None else config)
    start = "from email_gateway.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", start, "--config", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.run(
        [*command, *arguments], env=environment, input="mail", capture_output=True, text=True, check=False
    )


def test_program_tells_postfix_in_one_line(tmp_path):
    done = run_program(tmp_path, "deliver", "--sender=", "--", "info@mail.example.com")
    assert done.returncode == 69
    assert done.stdout.startswith("5.1.1 Zulip mail gateway: the address is neither") and done.stdout.count("\n") == 1


def test_program_defers_for_bad_configuration_and_for_its_own_errors(tmp_path):
    done = run_program(tmp_path, "deliver", "--", CHANNEL, config="[zulip")
    assert done.returncode == 75 and done.stdout.startswith("4.3.5 cannot use") and done.stderr == ""
    done = run_program(tmp_path, "deliver", "--", CHANNEL)
    assert done.returncode == 75 and "credential" in done.stdout


def test_a_bug_is_told_with_its_place():
    try:
        raise KeyError("x" + TOKEN)
    except KeyError as error:
        verdict = bug(error)
    assert verdict.status == "4.3.0" and "test_delivery.py" in verdict.reason and TOKEN not in verdict.reason


def test_status_and_quarantine_commands(tmp_path, gateway, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_become_owner", lambda _: None)
    monkeypatch.setattr(cli, "Gateway", lambda _: gateway)
    config = tmp_path / "gateway.conf"
    config.write_text(rendered(tmp_path))
    gateway.answers = [Refused("5.1.1", "unknown address", f"no such {TOKEN}")]
    gateway.deliver(Envelope(CHANNEL, "user@example.org", "QID"), b"Subject: x\n\nthe mail")
    [item] = gateway.quarantine.items()

    assert cli.main(["--config", str(config), "quarantine", "list"]) == 0
    listed = capsys.readouterr().out
    assert item.id in listed and TOKEN not in listed and TOKEN[:4] in listed
    assert cli.main(["--config", str(config), "status"]) == 0
    assert "refused         1  (unknown address 1)" in capsys.readouterr().out
    assert cli.main(["--config", str(config), "quarantine", "replay", item.id]) == 69
    assert "stays in quarantine" in capsys.readouterr().err and gateway.quarantine.items() == [item]
    gateway.answers = [Delivered()]
    assert cli.main(["--config", str(config), "quarantine", "replay", item.id]) == 0
    assert gateway.quarantine.items() == [] and gateway.handed[-1] == (CHANNEL, b"Subject: x\n\nthe mail")
    assert cli.main(["--config", str(config), "quarantine", "show", "nothing"]) == 1

"""The service, as its clients see it, and the commands of an operator."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from email_gateway import cli, service
from email_gateway.client import Client
from email_gateway.verdict import Deferred, Refused, Trouble
from mails import BEFORE, POSTED, eventually, mail, tell
from test_addresses import TOKEN
from test_config import made_logs, rendered, write_addresses

PACKAGE = Path(cli.__file__).parents[1]
CHANNEL = f"general.{TOKEN}@mail.example.com"
REPLY = f"mm{TOKEN}@mail.example.com"
# As systemd starts it: the socket is descriptor 3, and stays while the service is restarted.
START = """
import os, sys
sys.path.insert(0, sys.argv[1])
os.dup2(int(sys.argv[3]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="zulip-email-gateway.socket")
from email_gateway.cli import main
sys.exit(main(["--config", sys.argv[2], "serve"]))
"""


class Zulip:
    """Accepts mail, after .seconds, and posts it while its .worker runs; .unknown addresses it refuses."""

    def __init__(self, logs: Path) -> None:
        zulip = self
        self.seconds, self.unknown, self.handed = 0.0, False, 0
        self.status, self.worker = 200, threading.Event()
        self.worker.set()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer takes 40 ms

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                nobody = b"rcpt_to=" + b"0" * 32 in body
                answer: dict[str, str] = {"result": "success", "msg": ""}
                if zulip.unknown or nobody:
                    answer = {"result": "error", "msg": "5.1.1 Bad destination mailbox address: no"}
                else:
                    zulip.handed += 1
                    time.sleep(zulip.seconds)
                    what = "from user 9 to" if b"rcpt_to=mm" in body else "to"
                    posted = f"Successfully processed email {what} general (zulip)"
                    threading.Thread(target=lambda: zulip.worker.wait(60) and tell(logs, posted), daemon=True).start()
                text = json.dumps(answer).encode()
                self.send_response(400 if "error" in text.decode() else zulip.status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 100

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


class Running:
    """A service in a process of its own, with its Zulip."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.zulip = folder, Zulip(made_logs(folder / "logs"))
        self.state = folder / "state"
        self.state.mkdir()
        self.config = folder / "gateway.conf"
        (folder / "state" / "credential").write_text("secret\n")
        write_addresses(folder)
        text = rendered(self.state).replace("https://127.0.0.1", self.zulip.url)
        self.config.write_text(text.replace("/var/log/zulip", str(folder / "logs")))
        self.socket = str(folder / "submit")
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(self.socket)
        self.listening.listen(100)
        self.client = Client(20, self.socket)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        descriptor = self.listening.fileno()
        command = [sys.executable, "-IS", "-c", START, str(PACKAGE), str(self.config), str(descriptor)]
        self.process = subprocess.Popen(command, pass_fds=[descriptor])
        for _ in range(1000):
            if (self.state / "spool").exists():
                return
            time.sleep(0.02)
        raise AssertionError("it did not start")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process
        self.process.send_signal(how)
        return self.process.wait(20)

    def deliver(self, recipient: str = REPLY, queue_id: str = "", content: bytes = b"m", max_wait: float = 5):
        fields = {"recipient": recipient, "sender": "s@x", **({"queue-id": queue_id} if queue_id else {})}
        return self.client.deliver(mail(content).file(), max_wait, **fields)


@pytest.fixture
def running(tmp_path):
    one = Running(tmp_path)
    one.start()
    yield one
    one.process.kill()
    one.process.wait()
    one.zulip.server.shutdown()
    one.zulip.server.server_close()
    one.listening.close()


def test_a_mail_is_delivered_once(running):
    assert running.deliver(CHANNEL, "Q") == POSTED
    assert running.deliver(CHANNEL, "Q") == BEFORE
    assert running.zulip.handed == 1


def test_killed_it_still_knows_what_it_delivered(running):
    running.deliver(queue_id="Q")
    running.stop(signal.SIGKILL)
    running.start()
    assert running.deliver(queue_id="Q") == BEFORE


def test_asked_to_end_it_finishes_what_it_has_begun(running):
    """The others wait for the next one."""
    running.zulip.seconds = 0.2
    verdicts: list[object] = []
    threads = [threading.Thread(target=lambda: verdicts.append(running.deliver(max_wait=60))) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: running.zulip.handed == 1)
    assert running.stop() == 0
    running.start()
    for thread in threads:
        thread.join()
    assert verdicts == [POSTED] * 5 and running.zulip.handed == 5


def test_the_journal_removed_and_a_restart_post_nothing_twice(running):
    """While Zulip has accepted a mail and not posted it yet."""
    running.zulip.worker.clear()
    verdicts: list[object] = []
    thread = threading.Thread(target=lambda: verdicts.append(running.deliver(CHANNEL, "Q", max_wait=60)))
    thread.start()
    assert eventually(lambda: running.zulip.handed == 1)
    for path in running.state.glob("journal*"):
        path.unlink()
    assert running.stop() == 0
    running.start()
    running.zulip.worker.set()
    thread.join(60)
    assert verdicts == [POSTED] and running.zulip.handed == 1


def test_who_waits_for_room_when_it_ends_waits_for_the_next(running):
    """As in an upgrade; the socket stays, as with systemd."""
    replace(running.config, "50/60 120/300 600/3600", "2/2 600/3600")
    replace(running.config, "slack = 30", "slack = 1")
    for _ in range(2):
        running.deliver(CHANNEL)
    waiting: list[object] = []
    thread = threading.Thread(target=lambda: waiting.append(running.deliver(CHANNEL, max_wait=60)))
    thread.start()
    time.sleep(0.3)
    assert running.stop() == 0
    running.start()
    thread.join(60)
    assert waiting == [POSTED] and running.zulip.handed == 3


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_change_of_gateway_conf_takes_effect_at_once(running):
    assert running.deliver() == POSTED
    text = running.config.read_text()
    running.config.write_text("[zulip")
    verdict = running.deliver()
    assert isinstance(verdict, Deferred) and f"cannot use {running.config}" in verdict.reason
    running.config.write_text(text)
    assert running.deliver() == POSTED
    (running.state / "credential").rename(running.state / "aside")
    verdict = running.deliver()
    assert isinstance(verdict, Deferred) and "cannot read" in verdict.reason
    (running.state / "aside").rename(running.state / "credential")
    assert running.deliver() == POSTED
    write_addresses(running.folder, aliases={"support": {"to": CHANNEL.partition("@")[0], "channel": "#general"}})
    assert running.deliver("support@mail.example.com") == POSTED


def test_it_starts_with_an_unusable_configuration_and_says_so(tmp_path):
    running = Running(tmp_path)
    text = running.config.read_text()
    running.config.write_text("[zulip")
    (running.state / "spool").mkdir()
    running.start()
    verdict = running.deliver()
    assert isinstance(verdict, Deferred) and "cannot use" in verdict.reason
    running.config.write_text(text)
    assert running.deliver() == POSTED
    running.stop()


NONSENSE = (
    *(b"", b"deliver", b"deliver\n", b"\0\0\n", b"deliver\0recipient=x\n", b"\xff\xfe\n"),
    *(b"purge\0days=x\0lost=\n", b"x" * 100_000),
)


def test_nonsense_does_not_disturb_it(running):
    for request in NONSENSE:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(running.socket)
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(1000)
            assert answer == b"" or answer.startswith(b"75 4.3."), request
        assert running.deliver() == POSTED, request


def test_broken_requests_leave_no_file_open(running):
    def open_files() -> int:
        return len(os.listdir(f"/proc/{running.process.pid}/fd"))

    running.deliver()
    before = open_files()
    for request in (b"deliver", b"deliver\0recipient=x\n", b"nonsense\n"):
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as client, open("/dev/null") as file:
                client.connect(running.socket)
                socket.send_fds(client, [request], [file.fileno()])
    for _ in range(50):
        if open_files() <= before:
            return
        time.sleep(0.1)
    assert open_files() <= before


def test_many_clients_at_a_time(running):
    verdicts: list[object] = []
    threads = [threading.Thread(target=lambda: verdicts.append(running.deliver())) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [POSTED] * 50 and running.zulip.handed == 50


def test_what_an_inbox_still_has(running):
    identity = "zulip@example.com imap.example.com INBOX 7"
    for uid in (1, 3):
        verdict = running.client.deliver(mail(b"m").file(), 1, recipient=REPLY, inbox=identity, uid=str(uid))
        assert verdict == POSTED
    assert running.client.delivered(identity, [1, 2, 3, 4]) == {1, 3}
    assert running.client.delivered("another", [1, 2, 3, 4]) == set()


def test_the_inbox_keeps_its_refused_mail_itself(running):
    running.zulip.unknown = True
    verdict = running.client.deliver(mail(b"m").file(), 1, recipient=REPLY, inbox="i", uid="1")
    assert isinstance(verdict, Refused) and not list(running.state.glob("quarantine/*"))


def test_check_proves_the_way_to_zulip(running):
    status, line, _ = running.client.ask("check")
    assert status == 0 and "Zulip takes mail at" in line and running.zulip.handed == 0


def test_no_service(tmp_path):
    with pytest.raises(Trouble, match="the service cannot be reached"):
        Client(5, str(tmp_path / "none")).ask("check")


def test_serve_is_for_systemd(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("LISTEN_PID", raising=False)
    assert cli.main(["serve"]) == 75
    assert "systemctl start zulip-email-gateway.socket" in capsys.readouterr().err


def test_status_and_quarantine_commands(running, capsysbinary, monkeypatch):
    monkeypatch.setattr(cli, "_become_owner", lambda _: None)
    monkeypatch.setattr(cli, "Client", lambda _: running.client)

    def command(*arguments: str) -> tuple[int, str]:
        status = cli.main(["--config", str(running.config), *arguments])
        shown = capsysbinary.readouterr()
        return status, (shown.out + shown.err).decode()

    running.zulip.unknown = True
    fields = {"recipient": CHANNEL, "sender": "j\udcf6rg@example.org", "queue-id": "QID"}
    running.client.deliver(mail(b"Subject: x\n\nthe mail").file(), 20, **fields)
    status, listed = command("quarantine", "list")
    name = listed.split()[0]
    assert status == 0 and TOKEN not in listed and TOKEN[:4] in listed
    status, shown = command("quarantine", "show", name)  # an 8-bit sender, whatever the locale
    assert status == 0, shown
    assert "Subject: x\n\nthe mail" in shown and "sender: j\\xf6rg@example.org" in shown
    assert "refused         1  (unknown address 1)" in command("status")[1]
    assert json.loads(command("status", "--json")[1])["quarantine"] == 1
    status, told = command("quarantine", "replay", name)
    assert status == 69 and "refused again" in told and "stays in quarantine" in told
    running.zulip.unknown = False
    assert command("quarantine", "replay", name) == (0, f"{name}: posted in Zulip\n")
    assert command("quarantine", "list") == (0, "") and running.zulip.handed == 1
    assert command("quarantine", "show", "nothing")[0] == command("quarantine", "replay", "nothing")[0] == 1
    assert command("quarantine", "purge", "--older-than", "0") == (0, "0 removed\n")
    assert command("check")[0] == 0


def test_a_thread_that_keeps_the_journal_stops_the_heartbeat(tmp_path):
    one = service.Service(tmp_path / "gateway.conf")
    from email_gateway.journal import Journal

    one._journal = Journal(tmp_path)
    assert one._is_alive()
    held, done = threading.Event(), threading.Event()

    def keep() -> None:
        with one._journal.change():
            held.set()
            done.wait(10)

    thread = threading.Thread(target=keep)
    thread.start()
    held.wait(5)
    assert not one._is_alive()
    done.set()
    thread.join()

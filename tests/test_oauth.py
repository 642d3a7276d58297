"""Access tokens, from a real HTTP server."""

from __future__ import annotations

import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from email_gateway.oauth import Tokens
from email_gateway.verdict import Trouble

CLIENT = {"client_id": "id", "client_secret": "secret"}


@pytest.fixture
def endpoint():
    """Answers with .answers in turn, the last one again and again; keeps what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            server.asked.append(dict(urllib.parse.parse_qsl(body)))
            status, answer = server.answers[0] if len(server.answers) == 1 else server.answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode() if isinstance(answer, str) else json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers = [], [(200, {"access_token": "one", "expires_in": 3600})]
    server.url = f"http://127.0.0.1:{server.server_port}/token"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def tokens(endpoint, folder, **secret):
    return Tokens(endpoint.url, {**CLIENT, **secret}, "imap", folder / "refresh-token", 2)


def test_a_token_is_asked_for_once_and_renewed_in_time(endpoint, tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    one = tokens(endpoint, tmp_path, refresh_token="r")
    assert [one.access_token(), one.access_token()] == ["one", "one"] and len(endpoint.asked) == 1
    clock[0] += 3299
    one.access_token()
    assert len(endpoint.asked) == 1
    clock[0] += 2  # five minutes before it expires
    one.access_token()
    assert len(endpoint.asked) == 2
    one.access_token(anew=True)
    assert len(endpoint.asked) == 3


def test_what_is_sent(endpoint, tmp_path):
    tokens(endpoint, tmp_path).access_token()
    tokens(endpoint, tmp_path, refresh_token="r").access_token()
    assert endpoint.asked == [
        {**CLIENT, "grant_type": "client_credentials", "scope": "imap"},
        {**CLIENT, "grant_type": "refresh_token", "refresh_token": "r", "scope": "imap"},
    ]


def test_a_new_refresh_token_is_kept_until_another_is_configured(endpoint, tmp_path):
    endpoint.answers = [(200, {"access_token": "a", "refresh_token": "second"}), (200, {"access_token": "a"})]
    for configured in ("first", "first", "other"):
        tokens(endpoint, tmp_path, refresh_token=configured).access_token()
    assert [asked["refresh_token"] for asked in endpoint.asked] == ["first", "second", "other"]
    assert (tmp_path / "refresh-token").stat().st_mode & 0o777 == 0o600


def test_without_room_for_a_new_refresh_token_none_is_asked_for(endpoint, tmp_path, monkeypatch):
    """The one there is may be good for one use."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(Trouble, match=r"cannot write .*refresh-token: No space left on device"):
        tokens(endpoint, tmp_path, refresh_token="first").access_token()
    assert endpoint.asked == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, {"error": "invalid_grant", "error_description": "expired"}), "answers 400 invalid_grant: expired"),
        ((502, "<html>"), "answers 502"),
        ((200, "<html>"), "cannot be used"),
        ((200, {"token": "x"}), "no access_token"),
    ],
)
def test_trouble_is_told(endpoint, tmp_path, answer, words):
    endpoint.answers = [answer]
    with pytest.raises(Trouble) as caught:
        tokens(endpoint, tmp_path).access_token()
    assert words in str(caught.value) and "email_gateway_oauth_" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [200, 400])
def test_an_answer_nested_too_deep_is_no_token(endpoint, tmp_path, status):
    endpoint.answers = [(status, "[" * 100_000)]
    with pytest.raises(Trouble, match="the endpoint"):
        tokens(endpoint, tmp_path).access_token()


DEVICE = {"device_code": "d", "user_code": "ABCD", "verification_uri": "https://login.example.com", "expires_in": 60}
PENDING = (400, {"error": "authorization_pending"})
CONSENTED = (200, {"access_token": "one", "refresh_token": "first"})


def consent(endpoint, folder, *answers):
    """With a public client; what it said, and how long it has waited."""
    endpoint.answers = [*answers, (200, {"access_token": "one"})]
    said, waited = [], []
    one = Tokens(
        endpoint.url, {"client_id": "id", "client_secret": ""}, "imap offline_access", folder / "refresh-token", 2
    )
    try:
        one.consent(endpoint.url.replace("/token", "/device"), said.append, waited.append)
    finally:
        endpoint.said, endpoint.waited = said, waited
    return one


def test_somebody_consents_in_a_browser_and_the_token_is_kept(endpoint, tmp_path):
    """RFC 8628; slow_down asks for five seconds more each time."""
    one = consent(endpoint, tmp_path, (200, DEVICE), PENDING, (400, {"error": "slow_down"}), CONSENTED)
    assert "https://login.example.com" in endpoint.said[0] and "ABCD" in endpoint.said[0]
    assert endpoint.waited == [5, 5, 10]
    assert one.access_token() == "one"
    assert endpoint.asked[0] == {"client_id": "id", "scope": "imap offline_access"}
    assert endpoint.asked[-1] == {**endpoint.asked[0], "grant_type": "refresh_token", "refresh_token": "first"}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([(200, DEVICE), (400, {"error": "access_denied"})], "answers 400 access_denied"),
        ([(200, {**DEVICE, "expires_in": 8}), PENDING, PENDING], "has not heard of anybody's consent within 8 s"),
        ([(200, {})], "its answer lacks 'device_code'"),
        ([(200, DEVICE), (200, {"access_token": "one"})], "does --scope lack offline_access"),
        ([(401, {"error": "invalid_client"})], "answers 401 invalid_client"),
    ],
)
def test_why_there_is_no_consent(endpoint, tmp_path, answers, words):
    with pytest.raises(Trouble, match=words):
        consent(endpoint, tmp_path, *answers)
    assert list(tmp_path.iterdir()) == []


def test_before_anybody_has_consented_it_says_how(endpoint, tmp_path):
    with pytest.raises(Trouble, match=r"nobody has consented yet .* sudo zulip-email-gateway oauth --token-endpoint"):
        tokens(endpoint, tmp_path, client_secret="").access_token()


def test_a_poller_whose_token_is_worthless_does_not_disturb(endpoint, tmp_path):
    """Which is when somebody consents again: it tries meanwhile, and is refused."""
    endpoint.answers = [(200, DEVICE), (400, {"error": "invalid_grant"}), CONSENTED]
    poller = tokens(endpoint, tmp_path, refresh_token="revoked")

    def sleep(_: float) -> None:
        with pytest.raises(Trouble, match="invalid_grant"):
            poller.access_token()

    public = Tokens(endpoint.url, {"client_id": "id"}, "mail", tmp_path / "refresh-token", 2)
    public.consent(endpoint.url, lambda _: None, sleep)
    assert "first" in (tmp_path / "refresh-token").read_text()


def test_a_network_that_fails_for_a_moment_does_not_end_it(endpoint, tmp_path):
    consent(endpoint, tmp_path, (200, DEVICE), (503, "busy"), CONSENTED)
    assert "first" in (tmp_path / "refresh-token").read_text()

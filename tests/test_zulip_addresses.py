"""zulip_addresses: what the operator has written, and what Zulip's API says."""

from __future__ import annotations

import base64
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
import zulip_addresses
from email_gateway import address_book
from email_gateway.addresses import NotAGatewayAddress, Pattern, parse
from hypothesis import given
from hypothesis import strategies as st
from test_addresses import TOKEN

OTHER = "f" * 32
PATTERN = "%s@mail.example.com"
SENDS_FROM = ["noreply@mail.example.com", "noreply-{token}@mail.example.com", "noreply@elsewhere.example.com"]


class Api:
    """Zulip's API on loopback, with three channels."""

    channels: ClassVar = {
        "Support": (1, f"support.{TOKEN}.show-sender"),
        "ops": (2, f"ops.{OTHER}"),
        "日本語": (3, OTHER),
    }

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.waits = 0
        self.domain = "mail.example.com"
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer takes 40 ms

            def do_GET(self) -> None:
                login = base64.b64decode(self.headers["Authorization"].partition(" ")[2]).decode()
                api.asked.append((self.headers["Host"], login, self.path))
                status, answer = api.answer(self.path.removeprefix("/api/v1"))
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str) -> tuple[int, dict[str, Any]]:
        where, _, query = path.partition("?")
        arguments = dict(urllib.parse.parse_qsl(query))
        good: dict[str, Any] = {"result": "success", "msg": ""}
        if self.waits:
            self.waits -= 1
            return 429, {"result": "error", "msg": "API usage exceeded rate limit", "retry-after": 0.01}
        if where == "/streams":
            return 200, good | {
                "streams": [{"name": name, "stream_id": -id} for name, (id, _) in self.channels.items()]
            }
        if where == "/get_stream_id" and arguments["stream"] in self.channels:
            return 200, good | {"stream_id": self.channels[arguments["stream"]][0]}
        if match := re.fullmatch(r"/streams/(\d+)/email_address", where):
            local = next(local for number, local in self.channels.values() if number == int(match[1]))
            local = local.replace(TOKEN, "9" * 32) if arguments.get("sender_id") == "9" else local
            return 200, good | {"email": f"{local}@{self.domain}"}
        if where == "/users/alerts-bot%40example.com":
            return 200, good | {"user": {"user_id": 9}}
        return 400, {"result": "error", "msg": f"Invalid channel name '{arguments.get('stream')}'"}


@pytest.fixture
def api():
    made = Api()
    yield made
    made.server.shutdown()
    made.server.server_close()


def resolve(api: Api | None = None, aliases: Any = None, **options: Any) -> dict[str, Any]:
    url = f"http://127.0.0.1:{api.server.server_port}" if api else ""
    login = {"email": "bot@example.com", "key": options.pop("key", "s3cret")}
    zulip = zulip_addresses.Zulip(url, "chat.example.com", version=options.pop("version", "10.1"), **login)
    given = {
        "pattern": PATTERN,
        "channel_senders": {},
        "has_pattern": True,
        "blocked": [],
        "former": [],
        "sends_from": SENDS_FROM,
        "probe": "",
        "alerts": "",
    }
    return zulip_addresses.zulip_addresses(given | {"aliases": aliases or {}} | options, zulip)


def targets(addresses: dict[str, Any]) -> dict[str, str]:
    return {name: target["to"] for name, target in addresses["aliases"].items()}


def test_by_name_and_by_address(api, tmp_path):
    found = resolve(
        api,
        {
            "Support": "#Support",
            "ops": {"to": "#ops", "senders": ["Monitoring@example.com", "@example.net"], "options": ["prefer-text"]},
            "legacy": f"general.{TOKEN}.show-sender",
            "bare": f"{TOKEN}@mail.example.com",
            "alerts": {"to": "#Support", "as": "alerts-bot@example.com"},
        },
        channel_senders={"#ops": ["@example.org"]},
        blocked=["@bad.example.com"],
        former=["old.example.com", "user+%s@mail.example.com"],
    )["addresses"]
    assert found == {
        "aliases": {
            "support": {"to": f"support.{TOKEN}.show-sender", "channel": "#Support"},
            "ops": {"to": f"ops.{OTHER}.prefer-text", "channel": "#ops"},
            "legacy": {"to": f"general.{TOKEN}.show-sender", "channel": "general.0123....show-sender"},
            "bare": {"to": TOKEN, "channel": "0123...@mail.example.com"},
            "alerts": {"to": f"support.{'9' * 32}.show-sender", "channel": "#Support"},
        },
        "senders": {"ops": ["monitoring@example.com", "@example.net"], OTHER: ["@example.org"]},
        "blocked": ["@bad.example.com"],
        "former": ["%s@old.example.com", "user+%s@mail.example.com"],
        "sends_from": SENDS_FROM[:2],
        "probe": "",
        "alerts": "",
    }
    assert {asked[:2] for asked in api.asked} == {("chat.example.com", "bot@example.com:s3cret")}
    # The program understands all of it.
    (tmp_path / "addresses.json").write_text(json.dumps(found))
    book = address_book.load(tmp_path / "addresses.json", Pattern.parse(PATTERN))
    assert book.parse("ops@old.example.com").token == OTHER


def test_nothing_asks_nobody():
    found = resolve(aliases={"legacy": f"general.{TOKEN}"}, key="")["addresses"]
    assert targets(found) == {"legacy": f"general.{TOKEN}"} and found["senders"] == {}


def test_an_alias_for_each_channel(api):
    api.channels = api.channels | {"support!": (4, f"support.{'e' * 32}"), "noreply": (5, f"noreply.{'d' * 32}")}
    found = resolve(api, "channels")
    # stream_id is -id: the one made last comes first.
    assert targets(found["addresses"]) == {"ops": f"ops.{OTHER}", "support": f"support.{'e' * 32}"}
    assert [remark.partition(" has no alias")[0] for remark in found["remarks"]] == ["#noreply", "#日本語", "#Support"]
    assert "support is that of #support!, which is older" in found["remarks"][2]


def test_zulip_asks_for_patience(api):
    api.waits = 2
    assert resolve(api, {"a": "#ops"})["addresses"]["aliases"] == {"a": {"to": f"ops.{OTHER}", "channel": "#ops"}}


@pytest.mark.parametrize(
    ("aliases", "words"),
    [
        ({TOKEN: "#ops"}, f"email_gateway_aliases: {TOKEN} looks like one of Zulip's own addresses"),
        ({f"mm{TOKEN}": "#ops"}, "looks like one of Zulip's own"),
        ({"postmaster": "#ops"}, "email_gateway_aliases: postmaster is reserved"),
        ({"Abuse": "#ops"}, "is reserved"),
        ({"root": "#ops"}, "is reserved"),
        ({"noreply": "#ops"}, "an address that Zulip sends from"),
        ({"noreply-a": "#ops"}, "an address that Zulip sends from"),
        ({"a b": "#ops"}, "is no local part"),
        ({"a+b": "#ops"}, "is no local part"),
        ({".a": "#ops"}, "is no local part"),
        ({"support": "#ops", "Support": "#ops"}, "email_gateway_aliases: support appears twice"),
        (
            {"a": "#nowhere"},
            "email_gateway_aliases: a: Zulip's API answers 400 \"Invalid channel name 'nowhere'\" to bot@",
        ),
        ({"a": "ops"}, 'email_gateway_aliases: a leads to "ops", which is no channel\'s address at mail.example.com'),
        ({"a": f"mm{TOKEN}"}, 'leads to "mmTOKEN", which is no channel'),
        ({"a": f"general.{TOKEN}@x.org"}, 'leads to "general.TOKEN@x.org", which is no channel'),
        ({"a": {"to": "#ops", "as": "nobody@example.com"}}, "Zulip's API answers 400"),
        ({"a": {"to": f"general.{TOKEN}", "as": "b@example.com"}}, 'has as:, for which "to" has to be the name'),
        ({"a": {"to": "#ops", "options": ["x"]}}, 'has options: ["x"]; Zulip knows show-sender'),
        ({"a": {"to": "#ops", "senders": "x@y"}}, 'has senders: "x@y"; write a list'),
        ({"a": {"to": "#ops", "senders": ["x"]}}, 'has "x"; write "user@example.com"'),
        ({"a": {"to": "#ops", "sender": ["x"]}}, 'write "#channel", an address, or to: with'),
        ({"a": 5}, "email_gateway_aliases: a is 5; write"),
        ("channel", 'email_gateway_aliases is "channel"; write a name for each'),
        (["a"], "email_gateway_aliases is"),
    ],
)
def test_no_alias(api, aliases, words):
    with pytest.raises(zulip_addresses.Unfit) as caught:
        resolve(api, aliases)
    assert words in str(caught.value)
    assert isinstance(aliases, str) or TOKEN in str(aliases)[:40] or TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocked": ["bad.example.com"]}, 'email_gateway_blocked_senders has "bad.example.com"'),
        ({"former": ["mail"]}, 'email_gateway_former_mailnames has "mail"; write'),
        ({"former": ["Old.example.com"]}, "in lower case"),
        ({"former": ["mail.example.com"]}, "which is the current one"),
        (
            {"channel_senders": {"#nowhere": ["@x.org"]}},
            "email_gateway_channel_senders: #nowhere: Zulip's API answers 400",
        ),
        ({"channel_senders": {"#ops": "@x.org"}}, 'email_gateway_channel_senders: #ops is "@x.org"; write a list'),
        ({"aliases": {"a": "#ops"}, "key": ""}, "needs Zulip's API, but email_gateway_zulip_api_key is not set"),
        ({"aliases": {"a": "#ops"}, "version": "7.5"}, "Zulip 7.5 does not tell channels' addresses"),
        ({"aliases": {"a": {"to": "#ops", "as": "b@c"}}, "version": "9.4"}, "needs Zulip 10 or later; this is 9.4"),
    ],
)
def test_other_faults(api, options, words):
    with pytest.raises(zulip_addresses.Unfit) as caught:
        resolve(api, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize("aliases", [{"a": "#ops", "b": TOKEN}, "channels"])
def test_zulip_with_another_pattern(api, aliases):
    """Before it was restarted, at the first run, and when nobody has set it where Zulip is."""
    api.domain = "other.example.com"
    with pytest.raises(
        zulip_addresses.Unfit, match=r"Zulip tells an address at other.example.com, but its EMAIL_GATEW"
    ):
        resolve(api, aliases)
    found = resolve(api, aliases, channel_senders={"#ops": ["@x.org"]}, has_pattern=False)
    assert found["waits"] and found["addresses"]["senders"] == {}
    assert targets(found["addresses"]) == ({"b": TOKEN} if isinstance(aliases, dict) else {})
    with pytest.raises(zulip_addresses.Unfit, match="Zulip's API answers 400"):
        resolve(api, {"a": "#nowhere"}, has_pattern=False)


def test_zulip_does_not_answer(api, monkeypatch):
    monkeypatch.setattr(zulip_addresses, "RESTART", 0.1)
    api.server.shutdown()
    api.server.server_close()
    with pytest.raises(zulip_addresses.Unfit, match=r"http://127.0.0.1:\d+ does not answer; look at"):
        resolve(api, {"a": "#ops"})
    with pytest.raises(zulip_addresses.Unfit, match="set email_gateway_zulip_api_url"):
        resolve(None, {"a": "#ops"})


def test_zulip_is_being_restarted(api, monkeypatch):
    answer, broken = api.answer, [(502, "<html>"), (502, "<html>")]
    monkeypatch.setattr(api, "answer", lambda path: broken.pop() if broken else answer(path))
    assert resolve(api, {"a": "#ops"})["addresses"]["aliases"] == {"a": {"to": f"ops.{OTHER}", "channel": "#ops"}}
    broken += [(502, "<html>")] * 9
    monkeypatch.setattr(zulip_addresses, "RESTART", 0.1)
    with pytest.raises(zulip_addresses.Unfit, match=r"http://127.0.0.1:\d+ answers 502 without JSON"):
        resolve(api, {"a": "#ops"})


@given(st.from_regex(r"\A[a-f0-9.+mx_-]{30,40}\Z"))
def test_the_grammar_is_the_programs(local):
    try:
        is_channel = not parse(f"{local}@mail.example.com", Pattern.parse(PATTERN)).is_reply
    except NotAGatewayAddress:
        is_channel = False
    assert bool(zulip_addresses.CHANNEL.fullmatch(local)) >= is_channel


@pytest.mark.parametrize(
    ("text", "probe"),
    [
        ("", ""),
        ("Ops", "ops@mail.example.com"),
        ("ops@mail.example.com", "ops@mail.example.com"),
        (f"general.{TOKEN}", f"general.{TOKEN}@mail.example.com"),
    ],
)
def test_where_probes_are_sent(text, probe):
    assert resolve(aliases={"ops": TOKEN}, probe=text)["addresses"]["probe"] == probe


@pytest.mark.parametrize("text", ["nobody", "ops@elsewhere.example.com", f"mm{TOKEN}"])
def test_where_none_can_be_sent(text):
    with pytest.raises(zulip_addresses.Unfit) as caught:
        resolve(aliases={"ops": TOKEN}, probe=text)
    assert "neither an alias nor a channel's address at mail.example.com" in str(caught.value)
    assert TOKEN not in str(caught.value)

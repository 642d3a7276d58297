"""A line in front of a mail's text, as Python's email package reads it, with which Zulip does."""

from __future__ import annotations

import base64
import email
import email.policy

import pytest
from email_gateway.mail_parts import Unsure
from email_gateway.marked import marked
from mails import mail, spool, text

LINE = "Warning: it may be forged; example.net says so."
PLAIN, HTML = f"**{LINE}**", f"<p><b>{LINE}</b></p>"


def texts(raw: bytes) -> list[str]:
    """The first plain and the first HTML text, as Zulip reads them (zerver/lib/email_mirror.py)."""
    message = email.message_from_bytes(raw, policy=email.policy.default)
    found: dict[str, str] = {}
    for part in message.walk():
        payload = part.get_payload(decode=True)
        if part.get_content_type() in ("text/plain", "text/html") and isinstance(payload, bytes):
            found.setdefault(part.get_content_type(), payload.decode(part.get_content_charset() or "ascii", "ignore"))
    return list(found.values())


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
@pytest.mark.parametrize(
    ("header", "body", "decoded"),
    [
        ("", b"Hello\n", "Hello"),
        ("Content-Type: text/plain; charset=utf-8\n", "Grüße\n".encode(), "Grüße"),
        ("Content-Type: text/plain; charset=iso-8859-1\n", "Grüße\n".encode("latin-1"), "Grüße"),
        ("Content-Transfer-Encoding: QUOTED-PRINTABLE\n", b"Gr=\n=3D\n", "Gr="),
        ("Content-Transfer-Encoding: base64\n", base64.encodebytes(b"Hello"), "Hello"),
        ("Content-Transfer-Encoding:  Base64\n", b"SGVs\nbG8=\n", "Hello"),
    ],
)
def test_plain_text(tmp_path, header, body, decoded, ends):
    raw = (f"Subject: x\n{header}\n".encode() + body).replace(b"\n", ends)
    [found] = texts(text(marked(mail(raw), LINE, spool(tmp_path))))
    first, _, rest = found.replace("\r\n", "\n").partition("\n\n")
    assert (first, rest.strip()) == (PLAIN, decoded)


@pytest.mark.parametrize("encoding", ["7bit", "base64"])
def test_html(tmp_path, encoding):
    body = b"<!DOCTYPE html><html><body>Hello</body></html>\n"
    body = base64.encodebytes(body) if encoding == "base64" else body
    raw = b"Content-Type: text/html\nContent-Transfer-Encoding: " + encoding.encode() + b"\n\n" + body
    [found] = texts(text(marked(mail(raw), LINE, spool(tmp_path))))
    assert found.startswith(HTML) and "Hello" in found


def multipart(*parts: str, kind: str = "alternative") -> bytes:
    inside = "".join(f"--b\n{part}\n" for part in parts)
    return f"Content-Type: multipart/{kind}; boundary=b\n\npreamble\n{inside}--b--\nepilogue\n".encode()


def test_the_first_of_each_kind_and_nothing_else(tmp_path):
    parts = ["\nHello\n", "Content-Type: text/html\n\n<p>Hello</p>", "\nanother one", "Content-Type: image/png\n\nx"]
    raw = multipart(*parts)
    made = text(marked(mail(raw), LINE, spool(tmp_path)))
    assert made.count(LINE.encode()) == 2
    assert [one.startswith(line) for one, line in zip(texts(made), [PLAIN, HTML], strict=True)] == [True, True]
    taken_out = made.replace(f"{PLAIN}\r\n\r\n".encode(), b"").replace(f"{HTML}\r\n".encode(), b"")
    assert taken_out == raw


def test_a_report_of_a_delivery(tmp_path):
    parts = ["\nHello\n", "Content-Type: message/delivery-status\n\nReporting-MTA: dns; x\n\nAction: failed\n"]
    made = text(marked(mail(multipart(*parts, kind="report")), LINE, spool(tmp_path)))
    assert made.count(LINE.encode()) == 1 and texts(made)[0].startswith(PLAIN)


def test_a_text_with_nothing_in_it_stays_so(tmp_path):
    """Zulip takes the HTML then."""
    made = text(marked(mail(multipart("\n \n", "Content-Type: text/html\n\n<p>Hello</p>")), LINE, spool(tmp_path)))
    plain, html = texts(made)
    assert plain.strip() == "" and html.startswith(HTML)


@pytest.mark.parametrize(
    "raw",
    [
        b"Content-Transfer-Encoding: x-uuencode\n\nbegin 644 x\n#0V%T\n`\nend\n",
        b"Content-Transfer-Encoding: base64 \n\nHello\n",
        b"Content-Transfer-Encoding: base64 (x)\n\nHello\n",
        b"Content-Type: text/plain; charset=utf-16\n\n" + "Hello".encode("utf-16"),
        b"Content-Type: text/plain; charset=nonsense\n\nHello\n",
        b"Content-Type: text/plain; charset=rot13\n\nHello\n",
        b"Content-Type: image/png\n\nx\n",
        b"Content-Type: text/plain\n\n",
        # Python decodes it as a whole, or not at all.
        b"Content-Transfer-Encoding: base64\n\nPlease pay the invoice, your boss!xx\n",
        b"Content-Transfer-Encoding: base64\n\n" + b"QUJD\n" * 1_000_000,
        b"Content-Type: text/plain; charset*=us-ascii''utf-16le; charset=us-ascii\n\nHello\n",
        b"Content-Type: text/plain; charset*0*=us-ascii''utf-; charset*1=16; charset=utf-8\n\nHello\n",
        b"Content-Type: text/plain; charset*=us-ascii''%00\n\nHello\n",
        b"Content-Type: text/plain; charset*=utf-8''us-ascii; charset*1=utf-16\n\nHello\n",
        b"Content-Type: multipart/mixed; boundary*=utf-8''%C3%A9\n\nHello\n",
        multipart("Content-Type: multipart/mixed; boundary=b--\n\n--b--\n\nHello\n--b----\n"),
        multipart("\nHello", "Content-Type: message/partial\n\nHello"),
        multipart("Content-Type: message/delivery-status\n\nx: y\n", "\nHello"),
        multipart("Content-Type: message/rfc822\n\nSubject: x\n\nHello"),
        multipart(*["\nHello"] * 200),
    ],
)
def test_where_zulip_might_not_see_it_there_is_none(tmp_path, raw):
    with pytest.raises(Unsure):
        marked(mail(raw), LINE, spool(tmp_path))


def test_what_is_blank_in_one_character_set_may_be_text_in_another(tmp_path):
    """Zulip reads charset* and not charset."""
    kind = "Content-Type: text/plain; charset*=us-ascii''utf-8; charset=us-ascii\nContent-Transfer-Encoding: 8bit\n\n"
    made = text(
        marked(mail(multipart(f"{kind}Оплатите", "Content-Type: text/html\n\n<p>Hello")), LINE, spool(tmp_path))
    )
    assert [one.startswith(line) for one, line in zip(texts(made), [PLAIN, HTML], strict=True)] == [True, True]


@pytest.mark.parametrize("body", ["<!-- a --!> Pay now <!-- -->", "<!--> Pay now <!-- -->", "<p></p>"])
def test_html_that_shows_nothing_has_the_line_as_well(tmp_path, body):
    """Whether it shows nothing is for others to say."""
    made = text(marked(mail(multipart("\nHello", f"Content-Type: text/html\n\n{body}")), LINE, spool(tmp_path)))
    assert texts(made)[1].startswith(HTML)

"""Unusual mail: what reaches Zulip is what came, or it was refused with a reason.

These tests run for each generation of Zulip, see the files that import them.
"""

from __future__ import annotations

import base64
import email
import re

import pytest
import testhosts
from attacks import outside
from conftest import ZulipHost, wait

BASE = b"From: user@sender.example.org\r\nSubject: %s\r\n"
# What Postfix itself changes: see docs/architecture.md.
BY_POSTFIX = {
    # What is no header field ends the header.
    "a name with blanks": (b"X Name: y\r\n", b"\r\nX Name: y\r\n"),
    # cleanup_replace_stray_cr_lf, see postconf(5).
    "a lone CR": (b"a\rb", b"a b"),
}
PNG = base64.encodebytes(bytes(range(256)) * 4).replace(b"\n", b"\r\n")
# What reaches Zulip is what came, or it was refused with these words.
UNUSUAL: dict[str, tuple[bytes, str]] = {
    "NUL": (BASE + b"\r\na\0b text\r\n", ""),
    "8-bit header": (BASE + b"X-Name: J\xf6rg \xe6\x97\xa5\r\n\r\ntext\r\n", ""),
    "8-bit body": (BASE + b"\r\nJ\xf6rg \xff\r\n", ""),
    "a line of a megabyte": (BASE + b"\r\n" + b"x" * 1_000_000 + b"\r\n", "line"),
    "no body": (BASE, "no text"),
    "no body, but an empty line": (BASE + b"\r\n", "no text"),
    "a name with blanks": (BASE + b"X Name: y\r\nX-Other : z\r\n\r\ntext\r\n", ""),
    "broken base64": (BASE + b"Content-Transfer-Encoding: base64\r\n\r\nQQ=\r\nQ*&^\r\n", ""),
    "unknown charset": (BASE + b"Content-Type: text/plain; charset=klingon\r\n\r\ntext\r\n", ""),
    "dots": (BASE + b"\r\n.\r\n..\r\n. a\r\ntext\r\n", ""),
    "a lone CR": (BASE + b"\r\na\rb\r\ntext\r\n", ""),
    "blanks at the ends": (BASE + b"X-Blank:   \r\n\r\ntext  \t \r\n \r\n\r\n\r\n", ""),
    "a From line": (BASE + b"\r\nFrom here on text\r\n>From there\r\n", ""),
    "signed": (
        BASE
        + b'Content-Type: multipart/signed; micalg=pgp-sha256; protocol="application/pgp-signature"; boundary=s\r\n\r\n'
        b"--s\r\nContent-Type: text/plain\r\n\r\ntext  \r\n--s\r\n"
        b"Content-Type: application/pgp-signature; name=signature.asc\r\n\r\nABC\r\n--s--\r\n",
        "",
    ),
    "received often": (BASE + b"Received: by x.example.org\r\n" * 60 + b"\r\ntext\r\n", "too many hops"),
    "with a file": (
        BASE + b"Content-Type: multipart/mixed; boundary=m\r\n\r\n--m\r\n\r\ntext\r\n--m\r\nContent-Type: image/png\r\n"
        b"Content-Disposition: attachment; filename=a.png\r\nContent-Transfer-Encoding: base64\r\n\r\n"
        + PNG
        + b"--m--\r\n",
        "",
    ),
}


def taken(mx: ZulipHost, subject: str) -> list[bytes]:
    """The mails with this subject as Zulip was given them."""
    with testhosts.zulip_database(mx.container) as database:
        rows = database.execute("SELECT msg_base64 FROM taken").fetchall()
    return [content for (text,) in rows if subject.encode() in (content := base64.b64decode(text))]


def lines_of(content: bytes) -> bytes:
    """With LF, and without the Received field that Postfix adds and the fields of Zulip's own server."""
    content = content.replace(b"\r\n", b"\n")
    content = re.sub(rb"\A(?:Received: .*\n(?:[ \t].*\n)*)", b"", content)
    return re.sub(rb"(?m)^X-(?:RcptTo|MailFrom|Peer): .*\n", b"", content)


def folded_anew(content: bytes) -> bytes:
    """Zulip's own mail server writes out what it has read (Python's email package), and folds the header anew."""
    header, empty, body = content.partition(b"\n\n")
    return re.sub(rb"(?m)[ \t]+$", b"", re.sub(rb"[ \t]*\n[ \t]+", b" ", header)) + empty + body


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_reaches_zulip_is_what_came(mx, subject, name):
    content, words = UNUSUAL[name]
    mail = content.replace(b"%s", subject.encode(), 1)
    script = f"""
try:
    with smtplib.SMTP(SERVER, 25, timeout=60) as server:
        server.sendmail("user@sender.example.org", [{mx.address()!r}], {mail!r})
    print(json.dumps(""))
except smtplib.SMTPException as error:
    print(json.dumps(repr(error)))"""
    why = outside(mx, script)
    assert wait(lambda: taken(mx, subject) or mx.sh("zulip-email-gateway quarantine list") or why, 30), mx.journal()
    why += mx.sh("zulip-email-gateway quarantine list")
    if why:
        assert words and words in why, why
        mx.sh("zulip-email-gateway quarantine purge --all")
        return
    [got] = taken(mx, subject)
    was, becomes = BY_POSTFIX.get(name, (b"", b""))
    expected = mail.replace(was, becomes) if was else mail
    if mx.version == 11 and name == "a line of a megabyte":  # SMTP allows no such line
        assert email.message_from_bytes(got).get_payload(decode=True) == expected.partition(b"\r\n\r\n")[2]
    elif mx.version == 11:
        assert folded_anew(lines_of(got)) == folded_anew(lines_of(expected))
    else:
        assert lines_of(got) == lines_of(expected)
    mx.wait_for(subject)

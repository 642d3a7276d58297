"""A message reaches Zulip's SMTP server as it is, or in another form that reads the same.

However hostile it is: test_bombs.py.
"""

from __future__ import annotations

import email
import email.policy
import io
import re
import smtplib
import socket
from base64 import b64encode
from email.message import EmailMessage
from itertools import count

import pytest
from aiosmtpd.controller import Controller
from email_gateway import mime_structure, wire_format
from email_gateway.wire_format import write_wire_format
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

PARAGRAPH = "Grüße aus Zürich — " * 200  # 5,000 octets of UTF-8
LINK = "https://example.com/" + "a1-_=.%" * 430  # 3,000 characters
OVERLONG = b"x" * 999
PIECES = (1, 2, 3, 7, 998, 999, 1000, 128 * 1024)


def on_the_wire(message: bytes, *sizes: int) -> bytes:
    """What write_wire_format writes: the same, whichever of these sizes is read at a time (octets)."""
    texts = {}
    for size in sizes or (wire_format.PIECE,):
        target = io.BytesIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wire_format, "PIECE", size)
            write_wire_format(io.BytesIO(message), target)
        texts[size] = target.getvalue()
    assert len(set(texts.values())) == 1, texts
    return texts.popitem()[1]


def convert(message: bytes, *sizes: int) -> bytes:
    """The same, with the dots taken away; checks what is true of all of it."""
    text = on_the_wire(message, *sizes)
    assert not text or text.endswith(b"\r\n")
    lines = text.split(b"\r\n")
    assert not any(b"\r" in line or b"\n" in line for line in lines)
    assert not any(line.startswith(b".") and not line.startswith(b"..") for line in lines)
    lines = [line.removeprefix(b".") for line in lines]
    assert max(map(len, lines)) <= 998
    return b"\r\n".join(lines)


def crlf(text: bytes) -> bytes:
    return re.sub(rb"\r\n|\r|\n", b"\r\n", text)


def parse(message: bytes) -> EmailMessage:
    return email.message_from_bytes(message, policy=email.policy.default)  # type: ignore[return-value]


def squeezed(text: str | bytes) -> str:
    text = text if isinstance(text, str) else text.decode("utf-8", "surrogateescape")
    return re.sub(r"[ \t\r\n]+", "", text)


def view(message: bytes) -> list[tuple]:
    """All that a reader of a message may see, white space aside."""
    return [
        (
            squeezed(part.get_content_type()),
            [
                (name, squeezed(value))
                for name, value in part.raw_items()
                if name.lower() != "content-transfer-encoding"
            ],
            squeezed(part.get_payload(decode=True) or b""),
            squeezed(part.preamble or ""),
            squeezed(part.epilogue or ""),
        )
        for part in email.message_from_bytes(message).walk()
    ]


def multipart(*parts: bytes, boundary: bytes = b"b", kind: bytes = b"mixed") -> bytes:
    start = b"Content-Type: multipart/" + kind + b'; boundary="' + boundary + b'"\r\n\r\n'
    return (
        start + b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"
    )


# A message without overlong lines.


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"", b""),
        (b"\n", b"\r\n"),
        (b".", b"..\r\n"),
        (b"a\r\nb\nc\rd", b"a\r\nb\r\nc\r\nd\r\n"),
        (b"\r\r\n\n\n\r", b"\r\n\r\n\r\n\r\n\r\n"),
        (b".a\n..\r.b\r\n.\n", b"..a\r\n...\r\n..b\r\n..\r\n"),
        (b"a.b\n .c\n", b"a.b\r\n .c\r\n"),
        (
            b"A: b\n\n" + b"x" * 998 + b"\n." + b"y" * 997,
            b"A: b\r\n\r\n" + b"x" * 998 + b"\r\n.." + b"y" * 997 + b"\r\n",
        ),
    ],
)
def test_line_ends_and_dots(message, expected):
    assert on_the_wire(message, *PIECES) == expected


def test_nothing_else_changes():
    message = multipart(b"A:  \t b\r\n\t\r\n\r\n\0\xff \r\n", b"Content-Transfer-Encoding: 8bit\r\n\r\n\xc3\xa4 \r\n")
    assert convert(message) == message


def test_it_is_read_from_its_start():
    message, target = io.BytesIO(b"a\r\nb\r\n"), io.BytesIO()
    message.read()
    write_wire_format(message, target)
    assert target.getvalue() == b"a\r\nb\r\n"


# A part with an overlong line.


@pytest.mark.parametrize("encoding", ["", "7bit", "8bit", "BINARY", "8-bit"])
@pytest.mark.parametrize("text", [PARAGRAPH, LINK, f"short\n{LINK}\n\n.\n{PARAGRAPH}\n"])
def test_text_reads_the_same(encoding, text):
    field = f"content-transfer-encoding: {encoding}\n" if encoding else ""
    message = parse(convert(f"{field}Content-Type: text/plain; charset=utf-8\n{field}\n{text}".encode(), *PIECES))
    assert message.get_content() == text.replace("\n", "\r\n")
    assert message.get_all("Content-Transfer-Encoding") == ["base64"]
    assert max(map(len, message.get_payload().splitlines())) == 76


def test_only_the_part_with_the_line_changes():
    parts = [
        b"Content-Type: text/plain\r\n\r\n--\r\n.\r\n\r\n" + b"x" * 998,
        b"Content-Type: text/html; charset=utf-8\r\nX: y\r\n\r\n<p>" + PARAGRAPH.encode() + b"\r\n",
        b"Content-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\niVBORw0KGgo=\r\n",
    ]
    message, written = multipart(*parts), convert(multipart(*parts), *PIECES)
    start, end = message.index(parts[1]), message.index(parts[1]) + len(parts[1])
    assert written.startswith(message[:start]) and written.endswith(message[end:])
    changed = written[start : len(written) - (len(message) - end)]
    assert changed.startswith(
        b"Content-Type: text/html; charset=utf-8\r\nX: y\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    )
    assert [part.get_content() for part in parse(written).iter_parts()] == [
        part.get_content() for part in parse(message).iter_parts()
    ]


@pytest.mark.parametrize("text", [OVERLONG, OVERLONG + b"\r\n", OVERLONG + b"\r\n\r\n", b"x" * 57 * 20])
def test_what_is_encoded_ends_before_the_line_end_of_the_boundary(text):
    written = convert(multipart(b"\r\n" + text, b"\r\nlast"))
    first, last = email.message_from_bytes(written).get_payload()
    assert first.get_payload(decode=True) == text
    assert last.get_payload() == "last"
    assert not first.get_payload().endswith("\n")


INNER = b"Content-Type: multipart/%s; boundary=b\r\n\r\n"
PART = b"\r\nA: b\r\n\r\n" + OVERLONG


@pytest.mark.parametrize(
    "message",
    [
        multipart(b"Content-Transfer-Encoding: base64", PART, boundary=b"b:c"),
        multipart(multipart(b"\r\nx", boundary=b"c"), PART),
        multipart(multipart(b"\r\nx", boundary=b"c").replace(b"--c--\r\n", b""), PART),
        multipart(INNER % b"digest" + b"x", PART),
        multipart(PART, kind=b"digest"),
        multipart(b"\r\nx", PART).replace(b"--b", b"--b \t") + b"epilogue\r\n",
    ],
)
def test_parts_are_those_that_python_sees(message):
    written = convert(message, *PIECES)
    assert view(written) == view(message)
    *_, part = email.message_from_bytes(written).walk()
    assert part["Content-Transfer-Encoding"] == "base64"


def test_signed_text_and_its_signature_read_the_same():
    signature = b"Content-Type: application/pgp-signature\r\n\r\n-----BEGIN PGP SIGNATURE-----\r\n\r\niQ==\r\n"
    text = b"Content-Type: text/plain; charset=utf-8\r\n\r\n" + PARAGRAPH.encode()
    message = multipart(text, signature, kind=b"signed; protocol=x")
    assert convert(message).endswith(message[message.index(signature) :])
    assert view(convert(message)) == view(message)


def test_base64_is_cut():
    code = b64encode(PARAGRAPH.encode())
    written = convert(b"Content-Transfer-Encoding: Base64\nContent-Type: text/plain; charset=utf-8\n\n" + code, *PIECES)
    assert written.count(b"\r\n" + code[:998] + b"\r\n" + code[998:1996] + b"\r\n") == 1
    assert parse(written).get_content() == PARAGRAPH


def test_quoted_printable_gets_soft_line_breaks():
    for shift in ("", "a", "ab"):
        code = shift + "".join(f"={octet:02X}" for octet in PARAGRAPH.encode())
        head = "Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: quoted-printable\n\n"
        written = convert((head + code).encode(), *PIECES)
        assert parse(written).get_content().strip() == shift + PARAGRAPH.strip()
        lines = written.split(b"\r\n\r\n")[1].split(b"\r\n")[:-1]
        assert not [line for line in lines if re.search(rb"=.?=$", line)]


@pytest.mark.parametrize("encoding", [b"base64", b"quoted-printable"])
def test_no_cut_makes_a_boundary(encoding):
    for length in (997, 998):
        part = b"Content-Transfer-Encoding: " + encoding + b"\r\n\r\n" + b"x" * length + b"--b\r\n"
        assert len(parse(convert(multipart(part))).get_payload()) == 1


def test_what_an_attached_message_contains_is_encoded():
    inner = b"Subject: s\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n" + LINK.encode()
    attached = b"Content-Type: message/rfc822\r\nContent-Transfer-Encoding: 7bit\r\n\r\n"
    for message in (multipart(attached + inner, b"\r\nx"), multipart(b"\r\n" + inner, kind=b"digest")):
        written = convert(message, *PIECES)
        assert view(written) == view(message)
        assert parse(written).get_payload()[0]["Content-Transfer-Encoding"] in (None, "7bit")
        assert parse(written).get_payload()[0].get_payload()[0].get_content().strip() == LINK


@pytest.mark.parametrize("encoding", [b"x-uuencode", b"uuencode", b"quoted-printable (a comment)"])
def test_an_encoding_in_doubt_is_left(encoding):
    head = b"Content-Transfer-Encoding: " + encoding + b"\r\n\r\n"
    assert convert(head + OVERLONG) == head + OVERLONG[:998] + b"\r\n x\r\n"


# An overlong line in a header.


def test_a_header_is_folded_before_white_space():
    references = " ".join(f"<{number}@example.com>" for number in range(300))
    written = convert(f"References: {references}\nSubject: s\n\nbody\n".encode(), *PIECES)
    assert written.startswith(b"References: <0@example.com> <1@")
    assert parse(written)["References"] == references
    assert written.endswith(b"\r\nSubject: s\r\n\r\nbody\r\n")


def test_a_header_is_folded_before_a_tab():
    written = convert(b"A: " + b"x" * 900 + b"\t" + b"y" * 900 + b"\n\nbody\n")
    assert written == b"A: " + b"x" * 900 + b"\r\n\t" + b"y" * 900 + b"\r\n\r\nbody\r\n"


def test_without_white_space_it_is_cut_as_by_postfix():
    written = convert(b"Subject: " + b"x" * 3000 + b"\n\nbody\n", *PIECES)
    first = b"Subject: " + b"x" * 989
    rest = b"x" * (3000 - 989)
    assert written == b"\r\n ".join([first, rest[:997], rest[997:1994], rest[1994:]]) + b"\r\n\r\nbody\r\n"
    written = convert(b"Subject: " + "ä".encode() * 1500 + b"\n\nbody\n", *PIECES)
    assert [line.decode().strip("ä") for line in written.split(b"\r\n")[:4]] == ["Subject: ", " ", " ", " "]


SPACE = b" " * 1200


@pytest.mark.parametrize(
    "header",
    [
        b"Subject:" + SPACE,
        b"Subject:" + SPACE + b"a",
        b"Subject: a" + SPACE + b"b",
        b"Subject: a" + SPACE,
        b"Subject: " + b"a" * 998 + b" ",
        b"Subject: " + b"a" * 989 + b" \t ",
        b"Subject: " + b"a" * 988 + b"  b",
        b"Subject: a\n" + b"\t" * 998 + b"b",
        b"Subject: a\n" + SPACE + b"X-RcptTo: b",
        b"Subject: " + b"a" * 990 + SPACE + b"b" + SPACE + b"c" * 1200,
    ],
)
def test_folding_leaves_no_line_of_white_space(header):
    for size in PIECES:  # by which the white space that is left differs
        written = convert(header + b"\nTo: b\n\nbody\n", size)
        assert not re.search(rb"\n[ \t]+\r", written)
        assert view(written) == view(header + b"\nTo: b\n\nbody\n")


def test_a_header_line_of_white_space_stays_one():
    assert convert(b"A: b\n" + SPACE + b"\nC: d\n\nbody\n") == b"A: b\r\n \r\nC: d\r\n\r\nbody\r\n"


@pytest.mark.parametrize("before", [b"", b"A: b\n" * 100_000, b"--b: c\n"])
def test_no_cut_makes_a_header_field(before):
    field = b"A: " + b"b" * 995
    written = convert(before + field + b"X-RcptTo: c\n\nbody\n")
    assert b"\r\n" + field + b"\r\n X-RcptTo: c\r\n\r\nbody\r\n" in b"\r\n" + written
    assert parse(written)["X-RcptTo"] is None


# What is no proper MIME.


@pytest.mark.parametrize(
    "message",
    [
        b"Content-Type: multipart/mixed\n\n--b\n\n%s\n--b--\n",
        b"Content-Type: multipart/mixed; boundary=c\n\n--b\n\n%s\n--b--\n",
        b"Content-Type: multipart/mixed; boundary=b\n\n%s\n--b--\n",
        b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\nx\n--b--\n%s\n--b\n",
        b"Content-Type: multipart/mixed; boundary=b\n\n--b\nno header\n\n%s\n--b--\n",
        b"no header\n\n%s",
        b"Content-Type: message/delivery-status\n\nA: %s\n\nC: d\n",
    ],
)
def test_broken_structures_are_cut(message):
    words = message % (b"word " * 400)
    written = convert(words, *PIECES)
    assert written == crlf(re.sub(rb" (?=\n|$)", b"", written))  # no other white space is lost
    assert written.replace(b"\r\n word", b" word").split() == words.split()
    text = message % ("ä".encode() * 1000)
    written = convert(text, *PIECES)
    assert written.replace(b"\r\n ", b"") == crlf(text if text.endswith(b"\n") else text + b"\n")
    written.decode()  # no character is cut


def test_a_multipart_without_end_has_parts():
    message = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\n" + OVERLONG
    (part,) = email.message_from_bytes(convert(message)).get_payload()
    assert part.get_payload(decode=True) == OVERLONG
    assert part["Content-Transfer-Encoding"] == "base64"


@pytest.mark.parametrize(
    ("module", "limit"),
    [(mime_structure, "MAX_DEPTH"), (wire_format, "MAX_PARTS"), (mime_structure, "_MAX_HEADER")],
)
def test_beyond_the_limits_it_is_cut(monkeypatch, module, limit):
    deep = multipart(multipart(b"A: b\r\n" * 9 + b"\r\n" + OVERLONG, boundary=b"c"), boundary=b"b")
    assert b"base64" in convert(deep)
    monkeypatch.setattr(module, limit, 1)
    monkeypatch.setattr(wire_format, "PIECE", 1)
    assert convert(deep) == deep.replace(OVERLONG, OVERLONG[:998] + b"\r\n x")


# Whatever the message is.

lines = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    st.builds(str.__mul__, st.sampled_from(["ä", "word ", "=", "-", ".", "€-", " "]), st.integers(300, 1200)),
    st.just(LINK),
)
texts = st.lists(lines, max_size=6).map("\n".join)
identity = st.sampled_from(["", "Content-Transfer-Encoding: 8bit\n", "content-transfer-encoding:\n\t7bit\nX: y\n"])
subjects = st.builds(lambda text: "Subject: s" + re.sub(r"\s", " ", text) + "\n", texts)
START = "Content-Type: text/plain; charset=utf-8\n"


def quoted(text: str) -> str:
    coded = re.compile(r"[^!-<>-~ \n]|=| (?=\n|$)")
    return coded.sub(lambda found: "".join(f"={octet:02X}" for octet in found[0].encode()), text)


leaves = st.one_of(
    st.builds(lambda subject, field, text: START + subject + field + "\n" + text, subjects, identity, texts),
    texts.map(lambda text: START + "Content-Transfer-Encoding: base64\n\n" + b64encode(text.encode()).decode()),
    texts.map(lambda text: START + "Content-Transfer-Encoding: quoted-printable\n\n" + quoted(text)),
)
numbers = count()


def mixed(parts: list[str], preamble: str, kind: str) -> str:
    boundary = f"=_{next(numbers)}:b"
    head = f'Content-Type: multipart/{kind};\n boundary="{boundary}"\n\n{preamble}\n'
    return head + "".join(f"--{boundary}\n{part}\n" for part in parts) + f"--{boundary}--\n"


messages = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(mixed, st.lists(inner, min_size=1, max_size=3), lines, st.sampled_from(["mixed", "alternative"])),
        st.builds(mixed, inner.map("\n{}".format).map(lambda part: [part]), lines, st.just("digest")),
        inner.map("Content-Type: message/rfc822\n\n{}".format),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(messages, st.sampled_from(PIECES))
def test_proper_messages_read_the_same(text, size):
    message = crlf(text.encode() + b"\n")
    written = convert(message, size)
    before, after = email.message_from_bytes(message), email.message_from_bytes(written)
    for old, new in zip(before.walk(), after.walk(), strict=True):
        assert old.get_content_type() == new.get_content_type()
        assert old.get_payload(decode=True) == new.get_payload(decode=True)
    assert view(written) == view(message)


FRAGMENTS = [
    b"Content-Type: multipart/mixed; boundary=b\n",
    b'content-type: multipart/digest;\n boundary="c"\n',
    b"Content-Type: message/rfc822\n",
    b"Content-Type: text/plain\n",
    b"Content-Type: message/delivery-status\n",
    b"Content-Transfer-Encoding: base64\n",
    b"Content-Transfer-Encoding: quoted-printable\n",
    b"Content-Transfer-Encoding: 8bit\n",
    b"Content-Transfer-Encoding: x-y\n",
    *(b"\n", b"--b\n", b"--b--\n", b"--c\n", b"--c-- \n", b"--b: x\n", b"From x\n", b"A: b\nX-RcptTo: c\n", b" more\n"),
    *("ä".encode() * 700, b"x" * 1200, b"=41" * 400, b"QUJD" * 400, b"-" * 1100, b"word " * 300, SPACE, b".", b"text"),
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=20).map(b"".join), st.sampled_from(PIECES))
@example(FRAGMENTS[0] + b"\n--b\n\n" + OVERLONG + b"\n--b--\n" + OVERLONG, 7)
def test_what_python_reads_stays_the_same(message, size):
    assume(not re.search(rb"^[!-9;-~]{998,}:", message, re.MULTILINE))  # a name, which cannot be cut
    assume(not re.search(rb"printable\n[ \t]", message))  # Python's versions differ
    assert view(convert(message, size)) == view(message)


@settings(deadline=None)
@given(st.binary(max_size=3000))
def test_any_octets_are_taken(message):
    convert(message)
    convert(OVERLONG + message)


def test_aiosmtpd_takes_it():
    class Handler:
        async def handle_DATA(self, server, session, envelope):
            self.content = envelope.content
            return "250 OK"

    message = b"." * 998 + b"\n" + multipart(b"\n" + LINK.encode() + b"\n" + b"y." * 499) + b"Subject:" + b" y" * 800
    handler = Handler()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    controller = Controller(handler, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        with smtplib.SMTP("127.0.0.1", port) as smtp:
            smtp.ehlo()
            smtp.mail("")
            smtp.rcpt("a@example.com")
            smtp.docmd("DATA")
            smtp.send(on_the_wire(message) + b".\r\n")
            assert smtp.getreply()[0] == 250
    finally:
        controller.stop()
    assert handler.content == convert(message)

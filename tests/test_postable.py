"""What Zulip would drop without a word is posted, and all other mail stays as it is."""

from __future__ import annotations

import email
import email.policy
import hashlib
import re
from base64 import encodebytes
from typing import NamedTuple

import pytest
from email_gateway import postable as module
from email_gateway.postable import postable
from hypothesis import given, settings
from hypothesis import strategies as st
from mails import mail, text

PDF = bytes(range(256)) * 50
BODY = encodebytes(PDF)
TOP = b"From: a@example.com\r\nSubject: s\r\nX-Folded: a\r\n\tb\r\n"
BLANK = b"Content-Type: text/plain\r\n\r\n \r\n"


class Reading(NamedTuple):
    """What Zulip makes of a mail: the text (None: it drops the mail), and the files that it uploads."""

    text: str | None
    files: dict[str, bytes]


def as_zulip_reads(content: bytes) -> Reading:
    """As zerver/lib/email_mirror.py does, but for quotations."""
    message = email.message_from_bytes(content, policy=email.policy.default)
    bodies = {"text/plain": "", "text/html": ""}
    for kind in bodies:
        for part in message.walk():
            if part.get_content_type() == kind:
                payload = part.get_payload(decode=True)
                assert isinstance(payload, bytes)
                try:
                    body = payload.decode(part.get_content_charset("us-ascii"), "ignore")
                except LookupError:
                    body = payload.decode("us-ascii", "ignore")
                bodies[kind] = (re.sub("(?s)<style.*?</style>|<!--.*?-->|<[^>]*>|&nbsp;", "", body)
                                if kind == "text/html" else body).strip()  # fmt: skip
                break
    files = {}
    for part in message.walk():
        if name := part.get_filename():
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                assert name not in files
                files[name] = payload
    return Reading(bodies["text/plain"] or bodies["text/html"] or None, files)


def made(content: bytes, folder) -> bytes:
    """What is made of a mail that Zulip cannot post as it is."""
    message = mail(content)
    result = postable(message, folder)
    assert result is not message
    assert text(message) == content
    again = postable(result, folder)
    assert again is result  # it is right now
    return text(result)


def is_unchanged(content: bytes, folder) -> bool:
    message = mail(content)
    before = hashlib.sha256(content).digest()
    result = postable(message, folder)
    return result is message and hashlib.sha256(text(result)).digest() == before


def multipart(*parts: bytes, kind: bytes = b"mixed", boundary: bytes = b"b", top: bytes = b"") -> bytes:
    start = top + b"Content-Type: multipart/" + kind + b'; boundary="' + boundary + b'"\r\n\r\npreamble\r\n'
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts)
    return start + body + b"--" + boundary + b"--\r\nepilogue\r\n"


def part(kind: bytes, body: bytes = BODY, fields: bytes = b"Content-Transfer-Encoding: base64\r\n") -> bytes:
    return b"Content-Type: " + kind + b"\r\n" + fields + b"\r\n" + body


def with_line_ends(content: bytes, line_end: bytes) -> bytes:
    return re.sub(rb"\r\n|\r|\n", line_end, content)


# A mail without text gets some.


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n", b"\r"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (b"application/pdf", "file.pdf"),
        (b'APPLICATION/PDF; name="scan 1.pdf"', "scan 1.pdf"),
        (b"image/jpeg", "image.jpg"),
        (b"audio/wav", "audio.wav"),
        (b"application/ms-tnef", "winmail.dat"),
        (b"application/pkcs7-mime; smime-type=enveloped-data", "smime.p7m"),
        (b"text/csv", "text.csv"),
        (b"text/x-no-such-thing", "text.txt"),
        (b"application/x-no-such-thing", "file.bin"),
    ],
)
def test_a_lone_file_is_uploaded(tmp_path, kind, name, line_end):
    content = with_line_ends(TOP + part(kind) + b"\r\n", line_end)
    result = made(content, tmp_path)
    assert as_zulip_reads(content).text is None
    assert as_zulip_reads(result) == Reading("(no text)", {name: PDF})
    top, body = with_line_ends(TOP, line_end), content.partition(line_end * 2)[2]
    assert result.startswith(top + b"MIME-Version: 1.0")
    assert body in result
    assert set(re.findall(rb"\r\n|\r|\n", result.replace(body, b""))) == {line_end}
    assert result.count(b"Content-Transfer-Encoding: base64") == 1


def test_content_fields_move_and_no_others(tmp_path):
    fields = b"Content-Language: de\r\nMIME-version: 1.0\r\ncontent-disposition: inline;\r\n size=3\r\nX-Y: z\r\n"
    result = made(fields + part(b"image/png") + b"\r\n", tmp_path)
    outer, _, inner = result.partition(b"\r\n\r\n")
    assert outer.split(b"\r\n")[:2] == [b"MIME-version: 1.0", b"X-Y: z"]
    assert outer.count(b"\r\n") == 2
    assert b"\r\nContent-Language: de\r\nContent-Type: image/png\r\n" in inner
    assert inner.lower().count(b"content-disposition:") == 1


@pytest.mark.parametrize(
    "blank",
    [
        BLANK,
        b"\r\n",
        part(b"text/plain; charset=utf-8", b"wqANCg=="),
        part(b"text/html", b"<html><head><style>p {x}</style></head><!-- a -->\r\n<p>&nbsp;<br/></p></html>", b""),
        part(b"text/html", b"<div=20dir=3D'ltr'><br></div>", b"Content-Transfer-Encoding: quoted-printable\r\n"),
        multipart(BLANK, part(b"text/html", b"<div></div>\r\n", b""), kind=b"alternative", boundary=b"c"),
        part(b"text/plain; charset=no-such", b"\t", b""),
    ],
    ids=range(7),
)
def test_blank_text_and_files(tmp_path, blank):
    content = multipart(blank, part(b"application/pdf; name=a.pdf"), top=TOP)
    result = made(content, tmp_path)
    assert as_zulip_reads(content).text is None
    assert as_zulip_reads(result) == Reading("(no text)", {"a.pdf": PDF})
    assert content[len(TOP) :] in result


def test_unnamed_files_get_different_names(tmp_path):
    pictures = [part(b"image/jpeg", encodebytes(octet * 99)) for octet in (b"x", b"y", b"z")]
    named = part(b"image/jpeg; name=Image-2.JPG", encodebytes(b"n"))
    inline = part(
        b"image/png", encodebytes(b"i"), b"Content-Transfer-Encoding: base64\r\nContent-Disposition: inline\r\n"
    )
    content = multipart(named, multipart(*pictures, kind=b"related", boundary=b"c"), inline, top=TOP)
    result = made(content, tmp_path)
    assert as_zulip_reads(result) == Reading(
        "(no text)",
        {
            "Image-2.JPG": b"n",
            "image.jpg": b"x" * 99,
            "image-3.jpg": b"y" * 99,
            "image-4.jpg": b"z" * 99,
            "image.png": b"i",
        },
    )
    for picture in pictures:
        assert picture.partition(b"\r\n\r\n")[2] in result
    assert named in result


def test_later_text_that_zulip_does_not_look_for_is_a_file(tmp_path):
    content = multipart(BLANK, part(b"image/gif"), b"\r\nthe text", top=TOP)
    assert as_zulip_reads(made(content, tmp_path)) == Reading("(no text)", {"image.gif": PDF, "text.txt": b"the text"})


def test_textless_signed_mail_is_wrapped_as_it_is(tmp_path):
    signature = part(b"application/pkcs7-signature; name=smime.p7s", b"MAA=\r\n")
    inside = multipart(part(b"application/pdf; name=a.pdf"), part(b"image/png"), boundary=b"c")
    signed = multipart(inside, signature, kind=b"signed; protocol=x", top=TOP)
    result = made(signed, tmp_path)
    assert as_zulip_reads(result) == Reading("(no text)", {"a.pdf": PDF, "smime.p7s": b"0\0"})
    assert signed[len(TOP) :] in result


def test_encrypted_mail_is_wrapped_and_nothing_comes_into_it(tmp_path):
    control = part(b"application/pgp-encrypted; name=version.asc", b"Version: 1", b"")
    secret = part(b"application/octet-stream; name=encrypted.asc", b"-----BEGIN PGP MESSAGE-----\r\n", b"")
    content = multipart(control, secret, kind=b"encrypted; protocol=application/pgp-encrypted", top=TOP)
    result = made(content, tmp_path)
    assert as_zulip_reads(result).text == "(no text)"
    assert as_zulip_reads(result).files["encrypted.asc"].startswith(b"-----BEGIN")
    assert content[len(TOP) :] in result
    _, inner = email.message_from_bytes(result).get_payload()
    assert inner.get_content_type() == "multipart/encrypted" and len(inner.get_payload()) == 2


CALENDAR = """BEGIN:VCALENDAR
BEGIN:VTIMEZONE
DTSTART:19700101T000000
END:VTIMEZONE
BEGIN:VEVENT
DTSTART;TZID="Europe/Berlin":20261126T100000
DTEND;TZID=Europe/Berlin:20261126T113000
LOCATION;ALTREP="http://x":Room 5\\, Köln
SUMMARY;LANGUAGE=de:Besprechung über \\nalles\\; und
  jedes
BEGIN:VALARM
SUMMARY:Reminder
END:VALARM
END:VEVENT
END:VCALENDAR
""".replace("\n", "\r\n")


def test_an_invitation_says_what_when_and_where(tmp_path):
    calendar = part(b"text/calendar; charset=utf-8; method=REQUEST", encodebytes(CALENDAR.encode()))
    said = "\n".join(
        (
            "Calendar event: Besprechung über alles; und jedes",
            "Time: 2026-11-26 10:00 to 2026-11-26 11:30 (Europe/Berlin)",
            "Place: Room 5, Köln",
        )
    )
    for content in (TOP + calendar, multipart(BLANK, calendar, kind=b"alternative", top=TOP)):
        reading = as_zulip_reads(made(content, tmp_path))
        assert reading == Reading(said.replace("\n", "\r\n"), {"invite.ics": CALENDAR.encode()})


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ("SUMMARY:a\nDTSTART;VALUE=DATE:20261126", "Calendar event: a\nTime: 2026-11-26"),
        ("DTSTART:20261126T090000Z\nDTEND:20261126T100000Z", "Time: 2026-11-26 09:00 UTC to 2026-11-26 10:00 UTC"),
        ("DTSTART:soon", "Time: soon"),
        ("DESCRIPTION:b", "(no text)"),
        ("SUMMARY:" + "c" * 9999, "Calendar event: " + "c" * 300),
    ],
)
def test_invitations_of_other_kinds(tmp_path, event, said):
    result = made(part(b"text/calendar", b"BEGIN:VEVENT\n" + event.encode(), b""), tmp_path)
    assert as_zulip_reads(result).text.replace("\r\n", "\n") == said


# An attached message becomes a file.

ATTACHED = b"Subject: Re: it\r\nContent-Type: multipart/mixed; boundary=i\r\n\r\n--i\r\n\r\ninner text \xe4\r\n--i--"
WORDS = part(b"text/plain", b"words", b"")


@pytest.mark.parametrize(
    ("header", "subject", "name"),
    [
        (b"Content-Type: message/rfc822", b"Subject: Re: it", "Re it.eml"),
        (b"Content-Type: message/rfc822; name=a.eml", b"Subject: s", "a.eml"),
        (b'content-type: Message/Global;\r\n name="a/b\\"c.EML"', b"Subject: s", "a b c.eml"),
        (b"Content-Type: message/rfc822\r\nContent-Disposition: attachment;\r\n filename=x", b"A: b", "x.eml"),
        (b"Content-Type: message/rfc822", b"A: b", "message.eml"),
        (b"Content-Type: message/rfc822", b'subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n aus\\/"K\x07', "Grüße aus K.eml"),
        (b"Content-Type: message/rfc822", "Subject: Grüße".encode(), "Grüße.eml"),
        (b"Content-Type: message/rfc822", b"Subject: " + b"long " * 50, "long " * 15 + "long .eml"),
        (b"Content-Type: message/rfc822", b"Subject: \r\n\r\nSubject: no", "message.eml"),
        (b"Content-Type: message/rfc822", b"Subject: " + "日本語".encode() * 30, "日本語" * 26 + "日本.eml"),
    ],
    ids=range(10),
)
def test_an_attached_message_is_uploaded(tmp_path, header, subject, name):
    attached = ATTACHED.replace(b"Subject: Re: it", subject)
    content = multipart(WORDS, header + b"\r\nContent-Transfer-Encoding: 7bit\r\nX: y\r\n\r\n" + attached, top=TOP)
    result = made(content, tmp_path)
    name = re.sub(" .eml$", ".eml", name.replace("Re it", "Re: it"))
    assert as_zulip_reads(result) == Reading("words", {name: attached})
    before, after = content.split(header)
    assert result.startswith(before) and result.endswith(after.partition(b"\r\n\r\n")[2])
    changed = result[len(before) : len(result) - len(after.partition(b"\r\n\r\n")[2])]
    assert b"Content-Transfer-Encoding: 7bit\r\nX: y\r\n" in changed
    assert b"Content-Type: application/octet-stream" in changed
    assert all(octet < 128 for octet in changed)


def test_a_message_without_text_around_it(tmp_path):
    attached = b"Content-Type: message/rfc822\r\n\r\n" + ATTACHED
    for content in (multipart(attached, top=TOP), multipart(BLANK, attached, top=TOP)):
        assert as_zulip_reads(made(content, tmp_path)) == Reading("(no text)", {"Re: it.eml": ATTACHED})


def test_messages_of_the_same_name_in_a_digest(tmp_path):
    content = multipart(b"\r\n" + ATTACHED, b"X: y\r\n\r\n" + ATTACHED + b"\r\n", kind=b"digest", top=TOP)
    assert as_zulip_reads(made(content, tmp_path)) == Reading(
        "(no text)", {"Re: it.eml": ATTACHED, "Re: it-2.eml": ATTACHED + b"\r\n"}
    )


def test_an_attached_message_in_base64(tmp_path):
    content = multipart(WORDS, part(b"message/rfc822", encodebytes(ATTACHED)))
    assert as_zulip_reads(made(content, tmp_path)) == Reading("words", {"Re: it.eml": ATTACHED})


def test_a_bounce(tmp_path):
    status = part(b"message/delivery-status", b"Reporting-MTA: dns; x\r\n\r\nFinal-Recipient: rfc822; a@b\r\n", b"")
    attached = part(b"message/rfc822", ATTACHED, b"")
    content = multipart(WORDS, status, attached, kind=b"report; report-type=delivery-status", top=TOP)
    result = made(content, tmp_path)
    assert as_zulip_reads(result) == Reading("words", {"Re: it.eml": ATTACHED})
    assert content[: content.index(attached)] in result
    assert is_unchanged(multipart(status, attached, kind=b"report"), tmp_path)  # what is in there may be text


def test_a_message_beside_what_is_signed(tmp_path):
    signed = multipart(WORDS, part(b"application/pgp-signature", b"x", b""), kind=b"signed", boundary=b"c")
    content = multipart(signed, part(b"message/rfc822", ATTACHED, b""), top=TOP)
    result = made(content, tmp_path)
    assert signed in result
    assert as_zulip_reads(result) == Reading("words", {"Re: it.eml": ATTACHED})


# All other mail stays as it is.

SIGNED = multipart(WORDS, part(b"message/rfc822", ATTACHED, b""), part(b"image/png"), boundary=b"c")
UNCHANGED = {
    "text": TOP + b"\r\ntext\r\n",
    "8-bit": TOP + b"Content-Type: text/plain; charset=latin1\r\n\r\n\xe4\r\n",
    "alternative": multipart(WORDS, part(b"text/html", b"<p>words</p>", b""), kind=b"alternative"),
    "HTML alone": multipart(BLANK, part(b"text/html", b"<p>words</p>", b""), part(b"image/png")),
    "a picture in HTML": part(b"text/html", b"<img src=x>", b""),
    "attachments": multipart(WORDS, part(b"application/pdf; name=a.pdf"), part(b"image/png")),
    "a text file": part(b"text/plain; name=a.txt", b"words", b""),
    "signed": multipart(SIGNED, part(b"application/pgp-signature", b"x", b""), kind=b"signed"),
    "a signed message": multipart(part(b"message/rfc822", ATTACHED, b""), b"", kind=b"signed"),
    "nothing": b"",
    "no text": TOP + b"\r\n",
    "blank text": TOP + b"\r\n \r\n\t\r\n",
    "blank alternative": multipart(BLANK, part(b"text/html", b"<br>", b""), kind=b"alternative"),
    "blank signed": multipart(BLANK, part(b"application/pgp-signature; name=x", b"x", b""), kind=b"signed"),
    "an empty file": part(b"image/png", b""),
    "a message itself": part(b"message/rfc822", ATTACHED, b""),
    "no boundary": b"Content-Type: multipart/mixed\r\n\r\n--b\r\n\r\n" + part(b"image/png"),
    "no such boundary": multipart(part(b"image/png")).replace(b'"b"', b"c"),
    "a disputed boundary": multipart(part(b"image/png")).replace(b'"b"', b"b(c)").replace(b"--b", b"--b(c)"),
    "a broken header": multipart(b"no field\r\n" + part(b"image/png")),
    "no empty line": multipart(part(b"image/png"), b"Content-Type: image/png"),
    "a mailbox's line": b"From a\r\n" + part(b"image/png"),
    "two boundaries": multipart(part(b"image/png")).replace(b"--b\r\n", b"--b\r\n--b\r\n"),
    "an odd type": part(b"=?utf-8?q?image/png?="),
    "an odd charset": multipart(part(b"text/plain; charset=undefined", b"x", b""), part(b"image/png")),
    "a long type": part(b"image/png; a=" + b"a" * 99_999),
    "a long type of a multipart": multipart(part(b"image/png")).replace(b"mixed", b"mixed; a=" + b"a" * 1024),
    "many parts": multipart(*[part(b"image/png", b"eA==")] * 101),
    "long blank text": multipart(b"\r\n" + b" \r\n" * 20_000, part(b"image/png")),
    "nested comments": multipart(part(b"text/html", b"<!--" * 8000, b""), part(b"image/png")),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCHANGED)
def test_other_mail_is_unchanged(tmp_path, name):
    for line_end in (b"\r\n", b"\n", b"\r"):
        assert is_unchanged(with_line_ends(UNCHANGED[name], line_end), tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 997])
def test_it_does_not_matter_how_it_is_read(tmp_path, monkeypatch, size):
    mixed_line_ends = multipart(part(b"image/png"), part(b"message/rfc822", ATTACHED, b"")).replace(
        b"BwgJ\r\n", b"BwgJ\n"
    )
    content = TOP.replace(b"\r\n", b"\n", 1) + mixed_line_ends
    expected = as_zulip_reads(made(content, tmp_path))
    assert expected == Reading("(no text)", {"image.png": PDF, "Re: it.eml": ATTACHED})
    monkeypatch.setattr("email_gateway.message.PIECE", size)
    assert as_zulip_reads(made(content, tmp_path)) == expected


def test_an_error_of_ours_changes_nothing(tmp_path, monkeypatch):
    def fail(*_args):
        raise RecursionError

    monkeypatch.setattr(module, "_has_text", fail)
    assert is_unchanged(part(b"image/png"), tmp_path)


def test_a_full_disk_is_not_hidden(tmp_path):
    with pytest.raises(OSError):
        postable(mail(part(b"image/png")), tmp_path / "none")


# Whatever the mail is.

FRAGMENTS = [
    b"Content-Type: multipart/mixed; boundary=b\n",
    b'content-type: multipart/digest;\n boundary="c"\n',
    b"Content-Type: multipart/signed; boundary=b\n",
    b"Content-Type: message/rfc822\n",
    b"Content-Type: message/delivery-status\n",
    b"Content-Type: text/plain\n",
    b"Content-Type: text/html\n",
    b"Content-Type: image/png\n",
    b"Content-Type: text/calendar\n",
    b"Content-Disposition: attachment; filename=a\n",
    b"Content-Transfer-Encoding: base64\n",
    b"Content-Transfer-Encoding: quoted-printable\n",
    *(b"\n", b"\r", b"\r\n", b"\n\n", b"--b\n", b"--b--\n", b"--c\r\n", b"--c-- \n", b"--b: x\n", b"From x\n"),
    *(b"A: b\n", b" more\n", b"eA==\n", b"=20\n", b"<br>", b"text\n", b"\xe4", b" ", b"Subject: x\x0b\n"),
]


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=20).map(b"".join))
def test_what_is_changed_can_be_posted(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    message = mail(content)
    result = postable(message, folder)
    before, after = as_zulip_reads(content), as_zulip_reads(text(result))
    if result is message:
        return
    assert after.text is not None
    # A part of a digest without a header is a mail, too, and comes as a file of its own.
    assert before.files.keys() <= after.files.keys() or b"rfc822" in content or b"digest" in content
    assert before != after
    if before.text and b"message/rfc822" not in content and b"digest" not in content:
        raise AssertionError("it had text")


@settings(deadline=None)
@given(st.binary(max_size=2000))
def test_any_octets_are_taken(tmp_path_factory, content):
    postable(mail(content), tmp_path_factory.getbasetemp())
    postable(
        mail(b"Content-Type: multipart/mixed; boundary=b\n\n--b\nContent-Type: image/png\n" + content),
        tmp_path_factory.getbasetemp(),
    )

"""The parts of a mail as Zulip sees them (zerver/lib/email_mirror.py), for mail that is to be
changed: what is unusual, or may be read otherwise by Python's email package, is Unsure.

Places are as in mime_structure.
"""

from __future__ import annotations

import re
from email import policy
from email.message import Message as Header
from email.parser import BytesHeaderParser
from typing import NamedTuple

from .message import Message
from .mime_structure import Structure, normalized

# No honest mail that is to be changed has more parts.
_MAX_PARTS = 100
# How much of a part is looked at for text (octets).
_MAX_TEXT = 32 * 1024
# How long the headers of all parts may be together, and how long what is read of one: all
# that is read, and what takes Python long (octets).
_MAX_HEADERS = 128 * 1024
_MAX_FIELDS = 4 * 1024
MAX_VALUE = 512
TEXTS = ("text/plain", "text/html")
_SIGNATURES = ("application/pkcs7-signature", "application/x-pkcs7-signature", "application/pgp-signature")
# A field of a header whose lines end anyhow.
CONTENT_FIELD = re.compile(rb"(?is)(?:(?<=[\r\n])|\A)Content-[!-9;-~]*:.*?(?:\r\n|\r(?!\n)|\n)(?![ \t])")
_TYPE = re.compile(r"[a-z0-9.+_-]+/[a-z0-9.+_-]+")
# HTML that shows nothing; any other tag may.
_EMPTY_HTML = re.compile(
    r"(?is)\s+|&nbsp;|&#160;|&#xa0;|<!--.*?-->|<style\b.*?</style\s*>"
    r"|<(?:!doctype|/?(?:html|head|body|meta|div|p|br|span|font|o:p)\b)[^<>]*>"
)


class Unsure(Exception):
    """Zulip may read the mail otherwise than we do."""


class _Inside(NamedTuple):
    """What is true of the parts of a multipart: the type of one that names none, and whether
    they are signed."""

    default: str
    signed: bool


class Part(NamedTuple):
    """A part: the places where its header and its body begin, its fields that begin with
    "Content-", its type, and the length and the beginning of its body (octets)."""

    begin: int
    body: int
    fields: Header
    kind: str
    signed: bool
    size: int
    text: bytes

    @property
    def name(self) -> str | None:
        """Its file name, if Zulip sees one."""
        return self.fields.get_filename() or None

    @property
    def is_blank(self) -> bool:
        """Whether it shows no text, as far as Zulip can tell."""
        if self.size > _MAX_TEXT:
            return False
        if self.kind == "text/html":
            return _is_blank_html(self.decoded("us-ascii"))
        return not self.decoded("us-ascii").strip()

    @property
    def is_content(self) -> bool:
        """Whether there is anything in it to post."""
        if self.kind.startswith("multipart/") or self.kind in _SIGNATURES:
            return False
        if self.name:
            return True
        return self.size > 0 and not (self.kind in TEXTS and self.is_blank)

    def decoded(self, charset: str) -> str:
        """The beginning of its text, which is in `charset` if it does not say."""
        data = self.text
        if str(self.fields.get("Content-Transfer-Encoding", "")).strip().lower() in ("base64", "quoted-printable"):
            self.fields.set_payload(data.decode("ascii", "surrogateescape"))
            payload = self.fields.get_payload(decode=True)
            data = payload if isinstance(payload, bytes) else b""
        try:
            return data.decode(self.fields.get_content_charset(charset), "ignore")
        except LookupError:
            return data.decode("us-ascii", "ignore")


def parts_of(message: Message) -> list[Part]:
    """All parts. An attached message counts as one, as if it were a file already."""
    structure = Structure[_Inside](normalized(message.pieces()))
    inside: _Inside | None = _Inside("text/plain", signed=False)
    parts: list[Part] = []
    left = _MAX_HEADERS
    while inside is not None:
        begin, header = structure.place, structure.header()
        if header is None or len(header) > left or len(parts) == _MAX_PARTS:
            raise Unsure
        left -= len(header)
        raw = b"".join(CONTENT_FIELD.findall(header[1:]))
        if len(raw) > _MAX_FIELDS:
            raise Unsure
        fields = BytesHeaderParser().parsebytes(raw)
        fields.set_default_type(inside.default)
        kind = fields.get_content_type()
        if not _TYPE.fullmatch(kind):
            raise Unsure
        body, text = structure.place, structure.peek(_MAX_TEXT)
        if kind.startswith("multipart/"):
            default = "message/rfc822" if kind == "multipart/digest" else "text/plain"
            signed = inside.signed or kind == "multipart/signed"
            structure.enter(_boundary(fields, raw), _Inside(default, signed))
        is_all = not parts and kind in TEXTS  # then it need not be read to its end
        end = message.size if is_all else structure.body()[0]
        size = max(0, end - body)
        parts.append(Part(begin, body, fields, kind, inside.signed, size, text[:size]))
        inside = None if is_all else structure.next_part()
    return parts


def _boundary(fields: Header, raw: bytes) -> bytes | None:
    """The boundary of a multipart, if Python's email package has but one opinion of it."""
    if len(raw) > MAX_VALUE:
        raise Unsure
    boundary = fields.get_boundary()
    if boundary != BytesHeaderParser(policy=policy.default).parsebytes(raw).get_boundary():
        raise Unsure
    return None if boundary is None else boundary.encode("ascii", "surrogateescape")


def _is_blank_html(html: str) -> bool:
    place = 0
    while found := _EMPTY_HTML.match(html, place):
        place = found.end()
    return place == len(html)

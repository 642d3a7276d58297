"""Mail that Zulip's queue worker would drop after it has accepted it, made postable.

The worker (zerver/lib/email_mirror.py) takes the first text/plain part and the first
text/html part for the text, and drops a mail that has neither, or nothing in them. It
uploads a part only if that has a file name and is no message/rfc822, which Python's email
package gives no bytes for. So a mail without text gets some here, and its other parts get
names; an attached message becomes a file. In doubt a mail is left as it is, and so is all
that is signed: nothing within a multipart/signed is ever touched.

Places are as in mime_structure.
"""

from __future__ import annotations

import mimetypes
import os
import re
from email import policy
from email.message import Message as Header
from email.message import MIMEPart
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import NamedTuple

from .invitation import described
from .message import Message
from .mime_structure import Structure, normalized, offsets

# No honest mail that is to be changed has more parts.
_MAX_PARTS = 100
# How much of a part is looked at for text (octets).
_MAX_TEXT = 32 * 1024
# How long the fields that are read may be: in all parts together, in one, and where more
# than quick parsing is needed (octets).
_MAX_FIELDS = 64 * 1024
_MAX_HEADER = 8 * 1024
_MAX_VALUE = 512
# The longest file name made here (characters).
_MAX_NAME = 80

_NO_TEXT = "(no text)"
_TEXTS = ("text/plain", "text/html")
_MESSAGES = ("message/rfc822", "message/global")
_SIGNATURES = ("application/pkcs7-signature", "application/x-pkcs7-signature", "application/pgp-signature")
# Names that programs know these files by, instead of one made from their type.
_NAMES = {
    "application/ms-tnef": "winmail.dat",
    "application/vnd.ms-tnef": "winmail.dat",
    "application/pkcs7-mime": "smime.p7m",
    "application/x-pkcs7-mime": "smime.p7m",
    "text/calendar": "invite.ics",
}

_LINE_END = re.compile(rb"\r\n|\r|\n")
_CONTENT_FIELD = re.compile(rb"(?is)(?:(?<=[\r\n])|\A)Content-[!-9;-~]*:.*?(?:\r\n|\r(?!\n)|\n)(?![ \t])")
_SUBJECT = re.compile(r"(?ims)^Subject:(.*?)\n(?![ \t])")
_TYPE = re.compile(r"[a-z0-9.+_-]+/[a-z0-9.+_-]+")
# HTML that shows nothing; any other tag may.
_EMPTY_HTML = re.compile(
    r"(?is)\s+|&nbsp;|&#160;|&#xa0;|<!--.*?-->|<style\b.*?</style\s*>"
    r"|<(?:!doctype|/?(?:html|head|body|meta|div|p|br|span|font|o:p)\b)[^<>]*>"
)

_Change = tuple[int, int, bytes]


class _Unsure(Exception):
    """Zulip may read the mail otherwise than we do."""


class _Inside(NamedTuple):
    """What is true of the parts of a multipart: the type of one that names none, and whether
    they are signed."""

    default: str
    signed: bool


class _Part(NamedTuple):
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
        return self.size > 0 and not (self.kind in _TEXTS and self.is_blank)

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


def postable(message: Message, folder: Path) -> Message:
    """The mail as Zulip can post it: `message` itself where nothing has to be changed.

    folder: where another one is stored, which goes when it is no longer used. Raises OSError
    if that fails, and nothing whatever the mail is.
    """
    try:
        changes = _changes(message)
    except Exception:  # whatever it is, the mail is better left alone
        changes = []
    return message.changed(changes, folder) if changes else message


def _changes(message: Message) -> list[_Change]:
    parts = _parts(message)
    attached = [part for part in parts[1:] if part.kind in _MESSAGES and not part.signed]
    if _has_text(parts, attached):
        return _rewritten(message, parts, attached, None) if attached else []
    content = [part for part in parts if part.is_content]
    if not content:
        return []
    files = [part for part in content if part in attached or not (part.name or part.signed)]
    return _rewritten(message, parts, files, _text(parts))


def _parts(message: Message) -> list[_Part]:
    """All parts. An attached message counts as one, as if it were a file already."""
    structure = Structure[_Inside](normalized(message.pieces()))
    inside: _Inside | None = _Inside("text/plain", signed=False)
    parts: list[_Part] = []
    left = _MAX_FIELDS
    while inside is not None:
        begin, header = structure.place, structure.header()
        raw = b"".join(_CONTENT_FIELD.findall(header[1:])) if header else b""
        left -= len(raw)
        if header is None or len(raw) > _MAX_HEADER or left < 0 or len(parts) == _MAX_PARTS:
            raise _Unsure
        fields = BytesHeaderParser().parsebytes(raw)
        fields.set_default_type(inside.default)
        kind = fields.get_content_type()
        if not _TYPE.fullmatch(kind):
            raise _Unsure
        body, text = structure.place, structure.peek(_MAX_TEXT)
        if kind.startswith("multipart/"):
            default = "message/rfc822" if kind == "multipart/digest" else "text/plain"
            signed = inside.signed or kind == "multipart/signed"
            structure.enter(_boundary(fields, raw), _Inside(default, signed))
        is_all = not parts and kind in _TEXTS  # then it need not be read to its end
        end = message.size if is_all else structure.body()[0]
        size = max(0, end - body)
        parts.append(_Part(begin, body, fields, kind, inside.signed, size, text[:size]))
        inside = None if is_all else structure.next_part()
    return parts


def _boundary(fields: Header, raw: bytes) -> bytes | None:
    """The boundary of a multipart, if Python's email package has but one opinion of it."""
    if len(raw) > _MAX_VALUE:
        raise _Unsure
    boundary = fields.get_boundary()
    if boundary != BytesHeaderParser(policy=policy.default).parsebytes(raw).get_boundary():
        raise _Unsure
    return None if boundary is None else boundary.encode("ascii", "surrogateescape")


def _has_text(parts: list[_Part], attached: list[_Part]) -> bool:
    """Whether Zulip finds text when the attached messages are files."""
    seen = set()
    for part in parts:
        if part.kind.startswith("message/") and part not in attached:
            raise _Unsure  # Zulip goes on looking in there
        if part.kind in _TEXTS and part.kind not in seen:
            seen.add(part.kind)
            if not part.is_blank:
                return True
    return False


def _is_blank_html(html: str) -> bool:
    place = 0
    while found := _EMPTY_HTML.match(html, place):
        place = found.end()
    return place == len(html)


def _rewritten(message: Message, parts: list[_Part], files: list[_Part], text: str | None) -> list[_Change]:
    """What makes `files` files, and `text`, if any, the text."""
    places = sorted({0, parts[0].body, *(part.begin for part in files), *(part.body for part in files)})
    at = dict(zip(places, offsets(message.pieces(), places), strict=True))
    top = message.text(0, at[parts[0].body])
    line_end = _LINE_END.findall(top)[0]
    taken = {part.name.lower() for part in parts if part.name and part not in files}
    changes = []
    for part in files:
        begin, end = at[part.begin], at[part.body]
        kind = "application/octet-stream" if part.kind in _MESSAGES else None
        header = _named(message.text(begin, end), kind, _unique(_file_name(part), taken), line_end)
        changes.append((begin, end, header))
    if text is None:
        return changes
    if files and files[0] is parts[0]:
        changes, top = [], changes[0][2]
    boundary = b"=_" + os.urandom(16).hex().encode()
    opening = _opening(top, boundary, text, line_end)
    closing = line_end + b"--" + boundary + b"--" + line_end
    return [(0, at[parts[0].body], opening), *changes, (message.size, message.size, closing)]


def _named(header: bytes, kind: str | None, name: str, line_end: bytes) -> bytes:
    """The header of a part with that file name and, if not None, that type."""
    replaced = ("content-disposition:", "content-type:") if kind else "content-disposition:"
    fields = MIMEPart(policy.default.clone(linesep=line_end.decode()))
    if kind:
        fields.add_header("Content-Type", kind, name=name)
    fields.add_header("Content-Disposition", "attachment", filename=name)
    kept = _CONTENT_FIELD.sub(lambda field: b"" if _starts(field[0], replaced) else field[0], header)
    place = _blank_line(kept)
    return kept[:place] + fields.as_bytes().removesuffix(line_end) + kept[place:]


def _starts(field: bytes, names: str | tuple[str, ...]) -> bool:
    return field[:20].decode("latin-1").lower().startswith(names)


def _blank_line(header: bytes) -> int:
    """Where the empty line at its end begins."""
    return len(header) - (2 if header.endswith(b"\r\n") else 1)


def _opening(header: bytes, boundary: bytes, text: str, line_end: bytes) -> bytes:
    """The header of a mail that becomes a multipart/mixed, up to the header of what it was,
    which is its second part; its first one is `text`."""
    place = _blank_line(header)
    outer = _CONTENT_FIELD.sub(b"", header[:place])
    if not re.search(rb"(?i)(?:\A|[\r\n])MIME-Version:", outer):
        outer += b"MIME-Version: 1.0" + line_end
    first = MIMEPart(policy.default.clone(linesep=line_end.decode()))
    first.set_content(text)
    start = b"--" + boundary + line_end
    kind = b'Content-Type: multipart/mixed; boundary="' + boundary + b'"' + line_end
    inner = b"".join(_CONTENT_FIELD.findall(header[:place])) + header[place:]
    return outer + kind + line_end + start + first.as_bytes() + start + inner


def _file_name(part: _Part) -> str:
    if part.kind in _MESSAGES:
        return _message_name(part) + ".eml"
    main, sub = part.kind.split("/")
    extension = mimetypes.guess_extension(part.kind, strict=False) or f".{sub if len(sub) < 5 else 'bin'}"
    return _NAMES.get(part.kind, ("file" if main == "application" else main) + extension)


def _message_name(part: _Part) -> str:
    """The name that an attached message had, or its subject, without what a name must not have."""
    name = part.name
    if name is None:
        header = part.decoded("utf-8").replace("\r\n", "\n").partition("\n\n")[0] + "\n"
        found = _SUBJECT.search(header)
        name = found[1] if found else ""
    elif name.lower().endswith(".eml"):
        name = name[:-4]
    decoded = str(policy.default.header_factory("Subject", " ".join(name[:_MAX_VALUE].split())))
    harmless = "".join(sign if sign.isprintable() and sign not in '/\\"' else " " for sign in decoded)
    return " ".join(harmless.split())[:_MAX_NAME].strip() or "message"


def _unique(name: str, taken: set[str]) -> str:
    """The name, or another one like it, that is none of `taken`, which it joins."""
    stem, extension = os.path.splitext(name)
    number = 2
    while name.lower() in taken:
        name, number = f"{stem}-{number}{extension}", number + 1
    taken.add(name.lower())
    return name


def _text(parts: list[_Part]) -> str:
    """The text of a mail that has none: what its invitation says, if it has one."""
    calendar = next((part.decoded("utf-8") for part in parts if part.kind == "text/calendar"), "")
    return described(calendar) or _NO_TEXT

"""Mail that Zulip's queue worker would drop after it has accepted it, made postable.

The worker (zerver/lib/email_mirror.py) takes the first text/plain part and the first
text/html part for the text, and drops a mail that has neither, or nothing in them. It
uploads a part only if that has a file name and is no message/rfc822, which Python's email
package gives no bytes for. So a mail without text gets some here, and its other parts get
names; an attached message becomes a file. In doubt a mail is left as it is, and so is all
that is signed: nothing within a multipart/signed is touched here.

Places are as in mime_structure.
"""

from __future__ import annotations

import mimetypes
import os
import re
from email import policy
from email.message import MIMEPart
from pathlib import Path

from .invitation import described
from .mail_parts import CONTENT_FIELD, MAX_VALUE, TEXTS, Part, Unsure, parts_of
from .message import Change, Message
from .mime_structure import offsets

# The longest file name made here (characters).
_MAX_NAME = 80

_NO_TEXT = "(no text)"
_MESSAGES = ("message/rfc822", "message/global")
# Names that programs know these files by, instead of one made from their type.
_NAMES = {
    "application/ms-tnef": "winmail.dat",
    "application/vnd.ms-tnef": "winmail.dat",
    "application/pkcs7-mime": "smime.p7m",
    "application/x-pkcs7-mime": "smime.p7m",
    "text/calendar": "invite.ics",
}

_SUBJECT = re.compile(r"(?ims)^Subject:(.*?)\n(?![ \t])")


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


def _changes(message: Message) -> list[Change]:
    parts = parts_of(message)
    attached = [part for part in parts[1:] if part.kind in _MESSAGES and not part.signed]
    if _has_text(parts, attached):
        return _rewritten(message, parts, attached, None) if attached else []
    content = [part for part in parts if part.is_content]
    if not content:
        return []
    files = [part for part in content if part in attached or not (part.name or part.signed)]
    return _rewritten(message, parts, files, _text(parts))


def _has_text(parts: list[Part], attached: list[Part]) -> bool:
    """Whether Zulip finds text when the attached messages are files."""
    seen = set()
    for part in parts:
        if part.kind.startswith("message/") and part not in attached:
            raise Unsure  # Zulip goes on looking in there
        if part.kind in TEXTS and part.kind not in seen:
            seen.add(part.kind)
            if not part.is_blank:
                return True
    return False


def _rewritten(message: Message, parts: list[Part], files: list[Part], text: str | None) -> list[Change]:
    """What makes `files` files, and `text`, if any, the text."""
    places = sorted({0, parts[0].body, *(part.begin for part in files), *(part.body for part in files)})
    at = dict(zip(places, offsets(message.pieces(), places), strict=True))
    top = message.text(0, at[parts[0].body])
    line_end = b"\r\n" if b"\r\n" in top else top[-1:]
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
    replaced = (b"content-disposition:", b"content-type:") if kind else b"content-disposition:"
    fields = MIMEPart(policy.default.clone(linesep=line_end.decode()))
    if kind:
        fields.add_header("Content-Type", kind, name=name)
    fields.add_header("Content-Disposition", "attachment", filename=name)
    kept = CONTENT_FIELD.sub(lambda field: b"" if field[0].lower().startswith(replaced) else field[0], header)
    place = _blank_line(kept)
    return kept[:place] + fields.as_bytes().removesuffix(line_end) + kept[place:]


def _blank_line(header: bytes) -> int:
    """Where the empty line at its end begins."""
    return len(header) - (2 if header.endswith(b"\r\n") else 1)


def _opening(header: bytes, boundary: bytes, text: str, line_end: bytes) -> bytes:
    """The header of a mail that becomes a multipart/mixed, up to the header of what it was,
    which is its second part; its first one is `text`."""
    place = _blank_line(header)
    outer = CONTENT_FIELD.sub(b"", header[:place])
    if not re.search(rb"(?i)(?:\A|[\r\n])MIME-Version:", outer):
        outer += b"MIME-Version: 1.0" + line_end
    first = MIMEPart(policy.default.clone(linesep=line_end.decode()))
    first.set_content(text)
    start = b"--" + boundary + line_end
    kind = b'Content-Type: multipart/mixed; boundary="' + boundary + b'"' + line_end
    inner = b"".join(CONTENT_FIELD.findall(header[:place])) + header[place:]
    return outer + kind + line_end + start + first.as_bytes() + start + inner


def _file_name(part: Part) -> str:
    if part.kind in _MESSAGES:
        return _message_name(part) + ".eml"
    main, sub = part.kind.split("/")
    fallback = sub if len(sub) < 5 else "txt" if main == "text" else "bin"
    extension = mimetypes.guess_extension(part.kind, strict=False) or f".{fallback}"
    return _NAMES.get(part.kind, ("file" if main == "application" else main) + extension)


def _message_name(part: Part) -> str:
    """The name that an attached message had, or its subject, without what a name must not have."""
    name = part.name
    if name is None:
        header = part.decoded("utf-8").replace("\r\n", "\n").partition("\n\n")[0] + "\n"
        found = _SUBJECT.search(header)
        name = found[1] if found else ""
    elif name.lower().endswith(".eml"):
        name = name[:-4]
    decoded = str(policy.default.header_factory("Subject", " ".join(name[:MAX_VALUE].split())))
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


def _text(parts: list[Part]) -> str:
    """The text of a mail that has none: what its invitation says, if it has one."""
    calendar = next((part.decoded("utf-8") for part in parts if part.kind == "text/calendar"), "")
    return described(calendar) or _NO_TEXT

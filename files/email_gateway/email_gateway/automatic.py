"""Mail that a machine has sent in answer to mail, and mail that goes in circles.

An automatic reply to one of Zulip's notifications ("I am out of office") is no message of
the user's, so it is not posted, as in Zulip 11.2 and later. Machines may write to channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .message import Message

# So often a mail may have passed before.
_PASSES = 3

# RFC 3834, 5; the others were in use before it, or are Microsoft's (MS-OXCMAIL, 2.2.3.2.14).
_AUTOMATIC = re.compile(
    rb"(?im)^(?:Auto-Submitted:\s*(?!no\s*(?:;|$))\S"
    rb"|Precedence:\s*(?:bulk|junk|auto[_-]reply)\s*$"
    rb"|X-Auto-Response-Suppress:|X-Autoreply:"
    rb"|Return-Path:\s*<>)"
)
# Only Zulip's notifications ask for answers to such an address (zerver/lib/email_notifications.py).
_NOTIFICATION = rb"(?im)^Reply-To:[^\n]*(?:\n[ \t][^\n]*)*?\bmm[0-9a-f]{32}@%s\b"
_PASSED = rb"(?im)^Received:[^\n]*(?:\n[ \t][^\n]*)*?\bby %s[ ;\n]"


def is_automatic_reply(message: Message, sender: str, has_envelope: bool) -> bool:
    """True for a mail that a machine has sent in answer. has_envelope: an empty sender is the null one."""
    return (has_envelope and sender in ("", "<>")) or _AUTOMATIC.search(message.header()) is not None


def loop(message: Message, domains: Iterable[str]) -> str:
    """Why a mail to a channel goes in circles; empty if it does not. domains: the mail domain, and former ones."""
    header, any_domain = message.header(), b"(?:%s)" % b"|".join(re.escape(domain.encode()) for domain in domains)
    if re.search(_NOTIFICATION % any_domain, header):
        return "it is a notification that Zulip itself has sent"
    if len(re.findall(_PASSED % any_domain, header)) > _PASSES:
        return f"it has passed through this mail server {_PASSES} times before"
    return ""

"""Mail that the gateway itself writes."""

from __future__ import annotations

import email.utils
from email.message import EmailMessage


def own_mail(domain: str, recipient: str, subject: str, text: str) -> EmailMessage:
    """A mail from postmaster of the mail domain, of now."""
    mail = EmailMessage()
    mail["From"] = f"Zulip email gateway <postmaster@{domain}>"
    mail["To"] = recipient
    mail["Subject"] = subject
    mail["Date"] = email.utils.formatdate()
    mail["Message-ID"] = email.utils.make_msgid(domain=domain)
    mail.set_content(text, cte="7bit")
    return mail

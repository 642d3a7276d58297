"""What doctor looks at of Postfix: its configuration, port 25 as a sender meets it, the certificate."""

from __future__ import annotations

import re
import smtplib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from . import certificate, postfix, sender_checks
from .config import Config
from .finding import OK, WARN, WRONG, Finding, found, run
from .verdict import COPY_AGAIN

ROOTS_MAIL = Path("/var/mail/root")
# What site.yml has written, see the role postfix_localmail (sha256sum(1)).
CHECKSUMS = Path("/etc/postfix/zulip-email-gateway.sha256")
# Where rspamd checks senders.
SENDERS = "/run/zulip-email-gateway-senders/"
_SITE = "run playbooks/site.yml"
_ASKS = "look at: systemctl status zulip-email-gateway-policy.socket"


def _configuration(config: Config) -> Iterator[Finding]:
    done = run("postfix", "check")
    # That the host has no IPv6 is all right.
    complaints = [line for line in done.stderr.strip().splitlines() if "disabling IPv6" not in line]
    if done.returncode or complaints:
        what = complaints[0] if complaints else f"exit status {done.returncode}"
        yield Finding(WRONG, f"postfix check: {what}", _SITE)
    elif run("postfix", "status").returncode:
        yield Finding(WRONG, "Postfix does not run", "look at: systemctl status postfix, journalctl -u 'postfix*'")
    elif (config.sender_checks != sender_checks.OFF) != (SENDERS in run("postconf", "-h", "smtpd_milters").stdout):
        what = f"gateway.conf has sender_checks = {config.sender_checks}, and Postfix is configured otherwise"
        yield Finding(WRONG, what, _SITE)
    else:
        yield Finding(OK, "Postfix runs, and its configuration is sound")


def _port_25(config: Config) -> Iterator[Finding]:
    """A dialogue up to RCPT, as a sender would have it; no mail."""
    domain = config.pattern.domain
    try:
        with socket.create_connection(postfix.PORT_25, 10) as connection, connection.makefile("rwb") as lines:
            banner = lines.readline().decode("ascii", "replace").strip()
            recipient = config.pattern.address("0" * 32)
            for command in ("EHLO doctor.invalid", "MAIL FROM:<>", f"RCPT TO:<{recipient}>"):
                lines.write(f"{command}\r\n".encode())
                lines.flush()
                while (line := lines.readline())[3:4] == b"-":
                    pass
                answer = line.decode("ascii", "replace").strip()
                if not answer.startswith("2"):
                    break
            lines.write(b"QUIT\r\n")
    except OSError as error:
        yield Finding(WRONG, f"port 25 does not answer: {error}", "look at: journalctl -u 'postfix*'")
        return
    good = banner.startswith(f"220 {domain} ")
    yield found(good, f"port 25 greets with {banner!r}", _SITE)
    what, remedy = "an address that no channel has", _SITE
    # So Zulip, if it is asked, says that it does not know it; Postfix's own map has other words.
    good = COPY_AGAIN in answer if config.asks else answer.startswith("250")
    if answer.startswith("250"):
        remedy = (
            "Zulip could not be asked whether it has that address; if nothing else is wrong here, look at: " + _ASKS
        )
    elif answer.startswith("4"):  # the milters, too, have to answer
        what, remedy = f"{command.partition(' ')[0]}, as to all mail", _ASKS
    yield found(good, f"port 25 answers {answer!r} to {what}", remedy)


def _unchanged(_: Config) -> Iterator[Finding]:
    """Whether its files are those that site.yml has written."""
    if not CHECKSUMS.exists():
        yield Finding(WARN, f"there is no {CHECKSUMS}: whether Postfix's files were changed is not known", _SITE)
        return
    done = run("env", "LC_ALL=C", "sha256sum", "--check", "--quiet", str(CHECKSUMS))
    changed = re.findall(r"^(.*): FAILED", done.stdout, re.MULTILINE)
    if changed:
        what = f"{', '.join(changed)}: not what playbooks/site.yml has written"
        yield Finding(
            WRONG,
            what,
            "run it, first with --check --diff; what is to stay goes into postfix_localmail_settings",
        )
    elif done.returncode:
        yield Finding(WRONG, f"{CHECKSUMS} cannot be checked: {done.stderr.strip()}", _SITE)
    else:
        yield Finding(OK, "Postfix's files are those that playbooks/site.yml has written")


def _certificate(config: Config) -> Iterator[Finding]:
    """With a STARTTLS as a sender would do it: whether the key fits, and the latest is in use."""
    files = certificate.files_of(postfix.main_cf())
    key, chain = files
    ours = certificate.read(chain)
    if not ours:
        yield Finding(WRONG, f"the certificate {chain} cannot be read", _SITE)
        return
    until = certificate.good_until(ours)
    days = (until - time.time()) / 86400
    date = time.strftime("%Y-%m-%d", time.localtime(until))
    what = f"the certificate {chain} is good until {date}, for {days:.0f} days"
    if days < 0:
        what = f"the certificate {chain} was good until {date}"
    yield found(days * 86400 > certificate.SOON, what, "renew it")
    names = {socket.getfqdn(), config.pattern.domain}
    if not any(certificate.is_for(ours, name) for name in names):
        what = f"the certificate {chain} names neither {' nor '.join(sorted(names))}"
        what = f"{what}: senders that insist on it (MTA-STS, DANE) bring nothing"
        yield Finding(WARN, what, "have it name the host that the MX record names")
    try:
        shown = certificate.shown()
    except (OSError, smtplib.SMTPException) as error:
        reload = "run: systemctl reload postfix"
        why, remedy = f"{key} is not the key of {chain}", f"put both in place again, then {reload}"
        if certificate.key_fits(files):
            why, remedy = f"{key} and {chain} are good", f"{reload}, or look at: journalctl -u 'postfix*'"
        yield Finding(WRONG, f"STARTTLS at port 25 fails ({error}; {why}), so senders use none", remedy)
        return
    good = shown.split() == ours.split()
    text = "STARTTLS at port 25 works, with that certificate"
    if not good:
        text = f"STARTTLS at port 25 works with another certificate than {chain}"
    remedy = "look at: systemctl status zulip-email-gateway-certificate.timer, or run: systemctl reload postfix"
    yield found(good, text, remedy)


def _postmaster(config: Config) -> Iterator[Finding]:
    """Whether mail to postmaster is taken, and whether there is room for it (RFC 5321, 4.5.1)."""
    postmaster = f"postmaster@{config.pattern.domain}"
    try:
        with smtplib.SMTP(*postfix.PORT_25, "doctor.invalid", timeout=10) as server:
            server.ehlo()
            server.mail("")
            code, answer = server.rcpt(postmaster)
    except (OSError, smtplib.SMTPException) as error:
        yield Finding(WRONG, f"port 25 does not answer: {error}", "look at: journalctl -u 'postfix*'")
        return
    if code == 250:
        yield Finding(OK, f"port 25 takes mail to {postmaster}")
    else:
        said = answer.decode("ascii", "replace")
        remedy = _SITE if code >= 500 else f"make room in {ROOTS_MAIL}, or look at: journalctl -u 'postfix*'"
        yield Finding(WRONG, f"port 25 refuses mail to {postmaster}: {code} {said}", remedy)
    if not ROOTS_MAIL.exists():
        return
    size = ROOTS_MAIL.stat().st_size
    most = int(run("postconf", "-h", "mailbox_size_limit").stdout.strip() or 0)
    if most and size > most / 2:
        what = f"{ROOTS_MAIL}, where mail to {postmaster} goes, has {size >> 20} of at most {most >> 20} MiB"
        remedy = "read and empty it, or send root's mail elsewhere (/etc/aliases, then newaliases)"
        yield Finding(WRONG, what, remedy)


# In the order in which a sender meets them.
CHECKS = (_configuration, _unchanged, _port_25, _postmaster, _certificate)

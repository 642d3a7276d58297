"""The certificate that Postfix shows at port 25."""

from __future__ import annotations

import re
import smtplib
import ssl
from typing import NamedTuple

from .finding import run
from .postfix import PORT_25

# It is renewed well before this time (seconds).
SOON = 7 * 86400
# What openssl(1) is asked, it answers within so many seconds, or the answer is not known.
_PATIENCE = 10.0
_CHAIN = re.compile(r"^smtpd_tls_chain_files *=\s*(\S+)\s+(\S+)", re.MULTILINE)


class Files(NamedTuple):
    """Where the key is, and the certificate with those it was signed with."""

    key: str
    chain: str


def files_of(main_cf: str) -> Files:
    """What the gateway's main.cf names (postconf(5), smtpd_tls_chain_files); empty where that was taken out."""
    found = _CHAIN.search(main_cf)
    return Files(found[1], found[2]) if found else Files("", "")


def read(path: str) -> str:
    """The first certificate of a file (PEM); empty if there is none, or it cannot be read."""
    return _openssl(("-in", path, "-outform", "PEM"))


def shown() -> str:
    """What a sender is shown after STARTTLS (PEM). Raises OSError and smtplib.SMTPException."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with smtplib.SMTP(*PORT_25, "doctor.invalid", timeout=10) as server:
        server.starttls(context=context)
        assert isinstance(server.sock, ssl.SSLSocket)
        return ssl.DER_cert_to_PEM_cert(server.sock.getpeercert(binary_form=True) or b"")


def good_until(certificate: str) -> float:
    """When it expires (Unix seconds); 0 if it is none."""
    found = re.search(r"^notAfter=(.*)$", _openssl(("-noout", "-enddate"), certificate), re.MULTILINE)
    return float(ssl.cert_time_to_seconds(found[1])) if found else 0.0


def is_for(certificate: str, name: str) -> bool:
    """True if it names that host (RFC 6125)."""
    return "does match" in _openssl(("-noout", "-checkhost", name), certificate)


def key_fits(files: Files) -> bool:
    """True if the key is the certificate's; to be asked as root."""
    ours = _openssl(("-noout", "-pubkey", "-in", files.chain))
    return bool(ours) and ours == run("openssl", "pkey", "-pubout", "-in", files.key, seconds=_PATIENCE).stdout


def _openssl(question: tuple[str, ...], certificate: str | None = None) -> str:
    return run("openssl", "x509", *question, input=certificate, seconds=_PATIENCE).stdout

#!/usr/bin/python
"""Ansible module: a Zulip server, and the host it runs on, as they are before a run. Reads, never writes."""

from __future__ import annotations

import ast
import configparser
import email.utils
import http.client
import io
import os
import pwd
import re
import socket
import ssl
import stat
import subprocess
import sys
import tokenize
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: zulip_info
short_description: A Zulip server and its host, as they are before a run
description:
  - Finds the deployment, its version, zulip.conf, the email settings of settings.py and the way mail goes into it,
    what the gateway has left in an earlier run, and what it has to know of the host.
  - What is wrong with Zulip's files is told as RV(fault). Changes nothing.
options:
  deployment:
    description: The symlink to the current deployment.
    type: path
    default: /home/zulip/deployments/current
  etc:
    description: The folder with settings.py, zulip.conf and zulip-secrets.conf.
    type: path
    default: /etc/zulip
  server:
    description: HOST:PORT of the mail server of a Zulip on another host; this host must have none.
    type: str
  user:
    description: The gateway's user, who need not exist yet.
    type: str
    required: true
  name:
    description: A name to ask DNS for, to see whether it answers.
    type: str
  paths:
    description: Files and folders of the gateway, to see which of them are there.
    type: list
    elements: path
    default: []
  folder:
    description: A folder that has to be there.
    type: path
  secret:
    description: Return the shared secret, and nothing else; needs C(no_log) at the task.
    type: bool
    default: false
author: The Zulip email gateway maintainers
"""

EXAMPLES = r"""
- name: Find Zulip
  zulip_info:
    user: zulip-email-gateway
  register: zulip
"""

RETURN = r"""
fault:
  description: What the gateway cannot work with, and the file; else empty. Nothing else is told of Zulip then.
  type: str
  returned: success
system:
  description: The operating system, for example "Debian 12".
  type: str
  returned: success
fqdn:
  description: The host's full name.
  type: str
  returned: success
addresses:
  description: Its IP addresses, without those of loopback and of links.
  type: list
  elements: str
  returned: success
dns_answers:
  description: Whether its name servers answer within 4 s.
  type: bool
  returned: success
has_user:
  description: Whether the gateway's user exists.
  type: bool
  returned: success
there:
  description: Those of O(paths) that exist.
  type: list
  elements: str
  returned: success
has_folder:
  description: Whether O(folder) is there.
  type: bool
  returned: success
version:
  description: ZULIP_VERSION of the deployment; empty if Zulip is on another host.
  type: str
  returned: success
here:
  description: Whether Zulip is on this host.
  type: bool
  returned: success
conf:
  description: zulip.conf as sections of keys.
  type: dict
  returned: success
classes_line:
  description: The line puppet_classes in the section machine of zulip.conf as it stands.
  type: str
  returned: success
classes_line_before:
  description: That line before a takeover took the class out; empty if there was none.
  type: str
  returned: success
cron:
  description: Whose /etc/cron.d/email-mirror it is, "ours" or "foreign"; empty if there is none.
  type: str
  returned: success
password_kept:
  description: Whether the gateway has replaced email_gateway_password of zulip-secrets.conf.
  type: bool
  returned: success
has_block:
  description: Whether settings.py has the gateway's block.
  type: bool
  returned: success
block:
  description: What stands in that block.
  type: str
  returned: success
runs_with:
  description: That block when Zulip was last restarted by the gateway.
  type: str
  returned: success
has_own_server:
  description: Whether Zulip's Puppet has set up the mail server that Zulip 11 and later have for port 25.
  type: bool
  returned: success
metrics_file:
  description: Where the metrics are written now; empty if they are not.
  type: str
  returned: success
sends_here:
  description: Whether Zulip sends its own mail to port 25 of this host (EMAIL_HOST in settings.py).
  type: bool
  returned: success
closed:
  description: The folders on the way to what Zulip's worker tells of the mail that the gateway's user cannot pass.
  type: list
  elements: str
  returned: success
web:
  description: Zulip's web server on this host; empty if Zulip is on another one.
  type: str
  returned: success
external_host:
  description: EXTERNAL_HOST of settings.py; empty if it cannot be told.
  type: str
  returned: success
sends_from:
  description: The addresses that Zulip sends from, with {token} for what changes.
  type: list
  elements: str
  returned: success
shared_secret:
  description: Zulip's shared secret.
  type: str
  returned: when secret is true
url:
  description: Where mail goes into Zulip. http(s) is its web server (up to 10), smtp its mail server (11 and later).
  type: str
  returned: success
"""

# Zulip's HTTP mail endpoint, before and since some version from 7 to 9.
ENDPOINTS = ("/email_mirror_message", "/api/internal/email_mirror_message")
# What the management command of Zulip's own mail server looks like in a deployment.
MAIL_SERVER = "zerver/management/commands/email_server.py"
# Where the gateway's unit lets that server listen.
MAIL_SERVER_URL = "smtp://127.0.0.1:10525"
LAST_WITH_ENDPOINT = 10
# With what Zulip's Puppet runs that server on port 25.
OWN_SERVER = "supervisor/conf.d/zulip/email-mirror.conf"
# What Zulip takes for true, in either case: puppet/zulip/lib/puppet/functions/zulipconf.rb.
TRUE = ("1", "y", "t", "yes", "true", "enable", "enabled")
# What Zulip's worker tells of the mail stands in these, which its Puppet keeps to its own user.
WORKER_FOLDERS = ("/var/log/zulip", "/var/log/zulip/queue_error")

# By this the gateway knows its own files.
MARK = "Zulip email gateway"
# What tasks/zulip.yml puts around its block in settings.py, and what may stand in it.
BEGIN_OF_BLOCK, END_OF_BLOCK = f"# BEGIN {MARK} (Ansible)", f"# END {MARK} (Ansible)"
IN_BLOCK = {f"EMAIL_GATEWAY_{name}" for name in ("PATTERN", "LOGIN", "IMAP_SERVER", "IMAP_PORT", "IMAP_FOLDER")}
# Zulip's script that prints a setting as its own programs see it.
SETTING = "scripts/get-django-setting"
# The unit that writes the metrics, by the file at the end of its command.
METRICS_UNIT = "systemd/system/zulip-email-gateway-metrics.service"

# The files of Zulip that are read here are shorter (bytes).
LARGEST = 2**20


class Unfit(Exception):
    """Something about this Zulip that the gateway cannot work with."""


def bytes_of(path: Path) -> bytes:
    """A file that every Zulip has; raises Unfit.

    Zulip's user owns the folder, and root reads and changes the file: it has to be one, and not a link
    that leads root to another. A link that root has made is all right.
    """
    try:
        if path.is_symlink() and path.lstat().st_uid != 0:
            raise Unfit(f"{path} is a link that does not belong to root; put the file itself in its place")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Unfit(f"{path} is no regular file; put Zulip's own in its place")
        with open(descriptor, "rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise Unfit(f"{path} does not exist; is Zulip's installation complete?") from None
    if len(content) > LARGEST:
        raise Unfit(f"{path} has more than {LARGEST} bytes, which none of Zulip's has; look at it")
    return content


def text_of(path: Path) -> str:
    """The text of such a file; raises Unfit if it is not UTF-8."""
    try:
        return io.TextIOWrapper(io.BytesIO(bytes_of(path)), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise Unfit(f"{path} is not UTF-8: {error}; mend it first") from error


def version_of(deployment: Path) -> str:
    """ZULIP_VERSION in version.py."""
    path = deployment / "version.py"
    if not path.is_file():
        raise Unfit(
            f"there is no Zulip on this host: {path} does not exist. Put only Zulip servers into the inventory's group "
            "zulip; if it runs in a container or on another host, set email_gateway_zulip_server to where its mail "
            "server is reached, for example 127.0.0.1:2525 for a container's port 25 published there"
        )
    found = re.search(r'^ZULIP_VERSION = "(\d[^"]*)"', text_of(path), re.MULTILINE)
    if found is None:
        raise Unfit(f'{path} has no line ZULIP_VERSION = "N.N"; is {deployment} a complete deployment of Zulip?')
    return found[1]


def conf_of(path: Path) -> dict[str, dict[str, str]]:
    """zulip.conf or zulip-secrets.conf as sections of keys, as Zulip reads them (zproject/config.py).

    Raises Unfit, which never quotes a line: there may be a secret in it.
    """
    text = text_of(path)
    if text.startswith("\ufeff"):
        raise Unfit(
            f"{path} starts with a byte order mark (BOM), and Zulip itself cannot read it; "
            f"remove the mark: sed -i '1s/^\\xEF\\xBB\\xBF//' {path}"
        )
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text, source=str(path))
    except configparser.MissingSectionHeaderError as error:
        raise Unfit(f"{path} cannot be parsed: line {error.lineno} stands above the first [section]") from None
    except configparser.ParsingError as error:
        numbers = ", ".join(str(number) for number, _ in error.errors)
        raise Unfit(f"{path} cannot be parsed: no [section] and no key = value: line {numbers}") from None
    except configparser.Error as error:  # something stands there twice
        raise Unfit(f"{path} cannot be parsed: {error}") from error
    return {section: dict(parser.items(section)) for section in parser.sections()}


def check_settings(path: Path) -> dict[str, Any]:
    """settings.py has to be Python, and nothing may override the gateway's block; raises Unfit.

    Returns what is set there to a plain value, and "*" if something comes from another module that way.
    """
    try:
        # As Python reads it (PEP 263), its line ends all made "\n"; splitlines knows others, too.
        content = io.BytesIO(bytes_of(path))
        encoding, _ = tokenize.detect_encoding(content.readline)
        content.seek(0)
        text = io.TextIOWrapper(content, encoding).read()
        lines, module = text.split("\n"), ast.parse(text, filename=str(path))
    except (RecursionError, MemoryError):
        raise Unfit(f"{path} is nested too deeply to be read; mend it first") from None
    except SyntaxError as error:
        where = f", line {error.lineno}," if error.lineno else ""
        what = repr(error.text.rstrip()) if error.text else error.msg
        raise Unfit(f"{path}{where} is not valid Python: {what}; mend it first") from error
    except ValueError as error:  # no text in its encoding, or NUL bytes
        raise Unfit(f"{path} is not valid Python: {error}; mend it first") from error
    end = lines.index(END_OF_BLOCK) if END_OF_BLOCK in lines else len(lines)
    for number, name in sorted(bound(module)):
        if number > end and name in IN_BLOCK:
            raise Unfit(
                f"{path}, line {number}, overrides the gateway's block above it: {lines[number - 1]!r}; "
                "remove that line and set it in the inventory"
            )
        if number > end and name == "*":
            raise Unfit(
                f"{path}, line {number}, may override the gateway's block above it: {lines[number - 1]!r}; "
                "move that line above the block"
            )
    values = plain_values(module)
    if any(name == "*" for _, name in bound(module)):
        values["*"] = True
    return values


def bound(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Each name that is bound or deleted, in whatever way, after its line."""
    nodes = list(ast.walk(module))
    # "NAME: type" alone binds nothing.
    declared = [node.target for node in nodes if isinstance(node, ast.AnnAssign) and node.value is None]
    for node in nodes:
        if isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load) and node not in declared:
                yield node.lineno, node.id
        elif isinstance(name := getattr(node, "asname", None) or getattr(node, "name", None), str):
            # By import, def, class, except or match.
            yield getattr(node, "lineno", 0), name


def plain_values(module: ast.Module) -> dict[str, Any]:
    """What names are assigned, where that is a literal: the last one of each name."""
    kinds = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)
    nodes = [node for node in ast.walk(module) if isinstance(node, kinds) and node.value is not None]
    values: dict[str, Any] = {}
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for name, part in pairs(target, node.value):
                with suppress(ValueError, TypeError, KeyError):  # no plain value
                    value = ast.literal_eval(part)
                    if not isinstance(node, ast.AugAssign):
                        values[name] = value
                    elif isinstance(node.op, ast.Add):
                        values[name] += value
    return values


def pairs(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[str, ast.expr]]:
    """Each name in an assignment's target with its part of the value, as far as the two can be matched."""
    while isinstance(value, ast.NamedExpr):
        value = value.value
    sequences = (ast.Tuple, ast.List)
    if isinstance(target, ast.Name) and value is not None:
        yield target.id, value
    elif isinstance(target, sequences) and isinstance(value, sequences):
        # Up to a star from both ends.
        for step in (-1, 1):
            for one, part in zip(target.elts[::step], value.elts[::step], strict=False):
                if isinstance(one, ast.Starred) or isinstance(part, ast.Starred):
                    break
                yield from pairs(one, part)


def url_of(conf: dict[str, dict[str, str]]) -> str:
    """The web server on loopback, by [application_server] of zulip.conf."""
    server = conf.get("application_server", {})
    http_only = server.get("http_only", "").lower() in TRUE
    scheme, default = ("http", "80") if http_only else ("https", "443")
    port = server.get("nginx_listen_port", default)
    if not port.isdigit():
        raise Unfit(f"zulip.conf: [application_server] nginx_listen_port = {port!r} is no port number")
    return f"{scheme}://127.0.0.1" + ("" if port == default else f":{port}")


def has_endpoint(url: str) -> bool | None:
    """Whether the web server has the mail endpoint; None if its answers do not tell.

    GET is not allowed there (405), and of all other paths Zulip knows nothing (404).
    """
    where = urllib.parse.urlsplit(url)
    answers = [status_of(where.scheme, where.port, path) for path in ENDPOINTS]
    if 405 in answers:
        return True
    return False if set(answers) == {404} else None


def status_of(scheme: str, port: int | None, path: str) -> int | None:
    """The HTTP status with which the web server on loopback answers GET; None if it does not answer."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = (
        http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        if scheme == "http"
        else http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
    )
    with closing(connection), suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status
    return None


def way_in(deployment: Path, version: str, url: str) -> str:
    """The URL by which mail goes into Zulip: what answers decides, then what is installed."""
    endpoint = has_endpoint(url)
    if endpoint:
        return url
    if (deployment / MAIL_SERVER).is_file():
        return MAIL_SERVER_URL
    if endpoint is None and int(re.split(r"\D", version)[0]) <= LAST_WITH_ENDPOINT:
        return url
    why = "does not answer" if endpoint is None else "is 404"
    raise Unfit(
        f"Zulip {version} has no mail endpoint ({url}{ENDPOINTS[0]} {why}) "
        f"and no mail server ({deployment / MAIL_SERVER} does not exist): is its installation complete?"
    )


def elsewhere(server: str, deployment: Path) -> dict[str, Any]:
    """The same for a host without Zulip; raises Unfit."""
    host, _, port = server.rpartition(":")
    if not re.fullmatch(r"[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]", host) or not port.isdigit() or not 0 < int(port) < 65536:
        raise Unfit(
            f"email_gateway_zulip_server is {server!r}; write it as HOST:PORT, for example zulip.example.com:25"
        )
    if deployment.exists():
        version = version_of(deployment)
        why = (
            f"Zulip {version} takes mail from its own host only"
            if int(re.split(r"\D", version)[0]) <= LAST_WITH_ENDPOINT
            else f"this host has Zulip {version} itself"
        )
        raise Unfit(f"email_gateway_zulip_server is {server!r}, but {why}: remove email_gateway_zulip_server")
    return {
        "version": "",
        "here": False,
        "conf": {},
        "url": f"smtp://{server}",
        "classes_line": "",
        "classes_line_before": "",
        "cron": "",
        "password_kept": False,
        "has_block": False,
        "block": "",
        "runs_with": "",
        "has_own_server": False,
        "closed": [],
        "sends_here": False,
        "web": "",
        "external_host": "",
        "sends_from": [],
    }


def zulip_info(deployment: Path, etc: Path, user: str, server: str | None = None) -> dict[str, Any]:
    """All about Zulip; raises Unfit."""
    if server:
        return elsewhere(server, deployment)
    version = version_of(deployment)
    conf = conf_of(etc / "zulip.conf")
    values = check_settings(etc / "settings.py")
    shared_secret(etc / "zulip-secrets.conf")
    ours = etc.parent / "zulip-email-gateway"
    block = block_of(etc / "settings.py")
    return {
        "version": version,
        "here": True,
        "conf": conf,
        "url": way_in(deployment, version, url_of(conf)),
        "classes_line": classes_line(etc / "zulip.conf"),
        "classes_line_before": left_in(ours / "zulip.conf-line").rstrip("\n"),
        "cron": cron_of(etc.parent / "cron.d/email-mirror"),
        "password_kept": (ours / "zulip-secrets.conf-line").exists(),
        "has_block": block is not None,
        "block": block or "",
        "runs_with": left_in(ours / "zulip-runs-with"),
        "has_own_server": (etc.parent / OWN_SERVER).exists(),
        "closed": closed_to(user),
        "sends_here": is_this_host(mail_host(values, deployment)),
        "web": url_of(conf),
        "external_host": (host := setting("EXTERNAL_HOST", values, deployment)),
        "sends_from": senders(host.partition(":")[0], values, deployment),
    }


def host_info(
    etc: Path, name: str | None, user: str, paths: Sequence[str], folder: str | None = None
) -> dict[str, Any]:
    """What the gateway has to know of the host, and what it has left there itself."""
    # First of all: where DNS is dead everything else takes minutes. The resolver asks a second time, or another
    # server, after five seconds.
    answers = not name or answered("getent", "--service=hosts:dns", "ahosts", name, seconds=4)
    unit = left_in(etc.parent / METRICS_UNIT)
    metrics = re.search(r"^ExecStart=.* sh (/\S*)$", unit, re.MULTILINE)
    return {
        "system": system(left_in(etc.parent / "os-release")),
        "fqdn": socket.getfqdn() if answers else socket.gethostname(),
        "addresses": [one for one in own_addresses() if not one.startswith(("127.", "fe80:")) and one != "::1"],
        "dns_answers": answers,
        "has_user": has_user(user),
        "there": [path for path in paths if os.path.lexists(path)],
        "has_folder": bool(folder) and os.path.isdir(folder or ""),
        "metrics_file": metrics[1] if metrics else "",
    }


def system(os_release: str) -> str:
    """The operating system by name and version, from os-release(5): "Debian 12", "Ubuntu 24.04"."""
    found = dict(re.findall(r"""^([A-Z_]+)=["']?(.*?)["']?$""", os_release, re.MULTILINE))
    # Debian calls itself "Debian GNU/Linux".
    name = found.get("NAME", "an unknown system").replace(" GNU/Linux", "")
    return f"{name} {found.get('VERSION_ID', '')}".strip()


def left_in(path: Path) -> str:
    """A file of the gateway or of the system; nothing if it does not exist."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def block_of(path: Path) -> str | None:
    """What stands in the gateway's block of settings.py; None if it has none."""
    text = bytes_of(path).decode(errors="replace")
    if MARK not in text:
        return None
    found = re.search(
        rf"^{re.escape(BEGIN_OF_BLOCK)}\n(.*?)^{re.escape(END_OF_BLOCK)}$", text, re.DOTALL | re.MULTILINE
    )
    return found[1] if found else ""


def has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def shared_secret(path: Path) -> str:
    """The secret that Zulip's own programs share; raises Unfit."""
    secret = conf_of(path).get("secrets", {}).get("shared_secret")
    if not secret:
        raise Unfit(f"{path} has no shared_secret under [secrets], or an empty one; is Zulip's installation complete?")
    return secret


def mail_host(values: dict[str, Any], deployment: Path) -> str:
    """EMAIL_HOST, if Zulip sends its own mail to port 25 there; else empty."""
    # 25 is Django's default, and smtplib's for a port that is not set. It takes "25" as well.
    is_smtp = setting("EMAIL_PORT", values, deployment) in ("", "25", "None")
    return setting("EMAIL_HOST", values, deployment) if is_smtp else ""


def senders(host: str, values: dict[str, Any], deployment: Path) -> list[str]:
    """The addresses that Zulip sends from (zproject/default_settings.py)."""
    standard = {"NOREPLY_EMAIL_ADDRESS": "noreply", "TOKENIZED_NOREPLY_EMAIL_ADDRESS": "noreply-{token}"}
    found = (
        email.utils.parseaddr(setting(name, values, deployment))[1] or f"{local}@{host}"
        for name, local in standard.items()
    )
    return [address.lower() for address in found if host or not address.endswith("@")]


def setting(name: str, values: dict[str, Any], deployment: Path) -> str:
    """A setting as text, as far as it can be told; else empty."""
    asked = setting_of(name, deployment) if "*" in values else None
    return str(values.get(name) or "") if asked is None else asked


def setting_of(name: str, deployment: Path) -> str | None:
    """A setting as Zulip itself sees it (some seconds); None if it cannot tell."""
    script = deployment / SETTING
    if not script.is_file():
        return None
    return printed("su", "zulip", "-c", f"{script} {name}", seconds=60)


def is_this_host(name: str) -> bool:
    """Whether a name or an address is one of this host's; a name that DNS does not tell within 5 s is not."""
    if not name:
        return False
    resolved = printed("getent", "ahosts", name, seconds=5) or name
    addresses = {line.split()[0] for line in resolved.splitlines() if line.split()}
    own = own_addresses()
    return any(address in own or address.startswith("127.") for address in addresses)


def own_addresses() -> list[str]:
    """This host's IP addresses, those of loopback as well."""
    return re.findall(r"\binet6? ([0-9a-f.:]+)", printed("ip", "address", seconds=5) or "")


def answered(*command: str, seconds: float) -> bool:
    """Whether a command ended within that time, however."""
    try:
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False
    return True


def printed(*command: str, seconds: float) -> str | None:
    """What a command printed; None if it failed or took longer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def closed_to(user: str, folders: Sequence[str] = WORKER_FOLDERS) -> list[str]:
    """Those of `folders` that the user cannot pass; by their mode if there is no such user yet."""
    there = [folder for folder in folders if Path(folder).is_dir()]
    if not has_user(user):
        return [folder for folder in there if not Path(folder).stat().st_mode & stat.S_IXOTH]
    passes = ("runuser", "-u", user, "--", "test", "-x")
    return [folder for folder in there if subprocess.run((*passes, folder), check=False).returncode]


def cron_of(path: Path) -> str:
    """Whose cron job reads an inbox: "ours", "foreign", or "" for none."""
    if not path.exists():
        return ""
    return "ours" if MARK.encode() in path.read_bytes() else "foreign"


def classes_line(path: Path) -> str:
    """The line in the section [machine] of zulip.conf that lists the Puppet classes, as it stands; or nothing."""
    section = ""
    for line in text_of(path).split("\n"):
        if header := configparser.RawConfigParser.SECTCRE.match(line.strip()):
            section = header["header"]
        elif section == "machine" and re.match(r"[ \t]*puppet_classes[ \t]*[=:]", line, re.IGNORECASE):
            return line
    return ""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "deployment": {"type": "path", "default": "/home/zulip/deployments/current"},
            "etc": {"type": "path", "default": "/etc/zulip"},
            "server": {"type": "str"},
            "user": {"type": "str", "required": True},
            "name": {"type": "str"},
            "paths": {"type": "list", "elements": "path", "default": []},
            "folder": {"type": "path"},
            "secret": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    options = module.params
    deployment, etc, user = Path(options["deployment"]), Path(options["etc"]), options["user"]
    try:
        if options["secret"]:
            module.exit_json(changed=False, shared_secret=shared_secret(etc / "zulip-secrets.conf"))
        facts = {**host_info(etc, options["name"], user, options["paths"], options["folder"]), "fault": ""}
        try:
            # What follows needs a later one. The system's name, which is told all the same, says more.
            if sys.version_info < (3, 10):  # noqa: UP036
                raise Unfit("this host's Python is older than 3.10, which all systems have that Zulip supports")
            facts.update(zulip_info(deployment, etc, user, options["server"]))
        except Unfit as error:
            facts["fault"] = str(error)
        module.exit_json(changed=False, **facts)
    except Unfit as error:
        module.fail_json(msg=str(error))
    except (OSError, UnicodeError) as error:
        module.fail_json(msg=f"cannot read Zulip's files: {error}")


if __name__ == "__main__":
    main()

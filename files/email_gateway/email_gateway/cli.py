"""The command line of operators, units and site.yml; Postfix's command is deliver.py."""

from __future__ import annotations

import argparse
import getpass
import grp
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from . import __version__, address_book, config
from .addresses import Pattern, redact
from .client import Client
from .journal import BOUNDS, Journal
from .probe import Sent, still_waits
from .quarantine import Quarantine
from .terminal import escaped, readable
from .verdict import Trouble, exit_status

# Green, yellow, red (ECMA-48, 8.3.117).
_COLOURS = {"ok": "32", "warn": "33", "WRONG": "31;1"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zulip-email-gateway", description="Delivers email into Zulip, losing none.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--config", type=Path, default=config.CONFIG, help="default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    deliver = commands.add_parser(
        "deliver",
        help="deliver the mail on standard input (Postfix does, see pipe(8))",
        description="Delivers the mail on standard input. Before it stands a line with a channel's address, or a "
        "reply address: Delivered-To: ADDRESS",
    )
    deliver.add_argument("--queue-id", default="", help="Postfix's queue ID: the same mail is delivered once")
    deliver.add_argument("--deadline", type=float, default=300, help="seconds to wait (default: %(default)s)")

    commands.add_parser("serve", help="hand mail to Zulip (systemd starts it, see zulip-email-gateway.service)")
    poll = commands.add_parser("poll", help="take mail out of the IMAP inbox (a service does)")
    poll.add_argument(
        "--try",
        dest="candidate",
        action="store_true",
        help="only log in, to the inbox on standard input (JSON; site.yml does before it is configured)",
    )
    poll.add_argument(
        "--smtp",
        metavar="HOST:PORT",
        help="with --try: send the configured inbox a mail through the provider's SMTP server, and see it come",
    )
    oauth = commands.add_parser("oauth", help="have somebody consent in a browser that the gateway reads the inbox")
    oauth.add_argument("device_endpoint", metavar="DEVICE-ENDPOINT", help="the URL that hands out codes (RFC 8628)")
    for name in ("token-endpoint", "client-id", "scope"):
        variable = f"email_gateway_oauth_{name.replace('-', '_')}"
        oauth.add_argument(f"--{name}", required=True, help=f"as in the inventory ({variable})")
    oauth.add_argument(
        "--client-secret", action="store_true", help="ask for the secret of the client; a public one has none"
    )
    oauth.add_argument("--state-dir", type=Path, default=Path("/var/lib/zulip-email-gateway"), help=argparse.SUPPRESS)
    commands.add_parser("check", help="prove that Zulip would take mail; sends none")

    doctor = commands.add_parser("doctor", help="is everything right on this host? changes nothing; run it as root")
    doctor.add_argument("--json", action="store_true", help="for programs")
    status = commands.add_parser("status", help="what was delivered, deferred and refused, and what the limits allow")
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs")
    form.add_argument("--prometheus", action="store_true", help="for Prometheus, in its text format")
    form.add_argument("--history", type=int, metavar="DAYS", help="what was counted hour by hour, for programs")

    probe = commands.add_parser(
        "probe",
        help="send a mail through port 25, and see it posted",
        description="Sends a mail through port 25 of this host to the address on standard input, and follows it until "
        "it is posted. Everybody in the channel sees it.",
    )
    probe.add_argument("--timed", action="store_true", help="to email_gateway_probe_address (a timer does)")
    probe.add_argument("--wait", type=float, default=120, help="seconds to wait for it (default: %(default)s)")

    quarantine = commands.add_parser("quarantine", help="copies of refused mail")
    actions = quarantine.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="one line a mail, oldest first")
    show = actions.add_parser("show", help="envelope, reason and the message itself")
    replay = actions.add_parser("replay", help="deliver it again; it leaves the quarantine when Zulip accepts it")
    for action in (show, replay):
        action.add_argument("id", help="as listed")
    replay.add_argument("--to", action="store_true", help="to the address on standard input: the channel's new one")
    purge = actions.add_parser("purge", help="remove copies for good")
    which = purge.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--older-than", type=float, metavar="DAYS", help="those refused longer ago, but not what Zulip has lost"
    )
    which.add_argument(
        "--all", action="store_true", help="all, what Zulip has lost too, of which there is no other copy"
    )
    purge.add_argument("--lost", action="store_true", help="with --older-than: also what Zulip has lost")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status (sysexits(3))."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "doctor" and os.geteuid() != 0:
            raise Trouble("4.3.0", "user", "run this as root")
        if options.command == "serve":
            return _serve(options.config)
        if options.command == "doctor":
            return _doctor(config.load(options.config), options.json)
        if options.command == "oauth":
            return _consent(options)
        if options.command == "poll" and options.candidate and not options.smtp:
            return _try_inbox()
        settings = config.load(options.config)
        _become_owner(settings.state_dir)
        service = Client(settings.hand_over)
        if options.command == "poll":
            return _probe_inbox(settings, options.smtp) if options.smtp else _poll(settings, service)
        if options.command == "check":
            return _say(service.ask("check"))
        if options.command == "probe":
            return _probe(settings, service, options)
        if options.command == "status":
            return _status(settings, options)
        return _quarantine(settings, service, options)
    except Trouble as trouble:
        _print(f"zulip-email-gateway: {trouble}", to=sys.stderr)
        return exit_status(trouble.verdict)


def _serve(configuration: Path) -> int:
    from . import service

    sockets = service.listening_sockets()
    os.umask(0o077)
    service.Service(configuration).serve(*sockets)
    return 0


def _become_owner(folder: Path) -> None:
    """As root, go on as the gateway's user: what root writes it could not read."""
    try:
        owner = folder.stat()
    except OSError as error:
        raise Trouble("4.3.0", "state", f"cannot use {folder}: {error.strerror}") from error
    if os.geteuid() not in (0, owner.st_uid):
        raise Trouble("4.3.0", "user", f"{folder} belongs to another user: run this as root")
    groups: list[int] = []
    if os.geteuid() == 0 and owner.st_uid != 0:
        # Whoever looks at Postfix's queue needs this one where setgid programs have no effect (systemd.exec(5)).
        with suppress(KeyError):
            groups = [grp.getgrnam("postdrop").gr_gid]
        os.setgroups(groups)
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    os.umask(0o077)


def _doctor(settings: config.Config, as_json: bool) -> int:
    from . import doctor
    from .finding import WRONG

    findings = doctor.examine(settings)
    if as_json:
        _print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in findings:
            _print(str(finding), colour=_COLOURS[finding.level])
    return 1 if any(finding.level == WRONG for finding in findings) else 0


def _probe(settings: config.Config, service: Client, options: argparse.Namespace) -> int:
    from . import probe

    if not options.timed:
        sent = probe.send(settings, _address_asked_for(), _print)
        return 1 if sent is None or probe.follow(settings, sent, _print, options.wait) is None else 0
    if not settings.addresses.probe:
        raise Trouble("4.3.5", "configuration", "no address to send a probe to; set email_gateway_probe_address")
    at, seconds, sent = time.time(), None, _probe_that_waits(settings)
    if sent is None:
        sent = probe.send(settings, settings.addresses.probe, _print)
    else:
        _print(f"The last one, {sent.queue_id}, has not been posted yet, so that no other is sent")
    if sent is not None:
        seconds = probe.follow(settings, sent, _print, options.wait)
    fields = {"queue-id": sent.queue_id if sent else "", "after": str(sent.after if sent else 0)}
    fields |= {"at": f"{sent.at if sent else at:.3f}", "looked": f"{time.time():.3f}"}
    status, line, _ = service.ask("probed", seconds="" if seconds is None else f"{seconds:.3f}", **fields)
    if status:
        raise Trouble("4.3.2", "service", line)
    return 1 if seconds is None else 0


def _probe_that_waits(settings: config.Config) -> Sent | None:
    last = Journal(settings.state_dir, create=False).note("probe")
    if last is None or last["seconds"] is not None or not last.get("queue_id"):
        return None
    sent = Sent(last["at"], last["queue_id"], last["after"])
    return sent if still_waits(settings, sent) else None


def _address_asked_for() -> str:
    """On standard input: arguments are seen by every user of the host, and whoever has an address may post."""
    if sys.stdin.isatty():
        print("The address: ", end="", file=sys.stderr, flush=True)
    address = sys.stdin.readline().strip()
    if not address:
        sys.exit("No address came on standard input. Write one line with it: a channel's address, or an alias.")
    return address


def _inbox(settings: config.Config) -> config.Imap:
    if settings.imap is None:
        raise Trouble("4.3.5", "configuration", "gateway.conf has no [imap]: set email_gateway_login, run site.yml")
    _with_packages()
    return settings.imap


def _poll(settings: config.Config, service: Client) -> int:
    _inbox(settings)
    from .polling import Inbox

    Inbox(settings, service).run()
    return 0


def _probe_inbox(settings: config.Config, server: str) -> int:
    imap = _inbox(settings)
    from . import inbox_probe
    from .polling import tokens_of

    tokens = tokens_of(imap, settings.state_dir, settings.timeout)
    return 0 if inbox_probe.probe(settings, imap, tokens, server, _print) else 1


def _consent(options: argparse.Namespace) -> int:
    from .oauth import Tokens

    _become_owner(options.state_dir)
    secret = getpass.getpass("The secret of the client: ") if options.client_secret else ""
    client = {"client_id": options.client_id, "client_secret": secret}
    store = options.state_dir / "refresh-token"
    Tokens(options.token_endpoint, client, options.scope, store, 30.0).consent(
        options.device_endpoint, _print, time.sleep
    )
    _print("The consent is kept; run playbooks/site.yml, without email_gateway_oauth_refresh_token")
    return 0


def _try_inbox() -> int:
    _with_packages()
    from .polling import look_into

    asked = json.load(sys.stdin)
    imap = config.Imap(**asked["imap"])
    imap = imap._replace(port=int(imap.port), largest=int(imap.largest))
    # ansible-core 2.17 knows templates that are text only.
    is_own = str(asked["accept_existing"]) == "True"
    book = None if is_own else address_book.read(asked["addresses"], Pattern.parse(asked["pattern"]))
    _print(look_into(imap, book, Path(asked["state_dir"]), float(asked["timeout"])))
    return 0


def _with_packages() -> None:
    """Only polling uses a package of Debian's; deliveries start faster without (-S)."""
    import site

    site.main()


def _status(settings: config.Config, options: argparse.Namespace) -> int:
    from . import metrics, status

    if options.history is not None:
        since = time.time() - options.history * 86400
        bounds = [None if bound == float("inf") else bound for bound in BOUNDS]
        _print(json.dumps({"bounds": bounds, **Journal(settings.state_dir, create=False).history(since)}))
        return 0
    facts = status.collect(settings)
    if options.prometheus:
        print(redact(metrics.render(facts)), end="")
    else:
        _print(json.dumps(facts, indent=2) if options.json else status.render(facts, settings.logs))
    return 0


def _say(answer: tuple[int, str, str]) -> int:
    """Print what the service says; its exit status."""
    status, line, _ = answer
    _print(line, to=sys.stderr if status else sys.stdout)
    return status


def _quarantine(settings: config.Config, service: Client, options: argparse.Namespace) -> int:
    journal = Journal(settings.state_dir, create=False)
    if options.action == "list":
        for copy in journal.copies():
            when = _local_time(copy.refused)
            _print(f"{copy.id}  {when}  {copy.size:>8} bytes  {copy.recipient}  {copy.reason}")
        return 0
    if options.action == "purge":
        return _say(
            service.ask("purge", days=f"{options.older_than or 0:g}", lost=str(options.all or options.lost).lower())
        )
    if options.action == "replay":
        to = _address_asked_for() if options.to else ""
        return _say(service.ask("replay", id=options.id, to=to))
    found = journal.copy(options.id)
    if found is None:
        _print(f"zulip-email-gateway: no mail {options.id!r} in quarantine; see: quarantine list", to=sys.stderr)
        return 1
    store = Quarantine(settings.state_dir, journal, settings.quarantine_bytes, settings.quarantine_days)
    # Whoever writes the message into a file wants it as it came, and nothing else.
    is_terminal = sys.stdout.isatty()
    for name, value in {**found._asdict(), "refused": _local_time(found.refused)}.items():
        _print(f"{name}: {value}", to=sys.stdout if is_terminal else sys.stderr)
    if is_terminal:
        print()
        for text in readable(store.pieces(found.id)):
            print(text, end="")
        return 0
    for piece in store.pieces(found.id):
        sys.stdout.buffer.write(piece)
    return 0


def _print(text: str, to: TextIO | None = None, colour: str = "") -> None:
    """For people: no whole address, and nothing that steers a terminal but the colour of the first word."""
    shown = escaped(redact(text))
    if colour and sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        word, blank, rest = shown.partition(" ")
        shown = f"\x1b[{colour}m{word}\x1b[0m{blank}{rest}"
    print(shown, file=to)


def _local_time(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))

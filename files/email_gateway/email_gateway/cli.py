"""The command line: one door for Postfix, the others for operators and timers."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from . import config
from .addresses import redact
from .backend import prove
from .delivery import Envelope, Gateway
from .verdict import Delivered, Refused, Trouble, bug, exit_status, overdue, tell_postfix_and_exit


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zulip-email-gateway", description="Delivers email into Zulip, losing none.")
    parser.add_argument("--config", type=Path, default=config.CONFIG, help="default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    deliver = commands.add_parser("deliver", help="deliver the mail on standard input (Postfix does, see pipe(8))")
    deliver.add_argument("--sender", default="", help="envelope sender; empty for a bounce")
    deliver.add_argument("--queue-id", default="", help="Postfix' queue ID")
    deliver.add_argument("--original-recipient", default="", help="the recipient before Postfix' aliases")
    deliver.add_argument("recipient", help="a channel's address, or a reply address")

    poll = commands.add_parser("poll", help="take mail out of the IMAP inbox (a service does)")
    poll.add_argument(
        "--try",
        dest="candidate",
        action="store_true",
        help="only log in, to the inbox on standard input (JSON; site.yml does before it is configured)",
    )
    commands.add_parser("recover", help="hand over again what failed inside Zulip (a timer calls this every minute)")
    commands.add_parser("check", help="prove that Zulip would take mail; sends none")

    commands.add_parser("doctor", help="is everything right on this host? changes nothing; run it as root")
    status = commands.add_parser("status", help="what was delivered, deferred and refused, and what the limits allow")
    status.add_argument("--json", action="store_true", help="for programs")

    quarantine = commands.add_parser("quarantine", help="copies of refused mail")
    actions = quarantine.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="one line a mail, oldest first")
    show = actions.add_parser("show", help="envelope, reason and the message itself")
    replay = actions.add_parser("replay", help="deliver it again; it leaves the quarantine when Zulip accepts it")
    for action in (show, replay):
        action.add_argument("id", help="as listed")
    replay.add_argument("--to", metavar="ADDRESS", help="another address, where the channel's was renewed")
    purge = actions.add_parser("purge", help="remove copies for good")
    which = purge.add_mutually_exclusive_group(required=True)
    which.add_argument("--older-than", type=float, metavar="DAYS", help="those refused longer ago")
    which.add_argument("--all", dest="older_than", action="store_const", const=0.0, help="also what Zulip has lost")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status (sysexits(3))."""
    options = _parser().parse_args(arguments)
    if options.command == "deliver":
        _deliver(options)
    try:
        if options.command == "doctor" and os.geteuid() != 0:
            raise Trouble("4.3.0", "user", "run this as root")
        if options.command == "doctor":
            return _doctor(Gateway(config.load(options.config)))
        if options.command == "poll" and options.candidate:
            return _try_inbox()
        _become_owner(config.load(options.config).state_dir)
        gateway = Gateway(config.load(options.config))
        if options.command == "recover":
            return _recover(gateway)
        if options.command == "poll":
            return _poll(gateway)
        if options.command == "check":
            return _check(gateway)
        if options.command == "status":
            return _status(gateway, options.json)
        return _quarantine(gateway, options)
    except Trouble as trouble:
        print(f"zulip-email-gateway: {redact(str(trouble))}", file=sys.stderr)
        return exit_status(trouble.verdict)


def _deliver(options: argparse.Namespace) -> None:
    """Deliver for Postfix: one line and an exit status, whatever happens."""
    try:
        settings = config.load(options.config)
        if os.geteuid() == 0:  # an operator calls it by hand
            _become_owner(settings.state_dir)
        gateway = Gateway(settings)
        # Postfix bounces the mail of a command that overruns the transport's time
        # limit, which is twice this.
        signal.signal(signal.SIGALRM, lambda *_: tell_postfix_and_exit(overdue(gateway.deadline)))
        signal.alarm(gateway.deadline)
        # Zulip's own Postfix configuration aliases everything to zulip@localhost; such
        # mail still waits after a takeover.
        aliased = options.recipient == "zulip@localhost" and options.original_recipient
        envelope = Envelope(aliased or options.recipient, options.sender, options.queue_id)
        verdict = gateway.deliver(envelope, sys.stdin.buffer.read())
    except Trouble as trouble:
        verdict = trouble.verdict
    except BaseException as error:  # our own bug must delay a mail, never bounce it
        verdict = bug(error)
    tell_postfix_and_exit(verdict)


def _become_owner(folder: Path) -> None:
    """As root, go on as the gateway's user: what root writes it could not read."""
    try:
        owner = folder.stat()
    except OSError as error:
        raise Trouble("4.3.0", "state", f"cannot use {folder}: {error.strerror}") from error
    if os.geteuid() not in (0, owner.st_uid):
        raise Trouble("4.3.0", "user", f"{folder} belongs to another user: run this as root")
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    os.umask(0o077)


def _recover(gateway: Gateway) -> int:
    from .recovery import Recovery

    gateway.quarantine.tidy()
    for line in Recovery(gateway).run():
        print(line)
    return 0


def _doctor(gateway: Gateway) -> int:
    from . import doctor

    findings = doctor.examine(gateway)
    for finding in findings:
        print(f"{'ok    ' if finding.good else 'WRONG '} {redact(finding.text)}")
    return 0 if all(finding.good for finding in findings) else 1


def _poll(gateway: Gateway) -> int:
    if gateway.config.imap is None:
        raise Trouble("4.3.5", "configuration", "gateway.conf has no [imap]: set email_gateway_login, run site.yml")
    _with_packages()
    from .inbox import Inbox

    Inbox(gateway).run()
    return 0


def _try_inbox() -> int:
    _with_packages()
    from .inbox import look_into

    asked = json.load(sys.stdin)
    print(look_into(config.Imap(**asked["imap"]), Path(asked["state_dir"]), asked["timeout"]))
    return 0


def _with_packages() -> None:
    """Only polling uses a package of Debian's; deliveries start faster without (-S)."""
    import site

    site.main()


def _check(gateway: Gateway) -> int:
    verdict = prove(gateway.backend(), gateway.config)
    print(verdict.note if isinstance(verdict, Delivered) else redact(verdict.reason))
    return exit_status(verdict)


def _status(gateway: Gateway, as_json: bool) -> int:
    from . import status

    facts = status.collect(gateway)
    print(json.dumps(facts, indent=2) if as_json else status.render(facts, gateway.config.queue_stats))
    return 0


def _quarantine(gateway: Gateway, options: argparse.Namespace) -> int:
    store = gateway.quarantine
    if options.action == "list":
        for item in store.items():
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item.refused))
            print(f"{item.id}  {when}  {item.size:>8} bytes  {redact(item.recipient)}  {redact(item.reason)}")
        return 0
    if options.action == "purge":
        print(f"{store.purge(options.older_than)} removed")
        return 0
    try:
        item = store.get(options.id)
    except KeyError:
        print(f"zulip-email-gateway: no mail {options.id!r} in quarantine; see: quarantine list", file=sys.stderr)
        return 1
    if options.action == "show":
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item.refused))
        for name, value in {**item._asdict(), "refused": when}.items():
            print(f"{name}: {redact(str(value))}")
        print()
        sys.stdout.flush()
        sys.stdout.buffer.write(store.message(item))
        return 0
    verdict = gateway.deliver(
        Envelope(options.to or item.recipient, item.sender, item.queue_id), store.message(item), False
    )
    if isinstance(verdict, Delivered):
        store.remove(item)
        print(f"{item.id}: {verdict.note}")
        return 0
    kind = "refused again" if isinstance(verdict, Refused) else "not now"
    print(f"{item.id}: {kind}: {redact(verdict.reason)}; it stays in quarantine", file=sys.stderr)
    return exit_status(verdict)

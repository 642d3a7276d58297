#!/usr/bin/env python3
"""Test hosts: podman containers with systemd, and the images they start from.

    testhosts.py image SUITE...          make what is missing: the images (bookworm, trixie),
                                         podman's settings, the key to the hosts
    testhosts.py up PREFIX HOST:SUITE[:VERSION]...
                                         start hosts, with a DNS server of their own
    testhosts.py down PREFIX             remove them

The first host is always PREFIX-outside: the DNS server for all, the place mail
is sent from, and the mail server of the domain sender.example.org. Every other
host HOST is a Zulip server HOST.example.com, the MX of HOST.mail.example.com, with
Zulip 6.0, another VERSION, or none at all (VERSION "none").
"""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from zulip import store

SHARED = Path(__file__).resolve().parent
PACKAGES_FROM = ("debian.org", "pypi.org", "pythonhosted.org")
CACHE = Path(os.environ.get("ZEG_CACHE") or SHARED.parents[1] / ".cache")
PACKAGES = (
    "systemd-sysv,python3,python3-apt,dbus,iproute2,cron,openssh-server,sudo,ca-certificates,procps,openssl,"
    "nginx-light,gunicorn,python3-flask,python3-aiosmtpd,dnsmasq,ufw,firewalld,nftables,ssl-cert"
)
CONF = CACHE / "containers.conf"
# Fetched while the image is built, so that each test installs them from its own disk. Those of a line go together.
PREFETCHED = """
postfix dovecot-imapd python3-imap-tools acl rspamd publicsuffix libsasl2-modules
exim4-daemon-light bsd-mailx
msmtp-mta
"""
FETCH = "apt-get install --yes --quiet --download-only --no-install-recommends"
# For machines whose podman cannot use its defaults: no crun, no CAP_SYS_RESOURCE.
CONTAINERS_CONF = """[engine]
runtime = "runc"
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=10000:10000"]
"""


class Failed(Exception):
    """A command failed; with its own words."""


def run(*command: str, **options: Any) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return str(done.stdout).strip()


def say(text: str) -> None:
    print(text, flush=True)


def image_name(suite: str) -> str:
    """The image's name has a digest of all that goes into it."""
    digest = hashlib.sha256((PACKAGES + PREFETCHED).encode())
    for path in sorted((SHARED / "zulip").iterdir()):
        if path.is_file():
            digest.update(path.read_bytes())
    return f"localhost/zeg-{suite}:{digest.hexdigest()[:12]}"


def build(suite: str) -> None:
    name = image_name(suite)
    if subprocess.run(("podman", "image", "exists", name), check=False).returncode == 0:
        return
    say(f"Building the image of a Debian {suite} host (once; about a minute) ...")
    started = time.time()
    parts = " ".join(str(path) for path in (SHARED / "zulip").iterdir() if path.is_file())
    with tempfile.TemporaryDirectory() as folder:
        tar = f"{folder}/root.tar"
        run(
            "mmdebstrap",
            "--variant=minbase",
            f"--include={PACKAGES}",
            "--skip=cleanup/apt",
            '--customize-hook=mkdir -p "$1/opt/zulip-standin"',
            f"--customize-hook=copy-in {parts} /opt/zulip-standin",
            '--customize-hook=chroot "$1" sh /opt/zulip-standin/setup.sh',
            *(f'--customize-hook=chroot "$1" {FETCH} {line}' for line in PREFETCHED.split("\n") if line),
            '--customize-hook=chroot "$1" python3 /opt/zulip-standin/shorten_lists.py',
            suite,
            tar,
        )
        run("podman", "import", tar, name)
    say(f"  {name}, {time.time() - started:.0f} s")


def use_settings() -> None:
    """Podman's settings as choose_settings has chosen them earlier, if it has."""
    CACHE.mkdir(exist_ok=True)
    if CONF.exists() and CONF.read_text():
        os.environ["CONTAINERS_CONF"] = str(CONF)


def choose_settings(image: str) -> None:
    """Podman's own settings where they serve, ours where they do not (once)."""
    if CONF.exists():
        return
    probe = ("podman", "run", "--rm", "--systemd=always", image, "true")
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        CONF.write_text("")
        say("Podman works with its own settings here.")
        return
    CONF.write_text(CONTAINERS_CONF)
    os.environ["CONTAINERS_CONF"] = str(CONF)
    run(*probe)
    say(f"Podman needs other settings here, see {CONF} (runc, lower limits).")


def address(container: str) -> str:
    return run("podman", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", container)


def start(prefix: str, host: str, suite: str, dns: str | None) -> None:
    name = f"{prefix}-{host}"
    run(
        *("podman", "run", "--detach", "--name", name, "--hostname", f"{host}.example.com", "--systemd=always"),
        # What root has on a server: to set up a firewall, to see whose process it is.
        *("--cap-add=NET_ADMIN", "--cap-add=AUDIT_WRITE", "--cap-add=SYS_PTRACE"),
        *("--tmpfs", "/mnt/small:size=8k,mode=0777"),
        *(("--dns", dns) if dns else ()),
        *(image_name(suite), "/sbin/init"),
    )


_processes: dict[str, str] = {}


def inside(container: str) -> list[str]:
    """The command before a command to run it in a container as root.

    nsenter(1), because `podman exec` costs 150 ms each time, and tests look often.
    """
    if container not in _processes:
        _processes[container] = run("podman", "inspect", "--format", "{{.State.Pid}}", container)
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return ["nsenter", "--target", _processes[container], "--all", "env", "-i", "HOME=/root", f"PATH={path}"]


def enter(container: str, script: str) -> str:
    return run(*inside(container), "sh", "-euc", script)


def booted(container: str) -> None:
    """Wait until every unit has started; systemd itself answers only after a moment."""
    enter(
        container,
        "for i in $(seq 600); do case $(systemctl is-system-running --wait 2>&1) in running|degraded) exit ;; esac; "
        "sleep 0.1; done; systemctl list-jobs; exit 1",
    )


def key() -> str:
    path = CACHE / "id_ed25519"
    if not path.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test hosts", "-f", str(path))
    return path.with_suffix(".pub").read_text().strip()


def prepare(suites: Iterable[str]) -> None:
    """Make what all hosts share and what is made once.

    `make test` does so before it starts scenarios side by side.
    """
    suites = sorted(set(suites))
    with ThreadPoolExecutor() as pool:
        list(pool.map(build, suites))
    choose_settings(image_name(suites[0]))
    key()


# Root's processes of all containers count together, and each host's have about ten: with a dozen hosts Linux's own 128
# are used up, and systemd's path units fail.
INOTIFY_INSTANCES = Path("/proc/sys/fs/inotify/max_user_instances")


def up(prefix: str, hosts: list[str]) -> None:
    with suppress(OSError):
        if int(INOTIFY_INSTANCES.read_text()) < 1024:
            INOTIFY_INSTANCES.write_text("1024\n")
    wanted = [(*text.split(":"), "6.0")[:3] for text in hosts]
    down(prefix)
    prepare(["bookworm", *(suite for _, suite, _ in wanted)])
    start(prefix, "outside", "bookworm", None)
    dns = address(f"{prefix}-outside")
    for host, suite, _ in wanted:
        start(prefix, host, suite, dns)
    public = key()
    for host, _, version in (("outside", "bookworm", "none"), *wanted):
        container = f"{prefix}-{host}"
        booted(container)
        enter(
            container,
            f"install -d -m 700 /root/.ssh /run/sshd; echo '{public}' > /root/.ssh/authorized_keys",
        )
        if version == "none":
            enter(container, "rm -rf /home/zulip/deployments /etc/zulip /etc/ssl/private/zulip.key")
            continue
        enter(container, "systemctl enable --quiet --now nginx zulip-web zulip-worker")
        if version != "6.0":
            enter(container, f"sh /opt/zulip-standin/upgrade {version}")
    # For packages the DNS server asks where its own container was told to, and for nothing else: an answer that
    # does not come makes each login to a host take ten seconds (sshd asks for "UNKNOWN").
    forward = f"s#^nameserver #server=/{'/'.join(PACKAGES_FROM)}/#p"
    enter(
        f"{prefix}-outside",
        f"sed -n '{forward}' /etc/resolv.conf > /etc/dnsmasq.d/upstream.conf; "
        "echo nameserver 127.0.0.1 > /etc/resolv.conf",
    )
    publish(prefix)


def publish(prefix: str) -> None:
    """Write the DNS records of all hosts, with the addresses they have now."""
    dns = address(f"{prefix}-outside")
    records = ["bind-dynamic", "no-resolv", "local=/#/"]
    records += ["mx-host=sender.example.org,outside.example.com,1", f"address=/outside.example.com/{dns}"]
    for container in containers(prefix):
        host = container.removeprefix(f"{prefix}-")
        if host != "outside":
            records += [
                f"address=/{host}.example.com/{address(container)}",
                f"ptr-record={ipaddress.ip_address(address(container)).reverse_pointer},{host}.example.com",
                f"mx-host={host}.mail.example.com,{host}.example.com,1",
                f"mx-host={host}.old.example.com,{host}.example.com,1",
            ]
    lines = "\n".join(records)
    # For the inventories, which are asked for it again and again.
    (CACHE / f"{prefix}.dns").write_text(dns)
    enter(f"{prefix}-outside", f"echo '{lines}' > /etc/dnsmasq.d/zeg.conf; systemctl restart dnsmasq")


def restart(prefix: str, host: str) -> None:
    """Restart a host, as after a power cut; it may come back with another address."""
    run("podman", "restart", "--time", "0", f"{prefix}-{host}")
    _processes.pop(f"{prefix}-{host}", None)
    booted(f"{prefix}-{host}")
    publish(prefix)


def containers(prefix: str) -> list[str]:
    names = run("podman", "ps", "--all", "--format", "{{.Names}}").splitlines()
    return [name for name in names if name.startswith(f"{prefix}-")]


def send(prefix: str, *arguments: str) -> dict[str, Any]:
    """Send mail from outside; what send.py prints."""
    with (SHARED / "send.py").open() as script:
        printed = run(*inside(f"{prefix}-outside"), "python3", "-", *arguments, stdin=script)
    return dict(json.loads(printed))


@cache
def _root(container: str) -> str:
    """Where its files are on this machine."""
    return run("podman", "mount", container)


@contextmanager
def zulip_database(container: str) -> Iterator[sqlite3.Connection]:
    """The stand-in's database, opened from here: tests look every moment, and a process costs 70 ms of CPU."""
    # SQLite resolves links: /proc/PID/root would lead it to this machine's own file.
    root = _root(container)
    with closing(sqlite3.connect(f"{root}{store.DATABASE}", timeout=30)) as database, database:
        database.row_factory = sqlite3.Row
        yield database


def zulip_state(container: str) -> dict[str, Any]:
    """Channels, messages and so on of the stand-in."""
    with zulip_database(container) as database:
        return store.state(database)


def down(prefix: str) -> None:
    if names := containers(prefix):
        run("podman", "rm", "--force", "--time", "0", *names)
    (CACHE / f"{prefix}.dns").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("image").add_argument("suite", nargs="+")
    starting = commands.add_parser("up")
    starting.add_argument("prefix")
    starting.add_argument("host", nargs="+", metavar="HOST:SUITE[:VERSION]")
    commands.add_parser("down").add_argument("prefix")
    options = parser.parse_args()
    if not shutil.which("podman"):
        sys.exit("testhosts: podman is missing; run: make packages")
    use_settings()
    try:
        if options.command == "image":
            prepare(options.suite)
        elif options.command == "up":
            up(options.prefix, options.host)
        else:
            down(options.prefix)
    except Failed as error:
        sys.exit(f"testhosts: {error}")


if __name__ == "__main__":
    main()

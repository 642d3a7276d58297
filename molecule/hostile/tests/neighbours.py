"""What other users of the host may do, and what they may see.

These tests run for each generation of Zulip, see the files that import them.
"""

from __future__ import annotations

import re
import time

import pytest
from attacks import ETC, LIB, UNITS, USERS
from conftest import ZulipHost, tell, wait
from figures import STATE, WIDE, Fault, broken, limits, twice

TRAPS = {
    "a pipe": "mkfifo {0}",
    "a link to /dev/zero": "ln -s /dev/zero {0}",
    "a link to what only root may read": "ln -s /etc/shadow {0}",
    "a folder": "mkdir {0}",
    "a file without end": "truncate -s 1T {0}",
}
# By whom, where, and what is read there.
PLACES = {
    "Zulip's log": ("zulip", "/var/log/zulip", ("workers.log", "events_email_mirror.log")),
    "what failed in Zulip": ("zulip", "/var/log/zulip/queue_error", ("email_mirror.errors",)),
    "Zulip's settings": ("zulip", "/etc/zulip", ("zulip.conf", "zulip-secrets.conf")),
    "the journal": ("zulip-email-gateway", STATE, ("journal.sqlite",)),
    "the journal's log": ("zulip-email-gateway", STATE, ("journal.sqlite-wal",)),
    "the position": ("zulip-email-gateway", STATE, ("failures-position.json",)),
    "the quarantine": ("zulip-email-gateway", STATE, ("quarantine",)),
    "the spool": ("zulip-email-gateway", STATE, ("spool",)),
}


def of_one_generation(place: str) -> object:
    """Half of them on each host: what is read there is read in the same way."""
    return pytest.param(place, marks=pytest.mark.zulip(10 + list(PLACES).index(place) % 2))


@pytest.mark.parametrize("place", map(of_one_generation, PLACES))
def test_what_a_neighbour_puts_in_a_files_place_hangs_nothing(mx, subject, place):
    """Each trap in turn; and nothing of what a link leads to is shown."""
    user, folder, names = PLACES[place]
    paths = [f"{folder}/{name}" for name in names]
    secret = mx.sh("grep ^root: /etc/shadow").strip()
    mx.send(mx.address(), subject=f"{subject} before")  # a new journal would wait for the log
    mx.wait_for(subject)
    slowest = 0.0
    for number, (name, trap) in enumerate(TRAPS.items()):
        if place == "Zulip's settings" and name == "a file without end":
            continue  # Zulip itself reads it
        spoil = "; ".join(f"mv {path} {path}.aside 2>/dev/null || true; {trap.format(path)}" for path in paths)
        mend = "; ".join(f"rm -rf {path}; mv {path}.aside {path} 2>/dev/null || true" for path in paths)
        as_user = f"runuser -u {user} -- sh -c '{{}}'"
        # Zulip's worker waits for who reads the pipe; ours looks at its files when it starts.
        unit = "zulip-worker" if user == "zulip" else "zulip-email-gateway"
        restart = f"; systemctl restart {unit}.service || true"
        with broken(mx, Fault(as_user.format(spoil) + restart, as_user.format(mend) + restart)):
            began = time.monotonic()
            text = f"{subject} {number}"
            mx.send(mx.address(), subject=text)
            said = mx.host.run("timeout 30 zulip-email-gateway status; echo status: $?")
            said = said.stdout + said.stderr
            assert "status: 124" not in said, f"{name}: {said}"
            done = mx.host.run("timeout 60 zulip-email-gateway doctor; echo doctor: $?")
            said += done.stdout + done.stderr
            assert re.search("doctor: [01]$", said.strip()), f"{name}: {said}"
            slowest = max(slowest, time.monotonic() - began)
            memory = mx.sh("systemctl show -P MemoryCurrent zulip-email-gateway.service").strip()
            assert secret not in said and (not memory.isdecimal() or int(memory) < 150 * 2**20), f"{name}: {memory}"
        assert wait(lambda text=text: mx.sh("postqueue -f") or mx.messages(text), 60), f"{name}: {mx.journal()}"
        assert twice(mx, text) == 0
    mx.sh("zulip-email-gateway quarantine purge --all || true")
    tell(f"{place}: status and doctor took {slowest:.1f} s at most")


@pytest.mark.zulip(10)
def test_site_yml_follows_no_link_of_zulips(mx):
    path = "/etc/zulip/zulip.conf"
    spoil = f"runuser -u zulip -- sh -c 'mv {path} {path}.aside; ln -s /etc/shadow {path}'"
    with broken(mx, Fault(spoil, f"rm {path}; mv {path}.aside {path}")):
        assert f"{path} is a link that does not belong to root" in mx.refusal()


def installed(mx: ZulipHost) -> dict[str, str]:
    """Everything of ours on the host, with type, owner, group and mode."""
    places = (
        f"{ETC} {LIB} {STATE} /usr/local/bin/zulip-email-gateway {UNITS}* /var/backups/zulip-email-gateway /etc/postfix"
    )
    places += " /run/zulip-email-gateway* /etc/mailname"
    lines = mx.sh(f"find {places} -printf '%y %u:%g %m %p\\n'").splitlines()
    return {line.split(" ", 3)[3]: line.rsplit(" ", 1)[0] for line in lines}


# The first that fits.
PERMISSIONS = [
    (f"{ETC}/addresses.json", "f root:zulip-email-gateway 640"),
    (f"{ETC}/(credential|imap-secret)", "f zulip-email-gateway:zulip-email-gateway 400"),
    (f"{ETC}/zulip-secrets.conf-line", "f root:root 600"),
    (f"{ETC}/.*|{LIB}/.*[.]pyc?|{UNITS}.*|/etc/mailname", "f root:root 644"),
    ("/usr/local/bin/zulip-email-gateway", "f root:root 755"),
    (f"{ETC}|{LIB}(/email_gateway(/__pycache__)?)?", "d root:root 755"),
    (f"{STATE}(/(spool|quarantine))?", "d zulip-email-gateway:zulip-email-gateway 700"),
    (f"{STATE}/.*", "f zulip-email-gateway:zulip-email-gateway 600"),
    ("/var/backups/zulip-email-gateway", "d root:root 700"),
    ("/var/backups/zulip-email-gateway/.*", "f root:root 6[04][04]"),
    ("/run/zulip-email-gateway", "d zulip-email-gateway:zulip-email-gateway 755"),
    ("/run/zulip-email-gateway/submit", "s zulip-email-gateway:zulip-email-gateway 600"),
    ("/run/zulip-email-gateway/.*", "f zulip-email-gateway:zulip-email-gateway 600"),
    ("/run/zulip-email-gateway.policy", "s zulip-email-gateway:postfix 660"),
    ("/run/zulip-email-gateway-certificate", "d root:root 700"),
    ("/run/zulip-email-gateway-certificate/loaded", "f root:root 600"),
    ("/etc/postfix(/.*)?", "[dfl] root:root (755|644|777)"),
]


def test_every_file_has_its_owner_and_its_mode(mx):
    wrong = []
    for path, found in installed(mx).items():
        expected = next((text for pattern, text in PERMISSIONS if re.fullmatch(pattern, path)), "nothing of ours")
        if not re.fullmatch(expected, found):
            wrong.append(f"{path} is {found}, not {expected}")
    assert wrong == []


def test_nobody_else_can_change_what_root_runs_or_writes(mx):
    """Each path and each folder above it, as each user."""
    executed = mx.sh(f"grep -ho '^Exec[A-Za-z]*=[^ ]*' {UNITS}* | cut -d= -f2 | sort -u").split()
    paths = [path for path in installed(mx) if not path.startswith((STATE, "/run/zulip-email-gateway/"))]
    assert "/usr/bin/systemctl" in " ".join(executed) or "/bin/sh" in executed
    # Zulip's own code runs as Zulip's user.
    every = sorted(
        {*paths, *(path for path in executed if "/home/zulip" not in path), STATE, "/run/zulip-email-gateway.policy"}
    )
    every = sorted(
        {
            *every,
            *("/".join(path.split("/")[:depth]) or "/" for path in every for depth in range(1, path.count("/") + 1)),
        }
    )
    allowed = {STATE, "/run/zulip-email-gateway", "/run/zulip-email-gateway.policy"}
    checked = "\n".join(path for path in every if path not in allowed)
    for user in USERS:
        loop = 'while read -r path; do [ ! -w "$path" ] || echo "$path"; done'
        script = f"runuser -u {user} -- sh -c '{loop}' <<'EOF'\n{checked}\nEOF"
        assert mx.sh(script) == "", user
    for name in ("credential", "imap-secret"):
        for user in ("www-data", "postfix", "nobody"):
            assert mx.host.run(f"runuser -u {user} -- test -r {ETC}/{name}").rc != 0
    assert "not allowed" in str(mx.host.run("runuser -u nobody -- mailq").stderr)
    for user in ("www-data", "zulip", "nobody"):
        assert mx.host.run(f"runuser -u {user} -- ls {STATE}").rc != 0
        for socket in ("/run/zulip-email-gateway/submit", "/run/zulip-email-gateway.policy"):
            connect = f"import socket; socket.socket(socket.AF_UNIX).connect('{socket}')"
            assert mx.host.run(f'runuser -u {user} -- python3 -c "{connect}"').rc != 0


def test_every_unit_is_confined(mx):
    units = mx.sh(f"cd /etc/systemd/system; ls zulip-email-gateway*.service").split()  # noqa: F541
    found = {}
    for unit in units:
        found[unit] = float(
            mx.sh(f"systemd-analyze security --no-pager {unit}").rpartition("level for")[2].split(":")[1].split()[0]
        )
    tell(f"systemd-analyze security: {found}")
    assert len(units) >= 2 and max(found.values()) <= 2.0


def secrets_of(mx: ZulipHost) -> list[str]:
    state = mx.state()
    tokens = [row["token"] for row in (*state["channels"], *state["replies"])]
    kept = mx.sh("sed -n 's/^shared_secret = //p' /etc/zulip/zulip-secrets.conf").split()
    return [*tokens, *kept]


def test_no_user_sees_an_address_in_a_process(mx, subject):
    """While a mail waits for room within Zulip's limits."""
    limits(mx, "1/20 40/60 400/600")
    mx.send(mx.address(), subject=subject, count=4)
    assert wait(lambda: mx.sh("pgrep -f 'zulip-email-gateway deliver' || true"), 20)
    seen = mx.sh("cat /proc/*/cmdline /proc/*/environ 2>/dev/null | tr '\\0' '\\n'")
    assert "deliver" in seen and not [secret for secret in secrets_of(mx) if secret in seen]


@pytest.mark.zulip(10)
def test_no_run_shows_a_secret(mx):
    """Not even one that tells everything, and changes what is secret."""
    spoil = f"cp -p {ETC}/credential /root/; echo x > {ETC}/credential"
    with broken(mx, Fault(spoil, f"cp -p /root/credential {ETC}/")):
        done = mx.play("-vvv", "--diff", "--tags", "zulip")
        assert done.returncode == 0, done.stdout[-3000:]
    text = done.stdout + done.stderr
    assert "Write gateway.conf, the addresses and the credentials" in text
    assert not [secret for secret in secrets_of(mx) if secret in text]


def test_what_we_print_and_send_back_has_no_secret(mx, subject):
    limits(mx, WIDE)
    mx.send(mx.address(), subject=subject, text=" ", sender=f"user@{mx.fqdn}")
    mx.send(mx.address(), subject=subject, text=" ")
    assert wait(lambda: len(mx.sh("zulip-email-gateway quarantine list").splitlines()) == 2, 30)
    shown = mx.sh("zulip-email-gateway quarantine list; zulip-email-gateway status; zulip-email-gateway status --json; "
                  "zulip-email-gateway doctor || true; journalctl -o cat -u 'zulip-email-gateway*'")  # fmt: skip
    for copy in mx.sh("zulip-email-gateway quarantine list").splitlines():
        shown += mx.sh(f"zulip-email-gateway quarantine show {copy.split()[0]} 2>&1 >/dev/null")
    assert "quarantine" in shown and not [secret for secret in secrets_of(mx) if secret in shown]
    units = mx.sh(f"cd /etc/systemd/system; ls zulip-email-gateway*.service").split()  # noqa: F541
    assert {mx.sh(f"systemctl show -P LimitCORE {unit}").strip() for unit in units} == {"0"}
    mx.sh("zulip-email-gateway quarantine purge --all")

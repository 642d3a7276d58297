"""postfix_info: what stands on a host, for which a folder and fake commands stand here."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import postfix_info
import pytest
from test_scripts import MAIL, UNREADABLE, Host

OPENSSL = str(shutil.which("openssl"))
LISTENS = "LISTEN 0 100 0.0.0.0:25 0.0.0.0:*"


@pytest.fixture
def host(tmp_path, monkeypatch) -> Host:
    """A host without any mail system, and without the commands that would come with one."""
    (tmp_path / "host").mkdir()
    made = Host(tmp_path / "host")
    monkeypatch.setattr(postfix_info, "ROOT", made.root)
    monkeypatch.setenv("PATH", str(made.root / "bin"))
    made.fake("ss", "dpkg-query")
    made.fake("pgrep", "systemctl", does="exit 1")
    return made


def look(host: Host, packages: tuple[str, ...] = (), networks: tuple[str, ...] = ()) -> dict[str, Any]:
    return postfix_info.postfix_info(host.root / "backup", list(packages), list(networks))


def with_postfix(host: Host, main_cf: str = "# foreign\n") -> None:
    host.write("usr/sbin/postfix").chmod(0o755)
    host.write("etc/postfix/main.cf", main_cf)


def with_exim(host: Host, does: str = "echo 0") -> None:
    host.write("usr/sbin/exim4").chmod(0o755)
    host.fake("exim4", does=does)


def prints(host: Host, name: str, text: str) -> None:
    host.write(f"printed/{name}", text)
    host.fake(name, does=f"cat {host.root}/printed/{name}")


def test_a_host_without_mail(host):
    assert look(host, ("postfix",)) == {
        **dict.fromkeys(("port_25_holder", "other_mail_system", "relayhost", "version", "database"), ""),
        **dict.fromkeys(("queue_fault", "certificate_fault", "network_fault"), ""),
        **dict.fromkeys(("installed", "configured", "ours", "running", "enabled_and_active", "has_aliases"), False),
        **dict.fromkeys(("has_backup", "has_program", "has_senders", "zulips_certificate"), False),
        "address": "127.0.0.1",
        "alias_database": "/etc/aliases.db",
        "missing_packages": ["postfix"],
        "patterns": [],
        "waiting": 0,
        "stale": True,
    }


def test_a_host_with_ours(host):
    with_postfix(host, "# Zulip email gateway\n")
    host.fake("postfix", "systemctl")
    host.fake("postconf", does='[ "$*" != "-dh mail_version default_database_type" ] || printf "3.7.11\\nhash\\n"')
    (host.root / "backup").mkdir()
    assert not look(host)["has_backup"]
    host.write("backup/complete")
    host.write("usr/local/bin/zulip-email-gateway").chmod(0o755)
    found = look(host)
    told = ("installed", "configured", "ours", "running", "enabled_and_active", "has_backup", "has_program")
    assert [name for name in told if not found[name]] == []
    assert (found["version"], found["database"]) == ("3.7.11", "hash")


@pytest.mark.parametrize(("database", "name"), [("hash", "aliases.db"), ("lmdb", "aliases.lmdb")])
def test_the_aliases_have_the_database_that_postfix_has(host, database, name):
    """Without Berkeley DB (Ubuntu 26.04) it is lmdb; back_up.sh and restore.sh take either."""
    with_postfix(host)
    prints(host, "postconf", f"3.10\n{database}\n")
    host.write("etc/aliases")
    found = look(host)
    assert (found["alias_database"], found["has_aliases"]) == (f"/etc/{name}", False)
    host.write(f"etc/{name}")
    assert look(host)["has_aliases"]
    restore = Path(postfix_info.__file__).parents[2] / "roles/postfix_localmail/files/restore.sh"
    assert f"/etc/{name}" in restore.read_text()


class TestPort25:
    @pytest.mark.parametrize(
        ("lines", "holder"),
        [
            ([], ""),
            (['users:(("master",pid=7,fd=13))'], "master"),
            (['users:(("smtpd",pid=9,fd=6),("master",pid=7,fd=13))'], "master"),
            (['users:(("exim4",pid=7,fd=4))', 'users:(("exim4",pid=7,fd=5))'], "exim4"),
            (['users:(("nginx",pid=8,fd=4))', 'users:(("docker-proxy",pid=7,fd=4))'], "docker-proxy,nginx"),
        ],
    )
    def test_who_listens_there(self, host, lines, holder):
        prints(host, "ss", "".join(f"{LISTENS} {line}\n" for line in lines))
        assert look(host)["port_25_holder"] == holder

    @pytest.mark.parametrize(("runs", "holder"), [("master", "master"), ("exim4", "exim4"), ("nginx", "unknown")])
    def test_where_ss_shows_no_names(self, host, runs, holder):
        prints(host, "ss", f"{LISTENS}\n")
        host.fake("pgrep", does=f'[ "$*" = "-x {runs}" ]')
        assert look(host)["port_25_holder"] == holder


def test_packages(host):
    listed = (
        "installed exim4-base ",
        "installed exim4-daemon-light default-mta, mail-transport-agent",
        "installed postfix default-mta, mail-transport-agent",
        "config-files sendmail-bin mail-transport-agent",
        "installed lsb-invalid-mta not-a-mail-transport-agent",
        "installed msmtp-mta mail-transport-agent (= 1)",
        "config-files ca-certificates ",
        "installed ssl-cert ",
    )
    prints(host, "dpkg-query", "".join(f"{line}\n" for line in listed))
    found = look(host, ("postfix", "ssl-cert", "libsasl2-modules", "ca-certificates"))
    assert found["missing_packages"] == ["libsasl2-modules", "ca-certificates"]
    assert found["other_mail_system"] == "exim4-daemon-light,msmtp-mta"


class TestPatterns:
    ONE, TWO = "%s@mail.example.com", "user+%s@old.example.com"

    @pytest.mark.parametrize(
        ("comment", "found"),
        [
            ("# EMAIL_GATEWAY_PATTERN = %s@mail.example.com\n", [ONE]),
            ("# EMAIL_GATEWAY_PATTERN, and former ones: %s@mail.example.com user+%s@old.example.com\n", [ONE, TWO]),
            ("# EMAIL_GATEWAY_PATTERN is set in settings.py\n", []),
        ],
    )
    def test_in_a_comment_of_earlier_versions(self, host, comment, found):
        with_postfix(host, f"# Zulip email gateway\n{comment}virtual_transport = zulip:\n")
        assert look(host)["patterns"] == found

    def test_main_cf_of_an_earlier_version_is_right(self, host):
        """Somebody has gone back to it for a while, and zulip_patterns is what a later one left."""
        with_postfix(host, f"# Zulip email gateway\n# EMAIL_GATEWAY_PATTERN = {self.ONE}\n")
        host.write("etc/postfix/zulip_patterns", f"{self.TWO}\n")
        assert look(host)["patterns"] == [self.ONE]

    def test_in_their_own_file(self, host):
        with_postfix(host, "# Zulip email gateway\n")
        host.write("etc/postfix/zulip_patterns", f"# one\n\n{self.ONE}\n {self.TWO} \n  # the end\n")
        assert look(host)["patterns"] == [self.ONE, self.TWO]
        host.write("etc/postfix/zulip_patterns")
        assert look(host)["patterns"] == []


class TestQueue:
    @pytest.mark.parametrize("system", ["postqueue", "exim4"])
    def test_one_that_takes_too_long_is_told_and_stops_nothing(self, host, monkeypatch, system):
        """Whether it matters is for the role to say."""
        monkeypatch.setattr(postfix_info, "PATIENCE", 0.1)
        if system == "exim4":
            with_exim(host, does="exec sleep 60")
        else:
            with_postfix(host)
            host.fake("postqueue", does="exec sleep 60")
        found = look(host)
        assert (
            found["waiting"] == 0 and f"{system} -" in found["queue_fault"] and "has not ended" in found["queue_fault"]
        )

    def test_one_that_cannot_be_read_is_told(self, host):
        with_postfix(host)
        host.fake("postqueue", does=f"printf '%s' '{MAIL}'; {UNREADABLE}")
        words = 'postqueue ended with 69: postqueue: fatal: bad string length 0 < 1: "x\\y" ='
        assert look(host)["queue_fault"] == words

    def test_by_its_last_words_in_one_line(self, host):
        with_postfix(host)
        host.fake("postqueue", does=r"printf 'one\ntwo\n\nthree\tx\n\033four\n' >&2; exit 1")
        assert look(host)["queue_fault"] == "postqueue ended with 1: two three x  four"
        (host.root / "bin/postqueue").unlink()
        assert look(host)["queue_fault"].startswith("postqueue ended with 127: ")

    def test_so_is_exims(self, host):
        with_exim(host, "echo 'exim: permission denied' >&2; exit 1")
        found = look(host)
        assert (found["waiting"], found["queue_fault"]) == (0, "exim4 -bpc ended with 1: exim: permission denied")
        with_exim(host, "echo 'no spool'")
        assert look(host)["queue_fault"] == "exim4 -bpc tells no number: no spool"

    def test_what_waits_is_counted(self, host):
        with_postfix(host)
        host.fake("postqueue", does=f"echo warning >&2; [ $1 = -j ] && printf '%s' '{MAIL}{MAIL}'")
        found = look(host)
        assert (found["waiting"], found["queue_fault"]) == (2, "")
        (host.root / "usr/sbin/postfix").unlink()
        with_exim(host, "echo warning >&2; echo 3")
        found = look(host)
        assert (found["waiting"], found["queue_fault"]) == (3, "")

    @pytest.mark.parametrize("main_cf", ["# Zulip email gateway\n", None])
    def test_one_that_does_not_matter_is_not_read(self, host, main_cf):
        """Our own, and that of a Postfix that was never configured, where postqueue always fails."""
        with_postfix(host, main_cf or "")
        if main_cf is None:
            (host.root / "etc/postfix/main.cf").unlink()
        host.fake("postqueue", does=UNREADABLE)
        found = look(host)
        assert (found["waiting"], found["queue_fault"]) == (0, "")
        assert not [call for call in host.calls() if call.startswith("postqueue")]


class TestRelayHost:
    def test_of_a_foreign_postfix(self, host):
        with_postfix(host)
        host.fake("postconf", does='[ "$*" != "-h relayhost" ] || echo "[smtp.example.com]:587"')
        assert look(host)["relayhost"] == "[smtp.example.com]:587"
        with_postfix(host, "# Zulip email gateway\n")
        assert look(host)["relayhost"] == ""

    @pytest.mark.parametrize("kind", ["smarthost", "satellite"])
    def test_of_exim(self, host, kind):
        with_exim(host)
        conf = f"# caf\xe9\ndc_eximconfig_configtype='{kind}'\ndc_smarthost='smtp.example.com::587'\n"
        path = host.write("etc/exim4/update-exim4.conf.conf")
        path.write_bytes(conf.encode("latin-1"))
        assert look(host)["relayhost"] == "smtp.example.com::587"
        path.write_text(conf.replace(kind, "internet"))
        assert look(host)["relayhost"] == ""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two keys with their certificates, the first key also with a passphrase, and files with nothing."""
    folder: Path = tmp_path_factory.mktemp("certificates")
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    commands = [
        (OPENSSL, "req", "-x509", *kind, "-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}")
        for name in ("one", "other")
    ]
    locked = ("-aes256", "-passout", "pass:secret")
    commands.append((OPENSSL, "pkey", "-in", "one.key", "-out", "locked.key", *locked))
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
    for name in ("none.key", "none.crt"):
        (folder / name).write_text("nothing")
    return folder


class TestCertificate:
    @staticmethod
    def put(host: Host, made: Path, key: str, chain: str) -> tuple[Path, Path]:
        return (
            host.write("etc/ssl/private/zulip.key", (made / f"{key}.key").read_text()),
            host.write("etc/ssl/certs/zulip.combined-chain.crt", (made / f"{chain}.crt").read_text()),
        )

    @pytest.mark.parametrize(
        ("key", "chain", "fault"),
        [
            ("one", "one", ""),
            ("one", "other", "{key} is not the key of {chain}"),
            ("none", "one", "{key} has no key that can be read without a passphrase"),
            ("locked", "one", "{key} has no key that can be read without a passphrase"),
            ("one", "none", "{chain} has no certificate"),
        ],
    )
    def test_a_key_that_is_not_the_certificates_is_told(self, host, made, key, chain, fault):
        (host.root / "bin/openssl").symlink_to(OPENSSL)
        key_file, chain_file = self.put(host, made, key, chain)
        found = look(host)
        assert found["zulips_certificate"]
        assert found["certificate_fault"] == fault.format(key=key_file, chain=chain_file)

    def test_without_openssl_nobody_can_tell(self, host, made):
        key, _ = self.put(host, made, "none", "none")
        found = look(host)
        assert (found["zulips_certificate"], found["certificate_fault"]) == (True, "")
        key.unlink()
        assert not look(host)["zulips_certificate"]


@pytest.mark.parametrize(
    ("networks", "fault"),
    [
        (("192.0.2.7", "2001:db8::/32", "192.0.2.0/24"), ""),
        (("192.0.2.7", "192.0.2.7/24", "x"), "192.0.2.7/24 has host bits set"),
        (("x", "192.0.2.7/24"), "'x' does not appear to be an IPv4 or IPv6 network"),
    ],
)
def test_networks(host, networks, fault):
    assert look(host, networks=networks)["network_fault"] == fault


@pytest.mark.parametrize("verb", ["is-active", "is-enabled"])
def test_systemd_knows_of_postfix_only_half(host, verb):
    with_postfix(host)
    host.fake("systemctl", does=f'[ "$2" != {verb} ]')
    host.fake("postfix", does="exit 1")
    found = look(host)
    assert (found["enabled_and_active"], found["running"]) == (False, False)


class TestStale:
    @pytest.fixture
    def reloaded(self, host: Host) -> Host:
        with_postfix(host, "# Zulip email gateway\n")
        host.write("etc/mailname", "mail.example.com\n")
        host.write("etc/postfix/sasl/x")
        time.sleep(0.02)  # longer than the kernel's clock for files takes to tick
        host.write("backup/reloaded")
        time.sleep(0.02)
        assert not look(host)["stale"]
        return host

    @pytest.mark.parametrize("path", ["etc/mailname", "etc/postfix/main.cf", "etc/postfix/sasl/x", "etc/postfix/new"])
    def test_something_has_changed_since(self, reloaded, path):
        reloaded.write(path, "changed")
        os.utime(reloaded.root / path, (0, 0))  # as of a file from a copy
        assert look(reloaded)["stale"]

    @pytest.mark.parametrize("path", ["etc/postfix/main.cf", "etc/postfix/sasl/x"])
    def test_something_was_removed_since(self, reloaded, path):
        (reloaded.root / path).unlink()
        assert look(reloaded)["stale"]

    @pytest.mark.parametrize("path", ["etc/mailname", "backup/reloaded"])
    def test_something_is_missing(self, reloaded, path):
        (reloaded.root / path).unlink()
        assert look(reloaded)["stale"]

    def test_reloaded_again(self, reloaded):
        (reloaded.root / "etc/postfix/main.cf").touch()
        assert look(reloaded)["stale"]
        time.sleep(0.02)
        (reloaded.root / "backup/reloaded").touch()
        assert not look(reloaded)["stale"]


class TestMainCf:
    def test_in_another_encoding(self, host):
        with_postfix(host)
        main_cf = "# caf\xe9\n# Zulip email gateway\n# EMAIL_GATEWAY_PATTERN = %s@mail.example.com\n"
        (host.root / "etc/postfix/main.cf").write_bytes(main_cf.encode("latin-1"))
        found = look(host)
        assert found["ours"] and found["patterns"] == ["%s@mail.example.com"]

    def test_as_a_link(self, host):
        with_postfix(host)
        host.write("srv/main.cf", "# Zulip email gateway\n")
        (host.root / "etc/postfix/main.cf").unlink()
        (host.root / "etc/postfix/main.cf").symlink_to(host.root / "srv/main.cf")
        assert look(host)["ours"]
        (host.root / "srv/main.cf").unlink()
        assert not look(host)["configured"]

    def test_as_something_else_it_is_not_ours(self, host):
        (host.root / "etc/postfix/main.cf").mkdir(parents=True)
        found = look(host)
        assert found["configured"] and not found["ours"]

    def test_that_cannot_be_read(self, host):
        with_postfix(host)
        (host.root / "etc/postfix/main.cf").unlink()
        (host.root / "etc/postfix/main.cf").symlink_to("/proc/self/mem")  # whose first byte is always an error
        with pytest.raises(postfix_info.Unfit, match=r"etc/postfix/main\.cf cannot be read: Input/output error; mend"):
            look(host)


def test_a_command_that_does_not_end(host, monkeypatch):
    monkeypatch.setattr(postfix_info, "PATIENCE", 0.2)
    host.fake("ss", does="exec sleep 30")
    with pytest.raises(postfix_info.Unfit, match=r"^ss --no-header .* has not ended within 0\.2 seconds; see what"):
        look(host)


@pytest.mark.parametrize("left", ["etc/systemd/system/zulip-email-gateway-senders.service", "backup/senders-packages"])
def test_what_is_left_of_the_checks_of_senders_is_seen(host, left):
    host.write(left)
    assert look(host)["has_senders"]


def test_an_address_of_the_host_is_told(host):
    listed = "2: eth0: <UP>\n    inet 192.0.2.7/24 scope global eth0\n    inet6 2001:db8::7/64 scope global\n"
    prints(host, "ip", listed)
    assert look(host)["address"] == "192.0.2.7"

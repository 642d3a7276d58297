"""What the network may do: TLS, certificates, greedy and slow clients.

These tests run for each generation of Zulip, see the files that import them.
"""

from __future__ import annotations

import time

import pytest
import testhosts
from attacks import CHAIN, KEY, doctor, outside, talk
from conftest import ZulipHost, tell, wait
from figures import Fault, broken

HANDSHAKE = """
def offered(name, **settings):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for field, value in settings.items():
        if field == "ciphers": context.set_ciphers(value)
        else: setattr(context, field, value)
    try:
        with smtplib.SMTP(SERVER, 25, timeout=30) as server:
            server.starttls(context=context)
            return [name, server.sock.version(), server.sock.cipher()[0]]
    except (OSError, smtplib.SMTPException) as error:
        return [name, "", str(error)]
weak = "ALL:@SECLEVEL=0"
V = ssl.TLSVersion
print(json.dumps([
    offered("default"),
    offered("1.3", minimum_version=V.TLSv1_3),
    offered("1.2", maximum_version=V.TLSv1_2),
    offered("1.1", minimum_version=V.TLSv1, maximum_version=V.TLSv1_1, ciphers=weak),
    offered("1.0", minimum_version=V.TLSv1, maximum_version=V.TLSv1, ciphers=weak),
    *[offered(kind, maximum_version=V.TLSv1_2, ciphers=kind + ":@SECLEVEL=0") for kind in ("aNULL", "eNULL", "AECDH")],
]))
"""


def test_tls_is_at_least_1_2_and_nobody_has_to_use_it(mx, subject):
    found = {name: version for name, version, _ in outside(mx, HANDSHAKE)}
    tell(f"TLS: {found}")
    assert found["default"] in ("TLSv1.2", "TLSv1.3") and found["1.3"] == "TLSv1.3" and found["1.2"] == "TLSv1.2"
    assert not any(version for name, version in found.items() if name not in ("default", "1.2", "1.3"))
    assert mx.send(mx.address(), subject=f"{subject} plain")["accepted"] == 1
    assert mx.send(mx.address(), subject=f"{subject} tls", starttls=True)["accepted"] == 1
    mx.wait_for(subject, 2)


# A key and a certificate, {0}.key and {0}.crt.
NEW = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=renewed.example.com -keyout {0}.key -out {0}.crt 2>/dev/null"
KEEP = Fault(
    f"tar --create --file /root/certificate.tar {KEY} {CHAIN} 2>/dev/null",
    f"rm {KEY} {CHAIN}; tar --extract --file /root/certificate.tar -C /; postfix reload",
)


def shown(mx: ZulipHost) -> str:
    """The name in the certificate that port 25 shows."""
    command = (
        "echo QUIT | openssl s_client -connect 127.0.0.1:25 -starttls smtp 2>/dev/null | openssl x509 -noout -subject"
    )
    return mx.sh(command).strip()


@pytest.mark.zulip(11)
def test_a_renewed_certificate_is_used_within_a_minute(mx):
    """As certbot renews it: links far up point elsewhere."""
    since = mx.sh("date +%s").strip()
    live, archive = "/etc/letsencrypt/live/x", "/etc/letsencrypt/archive/x"
    mx.sh(f"mkdir -p {live} {archive}; chmod 700 /etc/letsencrypt/live")
    mx.sh(f"cp {KEY} {archive}/privkey1.pem; cp {CHAIN} {archive}/fullchain1.pem")
    link = "cd {0}; for name in privkey fullchain; do ln -sf ../../archive/x/${{name}}{1}.pem $name.pem; done"
    with broken(mx, KEEP):
        mx.sh(f"{link.format(live, 1)}; ln -sf {live}/privkey.pem {KEY}; ln -sf {live}/fullchain.pem {CHAIN}; sleep 32")
        assert "renewed" not in shown(mx)
        mx.sh(f"{NEW.format('/root/new')}; mv /root/new.key {archive}/privkey2.pem")
        mx.sh(f"mv /root/new.crt {archive}/fullchain2.pem")
        began = time.monotonic()
        mx.sh(link.format(live, 2))
        assert wait(lambda: "renewed.example.com" in shown(mx), 60)
        tell(f"a renewed certificate was used after {time.monotonic() - began:.0f} s")
        assert "STARTTLS at port 25 works, with that certificate" in doctor(mx, 0)
    mx.sh("rm -r /etc/letsencrypt")
    lines = mx.sh(f"journalctl -o cat -u zulip-email-gateway-certificate.service --since @{since}").splitlines()
    assert len(lines) == 0, lines


@pytest.mark.zulip(10)
def test_a_key_that_is_not_the_certificates_is_told_before_and_after(mx):
    with broken(mx, KEEP):
        mx.sh(f"{NEW.format('/root/other')}; cat /root/other.key > {KEY}; postfix reload; sleep 1")
        assert f"{KEY} is not the key of {CHAIN}" in mx.refusal()
        assert f"WRONG  STARTTLS at port 25 fails" in doctor(mx, 1)  # noqa: F541
    assert "STARTTLS at port 25 works" in doctor(mx, 0)


# Who has passed postscreen.
FORGET = "systemctl stop postfix; rm -f /var/lib/postfix/postscreen_cache.*; systemctl start postfix"
# One that does not wait for the greeting.
BOT = """
connection = socket.create_connection((SERVER, 25), 20)
connection.sendall(b"EHLO bot.example.org\\r\\n"); time.sleep(8); said = connection.recv(9999)
for line in ("MAIL FROM:<x@example.org>", "RCPT TO:<x@example.org>"):
    connection.sendall(line.encode() + b"\\r\\n"); said += connection.recv(9999)
print(json.dumps(said.decode()))"""


@pytest.mark.zulip(10)
def test_postscreen_and_block_lists(mx, subject):
    """Both are options; a bot is turned away, whoever stands in a list is rejected, and all else goes on."""
    ours = testhosts.address(f"{mx.prefix}-outside")
    block_list = f"{mx.fqdn}.list.example.net"
    listed = f"address=/{'.'.join(reversed(ours.split('.')))}.{block_list}/127.0.0.2"
    records = f"/etc/dnsmasq.d/{mx.fqdn}.list.conf"
    dns = f"{mx.prefix}-outside"
    alone = {"postfix_localmail_client_exceptions": []}
    try:
        assert mx.play(postfix_localmail_postscreen=True, **alone).returncode == 0
        mx.sh(FORGET)
        answer = outside(mx, BOT)
        assert answer.startswith("220-") and "550 5.5.1 Protocol error" in answer, answer
        assert mx.send(mx.address(), subject=f"{subject} patient")["accepted"] == 1
        testhosts.enter(dns, f"echo '{listed}' > {records}; systemctl restart dnsmasq")
        lists = [block_list]
        done = mx.play(postfix_localmail_postscreen=True, postfix_localmail_block_lists=lists, **alone)
        assert done.returncode == 0, done.stdout[-2000:]
        mx.sh(FORGET)
        [[_, code, text]] = mx.send(mx.address(), subject=subject)["refused"]
        assert code == 550 and f"blocked using {block_list}" in text
        assert mx.play(postfix_localmail_block_lists=lists).returncode == 0
        [[_, code, text]] = mx.send(mx.address(), subject=subject)["refused"]
        assert code == 554 and f"blocked using {block_list}" in text
    finally:
        testhosts.enter(dns, f"rm -f {records}; systemctl restart dnsmasq")
        assert mx.play().returncode == 0
    assert mx.send(mx.address(), subject=f"{subject} after")["accepted"] == 1
    mx.wait_for(subject, 2)


ALONE = "postconf -e 'smtpd_client_event_limit_exceptions=$mynetworks'"
WITHOUT_EXCEPTIONS = Fault(
    f"cp -p /etc/postfix/main.cf /root/; {ALONE}; systemctl restart postfix",
    "cp -p /root/main.cf /etc/postfix/; systemctl restart postfix",
)


@pytest.mark.zulip(11)
def test_one_client_has_ten_connections_and_sixty_mails_a_minute(mx, subject):
    with broken(mx, WITHOUT_EXCEPTIONS):
        script = """
held, said = [], []
for _ in range(14):
    connection = socket.create_connection((SERVER, 25), 20); held.append(connection)
    said.append(connection.makefile("rb").readline().decode().strip())
print(json.dumps(said))"""
        said = outside(mx, script)
        assert sum(line.startswith("220 ") for line in said) == 10, said
        assert all(line.startswith("421 ") and "too many connections" in line for line in said[10:]), said
        mx.sh("systemctl restart postfix")
        script = """
codes = []
with smtplib.SMTP(SERVER, 25, timeout=60) as server:
    server.ehlo()
    for number in range(65):
        codes.append(server.mail("user@sender.example.org")[0]); server.rset()
print(json.dumps(codes))"""
        codes = outside(mx, script)
        assert codes == [250] * 60 + [450] * 5, codes


@pytest.mark.zulip(11)
def test_slow_clients_make_nobody_wait(mx):
    """Nine clients that trickle, each over as many connections as it may have; one alone had fifty of a hundred."""
    with broken(mx, WITHOUT_EXCEPTIONS):
        script = """
import socket, time
held = []
for client in range(2, 11):
    for _ in range(12):
        connection = socket.socket(); connection.bind((f"127.0.0.{client}", 0)); connection.settimeout(20)
        connection.connect(("127.0.0.1", 25)); held.append(connection)
for connection in held: connection.recv(100)  # who talks before the greeting is thrown out
open("/run/greeted", "w").close()
end = time.time() + 90
while time.time() < end:
    for connection in held:
        try: connection.send(b"E")
        except OSError: pass
    time.sleep(1)
"""
        mx.write("/root/slow.py", script)
        mx.sh("systemd-run --quiet --unit slow python3 /root/slow.py")
        try:
            # All are greeted: processes that start keep the other client waiting, whoever they are for.
            count = "test -e /run/greeted && ss -Htn state established 'sport = :25' | wc -l || true"
            assert wait(lambda: mx.sh(count).strip() == "90", 60)
            began = time.monotonic()
            said = talk(mx)
            seconds = time.monotonic() - began
        finally:
            mx.sh("systemctl stop slow; rm -f /run/greeted")
    tell(f"90 slow connections: another client was greeted and answered after {seconds:.1f} s")
    assert said[0].startswith("250-") and seconds <= 2

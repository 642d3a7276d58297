"""DNS, firewalls and outgoing mail as they are, and what site.yml and doctor say of them."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import testhosts
from conftest import ZulipHost, changed

RESOLV = "/etc/resolv.conf"


@pytest.fixture(scope="module")
def _set_up() -> None:
    assert changed(ZulipHost("servers", "mx43").play()) >= 0


@pytest.fixture
def mx(host, _set_up) -> ZulipHost:
    return host("mx43")


@contextmanager
def having(mx: ZulipHost, before: str, after: str) -> Iterator[None]:
    mx.sh(f"set -e\n{before}")
    try:
        yield
    finally:
        mx.sh(after)


@contextmanager
def records(mx: ZulipHost, *lines: str) -> Iterator[None]:
    """The DNS server has these, too (dnsmasq(8))."""
    outside = f"{mx.prefix}-outside"
    text = "\n".join(lines)
    # However often: systemd would give up after the fifth time in ten seconds.
    restart = "systemctl reset-failed dnsmasq; systemctl restart dnsmasq"
    testhosts.enter(outside, f"echo '{text}' > /etc/dnsmasq.d/test.conf; {restart}")
    try:
        yield
    finally:
        testhosts.enter(outside, f"rm /etc/dnsmasq.d/test.conf; {restart}")


def look(mx: ZulipHost, **variables: object) -> str:
    """What site.yml says before it changes anything."""
    done = mx.play("--tags", "always", **variables)
    assert changed(done) == 0
    return done.stdout


def postfix(mx: ZulipHost) -> int:
    """How much site.yml changes on the mail server's side."""
    return changed(mx.play("--tags", "postfix"))


def doctor(mx: ZulipHost, **variables: object) -> str:
    """All that doctor.yml says."""
    return mx.play(playbook="doctor", **variables).stdout


# --- apt


def test_what_apt_cannot_install_is_named_with_what_is_wrong_with_the_lists(host):
    """Before the first run: afterwards there is nothing to install."""
    mx = host("mx43")
    before = """mkdir /root/lists; mv /etc/apt/sources.list* /root/lists/; mkdir /etc/apt/sources.list.d
        echo 'deb file:/nowhere ./' > /etc/apt/sources.list.d/gone.list; mv /var/lib/apt/lists /root/lists/apt"""
    after = """rm -r /etc/apt/sources.list.d; mv /root/lists/sources.list* /etc/apt/; rm -rf /var/lib/apt/lists
        mv /root/lists/apt /var/lib/apt/lists; rmdir /root/lists"""
    with having(mx, before, after):
        acl = mx.play()
        mx.sh("dpkg --install /var/cache/apt/archives/acl_*.deb")
        done = mx.play()
    assert re.search(r"cannot be given access to /var/log/zulip.* on mx43.* the package acl: E: .*acl", acl.stdout)
    words = r"apt cannot install postfix, ssl-cert on mx43.example.com: No package matching 'postfix' is available \("
    assert done.returncode != 0 and re.search(words, done.stdout), done.stdout[-3000:]
    assert mx.play(zulip_puppet_classes="zulip::profile::standalone").returncode == 0


# --- DNS


def test_the_mx_record_with_the_lowest_number_has_to_be_this_host(mx):
    domain = "second.example.com"
    lines = (f"mx-host={domain},outside.example.com,10", f"mx-host={domain},mx43.example.com,20")
    with records(mx, *lines):
        text = mx.refusal(email_gateway_mailname=domain)
    assert "found 10 outside.example.com, 20 mx43.example.com, so mail goes to outside.example.com (" in text
    assert f"this host is mx43.example.com, zeg-servers-mx43 ({testhosts.address(mx.container)})" in text


def test_a_domain_without_mx_record_and_through_an_alias(mx):
    address = testhosts.address(mx.container)
    with records(mx, f"host-record=bare.example.com,{address}"):
        done = mx.play("--check", email_gateway_mailname="bare.example.com")
    assert "Note: bare.example.com has no MX record; mail comes as its own" in done.stdout


def test_null_mx(mx):
    with records(mx, "dns-rr=none.example.com,15,000000"):
        text = mx.refusal(email_gateway_mailname="none.example.com")
    assert 'found "0 .", with which a domain says that it takes no mail at all (RFC 7505); remove it' in text


def refused(mx: ZulipHost, **variables: object) -> tuple[str, float]:
    """What stops site.yml, and after how many seconds."""
    started = time.monotonic()
    text = mx.refusal(**variables)
    return text, time.monotonic() - started


@pytest.fixture(scope="module")
def usual(_set_up) -> float:
    """How long it takes this machine, busy as it is, to say that a mail domain has no MX record (seconds)."""
    return refused(ZulipHost("servers", "mx43"), email_gateway_mailname="nowhere.example.com")[1]


# Dead DNS may cost so much more (seconds): with the four that a calm machine needs anyway, less than fifteen.
WAITED = 10


def test_dead_dns_on_the_controller_is_told_soon(mx, usual):
    text, seconds = refused(mx, email_gateway_dns_servers=["127.0.0.1:9", "[::1]:9"])
    assert "Where mail for mx43.mail.example.com goes is not known" in text and "[::1]:9" in text
    assert seconds - usual < WAITED, (seconds, usual)


def test_dead_dns_on_the_host_is_told_soon(mx, usual):
    with having(mx, f"cp {RESOLV} /root/; echo nameserver 192.0.2.1 > {RESOLV}", f"cat /root/resolv.conf > {RESOLV}"):
        text, seconds = refused(mx)
    assert "The name servers of mx43.example.com (/etc/resolv.conf there) have not answered within 4 seconds" in text
    assert seconds - usual < WAITED, (seconds, usual)


# --- Firewalls


UFW = "ufw allow 22/tcp; ufw --force enable"
NO_UFW = "ufw --force disable; ufw --force reset; rm -f /etc/ufw/*.20*"


def test_ufw_is_opened(mx):
    with having(mx, UFW, NO_UFW):
        assert "WRONG  ufw keeps port 25 closed; run playbooks/site.yml" in doctor(mx)
        assert postfix(mx) == 1 and postfix(mx) == 0
        assert "25/tcp ALLOW Anywhere # Zulip email gateway" in " ".join(mx.sh("ufw status").split())
        assert "WRONG" not in doctor(mx)


def test_a_rule_of_ufw_that_was_narrowed_stays(mx):
    with having(mx, f"ufw allow from 192.0.2.0/24 to any port 25 proto tcp; ufw deny 25/tcp; {UFW}", NO_UFW):
        before = mx.sh("ufw status")
        done = mx.play("--tags", "postfix")
        assert changed(done) == 0 and mx.sh("ufw status") == before
        words = "WARNING: ufw on mx43.example.com has rules for port 25 that do not let everybody in: "
        assert f"{words}25/tcp ALLOW IN 192.0.2.0/24; 25/tcp DENY IN Anywhere; " in done.stdout, done.stdout[-3000:]
        assert "warn   ufw on mx43.example.com has rules for port 25" in doctor(mx)


def test_firewalld_in_the_zone_that_receives_mail(mx):
    """And not in its default zone."""
    start = "systemctl start firewalld; firewall-cmd --permanent --zone=dmz --add-interface=eth0"
    dmz = "firewall-cmd --permanent --zone=dmz"
    stop = f"{dmz} --remove-interface=eth0; {dmz} --remove-service=smtp; systemctl stop firewalld"
    with having(mx, f"{start}; firewall-cmd --reload", stop):
        assert "WRONG  firewalld keeps port 25 closed" in doctor(mx)
        assert postfix(mx) > 0 and postfix(mx) == 0
        for when in ("", "--permanent "):
            assert mx.sh(f"firewall-cmd {when}--zone=dmz --query-service=smtp").strip() == "yes"
            assert mx.host.run(f"firewall-cmd {when}--zone=public --query-service=smtp").rc == 1


def test_a_rule_of_firewalld_that_was_narrowed_stays(mx):
    rule = 'rule family="ipv4" source address="192.0.2.0/24" service name="smtp" accept'
    start = f"systemctl start firewalld; firewall-cmd --permanent --add-rich-rule='{rule}'; firewall-cmd --reload"
    with having(mx, start, f"firewall-cmd --permanent --remove-rich-rule='{rule}'; systemctl stop firewalld"):
        done = mx.play()
        assert changed(done) == 0
        assert (
            "WARNING: firewalld on mx43.example.com has rules for port 25 that do not let everybody in: " in done.stdout
        )
        assert mx.host.run("firewall-cmd --query-service=smtp").rc == 1


NFT = """nft -f - <<'EOF'
table inet filter {
  chain input {
    type filter hook input priority 0; policy drop;
    ct state vmap { established : accept, related : accept, invalid : drop }
    iifname lo accept
    tcp dport { 22, 80, 443 } accept
    udp dport 53 accept
    %s
  }
}
EOF"""
IPTABLES = "iptables -A INPUT -m state --state ESTABLISHED -j ACCEPT; iptables -A INPUT -i lo -j ACCEPT; "


@pytest.mark.parametrize(
    ("start", "stop", "where"),
    [
        (NFT % "", "nft delete table inet filter", "nftables, table inet filter, chain input: its policy is drop"),
        (
            f"{IPTABLES} iptables -A INPUT -p tcp --dport 25 -j REJECT",
            "iptables -F INPUT",
            "iptables, chain INPUT: a rule rejects it",
        ),
    ],
)
def test_rules_that_close_port_25_are_told_of_and_left_alone(mx, start, stop, where):
    with having(mx, start, stop):
        before = mx.sh("nft --stateless list ruleset")
        done = mx.play("--tags", "postfix")
        assert changed(done) == 0 and mx.sh("nft --stateless list ruleset") == before
        assert f"WARNING: Port 25 of mx43.example.com is closed to strangers by {where}" in done.stdout
        told = doctor(mx)
        assert f"WRONG  Port 25 of mx43.example.com is closed to strangers by {where}" in told


def test_rules_that_open_it_are_not(mx):
    with having(mx, NFT % "tcp dport 25 accept", "nft delete table inet filter"):
        assert "WARNING" not in look(mx)


@pytest.mark.parametrize(
    "start",
    [
        "iptables -t nat -A PREROUTING -p tcp --dport 25 -j DNAT --to-destination 10.88.99.5:25",
        "nft add table ip containers; nft 'add chain ip containers out { type nat hook prerouting priority -100; }'; "
        "nft add rule ip containers out tcp dport 25 dnat to 10.88.99.5:25",
    ],
)
def test_a_containers_port_25_that_nobody_listens_at(mx, start):
    with having(mx, start, "iptables -t nat -F PREROUTING; nft delete table ip containers 2>/dev/null; true"):
        text = mx.refusal()
    assert "What comes to port 25 of mx43.example.com goes on to 10.88.99.5:25 by a firewall rule" in text


# --- Port 25 as seen from the controller


ANOTHER = """
import select, socket, sys
server = socket.create_server(("", 25))
print("listens", flush=True)
while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
    server.accept()[0].sendall(b"220 outside.example.com ESMTP\\r\\n")
"""


@contextmanager
def another_mail_server(mx: ZulipHost) -> Iterator[str]:
    """The address of another mail server that the controller reaches."""
    name = f"{mx.prefix}-outside"
    command = (*testhosts.inside(name), "python3", "-c", ANOTHER)
    # It ends with its input, which is closed here.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout and server.stdout.readline() == "listens\n"
        yield testhosts.address(name)


UNREACHABLE = {"DROP": "nobody answers", "REJECT --reject-with tcp-reset": "[Errno 111] Connection refused"}


@pytest.mark.parametrize("target", UNREACHABLE)
def test_a_port_25_that_cannot_be_reached(mx, target):
    """Where the controller reaches no other either, nothing is known: its provider may drop or refuse it."""
    rule = f"iptables -A INPUT -i eth0 -p tcp --dport 25 -m ttl --ttl-lt 200 -j {target}"
    with having(mx, rule, "iptables -F INPUT"), another_mail_server(mx) as other:
        nobody, somebody = ({"doctor_other_mail_server": address} for address in ("192.0.2.1", other))
        told = mx.variants([nobody, somebody], "doctor").stdout
    words = "warn   port 25 of variant0 cannot be checked from here: this machine reaches no port 25 at all"
    assert words in told and "Everything is right" in told
    assert f"WRONG  port 25 of variant1 cannot be reached from here ({UNREACHABLE[target]})" in told


def test_an_alias_in_the_inventory_that_does_not_resolve(mx):
    """The host is reached by its address (ansible_host), also where DNS is not asked."""
    address = testhosts.address(mx.container)
    way = f"-o ProxyCommand='podman exec -i {mx.container} /usr/sbin/sshd -i' -o StrictHostKeyChecking=no"
    connection = {"ansible_ssh_common_args": f"{way} -o UserKnownHostsFile=/dev/null", "ansible_host": address}
    assert "ok     port 25 from outside" in doctor(mx, email_gateway_mx_check="skip", **connection)


# --- Outgoing mail


SETTINGS = "/etc/zulip/settings.py"


def test_email_host_is_this_host(mx):
    before = f"cp -p {SETTINGS} /root/; sed -i '1i EMAIL_HOST = \"{mx.fqdn}\"' {SETTINGS}"
    with having(mx, before, f"cat /root/settings.py > {SETTINGS}"):
        text = mx.refusal()
    assert "Zulip on mx43.example.com sends its own mail" in text and "postfix_localmail_outgoing: true" in text


def test_email_host_is_another_host(mx):
    before = f"cp -p {SETTINGS} /root/; sed -i '1i EMAIL_HOST = \"outside.example.com\"' {SETTINGS}"
    with having(mx, before, f"cat /root/settings.py > {SETTINGS}"):
        look(mx)


def test_email_host_from_another_file(mx):
    """Which Zulip itself is asked for."""
    folder = "/home/zulip/deployments/current"
    before = f"""cp -p {SETTINGS} /root/; echo 'EMAIL_HOST = "localhost"' > {folder}/zulip_local_settings.py
        sed -i '1i from zulip_local_settings import *' {SETTINGS}"""
    with having(mx, before, f"cat /root/settings.py > {SETTINGS}; rm {folder}/zulip_local_settings.py"):
        text = mx.refusal()
    assert "postfix_localmail_outgoing: true" in text


def test_the_hosts_own_public_address_counts_as_the_host(mx):
    address = testhosts.address(mx.container)
    assert changed(mx.play("--tags", "postfix", postfix_localmail_outgoing=True)) > 0
    talk = "s.ehlo(); s.mail('a@b.example'); print(s.rcpt('c@d.example')[0])"
    script = f"import smtplib; s = smtplib.SMTP('{address}'); {talk}"
    assert mx.python(script).strip() == "250"
    [[_, code, _]] = mx.send("user@sender.example.org")["refused"]
    assert code == 554
    assert postfix(mx) > 0
    assert mx.python(script).strip() == "554"


def test_a_relay_host_is_not_lost(mx):
    """Zulip's mail goes on leaving by it, or nothing is changed."""
    classes = {"zulip_puppet_classes": "zulip::profile::standalone"}
    assert changed(mx.play(**classes)) > 0
    mx.sh("DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends postfix")
    mx.sh("printf 'compatibility_level = 3.6\\nrelayhost = [smtp.example.net]:587\\n' > /etc/postfix/main.cf")
    try:
        adopt = {"postfix_localmail_adopt": True}
        bad = {**adopt, "postfix_localmail_relayhost": "smtp server"}
        half = {**adopt, "postfix_localmail_relayhost": "[a.example]", "postfix_localmail_relayhost_user": "u"}
        lost, bad_text, half_text = mx.refusals([adopt, bad, half])
        assert "sends all mail through [smtp.example.net]:587" in lost and "postfix_localmail_relayhost" in lost
        assert 'postfix_localmail_relayhost is "smtp server"' in bad_text
        assert "postfix_localmail_relayhost_password not set" in half_text
    finally:
        mx.sh("DEBIAN_FRONTEND=noninteractive apt-get purge --yes postfix; rm -rf /etc/postfix")

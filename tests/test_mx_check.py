"""The MX check asks a real DNS server, and says what keeps mail from the host."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import mx_check
import pytest

ADDRESS = "192.0.2.1"
# All that is known; "target" is this host, as are its addresses.
ZONE = {
    ("good.example.com", "MX"): ["10 target.example.com.", "20 backup.example.com."],
    ("capitals.example.com", "MX"): ["10 TARGET.Example.COM."],
    ("second.example.com", "MX"): ["10 other.example.com.", "20 target.example.com."],
    ("shared.example.com", "MX"): ["10 other.example.com.", "10 target.example.com."],
    ("foreign.example.com", "MX"): ["10 other.example.com."],
    ("alias.example.com", "CNAME"): ["good.example.com."],
    ("through.example.com", "MX"): ["10 mx-alias.example.com."],
    ("mx-alias.example.com", "CNAME"): ["target.example.com."],
    ("null.example.com", "MX"): ["0 ."],
    ("bare.example.com", "A"): [ADDRESS],
    ("nothing.example.com", "TXT"): ['"x"'],
    ("later.example.com", "MX"): ["10 target.example.com.", "20 broken.example.com."],
    ("lost.example.com", "MX"): ["10 gone.example.com."],
    ("six.example.com", "MX"): ["10 v6.example.com."],
    ("v6.example.com", "AAAA"): ["2001:db8::1"],
    ("target.example.com", "A"): [ADDRESS],
    ("other.example.com", "A"): ["192.0.2.2"],
    ("backup.example.com", "A"): ["192.0.2.3"],
    ("1.2.0.192.in-addr.arpa", "PTR"): ["backup.example.com.", "target.example.com."],
    (dns.reversename.from_address("2001:db8::1").to_text(omit_final_dot=True), "PTR"): ["v6.example.com."],
    ("4.2.0.192.in-addr.arpa", "PTR"): ["target.example.com."],
    ("6.2.0.192.in-addr.arpa", "PTR"): ["broken.example.com."],
    **{(f"host{number}.example.com", "A"): [f"192.0.2.{number}"] for number in (4, 5, 6)},
    **{(f"mail{number}.example.com", "MX"): [f"1 host{number}.example.com."] for number in (4, 5, 6)},
}


def answer(query: dns.message.Message) -> dns.message.Message:
    """As an authoritative server answers (RFC 1034, 4.3.2)."""
    made = dns.message.make_response(query)
    made.flags |= dns.flags.AA | dns.flags.RA
    name = str(query.question[0].name).lower().rstrip(".")
    kind = dns.rdatatype.to_text(query.question[0].rdtype)
    if name.startswith("broken"):
        made.set_rcode(dns.rcode.SERVFAIL)
        return made
    while alias := ZONE.get((name, "CNAME")):
        made.answer.append(dns.rrset.from_text_list(f"{name}.", 60, "IN", "CNAME", alias))
        name = alias[0].rstrip(".")
    if found := ZONE.get((name, kind)):
        made.answer.append(dns.rrset.from_text_list(f"{name}.", 60, "IN", kind, found))
    elif not any(known == name for known, _ in ZONE):
        made.set_rcode(dns.rcode.NXDOMAIN)
    return made


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as listening:
        listening.bind(("::1", 0))

        def run() -> None:
            while True:
                data, client = listening.recvfrom(4096)
                listening.sendto(answer(dns.message.from_wire(data)).to_wire(), client)

        threading.Thread(target=run, daemon=True).start()
        yield f"[::1]:{listening.getsockname()[1]}"


def check(server: str, domain: str, fqdn: str = "target.example.com") -> dict[str, object]:
    here = ["mx", "Target.example.com", ADDRESS, "2001:db8::1"]
    return mx_check.check(domain, "mx", fqdn, here, [server])


@pytest.mark.parametrize("domain", ["good", "capitals", "six", "Good"])
def test_it_comes_to_this_host(server, domain):
    found = check(server, f"{domain}.example.com")
    assert (found["fault"], found["changed"]) == ("", False)
    assert found["address"] == ("2001:db8::1" if domain == "six" else ADDRESS)


def test_others_are_named(server):
    found = check(server, "good.example.com")
    assert found["records"] == ["10 target.example.com", "20 backup.example.com"]
    [remark] = found["remarks"]
    assert "backup.example.com (192.0.2.3) gets mail when this host does not answer" in remark


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        (
            "foreign",
            "found 10 other.example.com, so mail goes to other.example.com (192.0.2.2); this host is mx, target",
        ),
        ("second", "mail goes to other.example.com (192.0.2.2), which has the lowest number and so is asked first"),
        ("null", 'found "0 .", with which a domain says that it takes no mail at all (RFC 7505); remove it'),
        ("nothing", "found none. Create"),
        ("unknown", "found none, and no name unknown.example.com either. Create"),
        ("lost", "found 10 gone.example.com, so mail goes to gone.example.com (no address); this host is mx"),
    ],
)
def test_it_does_not(server, domain, words):
    fault = str(check(server, f"{domain}.example.com")["fault"])
    assert fault.startswith(f"The MX record of {domain}.example.com does not point at mx: ")
    assert words in fault and f'Create in your DNS "{domain}.example.com. IN MX 1 target.example.com."; or' in fault


def test_both_sides_are_named_with_their_addresses(server):
    """Behind NAT it is these that tell why."""
    fault = str(check(server, "foreign.example.com")["fault"])
    assert (
        "other.example.com (192.0.2.2); this host is mx, target.example.com (192.0.2.1, 2001:db8::1). Create" in fault
    )


def test_a_host_whose_mx_has_no_address(server):
    found = mx_check.check("lost.example.com", "mx", "gone.example.com", ["gone.example.com"], [server])
    assert "and gone.example.com has no address, so that nobody can connect to it" in str(found["fault"])


def test_no_record_with_a_bare_host_name_is_suggested(server):
    fault = str(check(server, "nothing.example.com", fqdn="target")["fault"])
    assert '"nothing.example.com. IN MX 1 zulip.example.com." (with the full name of this host)' in fault


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        ("alias", "alias.example.com is an alias (CNAME) of good.example.com, whose MX records count"),
        ("through", "the MX record names mx-alias.example.com, an alias (CNAME) of target.example.com, which some"),
        (
            "bare",
            "bare.example.com has no MX record; mail comes as its own address is this host's. Better: \"bare.exam",
        ),
        ("shared", "other.example.com (192.0.2.2) gets as much of the mail as this host"),
    ],
)
def test_what_works_and_is_odd(server, domain, words):
    found = check(server, f"{domain}.example.com")
    assert found["fault"] == "" and any(words in remark for remark in found["remarks"]), found


@pytest.mark.parametrize(("number", "is_told"), [(4, True), (5, True), (6, False)])
def test_an_address_without_a_name_of_its_own(server, number, is_told):
    """Its name is another address's; it has none; or nobody can tell."""
    host = f"host{number}.example.com"
    found = mx_check.check(f"mail{number}.example.com", "mx", host, [host], [server])
    words = f"192.0.2.{number} has no name in DNS that leads back to it, and some servers take no mail (bounces)"
    assert found["fault"] == "" and [words in remark for remark in found["remarks"]] == [True] * is_told
    assert not is_told or found["remarks"][0].endswith(f"set its reverse name (PTR record) to {host}")


def test_one_that_is_asked_later_need_not_resolve(server):
    found = check(server, "later.example.com")
    assert found["fault"] == "" and "broken.example.com (no address) gets mail when" in str(found["remarks"])


def test_of_several_the_one_that_is_this_host_is_connected_to(server):
    assert check(server, "shared.example.com")["address"] == ADDRESS


def test_a_server_that_fails_is_not_taken_for_no_record(server):
    fault = str(check(server, "broken.example.com")["fault"])
    assert fault.startswith("Where mail for broken.example.com goes is not known: the name servers cannot tell the MX")


@pytest.mark.parametrize("count", [1, 3])
def test_dead_servers_are_told_of_soon(monkeypatch, count):
    """However many there are, within the time for one question: a second is not asked."""
    assert mx_check.QUESTION < mx_check.LIFETIME <= 12  # seconds, as the plugin's documentation promises
    monkeypatch.setattr(mx_check, "QUESTION", 0.2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        servers = [f"127.0.0.1:{silent.getsockname()[1]}"] * count
        started = time.monotonic()
        fault = str(mx_check.check("good.example.com", "mx", "mx", ["mx"], servers)["fault"])
    assert time.monotonic() - started < 4  # dnspython's own limit is 5 s
    assert f"no name server answered (asked {servers[0]}" in fault and "email_gateway_dns_servers" in fault


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("192.0.2.53", ("192.0.2.53", 53)),
        ("192.0.2.53:5353", ("192.0.2.53", 5353)),
        ("2001:DB8::53", ("2001:db8::53", 53)),
        ("[2001:db8::53]", ("2001:db8::53", 53)),
        ("[2001:db8::53]:5353", ("2001:db8::53", 5353)),
    ],
)
def test_name_servers(text, parts):
    assert mx_check.server_of(text) == parts


@pytest.mark.parametrize("text", ["", "ns.example.com", "192.0.2.53:x", "192.0.2.53:0", "[::1", "192.0.2.53:99999"])
def test_what_is_no_name_server_is_named(text):
    fault = str(mx_check.check("good.example.com", "mx", "mx", ["mx"], [text])["fault"])
    assert f"email_gateway_dns_servers has {text!r}, which is not the address of a name server; write it as" in fault


def test_without_dnspython_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(mx_check, "dns", None)
    fault = str(mx_check.check("good.example.com", "mx", "mx", ["mx"], [])["fault"])
    assert "needs the Python library dnspython on the machine that runs Ansible; install it with " in fault
    assert "-m pip install dnspython, or set email_gateway_mx_check: skip" in fault

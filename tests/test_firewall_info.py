"""What ufw, firewalld, nftables and iptables say of port 25, as these programs say it."""

from __future__ import annotations

import json

import firewall_info
import pytest

MARK = "Zulip email gateway"


def says(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Each program prints its text; a program without one is not installed, or fails."""
    texts = {name.replace("_", "-"): text for name, text in texts.items()}
    monkeypatch.setattr(firewall_info, "run", lambda *command: texts.get(command[0]))


@pytest.fixture(autouse=True)
def ufws_files(tmp_path, monkeypatch):
    """As of a ufw that is enabled and has a rule with a comment."""
    (tmp_path / "ufw.conf").write_text("# Set to yes to start on boot\nENABLED='yes'\n")
    (tmp_path / "user.rules").write_text("### tuple ### allow tcp 25 0.0.0.0/0 any 0.0.0.0/0 in comment=5a756c6970\n")
    monkeypatch.setattr(firewall_info, "UFW", tmp_path)
    return tmp_path


UFW = """Status: active
Logging: on (low)
Default: {default} (incoming), allow (outgoing), disabled (routed)
New profiles: skip

To                         Action      From
--                         ------      ----
22/tcp                     ALLOW IN    Anywhere
{rules}
22/tcp (v6)                ALLOW IN    Anywhere (v6)
"""


@pytest.mark.parametrize(
    ("rules", "state"),
    [
        ("", "closed"),
        ("25                         ALLOW IN    Anywhere", "open"),
        ("25/tcp                     ALLOW IN    Anywhere                   # mail", "open"),
        ("25/udp                     ALLOW IN    Anywhere", "closed"),
        ("2525/tcp                   ALLOW IN    Anywhere", "closed"),
        ("20:30/tcp                  ALLOW IN    Anywhere", "open"),
        ("25,587/tcp                 ALLOW IN    Anywhere", "open"),
        ("Anywhere                   ALLOW IN    Anywhere", "open"),
        ("25/tcp                     ALLOW IN    192.0.2.0/24", "narrowed"),
        ("25/tcp on eth1             ALLOW IN    Anywhere", "narrowed"),
        ("25/tcp                     DENY IN     Anywhere", "narrowed"),
        ("25/tcp                     REJECT IN   Anywhere", "narrowed"),
        ("25/tcp                     LIMIT IN    Anywhere", "narrowed"),
        ("Anywhere                   ALLOW IN    192.0.2.9", "closed"),
        (
            "25/tcp                     DENY IN     192.0.2.9\n25/tcp                     ALLOW IN    Anywhere",
            "narrowed",
        ),
        (
            "25/tcp                     ALLOW IN    192.0.2.9\n25/tcp                     ALLOW IN    Anywhere",
            "open",
        ),
    ],
)
def test_ufw(monkeypatch, rules, state):
    says(monkeypatch, ufw=UFW.format(default="deny", rules=rules))
    found = firewall_info.ufw(MARK)
    assert found.state == state
    assert bool(found.rules) == (state == "narrowed")


def test_ufw_that_denies_nothing(monkeypatch):
    says(monkeypatch, ufw=UFW.format(default="allow", rules=""))
    assert firewall_info.ufw(MARK).state == "open"
    says(monkeypatch, ufw="Status: inactive\n")
    assert firewall_info.ufw(MARK).state == ""
    says(monkeypatch)
    assert firewall_info.ufw(MARK).state == ""


def test_ufws_applications(monkeypatch):
    def run(*command: str) -> str:
        if command[:3] == ("ufw", "app", "info"):
            return f"Profile: {command[3]}\n\nPort:\n  {'465' if 'SMTPS' in command[3] else '25'}/tcp\n"
        return UFW.format(default="deny", rules=f"{application:27}ALLOW IN    Anywhere")

    monkeypatch.setattr(firewall_info, "run", run)
    application = "Postfix"
    assert firewall_info.ufw(MARK).state == "open"
    application = "Postfix SMTPS"
    assert firewall_info.ufw(MARK).state == "closed"


def test_our_own_rule(monkeypatch):
    says(monkeypatch, ufw=f"ufw allow 22/tcp comment '{MARK}'\nufw allow 25/tcp\n")
    assert firewall_info.ufw(MARK).state == ""
    says(monkeypatch, ufw=f"ufw allow 22/tcp\nufw allow 25/tcp comment '{MARK}'\n")
    assert firewall_info.ufw(MARK).state == "ours"


def test_ufw_is_not_asked_what_its_files_tell(monkeypatch, ufws_files):
    """It takes its time."""
    (ufws_files / "ufw.conf").write_text("ENABLED=no\n")
    (ufws_files / "user.rules").write_text("### tuple ### allow tcp 25 0.0.0.0/0 any 0.0.0.0/0 in\n")
    says(monkeypatch, ufw=UFW.format(default="deny", rules=f"25/tcp comment '{MARK}'"))
    assert firewall_info.ufw(MARK).state == ""


HEAD = "*filter\n:INPUT {} [0:0]\n:FORWARD ACCEPT [0:0]\n:mail - [0:0]\n"
ESTABLISHED = "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A INPUT -i lo -j ACCEPT\n"
ALLOW = "-A INPUT -p tcp -m tcp --dport 25 -j ACCEPT\n"


@pytest.mark.parametrize(
    ("policy", "rules", "closed"),
    [
        ("ACCEPT", "", False),
        ("DROP", "", True),
        ("DROP", ESTABLISHED, True),
        ("DROP", ESTABLISHED + ALLOW, False),
        ("DROP", "-A INPUT -s 192.0.2.0/24 -p tcp -m tcp --dport 25 -j ACCEPT\n", True),
        ("DROP", "-A INPUT ! -s 192.0.2.0/24 -p tcp -m tcp --dport 25 -j ACCEPT\n", False),
        ("DROP", "-A INPUT -p udp -m udp --dport 25 -j ACCEPT\n", True),
        ("DROP", "-A INPUT -p tcp -m multiport --dports 22,25,80:90 -j ACCEPT\n", False),
        ("DROP", "-A INPUT -i eth1 -p tcp -m tcp --dport 25 -j ACCEPT\n", True),
        ("DROP", "-A INPUT -i eth+ -p tcp -m tcp --dport 25 -j ACCEPT\n", False),
        ("DROP", '-A INPUT -p tcp -m tcp --dport 25 -m comment --comment "a mail" -j ACCEPT\n', False),
        ("DROP", "-A INPUT -p tcp -m state --state NEW -m tcp --dport 25 -j ACCEPT\n", False),
        ("DROP", "-A INPUT -p tcp -m tcp --dport 25 -m limit --limit 5/min -j ACCEPT\n", False),  # who knows
        ("DROP", "-A INPUT -j mail\n-A mail -p tcp -m tcp --dport 25 -j ACCEPT\n", False),
        ("DROP", "-A INPUT -j mail\n-A mail -p tcp -m tcp --dport 26 -j ACCEPT\n", True),
        ("DROP", "-A INPUT -g mail\n" + ALLOW, True),
        ("DROP", "-A INPUT -p tcp -m tcp --dport 25 --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT\n", False),
        ("DROP", "-A INPUT -m set --match-set known src -p tcp --dport 25 -j ACCEPT\n", False),
        ("DROP", "-A INPUT -m connlimit --connlimit-upto 9 --connlimit-saddr -j ACCEPT\n", False),
        ("DROP", "-A INPUT -p tcp -m tcp ! --dport 25 -j ACCEPT\n", True),
        ("DROP", "-A INPUT -j mail\n-A mail -j RETURN\n" + ALLOW, False),
        ("ACCEPT", "-A INPUT -j DROP\n", True),
        ("ACCEPT", ESTABLISHED + ALLOW + "-A INPUT -j REJECT --reject-with icmp-port-unreachable\n", False),
        ("ACCEPT", "-A INPUT -p tcp -m tcp --dport 25 -j REJECT --reject-with tcp-reset\n", True),
        ("ACCEPT", "-A INPUT -p tcp -m tcp --dport 25 -j LOG --log-prefix x\n", False),
        ("ACCEPT", "-A INPUT -m recent --name bad --rcheck -j DROP\n", False),
    ],
)
def test_iptables(monkeypatch, policy, rules, closed):
    says(monkeypatch, iptables_save=f"# Generated\n{HEAD.format(policy)}{rules}COMMIT\n")
    found = list(firewall_info.iptables("eth0"))
    assert [kind for kind, _ in found] == ["closed"] * closed
    assert all(text.startswith("iptables, chain INPUT: ") for _, text in found)


@pytest.mark.parametrize(
    ("rule", "to"),
    [
        ("-A DOCKER ! -i docker0 -p tcp -m tcp --dport 25 -j DNAT --to-destination 172.17.0.2:25", "172.17.0.2:25"),
        ("-A NETAVARK-DN-1D8 -p tcp -m tcp --dport 25 -j DNAT --to-destination 10.88.0.5:2525", "10.88.0.5:2525"),
        ("-A OUTPUT -p tcp -m tcp --dport 25 -j DNAT --to-destination 192.0.2.7:25", None),
        ("-A PREROUTING -i wg0 -p tcp -m tcp --dport 25 -j DNAT --to-destination 192.0.2.7:25", None),
        ("-A PREROUTING -s 10.0.0.0/8 -p tcp -m tcp --dport 25 -j DNAT --to-destination 192.0.2.7:25", None),
        ("-A PREROUTING -p tcp -m tcp ! --dport 25 -j DNAT --to-destination 192.0.2.7:25", None),
        ("-A DOCKER -p tcp -m tcp --dport 2525 -j DNAT --to-destination 172.17.0.2:25", None),
        ("-A DOCKER -p udp -m udp --dport 25 -j DNAT --to-destination 172.17.0.2:25", None),
    ],
)
def test_where_a_containers_published_port_leads(monkeypatch, rule, to):
    says(monkeypatch, iptables_save=f"*nat\n:PREROUTING ACCEPT [0:0]\n{rule}\nCOMMIT\n")
    assert list(firewall_info.iptables("eth0")) == ([("redirected", to)] if to else [])


def match(protocol: str, field: str, right: object, op: str = "==") -> dict[str, object]:
    return {"match": {"op": op, "left": {"payload": {"protocol": protocol, "field": field}}, "right": right}}


def meta(key: str, right: object) -> dict[str, object]:
    return {"match": {"op": "==", "left": {"meta": {"key": key}}, "right": right}}


NEW = {"key": {"ct": {"key": "state"}}}
ACCEPT: dict[str, object] = {"accept": None}


@pytest.mark.parametrize(
    ("policy", "rules", "closed"),
    [
        ("accept", [], False),
        ("drop", [], True),
        ("drop", [[match("tcp", "dport", 25), ACCEPT]], False),
        ("drop", [[match("tcp", "dport", {"set": [22, 25]}), {"counter": {}}, ACCEPT]], False),
        ("drop", [[match("tcp", "dport", {"set": [22, {"range": [20, 30]}]}), ACCEPT]], False),
        ("drop", [[match("tcp", "dport", "@mail"), ACCEPT]], False),  # who knows
        ("drop", [[match("tcp", "dport", 22), ACCEPT]], True),
        ("drop", [[match("udp", "dport", 25), ACCEPT]], True),
        ("drop", [[match("tcp", "dport", 25, "!="), ACCEPT]], True),
        ("drop", [[meta("iifname", "lo"), ACCEPT]], True),
        ("drop", [[meta("iifname", "eth0"), ACCEPT]], False),
        ("drop", [[meta("l4proto", "tcp"), ACCEPT]], False),
        ("drop", [[match("ip", "saddr", "192.0.2.1"), ACCEPT]], True),
        ("drop", [[match("ip", "saddr", {"prefix": {"addr": "192.0.2.0", "len": 24}}), ACCEPT]], True),
        ("drop", [[match("ip", "saddr", "192.0.2.1", "!="), match("tcp", "dport", 25), ACCEPT]], False),
        ("drop", [[{"vmap": {**NEW, "data": {"set": [["established", {"accept": None}]]}}}]], True),
        ("drop", [[{"vmap": {**NEW, "data": {"set": [["new", {"jump": {"target": "mail"}}]]}}}]], False),
        ("drop", [[{"jump": {"target": "mail"}}]], False),
        ("drop", [[{"xt": {"type": "match", "name": "x"}}, ACCEPT]], False),
        ("accept", [[{"drop": None}]], True),
        ("accept", [[match("tcp", "dport", 25), {"reject": {}}]], True),
        ("accept", [[match("tcp", "dport", 25), {"limit": {}}, {"drop": None}]], False),
        ("accept", [[match("tcp", "dport", 25), ACCEPT], [{"reject": {}}]], False),
    ],
)
def test_nftables(monkeypatch, policy, rules, closed):
    chain = {"family": "inet", "table": "filter"}
    listed: list[dict[str, object]] = [{"metainfo": {}}, {"table": {"family": "inet", "name": "filter"}}]
    listed.append({"chain": {**chain, "name": "input", "type": "filter", "hook": "input", "policy": policy}})
    listed += [{"rule": {**chain, "chain": "input", "expr": rule}} for rule in rules]
    listed.append({"rule": {**chain, "chain": "mail", "expr": [match("tcp", "dport", 25), ACCEPT]}})
    says(monkeypatch, nft=json.dumps({"nftables": listed}))
    found = list(firewall_info.nftables("eth0"))
    assert [kind for kind, _ in found] == ["closed"] * closed
    assert all(text.startswith("nftables, table inet filter, chain input: ") for _, text in found)


def test_ports():
    assert all(map(firewall_info.has_port, ("25", "22,25", "20:30", "20-30", "1:25")))
    assert not any(map(firewall_info.has_port, ("", "2", "250", "26:30", "smtps", "22,2525")))

"""Metrics, and what is made of them: alert rules and the dashboard (files/monitoring)."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from email_gateway import metrics, status
from email_gateway.gateway import Envelope
from email_gateway.journal import BOUNDS, NO_CHANNEL, REPLIES
from email_gateway.metrics import Metric
from email_gateway.verdict import Refused
from mails import mail
from prometheus_client.parser import text_string_to_metric_families
from test_gateway import CHANNEL, FROM_POSTFIX, REPLY

PROJECT = Path(__file__).resolve().parents[1]
MONITORING = PROJECT / "files/monitoring"
PROMTOOL = PROJECT / ".cache/promtool"
RULES = yaml.safe_load((MONITORING / "zulip-email-gateway.rules.yml").read_text())["groups"][0]["rules"]
KNOWN = {f"zulip_email_gateway_{one.name}": one for one in vars(metrics).values() if isinstance(one, Metric)}


def samples(text: str) -> dict[tuple[str, ...], float]:
    """By name and labels."""
    return {
        (sample.name.removeprefix("zulip_email_gateway_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_came_of_mail(gateway):
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    gateway.deliver(Envelope(REPLY), mail(b"m"))
    gateway.answers = [Refused("5.1.1", "unknown address", "no")]
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    text = metrics.render(status.collect(gateway.config))
    found = samples(text)
    assert found["mails_total", "delivered", "posted"] == 2
    assert found["mails_total", "refused", "unknown address"] == 1
    assert found["accepted_total", "postfix"] == 1
    assert found["posted_total", "general (zulip)"] == found["posted_total", REPLIES] == 1
    assert found["quarantine_mails", "refused"] == 1 and found["quarantine_mails", "lost"] == 0
    assert found["delay_seconds_count",] == found["delay_seconds_bucket", "+Inf"] == 2
    assert found["window_free_mails", "60"] == 49 and found["worker_log_readable",] == 1
    assert found["last_posted_timestamp_seconds",] == pytest.approx(found["written_timestamp_seconds",], abs=60)
    assert CHANNEL.partition("@")[0].partition(".")[2] not in text


def test_how_long_a_mail_took_counts_from_its_acceptance(gateway, monkeypatch):
    address = gateway._address_of(CHANNEL)
    gateway.journal.queue([address], "QID")
    with gateway.journal.change() as database:
        database.execute("UPDATE queued SET accepted = accepted - 40")
        database.execute("UPDATE queued SET at = at + 1000")
    gateway.deliver(FROM_POSTFIX._replace(queue_id="QID"), mail(b"m"))
    bounds, seconds = gateway.journal.delays()
    assert bounds == {bound: int(bound == 60.0) for bound in BOUNDS} and 40 <= seconds < 60


def test_what_waits_by_channel(gateway):
    address = gateway._address_of(CHANNEL)
    gateway.journal.queue([address, b"another"], "Q1")
    gateway.journal.queue([address], "Q2")
    assert gateway.journal.queued() == {NO_CHANNEL: 3}
    with gateway.journal.change() as database:
        gateway.journal.learn(database, address, "general")
    assert gateway.journal.queued() == {"general": 2, NO_CHANNEL: 1}


def test_a_counter_never_goes_down(gateway, monkeypatch):
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    before = samples(metrics.render(status.collect(gateway.config)))
    with gateway.journal.change() as database:
        for table in ("count", "posted", "delay"):
            database.execute(f"UPDATE {table} SET hour = hour - 2400")
    for _ in range(2):
        gateway.journal.tidy(1000)
        with gateway.journal.change() as database:
            hours = {
                row[0]
                for table in ("count", "posted", "delay")
                for row in database.execute(f"SELECT hour FROM {table}")
            }
        assert hours == {0}
    after = samples(metrics.render(status.collect(gateway.config)))
    for name in (("mails_total", "delivered", "posted"), ("posted_total", "general (zulip)"), ("delay_seconds_count",)):
        assert after[name] == before[name]


def test_a_probe(gateway):
    """And nothing of one that is not wanted any more."""
    probed = gateway.config._replace(addresses=gateway.config.addresses._replace(probe=CHANNEL))

    def found(config=probed) -> dict[tuple[str, ...], float]:
        told = samples(metrics.render(status.collect(config)))
        return {name: value for name, value in told.items() if name[0].startswith("probe")}

    assert found() == {}
    note = {"at": 1000.0, "looked": 1100.0, "queue_id": "A", "after": 0}
    for seconds in (None, 0.7):
        with gateway.journal.change() as database:
            gateway.journal.write_note(database, "probe", {**note, "seconds": seconds})
        assert found()["probe_timestamp_seconds",] == 1100 and found()["probe_success",] == int(seconds is not None)
        assert found().get(("probe_duration_seconds",)) == seconds
    assert found(gateway.config) == {}


def test_a_name_of_any_kind_is_a_label(gateway):
    facts = status.collect(gateway.config) | {"posted": {'a"b\\c\nd, 日本語}': 1}}
    assert samples(metrics.render(facts))["posted_total", 'a"b\\c\nd, 日本語}'] == 1


def promtool(*arguments: str, text: str = "") -> str:
    done = subprocess.run((PROMTOOL, *arguments), input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_has_nothing_to_complain_of(gateway):
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert promtool("check", "metrics", text=metrics.render(status.collect(gateway.config))) == ""
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(MONITORING / "zulip-email-gateway.rules.yml"))


HEALTHY = {
    "written_timestamp_seconds": "0+60x120",
    "up": "1x100 0x2 1x18",
    "last_poll_timestamp_seconds": "0+540x14",
    "certificate_expiry_timestamp_seconds": "1000000x120",
    "probe_timestamp_seconds": "0+60x120",
    "queue_oldest_seconds": "0x60 300x60",
    'quarantine_mails{kind="lost"}': "0x120",
    'quarantine_mails{kind="waiting"}': "0x100 2x5 0x15",
    'quarantine_mails{kind="refused"}': "7x120",
    'mails_total{outcome="refused",cause="x"}': "0+1x120",
    'mails_total{outcome="delivered",cause="posted"}': "0+2x120",
    "probe_success": "1x120",
    "worker_log_readable": "1x120",
    "damaged_journals": "0x120",
}
FAULTS = {
    "": {},
    "ZulipMailGatewaySilent": {"written_timestamp_seconds": "0+60x90 5400x30"},
    "ZulipMailGatewayDown": {"up": "1x100 0x20"},
    "ZulipMailInboxNotRead": {"last_poll_timestamp_seconds": "0+60x60 3600x60"},
    "ZulipMailCertificateExpires": {"certificate_expiry_timestamp_seconds": "1000000x50 600000x70"},
    "ZulipMailNotProbed": {"probe_timestamp_seconds": "-7200+0x120"},
    "ZulipMailWaits": {"queue_oldest_seconds": "0+60x120"},
    "ZulipMailProbeFailed": {"probe_success": "1x100 0x20"},
    "ZulipMailLost": {'quarantine_mails{kind="lost"}': "0x100 1x20"},
    "ZulipMailNotPosted": {'quarantine_mails{kind="waiting"}': "0x90 1x30"},
    "ZulipMailRefused": {'mails_total{outcome="refused",cause="x"}': "0+3x120"},
    "ZulipMailOutcomeUnknown": {"worker_log_readable": "1x90 0x30"},
    "ZulipMailJournalDamaged": {"damaged_journals": "0x110 1x10"},
}


def trial(alert: str) -> dict[str, Any]:
    """For promtool: with this fault, this alert and no other."""
    series = [
        {"series": f"zulip_email_gateway_{name}", "values": values}
        for name, values in (HEALTHY | FAULTS[alert]).items()
    ]
    expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else []
    query = {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": "115m", "exp_samples": expected}
    return {"interval": "1m", "input_series": series, "promql_expr_test": [query]}


def test_each_alert_is_about_its_fault_and_about_nothing_else(tmp_path):
    rules, file = str(MONITORING / "zulip-email-gateway.rules.yml"), tmp_path / "test.yml"
    tests = [trial(alert) for alert in FAULTS]
    file.write_text(yaml.safe_dump({"rule_files": [rules], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(file))


def test_each_alert_is_tested():
    assert {rule["alert"] for rule in RULES} | {""} == set(FAULTS)


def queries() -> list[str]:
    """All of the rules and of the dashboard."""
    dashboard = json.loads((MONITORING / "zulip-email-gateway.dashboard.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [one["definition"] for one in dashboard["templating"]["list"] if "definition" in one]
    return [rule["expr"] for rule in RULES] + panels + variables


@pytest.mark.parametrize("query", queries())
def test_queries_are_about_metrics_that_there_are(query):
    names = set(re.findall(r"zulip_email_gateway_\w+", query))
    known = {
        f"{name}{suffix}"
        for name, metric in KNOWN.items()
        for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
    }
    assert names and names <= known


def test_every_metric_is_documented():
    told = [line for line in (PROJECT / "docs/monitoring.md").read_text().splitlines() if line.startswith("| `")]
    assert told == [f"| `{name}` | {metric.kind} | {metric.help}. |" for name, metric in KNOWN.items()]

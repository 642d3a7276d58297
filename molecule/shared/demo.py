#!/usr/bin/env python3
"""make demo: a throw-away Zulip host, and one mail on its way into a channel.

Exit status 0 only when the mail was seen in the channel.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import testhosts

INVENTORY = ("-i", "inventory/demo")
PREFIX = "zeg-demo"
DOMAIN = "mx.mail.example.com"


def main() -> None:
    testhosts.use_settings()
    if not running():
        testhosts.say("Starting a host with systemd and a stand-in for Zulip, and a DNS server ...")
        testhosts.up(PREFIX, ["mx:bookworm"])
    testhosts.say("Running playbooks/site.yml against inventory/demo ...")
    play = subprocess.run(("ansible-playbook", *INVENTORY, "playbooks/site.yml"), check=False)
    if play.returncode:
        sys.exit("playbooks/site.yml failed, see above. make demo-down removes the host.")
    state = testhosts.zulip_state(f"{PREFIX}-mx")
    addresses = {
        channel["name"]: "".join((channel["slug"], "." if channel["slug"] else "", channel["token"], "@", DOMAIN))
        for channel in state["channels"]
    }
    topic = time.strftime("demo %H:%M:%S")
    ip = testhosts.address(f"{PREFIX}-mx")
    print("\nChannels and their addresses:")
    for name, address in addresses.items():
        print(f"  #{name}: {address}")
    print(
        f"\nLook at them:        https://{ip}/ (a self-signed certificate)\n"
        f"Send one yourself:   podman exec -i {PREFIX}-outside python3 - --server mx.example.com \\\n"
        f"                       --to {addresses['general']} --subject 'my topic' < molecule/shared/send.py\n"
        f"What has happened:   podman exec {PREFIX}-mx zulip-email-gateway status\n"
        "Remove it all:       make demo-down\n"
    )
    started = time.time()
    answer = testhosts.send(
        PREFIX, "--server", "mx.example.com", "--to", addresses["general"], "--subject", topic, "--text", "It works."
    )
    if answer["refused"]:
        sys.exit(f"the host refused the mail: {json.dumps(answer['refused'])}")
    while time.time() - started < 60:
        if any(message["topic"] == topic for message in testhosts.zulip_state(f"{PREFIX}-mx")["messages"]):
            print(f"delivered to #general > {topic} in {time.time() - started:.1f} s")
            print(f"A report for your browser: {report()}")
            return
        time.sleep(0.1)
    sys.exit("the mail did not arrive within 60 s; see: podman exec zeg-demo-mx journalctl -u 'postfix*'")


def report() -> Path:
    path = Path.cwd() / "zulip-email-report.html"
    command = ("ansible-playbook", *INVENTORY, "-e", f"report_file={path}", "playbooks/report.yml")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"playbooks/report.yml failed:\n{done.stdout}{done.stderr}")
    return path


def running() -> bool:
    names = testhosts.run("podman", "ps", "--format", "{{.Names}} {{.Image}}").splitlines()
    return f"{PREFIX}-mx {testhosts.image_name('bookworm')}" in names


if __name__ == "__main__":
    try:
        main()
    except testhosts.Failed as error:
        sys.exit(f"demo: {error}")

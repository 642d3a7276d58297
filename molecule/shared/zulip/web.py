"""The stand-in's web server: Zulip's mail endpoint, and a page to look at.

A knob for tests: "answer-seconds", between taking a mail and saying so.
"""

from __future__ import annotations

import configparser
import time
from pathlib import Path

import store
from api import api
from flask import Flask, Response, jsonify, render_template_string, request

app = Flask(__name__)
app.register_blueprint(api)
# Django's DATA_UPLOAD_MAX_MEMORY_SIZE; the check is on the whole form's size.
MAX_FORM = 25 * 2**20

SETTINGS = store.settings()
PATTERN = str(SETTINGS.get("EMAIL_GATEWAY_PATTERN", ""))
_secrets = configparser.RawConfigParser()
_secrets.read("/etc/zulip/zulip-secrets.conf")
SECRET = _secrets["secrets"]["shared_secret"]
HOSTS = {"127.0.0.1", "localhost", str(SETTINGS.get("EXTERNAL_HOST", ""))}
# Where this version of Zulip has its endpoint; Zulip 11 has none.
VERSION = store.version()[0]
PATH = "/email_mirror_message" if VERSION < 9 else "/api/internal/email_mirror_message"

HTML = "<!DOCTYPE html><html><body><h1>{}</h1></body></html>"


def html(status: int, text: str) -> Response:
    return Response(HTML.format(text), status, mimetype="text/html")


def error(status: int, message: str, code: str = "BAD_REQUEST", **more: str) -> tuple[Response, int]:
    return jsonify(result="error", msg=message, code=code, **more), status


def email_mirror_message():
    """The order of Django's and Zulip's own checks."""
    if request.host.partition(":")[0] not in HOSTS:
        return html(400, "Bad Request")
    if request.method != "POST":
        return error(405, "Method Not Allowed", "BAD_REQUEST")
    if (request.content_length or 0) > MAX_FORM:
        return html(400, "Bad Request (400)")
    if request.form.get("secret") != SECRET or request.headers.get("X-Real-IP") not in ("127.0.0.1", "::1"):
        return error(403, "Access denied", "UNAUTHORIZED_PRINCIPAL")
    for field in ("rcpt_to", "msg_base64"):
        if field not in request.form:
            return error(400, f"Missing '{field}' argument", "REQUEST_VARIABLE_MISSING", var_name=field)
    if store.database_was_restarted():
        store.STARTED = time.time()  # the first query of each process fails, and renews the connection
        return html(500, "Internal server error")
    database = store.connect()
    store.asked()
    try:
        store.find(database, request.form["rcpt_to"], PATTERN)
    except store.ForwardError as failure:
        return error(400, f"5.1.1 Bad destination mailbox address: {failure}")
    database.execute(
        "INSERT INTO queue (rcpt_to, msg_base64) VALUES (?, ?)", (request.form["rcpt_to"], request.form["msg_base64"])
    )
    time.sleep(store.knob("answer-seconds", 0))
    return jsonify(result="success", msg="")


if VERSION < 11:
    app.add_url_rule(PATH, view_func=email_mirror_message, methods=["GET", "POST"])


PAGE = """<!DOCTYPE html><html><head><title>Zulip stand-in</title><meta http-equiv="refresh" content="5">
<style>body{font-family:sans-serif;margin:2em}td,th{text-align:left;padding:.3em 1em;vertical-align:top}</style></head>
<body><h1>Channels</h1><table>{% for c in channels %}
<tr><td>#{{ c.name }}</td>
<td>{{ pattern.replace("%s", (c.slug + "." if c.slug else "") + c.token) }}</td></tr>{% endfor %}</table>
<h1>Messages</h1><table>{% for m in messages %}
<tr><td>{{ m.when }}</td><td>#{{ m.channel }} &gt; {{ m.topic }}</td>
<td>{{ m.sender }}</td><td><pre>{{ m.content }}</pre></td></tr>
{% endfor %}</table></body></html>"""


@app.get("/")
def page():
    database = store.connect()
    messages = [dict(row) for row in database.execute("SELECT * FROM message ORDER BY id DESC LIMIT 100")]
    for message in messages:
        message["when"] = time.strftime("%H:%M:%S", time.localtime(message["at"]))
    channels = database.execute("SELECT * FROM channel").fetchall()
    return render_template_string(PAGE, channels=channels, messages=messages, pattern=PATTERN)


Path(store.HOME).mkdir(exist_ok=True)

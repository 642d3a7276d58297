"""The stand-in's API, as far as it tells channels' addresses (zerver/views/streams.py, users.py).

Tables for tests: user (who may ask, with whose bot it is) and private (channels that nobody sees
who is not in them).
"""

from __future__ import annotations

import secrets

import store
from flask import Blueprint, Response, g, jsonify, request

api = Blueprint("api", __name__, url_prefix="/api/v1")
EXTERNAL_HOST = str(store.settings().get("EXTERNAL_HOST", ""))
VERSION = store.version()
Answer = Response | tuple[Response, int]


def error(status: int, message: str, code: str = "BAD_REQUEST") -> Answer:
    return jsonify(result="error", msg=message, code=code), status


@api.before_request
def check_caller() -> Answer | None:
    """Django's ALLOWED_HOSTS, then basic auth with an email and its API key."""
    if request.host.partition(":")[0] not in {EXTERNAL_HOST, "127.0.0.1", "localhost"}:
        return Response("<h1>Bad Request (400)</h1>", 400, mimetype="text/html")
    if request.path == "/api/v1/server_settings":
        return None
    # Without the organisation's own name it is the root domain's, which has no users.
    if request.host.partition(":")[0] != EXTERNAL_HOST:
        return error(401, "Account is not associated with this subdomain", "UNAUTHORIZED")
    login = request.authorization
    user = (
        store.connect()
        .execute("SELECT * FROM user WHERE email = ?", ((login.username if login else "") or "",))
        .fetchone()
    )
    if login is None or user is None or login.password != user["api_key"]:
        return error(401, "Invalid API key", "INVALID_API_KEY")
    g.user = user
    return None


def visible(database: store.sqlite3.Connection) -> list[store.sqlite3.Row]:
    query = "SELECT rowid AS id, * FROM channel WHERE name NOT IN (SELECT channel FROM private) ORDER BY name"
    return database.execute(query).fetchall()


@api.get("/server_settings")
def server_settings() -> Answer:
    return jsonify(result="success", msg="", zulip_version=".".join(map(str, VERSION)))


@api.get("/streams")
def streams() -> Answer:
    found = [{"name": row["name"], "stream_id": row["id"]} for row in visible(store.connect())]
    return jsonify(result="success", msg="", streams=found)


@api.get("/get_stream_id")
def get_stream_id() -> Answer:
    name = request.args.get("stream", "")
    for row in visible(store.connect()):
        if row["name"].lower() == name.lower():
            return jsonify(result="success", msg="", stream_id=row["id"])
    return error(400, f"Invalid channel name '{name}'")


@api.get("/users/<email>")
def user(email: str) -> Answer:
    row = store.connect().execute("SELECT * FROM user WHERE email = ?", (email,)).fetchone()
    if row is None:
        return error(400, "No such user")
    return jsonify(result="success", msg="", user={"user_id": row["id"], "email": row["email"]})


@api.get("/streams/<int:number>/email_address")
def email_address(number: int) -> Answer:
    if VERSION < (8, 0):
        return error(404, "Not found")
    database = store.connect()
    row = next((row for row in visible(database) if row["id"] == number), None)
    if row is None:
        return error(400, "Invalid channel ID")
    token = row["token"]
    if "sender_id" in request.args and VERSION >= (10, 0):
        sender = database.execute("SELECT * FROM user WHERE id = ?", (request.args["sender_id"],)).fetchone()
        if sender is None or g.user["id"] not in (sender["id"], sender["owner"]):
            return error(400, "Invalid user ID")
        token = token_for(database, row["name"], sender["email"])
    local = ".".join(filter(None, (row["slug"], token, "show-sender")))
    pattern = str(store.settings().get("EMAIL_GATEWAY_PATTERN", ""))
    return jsonify(result="success", msg="", email=pattern.replace("%s", local) if pattern else "")


def token_for(database: store.sqlite3.Connection, channel: str, sender: str) -> str:
    """zerver/models/streams.py, ChannelEmailAddress: one for each sender."""
    known = (channel, sender)
    database.execute("INSERT OR IGNORE INTO posts_as VALUES (?, ?, ?)", (*known, secrets.token_hex(16)))
    found = database.execute("SELECT token FROM posts_as WHERE channel = ? AND sender = ?", known).fetchone()
    return str(found["token"])

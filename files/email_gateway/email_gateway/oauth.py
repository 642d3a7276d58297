"""Access tokens for an IMAP inbox (OAuth 2, RFC 6749), renewed before they expire.

With a refresh token (section 6) or with the client's own credentials (4.4).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from .verdict import Trouble, one_line

# Renew this long before a token expires (seconds), or half its life if that is shorter.
_EARLY = 300.0


class Tokens:
    """Access tokens from the token end point `url`.

    secret: client_id, client_secret and, if there is one, refresh_token. store: a file
    for the refresh token that the end point gives in the place of the last one.
    timeout: seconds.
    """

    def __init__(self, url: str, secret: dict[str, str], scope: str, store: Path, timeout: float) -> None:
        self._url, self._secret, self._scope = url, secret, scope
        self._store = store
        self._timeout = timeout
        self._token, self._good_until = "", 0.0

    def access_token(self, anew: bool = False) -> str:
        """A token that is still good; raises Trouble. anew: the last one was refused."""
        if anew or time.time() >= self._good_until:
            answer = self._ask()
            life = answer["expires_in"]
            self._token = str(answer["access_token"])
            self._good_until = time.time() + max(life - _EARLY, life / 2)
            if answer.get("refresh_token"):
                self._keep(str(answer["refresh_token"]))
        return self._token

    def _ask(self) -> dict[str, Any]:
        fields = {"client_id": self._secret["client_id"], "client_secret": self._secret["client_secret"]}
        fields["grant_type"] = "client_credentials"
        if self._secret.get("refresh_token"):
            fields |= {"grant_type": "refresh_token", "refresh_token": self._refresh_token()}
        if self._scope:
            fields["scope"] = self._scope
        request = urllib.request.Request(self._url, urllib.parse.urlencode(fields).encode())
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                answer = json.loads(response.read(2**20))
            if not isinstance(answer, dict) or not answer.get("access_token"):
                raise ValueError("no access_token in the answer")
            answer["expires_in"] = float(answer.get("expires_in") or 3600)
            return answer
        except urllib.error.HTTPError as error:
            raise self._trouble(f"answers {error.code} {_fault(error.read(2**20))}") from error
        except (OSError, ValueError, TypeError, http.client.HTTPException) as error:
            raise self._trouble(f"can not be used: {getattr(error, 'reason', error)}") from error

    def _trouble(self, what: str) -> Trouble:
        return Trouble(
            "4.7.8",
            "OAuth 2",
            f"the token end point {self._url} {one_line(what, 300)}; look at email_gateway_oauth_* in the inventory",
        )

    def _refresh_token(self) -> str:
        """The latest refresh token, unless another one was configured since."""
        configured = self._secret["refresh_token"]
        try:
            kept = json.loads(self._store.read_text(encoding="utf-8"))
            if kept["instead_of"] == _digest(configured):
                return str(kept["refresh_token"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        except OSError as error:
            raise Trouble("4.3.0", "state", f"cannot read {self._store}: {error.strerror}") from error
        return configured

    def _keep(self, token: str) -> None:
        draft = self._store.with_suffix(".new")
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                json.dump({"instead_of": _digest(self._secret.get("refresh_token", "")), "refresh_token": token}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self._store)
        except OSError as error:
            raise Trouble("4.3.0", "state", f"cannot write {self._store}: {error.strerror}") from error


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _fault(body: bytes) -> str:
    """error and error_description of the answer (RFC 6749, 5.2)."""
    try:
        answer = json.loads(body)
        return f"{answer['error']}: {answer.get('error_description', '')}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""

"""Access tokens for an IMAP inbox (OAuth 2, RFC 6749), renewed before they expire.

With a refresh token (section 6) or with the client's own credentials (4.4).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from .files import Draft
from .verdict import Trouble, one_line

# Renew this long before a token expires (seconds), or half its life if that is shorter.
_EARLY = 300.0
# What a refresh token takes at most (bytes).
_ROOM = 2**16


class Tokens:
    """Access tokens from the token endpoint `url`.

    secret: client_id, client_secret and, if there is one, refresh_token. store: a file
    for the refresh token that the endpoint gives in the place of the last one.
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
            draft = self._draft()
            try:
                answer = self._ask()
                life = answer["expires_in"]
                self._token = str(answer["access_token"])
                self._good_until = time.time() + max(life - _EARLY, life / 2)
                if draft is not None and answer.get("refresh_token"):
                    self._store_token(draft, str(answer["refresh_token"]))
            finally:
                if draft is not None:
                    draft.discard()
        return self._token

    def _draft(self) -> Draft | None:
        """Room for a new refresh token, before the one there is may become worthless."""
        if not self._secret.get("refresh_token"):
            return None
        try:
            return Draft(self._store, _ROOM)
        except OSError as error:
            raise self._unwritable(error) from error

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
        except (OSError, ValueError, TypeError, RecursionError, http.client.HTTPException) as error:
            raise self._trouble(f"cannot be used: {getattr(error, 'reason', error)}") from error

    def _trouble(self, what: str) -> Trouble:
        return Trouble(
            "4.7.8",
            "OAuth 2",
            f"the token endpoint {self._url} {one_line(what, 300)}; look at email_gateway_oauth_* in the inventory",
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

    def _store_token(self, draft: Draft, token: str) -> None:
        kept = {"instead_of": _digest(self._secret["refresh_token"]), "refresh_token": token}
        try:
            draft.replace([json.dumps(kept).encode()])
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> Trouble:
        return Trouble("4.3.0", "state", f"cannot write {self._store}: {error.strerror}")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _fault(body: bytes) -> str:
    """error and error_description of the answer (RFC 6749, 5.2)."""
    try:
        answer = json.loads(body)
        return f"{answer['error']}: {answer.get('error_description', '')}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""

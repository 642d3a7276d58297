"""Access tokens for an IMAP inbox (OAuth 2, RFC 6749), renewed before they expire.

With a refresh token (section 6) or with the client's own credentials (4.4). The first refresh
token may come from the device flow (RFC 8628): somebody consents in a browser, anywhere.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import Draft
from .verdict import Trouble, one_line

# Renew this long before a token expires (seconds), or half its life if that is shorter.
_EARLY = 300.0
_DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
# What a refresh token takes at most (bytes).
_TOKEN_SIZE = 2**16


class Tokens:
    """Access tokens from the token endpoint `url`.

    secret: client_id, client_secret (empty for a public client) and, if one is configured,
    refresh_token. store: a file for the refresh token that the endpoint gives in the place of the
    last one. timeout: seconds.
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
        if not self._refresh_token():
            return None
        try:
            return Draft(self._store, _TOKEN_SIZE)
        except OSError as error:
            raise self._unwritable(error) from error

    def _ask(self) -> dict[str, Any]:
        token = self._refresh_token()
        if token:
            fields = {"grant_type": "refresh_token", "refresh_token": token}
        elif self._secret.get("client_secret"):
            fields = {"grant_type": "client_credentials"}
        else:
            reason = (
                "nobody has consented yet that this gateway reads the inbox; run on the host: sudo zulip-email-gateway "
                f"oauth --token-endpoint {self._url} --client-id {self._secret['client_id']} --scope '{self._scope}' "
                "DEVICE-ENDPOINT; see docs/polling.md"
            )
            raise Trouble("4.7.8", "OAuth 2", reason)
        return self._token_from(fields)

    def _token_from(self, fields: dict[str, str]) -> dict[str, Any]:
        """What the token endpoint gives for this grant."""
        answer = self._answer_to(self._url, fields)
        try:
            if not answer.get("access_token"):
                raise ValueError("no access_token in the answer")
            answer["expires_in"] = float(answer.get("expires_in") or 3600)
            return answer
        except (ValueError, TypeError) as error:
            raise _trouble(self._url, f"cannot be used: {error}") from error

    def _answer_to(self, url: str, fields: dict[str, str]) -> dict[str, Any]:
        """The object that an endpoint answers; raises Trouble, _Denied where it says why it does not."""
        fields = {"client_id": self._secret["client_id"], **fields}
        if self._secret.get("client_secret"):
            fields["client_secret"] = self._secret["client_secret"]
        if self._scope:
            fields["scope"] = self._scope
        request = urllib.request.Request(url, urllib.parse.urlencode(fields).encode())
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                answer = json.loads(response.read(2**20))
            if not isinstance(answer, dict):
                raise ValueError("the answer is no object")
            return answer
        except urllib.error.HTTPError as error:
            raise _Denied(url, error.code, *_fault(error.read(2**20))) from error
        except (OSError, ValueError, TypeError, RecursionError, http.client.HTTPException) as error:
            raise _trouble(url, f"cannot be used: {getattr(error, 'reason', error)}") from error

    def consent(self, device_endpoint: str, say: Callable[[str], None], sleep: Callable[[float], None]) -> None:
        """Have somebody consent in a browser, and store the refresh token; raises Trouble. say: tells them how."""
        try:
            # Its own: the poller may be trying a token that is worthless meanwhile.
            draft = Draft(self._store, _TOKEN_SIZE, ".consent")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            asked = self._answer_to(device_endpoint, {})
            try:
                grant = {"grant_type": _DEVICE_CODE, "device_code": asked["device_code"]}
                pause, end = float(asked.get("interval") or 5), float(asked["expires_in"])
                page = asked.get("verification_uri") or asked["verification_url"]  # Google's name for it
                say(f"Open {page} in a browser, log in as the inbox, and enter the code {asked['user_code']} ...")
            except (KeyError, ValueError, TypeError) as error:
                raise _trouble(device_endpoint, f"cannot be used: its answer lacks {error}") from error
            waited = 0.0
            while waited < end:
                sleep(pause)
                waited += pause
                try:
                    answer = self._token_from(grant)
                except _Denied as denied:
                    if denied.fault not in ("", "authorization_pending", "slow_down"):
                        raise
                    pause += 5 if denied.fault == "slow_down" else 0  # RFC 8628, 3.5
                    continue
                except Trouble:  # of the network
                    continue
                if not answer.get("refresh_token"):
                    raise _trouble(self._url, "gives no refresh_token; does --scope lack offline_access?")
                self._store_token(draft, str(answer["refresh_token"]))
                return
            raise _trouble(self._url, f"has not heard of anybody's consent within {end:.0f} s")
        finally:
            draft.discard()

    def _refresh_token(self) -> str:
        """The latest refresh token, unless another one was configured since; empty if there is none."""
        configured = self._secret.get("refresh_token", "")
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
        kept = {"instead_of": _digest(self._secret.get("refresh_token", "")), "refresh_token": token}
        try:
            draft.replace([json.dumps(kept).encode()])
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> Trouble:
        return Trouble("4.3.0", "state", f"cannot write {self._store}: {error.strerror}")


class _Denied(Trouble):
    """An endpoint has said no; fault: the error code (RFC 6749, 5.2)."""

    def __init__(self, url: str, status: int, fault: str, description: str) -> None:
        trouble = _trouble(url, f"answers {status} {fault}: {description}")
        super().__init__(*trouble.verdict[:3])
        self.fault = fault


def _trouble(url: str, what: str) -> Trouble:
    reason = f"the endpoint {url} {one_line(what, 300)}; look at email_gateway_oauth_* in the inventory"
    return Trouble("4.7.8", "OAuth 2", reason)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _fault(body: bytes) -> tuple[str, str]:
    """error and error_description of the answer (RFC 6749, 5.2)."""
    try:
        answer = json.loads(body)
        return str(answer["error"]), str(answer.get("error_description", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", ""

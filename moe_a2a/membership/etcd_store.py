"""A group's views in etcd: they outlive every process of the group, and hosts that vanish are noticed by their leases.

Keys under moe_a2a/<group>/: "view", "epoch" (which every change compares), "value/<name>", "alive/<host>" (under a
lease). Talks to etcd's HTTP gateway through etcd3gw (OpenStack's client, pure Python).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from moe_a2a.errors import ConfigError, MoeA2AError, StoreAway
from moe_a2a.membership.store import MAX_VALUE_BYTES
from moe_a2a.membership.view import View
from moe_a2a.membership.wire import decode_view, encode_view

USER, PASSWORD = "MOE_A2A_ETCD_USER", "MOE_A2A_ETCD_PASSWORD"
CA, CERT, KEY = "MOE_A2A_ETCD_CA", "MOE_A2A_ETCD_CERT", "MOE_A2A_ETCD_KEY"
#: Seconds that etcd keeps a host's key without a sign of life.
LEASE_S = 6
#: A host is silent if its key has been away for so long, and etcd was there all the time: after etcd itself was away,
#: all leases may have ended, and every host needs time to announce itself again.
GRACE_S = 6.0
_ANSWER_S = 3.0
T = TypeVar("T")


class EtcdStore:
    """A `Store`. tls: https, with $MOE_A2A_ETCD_CA (or the system's authorities) and, if etcd asks for one, a client
    certificate $MOE_A2A_ETCD_CERT, $MOE_A2A_ETCD_KEY. $MOE_A2A_ETCD_USER and $MOE_A2A_ETCD_PASSWORD if so asked.

    Raises ConfigError if etcd3gw is not installed or etcd refuses these credentials; StoreAway.
    """

    def __init__(self, host: str, port: int, group: str, tls: bool = False) -> None:
        self.url = f"{'etcds' if tls else 'etcd'}://{f'[{host}]' if ':' in host else host}:{port}"
        self._prefix = f"moe_a2a/{group}/"
        self._calls, self._waits = _Client(host, port, tls, self.url), _Client(host, port, tls, self.url)
        self._lease: Any = None
        self._absent: dict[str, float] = {}
        self._known_hosts: set[str] = set()
        self._events: Iterator[View] | None = None  # an open watch: up to which epoch it was read, how long it waits
        self._read, self._patience = 0, 0.0
        self._calls.call(lambda client: client.get(self._prefix + "epoch"))

    def get(self) -> View | None:
        return self._calls.call(lambda client: self._current(client)[0])

    def compare_and_set(self, epoch: int, view: View) -> View:
        data = encode_view(view)
        key, epoch_key = _b64(self._prefix + "view"), _b64(self._prefix + "epoch")
        compare = (
            {"key": epoch_key, "target": "VALUE", "result": "EQUAL", "value": _b64(str(epoch))}
            if epoch
            else {"key": epoch_key, "target": "CREATE", "result": "EQUAL", "create_revision": 0}
        )
        transaction = {
            "compare": [compare],
            "success": [
                {"request_put": {"key": epoch_key, "value": _b64(str(view.epoch))}},
                {"request_put": {"key": key, "value": _b64(data)}},
            ],
            "failure": [{"request_range": {"key": key}}],
        }
        answer = self._calls.call(lambda client: client.transaction(transaction))
        if answer.get("succeeded"):
            return view
        found = answer["responses"][0]["response_range"].get("kvs")
        if not found:
            raise StoreAway(f"the store {self.url} has lost its data")
        return decode_view(base64.b64decode(found[0]["value"]))

    def watch(self, epoch: int, timeout_s: float) -> View | None:
        if self._events is None or self._read > epoch or self._patience > timeout_s:
            newest, revision = self._waits.call(self._current)
            if newest is None and epoch:
                raise StoreAway(f"the store {self.url} has lost its data")
            if newest is not None and newest.epoch > epoch:
                return newest
            self._events, self._read, self._patience = self._stream(revision + 1, timeout_s), epoch, timeout_s
        for view in self._events:
            self._read = view.epoch
            if view.epoch > epoch:
                return view
        self._events = None  # the time is up: the next call looks again
        return None

    def put(self, name: str, value: bytes) -> None:
        if len(value) > MAX_VALUE_BYTES:
            raise ConfigError(f"{name} has {len(value)} bytes; the store takes {MAX_VALUE_BYTES}")
        self._calls.call(lambda client: client.put(f"{self._prefix}value/{name}", value))

    def find(self, name: str) -> bytes | None:
        found = self._calls.call(lambda client: client.get(f"{self._prefix}value/{name}"))
        return bytes(found[0]) if found else None

    def announce(self, host: str) -> None:
        def beat(client: Any) -> None:
            if self._lease is None or self._lease.refresh() < 0:
                self._lease = client.lease(ttl=LEASE_S)
                client.put(f"{self._prefix}alive/{host}", host, lease=self._lease)

        try:
            self._calls.call(beat)
        except StoreAway:
            self._absent.clear()
            raise

    def silent(self) -> tuple[str, ...]:
        try:
            found = self._calls.call(lambda client: client.get_prefix(f"{self._prefix}alive/"))
        except StoreAway:
            self._absent.clear()
            raise
        alive, now = {value.decode() for value, _ in found}, time.monotonic()
        self._known_hosts |= alive
        self._absent = {host: self._absent.get(host, now) for host in self._known_hosts - alive}
        return tuple(sorted(host for host, since in self._absent.items() if now - since > GRACE_S))

    def close(self) -> None:
        if self._lease is not None:
            with contextlib.suppress(MoeA2AError):
                self._calls.call(lambda client: self._lease.revoke())
        self._calls.drop()
        self._waits.drop()

    def _current(self, client: Any) -> tuple[View | None, int]:
        """The newest view, and the revision of etcd that was looked at."""
        request = {"key": _b64(self._prefix + "view")}
        answer = client.post(client.get_url("/kv/range"), json=request)
        revision = int(answer["header"]["revision"])
        found = answer.get("kvs")
        return (decode_view(base64.b64decode(found[0]["value"])) if found else None), revision

    def _stream(self, revision: int, timeout_s: float) -> Iterator[View]:
        """The views that are put from a revision on. Ends if none comes for `timeout_s`."""
        request = {"create_request": {"key": _b64(self._prefix + "view"), "start_revision": revision}}
        for message in self._waits.stream("/watch", request, timeout_s):
            result = message.get("result", {})
            if "error" in message or result.get("canceled"):
                raise StoreAway(f"{self.url} ended the watch: {str(message)[:200]}")
            for event in result.get("events", ()):
                if event.get("type", "PUT") == "PUT":
                    yield decode_view(base64.b64decode(event["kv"]["value"]))
                else:
                    raise StoreAway(f"the store {self.url} has lost its data")


class _Client:
    """etcd3gw's client, with a token that is fetched again when it has expired."""

    def __init__(self, host: str, port: int, tls: bool, url: str) -> None:
        try:
            import etcd3gw
            import requests
        except ImportError as error:
            raise ConfigError(
                f"store={url} needs etcd3gw, which is not installed; pip install 'moe-a2a[etcd]'"
            ) from error
        cert, key = os.environ.get(CERT), os.environ.get(KEY)
        if bool(cert) != bool(key):
            raise ConfigError(f"a client certificate needs both {CERT} and {KEY}")
        session = requests.Session()
        session.trust_env = False  # a proxy from the environment is not on the way to a cluster's own etcd
        if tls:
            session.verify = os.environ.get(CA) or True
            session.cert = (cert, key) if cert and key else None
        self._url, self._lock = url, threading.Lock()
        self._request_error: type[Exception] = requests.exceptions.RequestException
        self._etcd_error: type[Exception] = etcd3gw.exceptions.Etcd3Exception
        self._client: Any = etcd3gw.Etcd3Client(
            host, port, protocol="https" if tls else "http", timeout=_ANSWER_S, session=session
        )
        self._has_token = False

    def call(self, work: Callable[[Any], T]) -> T:
        """Raises StoreAway; ConfigError if etcd refuses the user."""
        with self._lock:
            try:
                if os.environ.get(USER) and not self._has_token:
                    self._authenticate()
                try:
                    return work(self._client)
                except self._etcd_error as error:
                    if not os.environ.get(USER) or "auth token" not in _said(error):
                        raise
                    self._authenticate()
                    return work(self._client)
            except self._etcd_error as error:
                raise self._translated(error) from error
            except (self._request_error, OSError) as error:
                if isinstance(error, MoeA2AError):
                    raise
                raise StoreAway(f"the store {self._url} does not answer: {str(error)[:200]}") from error

    def stream(self, path: str, request: dict[str, Any], timeout_s: float) -> Iterator[dict[str, Any]]:
        """JSON objects of a streaming answer, until none comes for `timeout_s`. Raises StoreAway."""
        import requests

        try:
            with self._client.session.post(
                self._client.get_url(path), json=request, stream=True, timeout=(_ANSWER_S, timeout_s)
            ) as answer:
                if answer.status_code != 200:
                    raise StoreAway(f"the store {self._url} refuses to be watched: {answer.text[:200]}")
                buffer = b""
                for part in answer.iter_content(chunk_size=None):
                    *lines, buffer = (buffer + part).split(b"\n")
                    for line in lines:
                        if line.strip():
                            yield json.loads(line)
        except (requests.exceptions.ReadTimeout, requests.exceptions.ConnectionError) as error:
            if "timed out" in str(error).lower():
                return
            raise StoreAway(f"the store {self._url} does not answer: {str(error)[:200]}") from error
        except (requests.exceptions.RequestException, ValueError) as error:
            raise StoreAway(f"the store {self._url} does not answer: {str(error)[:200]}") from error
        raise StoreAway(f"the store {self._url} ended the watch")

    def drop(self) -> None:
        self._client.session.close()

    def _authenticate(self) -> None:
        self._client.session.headers.pop("Authorization", None)
        said = {"name": os.environ[USER], "password": os.environ.get(PASSWORD, "")}
        answer = self._client.post(self._client.get_url("/auth/authenticate"), json=said)
        self._client.session.headers["Authorization"] = answer["token"]
        self._has_token = True

    def _translated(self, error: Exception) -> MoeA2AError:
        said = _said(error)
        if any(word in said for word in ("authentication failed", "permission denied", "user name is empty")):
            return ConfigError(f"{self._url} refuses: {said[:200]}; set {USER} and {PASSWORD} to a user of this prefix")
        return StoreAway(f"the store {self._url} does not answer: {said[:200]}")


def _said(error: Exception) -> str:
    return f"{getattr(error, 'detail_text', None) or ''} {error}".strip()


def _b64(value: str | bytes) -> str:
    return base64.b64encode(value.encode() if isinstance(value, str) else value).decode()

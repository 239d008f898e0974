"""Views and messages as bytes: JSON with limits, and a seal with an optional shared secret. Nothing is unpickled.

A sealed message is 4 bytes of magic, 32 bytes of HMAC-SHA256 over the rest (zero without a secret), then JSON. With a
secret the HMAC is checked before anything else is read.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from moe_a2a.errors import ConfigError, MessageError
from moe_a2a.membership.view import Endpoint, Slot, State, View

VIEW_VERSION = 1
#: The largest encoded view: 1024 slots with names of usual length are a fifth of it.
MAX_VIEW_BYTES = 1 << 20
#: The largest message between a rank and its watcher. (Later views come through the page.)
MAX_REQUEST_BYTES = 160_000
_MAGIC = b"mA2\x01"
_SEAL = len(_MAGIC) + hashlib.sha256().digest_size


def encode_view(view: View) -> bytes:
    """Raises ConfigError if the view is too large to be stored."""
    slots = {
        str(rank): [
            slot.state.value,
            slot.endpoint.address,
            slot.endpoint.incarnation,
            slot.endpoint.host,
            list(slot.first),
            list(slot.last),
            slot.note,
        ]
        for rank, slot in enumerate(view.slots)
        if slot.endpoint
    }
    value = {
        "moe_a2a_view": VIEW_VERSION,
        "epoch": view.epoch,
        "max_ranks": view.max_ranks,
        "channels": list(view.channels),
        "slots": slots,
    }
    data = json.dumps(value, separators=(",", ":")).encode()
    if len(data) > MAX_VIEW_BYTES:
        raise ConfigError(f"the view takes {len(data)} bytes; allowed are {MAX_VIEW_BYTES}; use shorter host labels")
    return data


def decode_view(data: bytes) -> View:
    """Raises MessageError, which says what is wrong, for anything that `encode_view` does not make."""
    value = decode_json(data, MAX_VIEW_BYTES, "a view")
    if value.get("moe_a2a_view") != VIEW_VERSION:
        raise MessageError(
            f"a view of version {str(value.get('moe_a2a_view'))[:20]}, this is version {VIEW_VERSION}; "
            "run one version of moe-a2a on all ranks"
        )
    try:
        max_ranks, channels = value["max_ranks"], value["channels"]
        if isinstance(max_ranks, bool) or not isinstance(max_ranks, int) or not 1 <= max_ranks <= 1024:
            raise MessageError(f"a view with max_ranks={str(max_ranks)[:20]}")
        slots = [Slot()] * max_ranks
        for key, entry in value["slots"].items():
            rank = int(key)
            if str(rank) != key or not 0 <= rank < max_ranks:
                raise MessageError(f"a view of {max_ranks} slots with slot {key[:20]!r}")
            state, address, incarnation, host, first, last, note = entry
            if not isinstance(note, str):
                raise MessageError(f"slot {rank} of a view has a note that is no text")
            slots[rank] = Slot(State(state), Endpoint(address, incarnation, host), _steps(first), _steps(last), note)
        if not isinstance(channels, list):
            raise MessageError("a view whose channels are no list")
        return View(value["epoch"], tuple(channels), tuple(slots))
    except MessageError:
        raise
    except ConfigError as error:
        raise MessageError(f"a view that cannot be: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MessageError(f"a malformed view: {type(error).__name__}: {str(error)[:200]}") from error


def _steps(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise MessageError("a view with steps that are no list")
    return tuple(value)


def encode_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def decode_json(data: bytes, limit: int, what: str) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes. Raises MessageError."""
    if len(data) > limit:
        raise MessageError(f"{what} of {len(data)} bytes; allowed are {limit}")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{what} that is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise MessageError(f"{what} that is no JSON object")
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def number(value: Mapping[str, Any], key: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
    """A whole number of a message. Raises MessageError."""
    found = value.get(key)
    if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
        raise MessageError(f"a message with {key}={str(found)[:40]}; a whole number from {low} to {high} belongs there")
    return found


def text(value: Mapping[str, Any], key: str, limit: int = 255) -> str:
    """A text of a message. Raises MessageError."""
    found = value.get(key)
    if not isinstance(found, str) or len(found) > limit:
        raise MessageError(
            f"a message with {key}={str(found)[:40]!r}; a text of up to {limit} characters belongs there"
        )
    return found


def incarnations(value: Mapping[str, Any], key: str = "ranks") -> dict[int, int]:
    """rank -> incarnation of a message, where JSON has [[rank, incarnation], ...]. Raises MessageError."""
    found = value.get(key)
    if not isinstance(found, list) or len(found) > 1024:
        raise MessageError(f"a message whose {key} are no list of up to 1024 pairs")
    pairs: dict[int, int] = {}
    for pair in found:
        if not isinstance(pair, list) or len(pair) != 2:
            raise MessageError(f"a message with {str(pair)[:40]} among its {key}; pairs of numbers belong there")
        named = {"rank": pair[0], "incarnation": pair[1]}
        pairs[number(named, "rank", 0, 1023)] = number(named, "incarnation", 1)
    return pairs


def seal(body: bytes, secret: bytes) -> bytes:
    """secret: empty for none."""
    return _MAGIC + _hmac(body, secret) + body


def unseal(data: bytes, secret: bytes) -> bytes:
    """The body of a sealed message. Raises MessageError if it was not sealed with this secret."""
    if len(data) < _SEAL:
        raise MessageError(f"a message of {len(data)} bytes, which is too short to be one")
    body = data[_SEAL:]
    if not hmac.compare_digest(data[len(_MAGIC) : _SEAL], _hmac(body, secret)):
        raise MessageError("a message that was not made with this group's secret (MOE_A2A_SECRET)")
    if data[: len(_MAGIC)] != _MAGIC:
        raise MessageError("a message of something else, or of another version of moe-a2a")
    return body


def _hmac(body: bytes, secret: bytes) -> bytes:
    if not secret:
        return bytes(hashlib.sha256().digest_size)
    return hmac.new(secret, _MAGIC + body, hashlib.sha256).digest()

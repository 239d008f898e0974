"""Messages between watchers: sealed, limited, and believed only if they are whole."""

from __future__ import annotations

import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_a2a import ConfigError
from moe_a2a.errors import MessageError
from moe_a2a.membership.control import Alive, Channel, Died, Message, NewView, decode, encode
from moe_a2a.membership.daemon import shared_secret
from moe_a2a.membership.view import Endpoint, View
from moe_a2a.membership.wire import encode_json, seal

SECRET = b"0123456789abcdef"
VIEW = View.of([Endpoint("127.0.0.1:1", 7, "h")], 2)
MESSAGES = [
    Message("g", 3, 12, Died({1: 5, 2: 6}, "gone")),
    Message("g", 3, 12, NewView(VIEW)),
    Message("g", 3, 12, Alive(99, {1: 5, 2: 6}, {2: 350})),
]


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("secret", [b"", SECRET])
def test_a_message_comes_back_as_it_was(message: Message, secret: bytes) -> None:
    assert decode(encode(message, secret), secret) == message


@pytest.mark.parametrize("theirs, ours", [(b"", SECRET), (SECRET, b""), (b"another secret!!", SECRET)])
def test_a_message_of_another_secret_is_not_read(theirs: bytes, ours: bytes) -> None:
    with pytest.raises(MessageError, match="not made with this group's secret"):
        decode(encode(MESSAGES[0], theirs), ours)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_bit_anywhere_is_noticed(place: int, change: int) -> None:
    data = bytearray(encode(MESSAGES[1], SECRET))
    data[place % len(data)] ^= change
    with pytest.raises(MessageError):
        decode(bytes(data), SECRET)


@given(st.binary(max_size=400))
def test_noise_is_refused_with_and_without_a_secret(data: bytes) -> None:
    for secret in (b"", SECRET):
        with pytest.raises(MessageError):
            decode(data, secret)
        with pytest.raises(MessageError):
            decode(seal(data, secret), secret)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"kind": "died"},
        {"kind": "king", "group": "g", "rank": 0, "incarnation": 1},
        {"kind": "alive", "group": "g", "rank": 0, "incarnation": 1, "ranks": [], "waited": []},
        {"kind": "alive", "group": "g", "rank": 0, "incarnation": 1, "at": 1, "ranks": [], "waited": [[0, -5]]},
        {"kind": "died", "group": "g", "rank": -1, "incarnation": 1, "ranks": [], "note": ""},
        {"kind": "died", "group": "g", "rank": 0, "incarnation": 0, "ranks": [], "note": ""},
        {"kind": "died", "group": "g", "rank": 0, "incarnation": 1, "ranks": [[1]], "note": ""},
        {"kind": "died", "group": "g", "rank": 0, "incarnation": 1, "ranks": [[1, "2"]], "note": ""},
        {"kind": "died", "group": "g", "rank": 0, "incarnation": 1, "ranks": [[1, 2]] * 1025, "note": ""},
        {"kind": "died", "group": "g", "rank": 0, "incarnation": 1, "ranks": [[1, 2]], "note": "x" * 256},
        {"kind": "view", "group": "g", "rank": 0, "incarnation": 1, "view": "{}"},
        {"kind": "view", "group": "g" * 256, "rank": 0, "incarnation": 1, "view": "{}"},
    ],
)
def test_a_malformed_message_is_refused(body: dict[str, object]) -> None:
    with pytest.raises(MessageError):
        decode(seal(encode_json(body), SECRET), SECRET)


def test_an_oversized_message_is_refused() -> None:
    body = {"kind": "died", "group": "g", "rank": 0, "incarnation": 1, "ranks": [], "note": "", "more": "x" * 70_000}
    with pytest.raises(MessageError, match="allowed are 60000"):
        decode(seal(encode_json(body), b""), b"")


def hear(channel: Channel) -> Message | MessageError | None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        found = channel.heard()
        if found is not None:
            return found
        time.sleep(0.001)
    return None


def test_channels_talk_and_drop_what_is_not_theirs() -> None:
    one, two = Channel("127.0.0.1", 0, SECRET), Channel("127.0.0.1", 0, SECRET)
    try:
        one.tell({two.address, one.address, "127.0.0.1:1", "nonsense"}, MESSAGES[0])
        assert hear(two) == MESSAGES[0]
        assert one.heard() is None
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"hello?", ("127.0.0.1", two.port))
        assert isinstance(hear(two), MessageError)
    finally:
        one.close()
        two.close()


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(ConfigError, match="give an address of this machine"):
        Channel("192.0.2.1", 0, b"")


def test_a_short_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_A2A_SECRET", "hunter2")
    with pytest.raises(ConfigError, match="7 bytes; give 16 or more"):
        shared_secret()
    monkeypatch.setenv("MOE_A2A_SECRET", SECRET.decode())
    assert shared_secret() == SECRET

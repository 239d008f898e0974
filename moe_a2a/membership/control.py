"""Messages between the watchers of a group's hosts: single datagrams, so that telling waits for nobody.

A lost one costs time and nothing else, since every watcher also follows the store. Replaying an old one does nothing:
what it says is tied to an incarnation or an epoch. With a secret, what was not made with it is dropped unread.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import Any

from moe_a2a.errors import ConfigError, MessageError
from moe_a2a.membership.view import View
from moe_a2a.membership.wire import (
    decode_json,
    decode_view,
    encode_json,
    encode_view,
    incarnations,
    number,
    seal,
    text,
    unseal,
)

#: The largest datagram that is sent. A larger view is left to the store.
MAX_MESSAGE_BYTES = 60_000
_READ = 65_536


@dataclass(frozen=True)
class Died:
    """Processes of the sender's host are gone. ranks: rank -> incarnation."""

    ranks: dict[int, int]
    note: str


@dataclass(frozen=True)
class NewView:
    """The group agreed on this."""

    view: View


@dataclass(frozen=True)
class Alive:
    """The sender's host is there, and these are its ranks. at: the sender's clock: what was recorded and is sent again
    is behind; ranks: rank -> incarnation; waited: ms since a rank was last seen to wait for others, of those that ever
    were."""

    at: int
    ranks: dict[int, int]
    waited: dict[int, int]


@dataclass(frozen=True)
class Message:
    """rank, incarnation: of a rank of the sender's host that takes (or took) part. Only members are listened to."""

    group: str
    rank: int
    incarnation: int
    content: Died | NewView | Alive


def encode(message: Message, secret: bytes) -> bytes:
    body: dict[str, Any] = {"group": message.group, "rank": message.rank, "incarnation": message.incarnation}
    if isinstance(message.content, Died):
        body |= {"kind": "died", "ranks": [list(pair) for pair in message.content.ranks.items()]}
        body["note"] = message.content.note
        return seal(encode_json(body), secret)
    if isinstance(message.content, Alive):
        body |= {
            "kind": "alive",
            "at": message.content.at,
            "ranks": [list(pair) for pair in message.content.ranks.items()],
        }
        body["waited"] = [list(pair) for pair in message.content.waited.items()]
        return seal(encode_json(body), secret)
    body |= {"kind": "view", "view": encode_view(message.content.view).decode()}
    return seal(encode_json(body), secret)


def decode(data: bytes, secret: bytes) -> Message:
    """Raises MessageError."""
    body = decode_json(unseal(data, secret), MAX_MESSAGE_BYTES, "a message")
    kind = text(body, "kind")
    content: Died | NewView | Alive
    if kind == "died":
        content = Died(incarnations(body), text(body, "note"))
    elif kind == "alive":
        content = Alive(number(body, "at", 1), incarnations(body), incarnations(body, "waited"))
    elif kind == "view":
        content = NewView(decode_view(text(body, "view", MAX_MESSAGE_BYTES).encode()))
    else:
        raise MessageError(f"a message of unknown kind {kind[:40]!r}")
    return Message(text(body, "group"), number(body, "rank", 0, 1023), number(body, "incarnation", 1), content)


class Channel:
    """A socket for datagrams. address: "host:port" where others reach it."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        """port: 0 for a free one. Raises ConfigError if it cannot be had."""
        self._secret = secret
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            self.socket = socket.socket(family, socket.SOCK_DGRAM)
            self.socket.bind(place)
        except OSError as error:
            raise ConfigError(
                f"cannot take messages on {host}:{port}: {error}; give an address of this machine (control_address)"
            ) from error
        self.socket.setblocking(False)
        self.port = int(self.socket.getsockname()[1])
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._family = family
        self._places: dict[str, Any] = {}

    def tell(self, addresses: set[str], message: Message) -> None:
        """Send to these addresses, those that cannot be reached excepted."""
        data = encode(message, self._secret)
        if len(data) > MAX_MESSAGE_BYTES:
            return  # a very large view: the others read it in the store
        for address in addresses - {self.address}:
            with contextlib.suppress(OSError, ValueError):
                if address not in self._places:
                    host, _, port = address.rpartition(":")
                    found = socket.getaddrinfo(host.strip("[]"), int(port), self._family, socket.SOCK_DGRAM)
                    self._places[address] = found[0][4]
                self.socket.sendto(data, self._places[address])

    def heard(self) -> Message | MessageError | None:
        """The next message, or what was wrong with it; None if there is none."""
        try:
            data = self.socket.recv(_READ)
        except OSError:  # nothing there, or the port of somebody we told is closed
            return None
        try:
            return decode(data, self._secret)
        except MessageError as error:
            return error

    def close(self) -> None:
        self.socket.close()

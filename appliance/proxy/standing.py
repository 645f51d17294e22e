"""The records that every session has, laid down as bytes without a record object between.

A worker owns one. The bytes are those that `capture.records.encode` makes of the same fields (tests
compare them); they cost a quarter. What is the same for many sessions is encoded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capture.records import Attributed, Detected, SessionOpen, encode

if TYPE_CHECKING:
    from appliance.config import Route

MOST_KEPT = 1024
_UNPARSED = frozenset({"opaque", "tls"})  #: relayed as they are, whatever is in them


class Standing:
    """Payloads of SessionOpen, Attributed and Detected, for the sessions of one worker."""

    __slots__ = ("_attributed", "_detected", "_routes", "_worker")

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._routes: dict[str, str] = {}
        self._detected: dict[tuple[str, str], bytes] = {}
        self._attributed: dict[int, tuple[Attributed, bytes]] = {}

    def opened(self, client: tuple[str, int], target: tuple[str, int], route: Route) -> bytes:
        """Return a SessionOpen; addresses are as the kernel writes them."""
        rest = self._routes.get(route.name)
        if rest is None:
            whole = SessionOpen(
                "", 0, "", 0, route.name, route.durability, route.source, self._worker
            )
            rest = encode(whole).decode().partition('"target_port":0')[2]
            self._routes[route.name] = rest
        return (
            f'{{"client":"{client[0]}","client_port":{client[1]},"target":"{target[0]}"'
            f',"target_port":{target[1]}{rest}'
        ).encode()

    def attributed(self, found: Attributed) -> bytes:
        """Return an Attributed; the answers for one process are one object as long as it lives."""
        kept = self._attributed.get(id(found))
        if kept is not None:
            return kept[1]
        payload = encode(found)
        if not found.waited_ns:  # an answer that was waited for is one session's alone
            if len(self._attributed) >= MOST_KEPT:
                self._attributed.clear()
            self._attributed[id(found)] = (found, payload)
        return payload

    def detected(self, protocol: str, reason: str) -> bytes:
        """Return a Detected; there are few protocols and few reasons."""
        payload = self._detected.get((protocol, reason))
        if payload is None:
            secrets = "unparsed" if protocol in _UNPARSED else ""
            payload = self._detected[protocol, reason] = encode(Detected(protocol, reason, secrets))
        return payload


def closed(
    reason: str, by: str, up: int, down: int, operations: int, started: int, reference: str
) -> bytes:
    """Return a SessionClose; its words are the driver's own."""
    return (
        f'{{"reason":"{reason}","by":"{by}","bytes_up":{up},"bytes_down":{down}'
        f',"operations":{operations},"started":{started},"reference":"{reference}"}}'
    ).encode()

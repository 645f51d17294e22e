"""What an HTTP/1.1 client has asked for and which answers are still to come.

`appliance.wire.httprequests` adds exchanges, `appliance.wire.httpresponses` takes them off in
order; `out` takes the effects of the event at hand. Answers keep the order of their requests: one
that the gate gives itself waits in its exchange until those before it are through, and then ends
the session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from appliance.sansio import CLIENT, UPSTREAM, Audit, Close, Effect, Forward, Origin
from appliance.wire.httpanswers import answer, tag
from capture.frames import session_name
from capture.records import Fact, Operation, Result

if TYPE_CHECKING:
    from appliance.sansio import Facts
    from appliance.wire.httphead import Fields
    from appliance.wire.httpstart import RequestLine

MOST_PLACE_CHARS = 1_024
MOST_PENDING = 128  #: outstanding answers; with more the client is not read


class Exchange:
    """One request and what is known of its answer."""

    __slots__ = (
        "asked", "begun", "body_bytes", "bytes", "done", "fields", "interim", "number", "refusal",
        "request_bytes", "request_facts", "status", "switch", "tag", "verb",
    )  # fmt: skip

    def __init__(self, number: int, verb: str) -> None:
        self.number = number
        self.verb = verb
        self.switch = ""  #: what the client would go on with; "" for HTTP
        self.asked = 0  #: time of the request's last byte, ns; 0 while it still comes
        self.request_bytes = 0  #: of its body, without chunk sizes
        self.request_facts: dict[str, str] = {}
        self.interim: list[int] | None = None  #: status of each interim response
        self.begun = False  #: the final response's head was forwarded
        self.status = 0
        self.tag = ""
        self.fields: Fields | None = None  #: of the final response
        self.bytes = 0  #: of all that answers it
        self.body_bytes = 0  #: of the final response's body, without chunk sizes
        self.done = False  #: its Result is written
        self.refusal: tuple[int, str] | None = None  #: what the gate will answer


class Exchanges:
    """The exchanges of one session that are not over, in order."""

    __slots__ = ("_credentials", "_facts", "_last", "now", "out", "over", "pending")

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._last = 0
        self._credentials: dict[str, bytes] = {}
        self.pending: list[Exchange] = []
        self.out: list[Effect] = []
        self.now = 0  #: time of the event at hand, ns
        self.over = False  #: the session is being closed: nothing is decoded any more

    def ask(self, line: RequestLine, fields: Fields, offset: int, length: int) -> Exchange:
        """Write the Operation of a request and expect its answer."""
        host = line.host or fields.host or ""
        place = f"{host}{line.path}"[:MOST_PLACE_CHARS]
        self._last = number = self._last + 1
        operation = Operation(
            number, line.verb, line.text, offset, length, (place,),
            f"{line.verb} {host}{line.template}", (), fields.host or "", "http",
        )  # fmt: skip
        self.out.append(Audit(operation))
        if fields.credentials:
            self._present(number, fields)
        exchange = Exchange(number, line.verb)
        exchange.request_facts = fields.facts
        self.pending.append(exchange)
        return exchange

    def _present(self, number: int, fields: Fields) -> None:
        """Write down each credential that the session has not shown yet."""
        for header, scheme, secret in fields.credentials:
            if header != "cookie" and self._credentials.get(header) != secret:
                self._credentials[header] = secret
                digest = self._facts.digest(secret)
                shown = {"op": number, "header": header, "scheme": scheme, "digest": digest}
                self.fact("credential", shown)

    def deny(self, verb: str, text: str, offset: int, length: int) -> Exchange:
        """Write the Operation of a request that is not passed on; the caller says why."""
        self._last = number = self._last + 1
        operation = Operation(number, verb, text, offset, length, kind="http", verdict="denied")
        self.out.append(Audit(operation))
        exchange = Exchange(number, verb)
        exchange.asked = self.now
        self.pending.append(exchange)
        return exchange

    def fact(self, kind: str, fields: dict[str, Any]) -> None:
        """Write a Fact."""
        self.out.append(Audit(Fact(kind, fields)))

    def result(self, exchange: Exchange, status: str, message: str = "") -> Audit:
        """Return the effect that writes how an exchange ended, now."""
        detail: dict[str, Any] = {
            "body": exchange.body_bytes,
            "request_body": exchange.request_bytes,
            "request": exchange.request_facts,
        }
        if exchange.fields is not None:
            detail["response"] = facts = exchange.fields.facts
            detail["content_type"] = facts.get("content-type", "")
        if exchange.interim is not None:
            detail["interim"] = exchange.interim
        if exchange.refusal is not None:
            detail["by"] = "gate"
        duration = self.now - exchange.asked if exchange.asked else 0
        return Audit(
            Result(
                exchange.number, status, exchange.tag, 0, exchange.bytes, duration,
                "", message, (), "", detail,
            )
        )  # fmt: skip

    def refuse(self, exchange: Exchange | None, status: int, reason: str) -> None:
        """Answer `exchange` with an error of the gate when its turn comes, else end the session."""
        reference = session_name(self._facts.session)
        self.answer(exchange, status, f"{reason} (reference {reference})")

    def answer(self, exchange: Exchange | None, status: int, message: str) -> None:
        """As `refuse`, with a message that has its reference."""
        if exchange is None or exchange.done or exchange.begun:
            self.close(message)
        else:
            exchange.refusal = (status, message)
            self.settle()

    def settle(self) -> None:
        """Give the answer that is the gate's, if its turn has come, and end the session."""
        if self.over or not self.pending or self.pending[0].refusal is None:
            return
        exchange = self.pending.pop(0)
        exchange.done = True
        assert exchange.refusal is not None
        status, message = exchange.refusal
        response = answer(status, message, exchange.verb)
        exchange.tag = tag(status)
        exchange.bytes = len(response)
        self.out.append(Forward(CLIENT, response, Origin.SYNTHESISED))
        self.out.append(self.result(exchange, "error", message))
        self.close(message)

    def close(self, reason: str) -> None:
        """End the session: what was not answered is cut."""
        self.cut()
        self.over = True
        self.out += (Close(CLIENT, reason), Close(UPSTREAM, reason))

    def cut_off(self) -> None:
        """The upstream is gone: what it owes is cut, and what waits behind that is too late."""
        refused = any(exchange.refusal is not None for exchange in self.pending)
        if refused:
            self.close("the upstream ended")
        else:
            self.cut()

    def cut(self) -> None:
        """No more answers will come."""
        for exchange in self.pending:
            exchange.done = True
            self.out.append(self.result(exchange, "cut"))
        self.pending.clear()

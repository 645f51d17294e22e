"""nftables through netlink: the few expressions that the redirect needs, and one atomic batch.

Only `appliance.proxy.redirect.rules` builds rules with it. pyroute2's nftables messages want integers where libnftables wants
names, and encode some attributes in their own way; each oddity is noted where it stands. Registers and keys:
linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import TYPE_CHECKING, Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg, nftsocket
from pyroute2.nftables.expressions import genex
from pyroute2.nftables.main import NFTables

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from appliance.config import Network

INET = 1
FILTER_PREROUTING = 0
PRIORITY_MANGLE = -150
BATCH_BEGIN, BATCH_END = 0x10, 0x11
TYPE_IPV4, TYPE_IPV6, TYPE_SERVICE = 7, 8, 13
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
META_MARK, META_NFPROTO, META_L4PROTO = 3, 15, 16

Expression = Any


def _value(data: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", data)]}


def meta(key: int) -> Expression:
    """Load a meta key into register 1."""
    return genex("meta", {"key": key, "dreg": 1})


def equals(data: bytes) -> Expression:
    """Continue when register 1 equals `data`."""
    return genex("cmp", {"sreg": 1, "op": 0, "data": _value(data)})


def between(low: bytes, high: bytes) -> list[Expression]:
    """Continue when low <= register 1 <= high."""
    at_least = genex("cmp", {"sreg": 1, "op": 5, "data": _value(low)})
    at_most = genex("cmp", {"sreg": 1, "op": 3, "data": _value(high)})
    return [at_least, at_most]


def payload(base: int, offset: int, length: int, register: int = 1) -> Expression:
    """Load packet bytes into a register; base 1 is the network header, 2 the transport header."""
    return genex("payload", {"dreg": register, "base": base, "offset": offset, "len": length})


def in_set(name: str) -> Expression:
    """Continue when register 1 is in a set."""
    return genex("lookup", {"set": name, "sreg": 1})


def set_mark(mark: int) -> list[Expression]:
    """Set the packet mark."""
    number = genex("immediate", {"dreg": 1, "data": _value(struct.pack("=I", mark))})
    return [number, genex("meta", {"key": META_MARK, "sreg": 1})]


def own_sockets() -> list[Expression]:
    """Continue when the packet belongs to a connected transparent socket of this host."""
    transparent = genex("socket", {"key": 0, "dreg": 1})
    wildcard = genex("socket", {"key": 2, "dreg": 1})
    return [transparent, equals(b"\1"), wildcard, equals(b"\0")]


def to_local() -> list[Expression]:
    """Continue when the destination is an address of this host.

    The fib result is encoded by pyroute2 as flags: address type (3) must be given as {UNSPEC, OIF}.
    """
    result = {"NFT_FIB_RESULT_UNSPEC", "NFT_FIB_RESULT_OIF"}
    return [genex("fib", {"dreg": 1, "result": result, "flags": 2}), equals(struct.pack("=I", 2))]


def to_listener(family: int, port: int) -> list[Expression]:
    """Give the packet to the transparent listener on `port`; the rule ends here when there is none."""
    number = genex("immediate", {"dreg": 1, "data": _value(struct.pack(">H", port))})
    return [number, genex("tproxy", {"family": family, "reg_port": 1})]


def strip_option(kind: int) -> Expression:
    """Overwrite a TCP option with no-operations. Any other attribute makes the kernel refuse the rule."""
    return genex("exthdr", {"type": kind, "op": 1})


def reject_port() -> Expression:
    """Answer with "port unreachable" of the packet's family."""
    return genex("reject", {"type": 2, "icmp_code": 1})


def verdict(code: int) -> Expression:
    """End with drop (0) or accept (1)."""
    return genex(
        "immediate",
        {"dreg": 0, "data": {"attrs": [("NFTA_DATA_VERDICT", {"attrs": [("NFTA_VERDICT_CODE", code)]})]}},
    )


COUNTER: Expression = {"attrs": [("NFTA_EXPR_NAME", "counter")]}
DROP, ACCEPT = verdict(0), verdict(1)


class Batch:
    """One transaction on our table: all of it or nothing."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._messages: list[Any] = []
        self._sets = 0
        self.shape: list[tuple[str, ...]] = []  #: names of the expressions of each rule, to compare what was applied

    def _add(self, kind: type, number: int, flags: int, attributes: list[Any]) -> None:
        message = kind()
        message["attrs"] = attributes
        message["header"]["type"] = NFNL_SUBSYS_NFTABLES << 8 | number
        message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK | flags
        message["nfgen_family"] = INET
        self._messages.append(message)

    def table(self) -> None:
        """Make the table if it is not there."""
        self._add(nftsocket.nft_table_msg, nftsocket.NFT_MSG_NEWTABLE, NLM_F_CREATE, [["NFTA_TABLE_NAME", self._table]])

    def delete_table(self) -> None:
        """Remove the table and all in it."""
        self._add(nftsocket.nft_table_msg, nftsocket.NFT_MSG_DELTABLE, 0, [["NFTA_TABLE_NAME", self._table]])

    def chain(self, name: str) -> None:
        """Make a base chain at prerouting, before routing decides."""
        hook = {"attrs": [["NFTA_HOOK_HOOKNUM", FILTER_PREROUTING], ["NFTA_HOOK_PRIORITY", PRIORITY_MANGLE]]}
        attributes = [
            ["NFTA_CHAIN_TABLE", self._table], ["NFTA_CHAIN_NAME", name], ["NFTA_CHAIN_TYPE", "filter"],
            ["NFTA_CHAIN_POLICY", 1], ["NFTA_CHAIN_HOOK", hook],
        ]  # fmt: skip
        self._add(nftsocket.nft_chain_msg, nftsocket.NFT_MSG_NEWCHAIN, NLM_F_CREATE | NLM_F_APPEND, attributes)

    def rule(self, chain: str, expressions: Sequence[Expression]) -> None:
        """Append a rule."""
        self.shape.append(tuple(dict(e["attrs"])["NFTA_EXPR_NAME"] for e in expressions))
        attributes = [
            ["NFTA_RULE_TABLE", self._table], ["NFTA_RULE_CHAIN", chain], ["NFTA_RULE_EXPRESSIONS", list(expressions)],
        ]  # fmt: skip
        self._add(nftsocket.nft_rule_msg, nftsocket.NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, attributes)

    def interval_set(self, name: str, key_type: int, key_bytes: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Make a set of the inclusive `ranges`; the end of an interval is an element with flag 1."""
        self._sets += 1
        attributes = [
            ["NFTA_SET_TABLE", self._table], ["NFTA_SET_NAME", name], ["NFTA_SET_KEY_TYPE", key_type],
            ["NFTA_SET_KEY_LEN", key_bytes], ["NFTA_SET_ID", self._sets], ["NFTA_SET_FLAGS", {"NFT_SET_INTERVAL"}],
        ]  # fmt: skip
        self._add(nftsocket.nft_set_msg, nftsocket.NFT_MSG_NEWSET, NLM_F_CREATE, attributes)
        elements = []
        for low, high in ranges:
            elements.append({"attrs": [["NFTA_SET_ELEM_KEY", _value(low.to_bytes(key_bytes, "big"))]]})
            if high + 1 < 1 << (key_bytes * 8):
                end = (high + 1).to_bytes(key_bytes, "big")
                elements.append({"attrs": [["NFTA_SET_ELEM_KEY", _value(end)], ["NFTA_SET_ELEM_FLAGS", {1}]]})
        if elements:
            attributes = [
                ["NFTA_SET_ELEM_LIST_TABLE", self._table], ["NFTA_SET_ELEM_LIST_SET", name],
                ["NFTA_SET_ELEM_LIST_ELEMENTS", elements],
            ]  # fmt: skip
            self._add(nftsocket.nft_set_elem_list_msg, nftsocket.NFT_MSG_NEWSETELEM, NLM_F_CREATE, attributes)

    def networks(self, name: str, version: int, networks: Iterable[Network]) -> None:
        """Make a set of the networks of one IP version."""
        mine = ipaddress.collapse_addresses(n for n in networks if n.version == version)  # type: ignore[type-var]
        ranges = [(int(n.network_address), int(n.broadcast_address)) for n in mine]
        self.interval_set(name, TYPE_IPV4 if version == 4 else TYPE_IPV6, 4 if version == 4 else 16, ranges)

    def commit(self) -> None:
        """Send the transaction. Raises NetlinkError and changes nothing when the kernel refuses any part."""

        def edge(number: int) -> Any:
            message = nfgen_msg()
            message["res_id"] = NFNL_SUBSYS_NFTABLES
            message["header"]["type"] = number
            message["header"]["flags"] = NLM_F_REQUEST
            return message

        with NFTables(nfgen_family=INET) as nft:

            async def send() -> list[Any]:
                batch = [edge(BATCH_BEGIN), *self._messages, edge(BATCH_END)]
                return [answer async for answer in nft.asyncore.nlm_request_batch(batch)]

            nft._run_with_cleanup(send)  # noqa: SLF001  # the only way to a batch in pyroute2 0.9


def dump(table: str) -> list[tuple[tuple[str, ...], int, int]]:
    """Return (expression names, packets, bytes of the first counter) of each rule of our table, in order."""
    rules = []
    with NFTables(nfgen_family=INET) as nft:
        for message in nft.get_rules():
            if message.get_attr("NFTA_RULE_TABLE") != table:
                continue
            names, packets, size = [], 0, 0
            for expression in message.get_attr("NFTA_RULE_EXPRESSIONS") or []:
                names.append(expression.get_attr("NFTA_EXPR_NAME"))
                if names[-1] == "counter":
                    data = expression.get_attr("NFTA_EXPR_DATA")
                    packets = data.get_attr("NFTA_COUNTER_PACKETS") or 0
                    size = data.get_attr("NFTA_COUNTER_BYTES") or 0
            rules.append((tuple(names), packets, size))
    return rules


def table_exists(table: str) -> bool:
    """Say whether our table is there."""
    with NFTables(nfgen_family=INET) as nft:
        return any(message.get_attr("NFTA_TABLE_NAME") == table for message in nft.get_tables())


def set_names(table: str) -> set[str]:
    """Return the names of the sets of our table."""
    with NFTables(nfgen_family=INET) as nft:
        return {
            message.get_attr("NFTA_SET_NAME")
            for message in nft.get_sets()
            if message.get_attr("NFTA_SET_TABLE") == table
        }

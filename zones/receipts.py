"""Checks the receipts in a ledger, long after: with the CA of the nodes' certificates, and nothing else. Pure.

A custodian signs what a lease was and did. Each receipt must be by the node that the entry names, under a certificate
that held when the lease ended; be about the lease and exactly the terms that the entry has; say the controls that its
level leaves; and have received what the ledger says was sent, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zones.errors import GrantRefusedError
from zones.keys import verify_node_signature
from zones.model import canonical, controls_held, digest
from zones.reconcile import framing_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One lease that ended."""

    #: Number of the ledger's entry.
    seq: int
    lease: str
    node: str
    #: What the custodian states; ``None`` where the lease was lost.
    receipt: Mapping[str, Any] | None
    #: What is wrong; ``""`` when nothing is.
    problem: str = ""


def check(entries: Iterable[Mapping[str, Any]], node_ca: str) -> Iterator[Checked]:
    """Yield each lease that ended, with what is wrong about its receipt.

    Args:
        entries: All of a ledger, in order.
        node_ca: CA certificate of the nodes, PEM, from the zone's Vault (`ray-gpu vault node-ca`).
    """
    calls: dict[str, int] = {}
    for entry in entries:
        if entry["kind"] == "completion":
            calls[entry["lease"]] = calls.get(entry["lease"], 0) + entry["bytes"]
        elif entry["kind"] == "lease-end":
            signed = entry["receipt"]
            problem = _problem(entry, signed, calls.get(entry["lease"], 0), node_ca) if signed else ""
            receipt = signed["receipt"] if signed else None
            yield Checked(seq=entry["seq"], lease=entry["lease"], node=entry["node"], receipt=receipt, problem=problem)


def _problem(entry: Mapping[str, Any], signed: Mapping[str, Any], calls: int, node_ca: str) -> str:
    receipt = signed["receipt"]
    try:
        verify_node_signature(
            signed["certificate"],
            node_ca,
            node=entry["node"],
            message=canonical(receipt),
            signature_hex=signed["signature"],
            now=receipt["ended"],
        )
    except GrantRefusedError:
        return f"its signature is not that of node {entry['node']}, under a certificate that held then"
    if (receipt["lease"], receipt["node"]) != (entry["lease"], entry["node"]):
        return "it is about another lease, or of another node"
    if receipt["grant"] != digest(entry["grant"]):
        return "it is about other terms than those in the entry"
    if receipt["controls"] != controls_held(receipt["degradations"]):
        return "the controls that it names do not fit what it lacks"
    sent = calls + framing_bytes(entry)
    if receipt["received_bytes"] != sent:
        return f"the node received {receipt['received_bytes']} bytes, and by the ledger {sent} were sent"
    return ""

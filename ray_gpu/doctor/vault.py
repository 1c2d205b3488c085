"""Checks of Vault as this host sees it: does it answer, prove itself, and agree on the time? :func:`ask` asks it.

The one request is for its health, without a login: nothing secret is sent.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from ray_gpu.doctor.files import SOON_S
from ray_gpu.doctor.finding import Finding, holds, missing, unclear
from zones.vault import MOST_SKEW_S

_HEALTH = "/v1/sys/health?standbyok=true&perfstandbyok=true&sealedcode=200&uninitcode=200"
_TIMEOUT_S = 5.0
_MOST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What Vault said, or why it did not."""

    address: str
    #: Why there is no answer; empty when there is one.
    failure: str = ""
    initialized: bool = False
    sealed: bool = False
    #: When its certificate ends, UTC seconds since the epoch.
    not_after: float = 0.0
    #: Its clock, from the header ``Date``, and ours at that moment, UTC seconds since the epoch.
    theirs: float | None = None
    ours: float = 0.0


def answers(answer: Answer) -> Finding:
    """Check that Vault answers, proves itself by its certificate, and is not sealed."""
    control, about = "vault-unproven", "Vault"
    if answer.failure:
        return missing(control, about, f"{answer.address}: {answer.failure}")
    if not answer.initialized:
        return missing(control, about, f"{answer.address} holds nothing yet", "Initialise it: bao operator init.")
    if answer.sealed:
        return missing(control, about, f"{answer.address} is sealed", "Unseal it: bao operator unseal.")
    return holds(control, about, f"{answer.address} answers, and is not sealed")


def certificate(answer: Answer) -> Finding:
    """Check when Vault's certificate ends."""
    control, about = "vault-unproven", "Vault's certificate"
    fix = "Give Vault a new certificate of the same CA."
    if answer.failure:
        return unclear(control, about, "Vault did not answer", "Mend that first.")
    when = datetime.fromtimestamp(answer.not_after, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if answer.not_after - answer.ours < SOON_S:
        return missing(control, about, f"it ends at {when}", fix)
    return holds(control, about, f"until {when}")


def clock(answer: Answer) -> Finding:
    """Check that this host's clock agrees with Vault's."""
    control, about = "clock-skew", "clock"
    if answer.failure or answer.theirs is None:
        why = "Vault did not answer" if answer.failure else "Vault's answer has no date"
        return unclear(control, about, why, "Mend that first.")
    # The header counts whole seconds, so their clock was half a second further on average.
    skew = answer.ours - answer.theirs - 0.5
    if abs(skew) > MOST_SKEW_S:
        return missing(control, about, f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} Vault's")
    return holds(control, about, f"agrees with Vault's to {MOST_SKEW_S:g} s")


# -- asking -------------------------------------------------------------------------------------


def ask(address: str, ca: str | None) -> Answer:
    """Ask a Vault for its health.

    Args:
        address: ``https://host:port``.
        ca: PEM file that its certificate must chain to; ``None`` for the system's CAs.
    """
    try:
        return _ask(address, ssl.create_default_context(cafile=ca))
    except ssl.SSLCertVerificationError as error:
        return Answer(address=address, failure=f"its certificate does not hold here: {error.verify_message}")
    except ssl.SSLError as error:
        reason = error.reason or type(error).__name__
        return Answer(address=address, failure=f"no TLS with what is there, or with the CA file {ca}: {reason}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Answer(address=address, failure=reason)


def _ask(address: str, context: ssl.SSLContext) -> Answer:
    parts = urlsplit(address)
    connection = http.client.HTTPSConnection(
        parts.hostname or "", parts.port or 443, timeout=_TIMEOUT_S, context=context
    )
    try:
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)
        own = connection.sock.getpeercert() or {}
        connection.request("GET", _HEALTH)
        response = connection.getresponse()
        ours = time.time()
        document = json.loads(response.read(_MOST_BYTES))
        if not isinstance(document, dict) or "sealed" not in document:
            raise ValueError("what answers there is no Vault")
        date = response.headers.get("Date")
        return Answer(
            address=address,
            initialized=bool(document.get("initialized")),
            sealed=bool(document["sealed"]),
            not_after=ssl.cert_time_to_seconds(str(own["notAfter"])),
            theirs=parsedate_to_datetime(date).timestamp() if date else None,
            ours=ours,
        )
    finally:
        connection.close()

"""Asks who answers at the head's address before a node starts Ray, which would only time out. Opens connections."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterable

from ray_gpu.node_identity import RayFiles
from zones.errors import ClusterError

#: A head that lives answers at once, on a machine with nothing left to give within seconds; a firewall that drops
#: says nothing.
_TIMEOUT_S = 20.0
_LOOK_AGAIN_S = 0.2


def check_head(address: str, port: int, files: RayFiles, *, node: str) -> None:
    """Shake hands with the cluster's head, as Ray will: both sides show a certificate.

    Args:
        address: IPv4 address of the head; its certificate must name it.
        port: Port of its GCS.
        files: The node's own certificate and key, and the cluster's CA.
        node: The node's name, for errors.

    Raises:
        ClusterError: Nothing answers, something else answers, or one of the two refuses the other's certificate.
    """
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(files.certificate, files.key)
    context.set_alpn_protocols(["h2"])
    where = f"the head at {address}:{port}"
    try:
        with (
            socket.create_connection((address, port), timeout=_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=address) as secured,
        ):
            # With TLS 1.3 only the first answer tells whether the other side took our certificate.
            if not secured.recv(1):
                raise ssl.SSLError("it closed the connection")
    except ssl.SSLCertVerificationError as error:
        raise ClusterError(
            f"{where} shows a certificate that is not valid for this cluster ({error.verify_message}); check that it "
            "is the head, that it got its certificate from the same Vault, and both hosts' clocks. If its certificate "
            "ended, restart the cluster",
            node=node,
            reason=error.verify_message,
        ) from None
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        raise ClusterError(
            f"{where} does not accept the certificate of node {node}, or is none ({reason}); check that both got their "
            "certificates from the same Vault, and both hosts' clocks",
            node=node,
            reason=reason,
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClusterError(
            f"{where} does not answer ({reason}); start it first (`ray up`, or `ray-gpu node start` there), and check "
            "the address in node.yaml and the firewalls (docs/ports.md)",
            node=node,
            reason=reason,
        ) from None


def await_hosts(addresses: Iterable[str], port: int, timeout_s: float, say: Callable[[str], None]) -> list[str]:
    """Wait until a port answers on every host; return the addresses of those where it did not within *timeout_s*."""
    missing = list(addresses)
    deadline = time.monotonic() + timeout_s
    while missing and time.monotonic() < deadline:
        for address in list(missing):
            with contextlib.suppress(OSError):
                socket.create_connection((address, port), timeout=1.0).close()
                missing.remove(address)
                say(f"GPU host {address} has joined")
        if missing:
            time.sleep(_LOOK_AGAIN_S)
    return missing

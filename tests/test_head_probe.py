"""A node asks who its head is before it starts Ray: real TLS on both ends, real certificates, good and bad ones."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ray_gpu import head_probe
from ray_gpu.node_identity import RayFiles
from zones.errors import ClusterError

HEAD = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA of nodes."""

    name: str
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, name: str) -> Authority:
        """Return a CA with a new key."""
        return cls(name, ec.generate_private_key(ec.SECP256R1()))

    def sign(
        self, subject: str, key: ec.EllipticCurvePrivateKey, *, address: str | None = None, days: tuple[int, int]
    ) -> bytes:
        """Return a certificate in PEM: the CA's own without *address*. Valid from and to *days* from now."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.name)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=address is None, path_length=None), critical=True)
        )
        if address is not None:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


OURS, FOREIGN = Authority.make("ours"), Authority.make("ours")
VALID, ENDED = (-1, 1), (-2, -1)


def files(
    directory: Path, authority: Authority = OURS, *, address: str = HEAD, days: tuple[int, int] = VALID
) -> RayFiles:
    """Write a node's certificate of this CA, its key, and our CA: who is foreign trusts us, and not the reverse."""
    key = ec.generate_private_key(ec.SECP256R1())
    directory.mkdir()
    made = RayFiles(directory=directory)
    made.ca.write_bytes(OURS.sign("ours", OURS.key, days=(-3, 3)))
    made.certificate.write_bytes(authority.sign("node", key, address=address, days=days))
    made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return made


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Answer one connection in a thread; yields the port."""
    with socket.create_server((HEAD, 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def head(shown: RayFiles) -> Callable[[socket.socket], None]:
    """Return what speaks like a GCS with mutual TLS: it says something first, once it took the other's certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=shown.ca)
    context.load_cert_chain(shown.certificate, shown.key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])

    def answer(connection: socket.socket) -> None:
        try:
            with context.wrap_socket(connection, server_side=True) as secured:
                secured.sendall(b"settings")
                secured.recv(1)
        except OSError:
            pass

    return answer


def test_head_and_node_fit(tmp_path: Path) -> None:
    """A head and a node of one cluster take each other's certificates."""
    with listening(head(files(tmp_path / "head"))) as port:
        head_probe.check_head(HEAD, port, files(tmp_path / "node"), node="gpu-1")


@pytest.mark.parametrize(
    ("authority", "address", "days", "message"),
    [
        (FOREIGN, HEAD, VALID, "not valid for this cluster"),
        (OURS, "127.0.0.9", VALID, r"not valid for this cluster \(IP address mismatch"),
        (OURS, HEAD, ENDED, r"not valid for this cluster \(certificate has expired\).*clocks"),
    ],
    ids=["foreign", "another's address", "expired"],
)
def test_wrong_head(tmp_path: Path, authority: Authority, address: str, days: tuple[int, int], message: str) -> None:
    """A head whose certificate is another cluster's, another host's, or over, is told from one that is silent."""
    shown = files(tmp_path / "head", authority, address=address, days=days)
    with listening(head(shown)) as port, pytest.raises(ClusterError, match=message):
        head_probe.check_head(HEAD, port, files(tmp_path / "node"), node="gpu-1")


@pytest.mark.parametrize(("authority", "days"), [(FOREIGN, VALID), (OURS, ENDED)], ids=["foreign", "expired"])
def test_wrong_node(tmp_path: Path, authority: Authority, days: tuple[int, int]) -> None:
    """A node whose own certificate the head refuses says so."""
    node = files(tmp_path / "node", authority, days=days)
    with (
        listening(head(files(tmp_path / "head"))) as port,
        pytest.raises(ClusterError, match="does not accept the certificate of node gpu-1"),
    ):
        head_probe.check_head(HEAD, port, node, node="gpu-1")


def test_no_tls(tmp_path: Path) -> None:
    """Something that speaks no TLS is no head."""
    with (
        listening(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port,
        pytest.raises(ClusterError, match="or is none"),
    ):
        head_probe.check_head(HEAD, port, files(tmp_path / "node"), node="gpu-1")


def test_nobody(tmp_path: Path) -> None:
    """Where nothing listens, the message says to start the head first."""
    with socket.create_server((HEAD, 0)) as server:
        port = server.getsockname()[1]

    with pytest.raises(ClusterError, match=r"does not answer .*start it first"):
        head_probe.check_head(HEAD, port, files(tmp_path / "node"), node="gpu-1")


def test_hosts_are_awaited() -> None:
    """Who answers has joined, who does not is missing; and nobody is waited for once all are there."""
    said: list[str] = []
    with socket.create_server(("127.0.0.2", 0)) as server:
        port = server.getsockname()[1]
        assert head_probe.await_hosts(["127.0.0.2"], port, 60.0, said.append) == []
        assert head_probe.await_hosts(["127.0.0.2", "127.0.0.3"], port, 0.1, said.append) == ["127.0.0.3"]

    assert said == ["GPU host 127.0.0.2 has joined"] * 2

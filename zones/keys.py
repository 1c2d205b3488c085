"""Keys outside Vault: the exchange and derivation of a lease key, and the nodes' signing keys.

Draws randomness when it makes a key; reads no clock, file or network.

Why a lease key has two parents. The data key comes from Vault, so that only the node
whose identity Vault knows can have it, for one grant. The exchange secret (X25519,
both sides ephemeral) is known to no third party, so that captured traffic stays
unreadable to whoever later obtains Vault's backup. Neither alone opens anything.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

from zones.envelope import LeaseKey
from zones.errors import GrantRefusedError
from zones.model import check_id

_LEASE_KEY_LABEL = b"ray-gpu/v1 lease key"
#: Keeps a node's signature from being taken for anything else its key might ever sign.
_SIGNATURE_LABEL = b"ray-gpu/v1 node signature\x00"


class ExchangeKey:
    """A one-time X25519 key pair (RFC 7748). The private half is dropped on first use."""

    __slots__ = ("_private", "public_hex")

    def __init__(self) -> None:
        private = X25519PrivateKey.generate()
        #: 64 hexadecimal digits.
        self.public_hex = private.public_key().public_bytes_raw().hex()
        # A list, because pop() is atomic: of two threads only one gets the key.
        self._private = [private]

    def __repr__(self) -> str:
        return f"ExchangeKey(public_hex={self.public_hex!r}, private=<redacted>)"

    def __reduce__(self) -> str:
        raise TypeError("an ExchangeKey is never pickled")

    def shared(self, peer_hex: str) -> bytes:
        """Return the 32-byte shared secret, once. A peer's bad key uses this key up too.

        Raises:
            GrantRefusedError: The key was used before, or *peer_hex* is no usable public key
                (wrong form, or a low-order point, RFC 7748 section 6.1).
        """
        try:
            private = self._private.pop()
        except IndexError:
            raise GrantRefusedError("this exchange key was used before; ask the node for a new offer") from None
        try:
            return private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(peer_hex)))
        except (ValueError, TypeError):
            raise GrantRefusedError("the peer's exchange key is not usable; ask the node for a new offer") from None


def derive_lease_key(data_key: bytes, shared_secret: bytes, grant_digest: str) -> LeaseKey:
    """Return the key of one lease: HKDF-SHA256 (RFC 5869) over both parents, bound to the grant.

    Args:
        data_key: 32 bytes from Vault, wrapped for this grant alone.
        shared_secret: 32 bytes from :meth:`ExchangeKey.shared`.
        grant_digest: :meth:`zones.model.Grant.digest`, 64 hexadecimal digits.

    Raises:
        ValueError: An argument has another length.
    """
    digest = bytes.fromhex(grant_digest)
    if not len(data_key) == len(shared_secret) == len(digest) == 32:
        # Fixed lengths, so that no two pairs of parents give the same input.
        raise ValueError("data key, shared secret and grant digest are 32 bytes each")
    kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=digest, info=_LEASE_KEY_LABEL)
    return LeaseKey.from_bytes(kdf.derive(data_key + shared_secret))


class CertificateSigner(Protocol):
    """Who certifies a node's key: Vault, or a test's own CA."""

    def sign_node_certificate(self, node: str, csr_pem: str) -> tuple[str, str]:
        """Return certificate and CA, both PEM."""
        ...


class NodeIdentity:
    """A node's Ed25519 signing key and the certificate that binds it to the node's name."""

    __slots__ = ("_private", "ca_pem", "certificate_pem", "node")

    def __init__(self, node: str, private: Ed25519PrivateKey, certificate_pem: str, ca_pem: str) -> None:
        self.node = node
        self.certificate_pem = certificate_pem
        self.ca_pem = ca_pem
        self._private = private

    @classmethod
    def enrol(cls, node: str, signer: CertificateSigner) -> NodeIdentity:
        """Make a key and have it certified. The key never leaves the returned object.

        Args:
            node: Node id.
            signer: Logged in as this node; a :class:`zones.vault.Vault`.

        Raises:
            VaultDeniedError: The signer's login is another node's.
        """
        private = Ed25519PrivateKey.generate()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_id(node, what="node"))])
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(private, None)
        csr_pem = csr.public_bytes(serialization.Encoding.PEM).decode("ascii")
        return cls(node, private, *signer.sign_node_certificate(node, csr_pem))

    def __repr__(self) -> str:
        return f"NodeIdentity(node={self.node!r}, private=<redacted>)"

    def __reduce__(self) -> str:
        raise TypeError("a NodeIdentity is never pickled")

    def sign(self, message: bytes) -> str:
        """Return the node's signature of *message*, 128 hexadecimal digits (RFC 8032)."""
        return self._private.sign(_SIGNATURE_LABEL + message).hex()


def verify_node_signature(cert_pem: str, ca_pem: str, node: str, message: bytes, signature_hex: str, now: int) -> None:
    """Check that *node* signed *message*, under a certificate of the zone's own Vault.

    Certificates are short-lived; revocation lists are not read.

    Args:
        ca_pem: From :meth:`zones.vault.Vault.node_ca`, never from the node.
        now: UTC seconds since the epoch.

    Raises:
        GrantRefusedError: Anything about it is wrong. The cause is not told apart.
    """
    try:
        key = _certified_key(cert_pem, ca_pem, node, datetime.fromtimestamp(now, UTC))
        key.verify(bytes.fromhex(signature_hex), _SIGNATURE_LABEL + message)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.DuplicateExtension):
        raise GrantRefusedError(
            f"the signature is not one of node {node}; check its clock, its certificate and which Vault it uses"
        ) from None


def _certified_key(cert_pem: str, ca_pem: str, node: str, now: datetime) -> Ed25519PublicKey:
    certificate = x509.load_pem_x509_certificate(cert_pem.encode("ascii"))
    ca = x509.load_pem_x509_certificate(ca_pem.encode("ascii"))
    certificate.verify_directly_issued_by(ca)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    key = certificate.public_key()
    fits = (
        [name.value for name in names] == [node]
        and all(c.not_valid_before_utc <= now <= c.not_valid_after_utc for c in (certificate, ca))
        and _is_ca(ca)
        and not _is_ca(certificate)
    )
    if not fits or not isinstance(key, Ed25519PublicKey):
        raise ValueError
    return key


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def certificate_end(certificate_pem: str) -> float:
    """Return when a certificate ends, UTC seconds since the epoch.

    Raises:
        ValueError: It is no certificate in PEM.
    """
    return x509.load_pem_x509_certificate(certificate_pem.encode("utf-8")).not_valid_after_utc.timestamp()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopbackTls:
    """What a server on 127.0.0.1 needs to speak TLS, and what its clients check it with."""

    ca_pem: bytes
    certificate_pem: bytes
    #: A secret.
    key_pem: bytes

    def __repr__(self) -> str:
        return "LoopbackTls(<redacted>)"


def loopback_tls(now: datetime, days: int, address: str = "127.0.0.1") -> LoopbackTls:
    """Return a new certificate for one IP address under a new CA whose key is dropped at once.

    So the CA can vouch for nothing else, ever.
    """
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ray-gpu embedded vault CA")])
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    start, end = now - timedelta(minutes=5), now + timedelta(days=days)
    base = x509.CertificateBuilder().issuer_name(ca_name).not_valid_before(start).not_valid_after(end)
    ca = (
        base.subject_name(ca_name)
        .public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(ca_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        base.subject_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key_pem = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return LoopbackTls(ca_pem=ca.public_bytes(pem), certificate_pem=leaf.public_bytes(pem), key_pem=key_pem)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsRequest:
    """A new TLS key and the request to certify it. The key is made here, so that it need not travel."""

    csr_pem: str
    #: A secret: PKCS #8, PEM, not encrypted.
    key_pem: str = field(repr=False)


def tls_request(name: str) -> TlsRequest:
    """Return a new P-256 key and a request for *name*. ECDSA, since not every TLS library takes Ed25519 certificates.

    Raises:
        ValueError: *name* is no valid id.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_id(name, what="node"))])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    key_pem = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return TlsRequest(csr_pem=csr.public_bytes(pem).decode("ascii"), key_pem=key_pem.decode("ascii"))


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )

"""Keys outside Vault: one-time exchange, derivation, and what a node's signature proves."""

from __future__ import annotations

import hashlib
import hmac
import os
import pickle
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from zones.envelope import LeaseKey, open_, seal
from zones.errors import EnvelopeError, GrantRefusedError
from zones.keys import ExchangeKey, NodeIdentity, certificate_end, derive_lease_key, loopback_tls, verify_node_signature
from zones.model import Direction, Kind, Slot

NOW = 1_800_000_000
DIGEST = hashlib.sha256(b"grant").hexdigest()
PROBE = b"test\x00"
SLOT = Slot(lease="lease-1", direction=Direction.OUT, kind=Kind.CALL, call=1, shard=0, attempt=0)
KEY_32 = st.binary(min_size=32, max_size=32)


def test_exchange_agrees() -> None:
    """Both sides of an exchange get the same 32 bytes."""
    zone, node = ExchangeKey(), ExchangeKey()

    secret = zone.shared(node.public_hex)

    assert secret == node.shared(zone.public_hex)
    assert len(secret) == 32


def test_exchange_is_one_time() -> None:
    """An exchange key that was used refuses a second peer."""
    key = ExchangeKey()
    key.shared(ExchangeKey().public_hex)

    with pytest.raises(GrantRefusedError, match="used before"):
        key.shared(ExchangeKey().public_hex)


@pytest.mark.parametrize(
    "peer",
    ["", "zz" * 32, "11" * 31, "11" * 33, "00" * 32, "01" + "00" * 31],
    ids=["empty", "not hex", "short", "long", "zero", "low order"],
)
def test_exchange_refuses_bad_peers(peer: str) -> None:
    """A peer key of the wrong form or of low order is refused, and uses the key up."""
    key = ExchangeKey()

    with pytest.raises(GrantRefusedError, match="not usable"):
        key.shared(peer)
    with pytest.raises(GrantRefusedError, match="used before"):
        key.shared(ExchangeKey().public_hex)


def test_lease_key_is_hkdf() -> None:
    """The derivation is RFC 5869 over both parents, as an independent computation says."""
    data_key, secret = bytes(range(32)), bytes(range(32, 64))
    extracted = hmac.digest(bytes.fromhex(DIGEST), data_key + secret, "sha256")
    expanded = hmac.digest(extracted, b"ray-gpu/v1 lease key\x01", "sha256")

    key = derive_lease_key(data_key, secret, DIGEST)

    assert key.derive(PROBE) == LeaseKey.from_bytes(expanded).derive(PROBE)


@given(data_key=KEY_32, secret=KEY_32, grant=KEY_32, which=st.integers(0, 2), bit=st.integers(0, 255))
def test_lease_key_depends_on_every_bit(data_key: bytes, secret: bytes, grant: bytes, which: int, bit: int) -> None:
    """One bit changed in data key, exchange secret or grant digest gives another lease key; none changed, the same."""
    parents = [data_key, secret, grant]
    changed = list(parents)
    changed[which] = (int.from_bytes(parents[which]) ^ 1 << bit).to_bytes(32)

    def key(parts: list[bytes]) -> bytes:
        return derive_lease_key(parts[0], parts[1], parts[2].hex()).derive(PROBE)

    assert key(parents) == key(parents)
    assert key(parents) != key(changed)


def recorded_and_stolen(secret: bytes, guess: bytes) -> bytes:
    """Seal under one secret of the exchange; open with Vault's half of the key and a thief's *guess* of the secret."""
    data_key = os.urandom(32)
    recorded = seal(b"rows", key=derive_lease_key(data_key, secret, DIGEST), grant_digest=DIGEST, slot=SLOT)
    return bytes(open_(recorded, key=derive_lease_key(data_key, guess, DIGEST), grant_digest=DIGEST, slot=SLOT))


def test_recorded_traffic_stays_closed() -> None:
    """Vault's backup, both public keys of the exchange, and a node's name open nothing that was recorded."""
    zone, node, thief = ExchangeKey(), ExchangeKey(), ExchangeKey()
    guess = thief.shared(zone.public_hex)

    with pytest.raises(EnvelopeError):
        recorded_and_stolen(zone.shared(node.public_hex), guess)


def test_control_recorded_traffic_without_the_exchange() -> None:
    """Were the exchange's secret known, or a constant, the same thief would read all of it."""
    assert recorded_and_stolen(bytes(32), bytes(32)) == b"rows"


@pytest.mark.parametrize(
    ("data_key", "secret", "grant"),
    [(b"x" * 31, b"y" * 33, DIGEST), (b"x" * 32, b"", DIGEST), (b"x" * 32, b"y" * 32, DIGEST[:-2])],
    ids=["moved boundary", "no secret", "short digest"],
)
def test_lease_key_lengths(data_key: bytes, secret: bytes, grant: str) -> None:
    """Parents of another length than 32 bytes are a caller's bug."""
    with pytest.raises(ValueError, match="32 bytes"):
        derive_lease_key(data_key, secret, grant)


class Ca:
    """A certificate authority that signs what a test asks for."""

    def __init__(self, name: str = "ca", *, is_ca: bool = True) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.is_ca = is_ca
        self.pem = self.certify(self.name, self.key.public_key(), ca=is_ca)

    def certify(
        self,
        subject: x509.Name,
        key: CertificatePublicKeyTypes,
        *,
        ca: bool = False,
        start: int = NOW - 1000,
        end: int = NOW + 1000,
    ) -> str:
        """Return a certificate, PEM."""
        builder = (
            x509.CertificateBuilder(issuer_name=self.name, subject_name=subject, public_key=key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.fromtimestamp(start, UTC))
            .not_valid_after(datetime.fromtimestamp(end, UTC))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        return builder.sign(self.key, None).public_bytes(serialization.Encoding.PEM).decode("ascii")

    def sign_node_certificate(self, node: str, csr_pem: str) -> tuple[str, str]:
        """Sign whatever is asked, as Vault would for the right node."""
        csr = x509.load_pem_x509_csr(csr_pem.encode("ascii"))
        assert csr.is_signature_valid
        return self.certify(csr.subject, csr.public_key()), self.pem


CA = Ca()
NODE = NodeIdentity.enrol("gpu-1", CA)
SIGNATURE = NODE.sign(b"offer")


def _check(
    certificate: str = NODE.certificate_pem,
    ca: str = CA.pem,
    node: str = "gpu-1",
    message: bytes = b"offer",
    signature: str = SIGNATURE,
    now: int = NOW,
) -> None:
    verify_node_signature(certificate, ca, node, message, signature, now)


def test_node_signature_holds() -> None:
    """What a node signed verifies under its name, its certificate and its CA."""
    _check()


@pytest.mark.parametrize(
    "change",
    [
        {"node": "gpu-2"},
        {"message": b"other"},
        {"message": b""},
        {"signature": NODE.sign(b"other")},
        {"signature": SIGNATURE[:-2]},
        {"signature": "not hexadecimal"},
        {"signature": NODE._private.sign(b"offer").hex()},
        {"ca": Ca().pem},
        {"ca": NODE.certificate_pem},
        {"ca": "not a certificate"},
        {"certificate": NodeIdentity.enrol("gpu-1", CA).certificate_pem},
        {"certificate": NodeIdentity.enrol("gpu-2", CA).certificate_pem},
        {"certificate": "None"},
        {"certificate": "schlüssel"},
        {"certificate": CA.pem},
        {"now": NOW + 1001},
        {"now": NOW - 1001},
    ],
    ids=[
        *["other node", "other message", "no message", "other signature", "short signature", "no hex", "no label"],
        *["other CA of the same name", "itself as CA", "no CA", "other key", "other node's", "no certificate"],
        *["not ASCII", "the CA as node", "expired", "not yet valid"],
    ],
)
def test_node_signature_refused(change: dict[str, object]) -> None:
    """A signature with anything about it changed is refused, always with the same words."""
    with pytest.raises(GrantRefusedError, match="the signature is not one of node"):
        _check(**change)  # type: ignore[arg-type]  # one argument of the table at a time


def _name(*common_names: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common_names])


def test_node_certificate_must_be_a_nodes() -> None:
    """Correct signatures under certificates that no node should hold are refused; the plain one is not."""
    key = NODE._private.public_key()
    _check(CA.certify(_name("gpu-1"), key))

    other_kind = ec.generate_private_key(ec.SECP256R1()).public_key()
    no_authority = Ca(is_ca=False)
    refused = [
        (CA.certify(_name("gpu-1"), key, ca=True), CA.pem),
        (CA.certify(_name("gpu-1", "gpu-2"), key), CA.pem),
        (CA.certify(_name("gpu-2", "gpu-1"), key), CA.pem),
        (CA.certify(_name(), key), CA.pem),
        (CA.certify(_name("gpu-1"), other_kind), CA.pem),
        (no_authority.certify(_name("gpu-1"), key), no_authority.pem),
    ]
    for certificate, ca in refused:
        with pytest.raises(GrantRefusedError):
            _check(certificate, ca)


@pytest.mark.parametrize("secret", [ExchangeKey(), NODE], ids=["exchange", "identity"])
def test_secrets_stay(secret: object) -> None:
    """Private keys show in no repr and refuse to be pickled."""
    assert "<redacted>" in repr(secret)
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_loopback_certificate() -> None:
    """The embedded server's certificate is for 127.0.0.1 alone, under a CA that signs nothing but it."""
    now = datetime.fromtimestamp(NOW, UTC)
    tls = loopback_tls(now, days=2)
    ca = x509.load_pem_x509_certificate(tls.ca_pem)
    leaf = x509.load_pem_x509_certificate(tls.certificate_pem)

    leaf.verify_directly_issued_by(ca)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert len(list(names)) == 1
    assert leaf.not_valid_after_utc == now + timedelta(days=2)
    assert isinstance(leaf.signature_hash_algorithm, hashes.SHA256)
    assert tls.key_pem.decode("ascii") not in repr(tls)


def test_certificate_end() -> None:
    """The end of a certificate is seconds since the epoch, UTC; what is no certificate is refused."""
    now = datetime.fromtimestamp(NOW, UTC)

    assert certificate_end(loopback_tls(now, days=2).certificate_pem.decode()) == NOW + 2 * 86400
    with pytest.raises(ValueError, match="PEM"):
        certificate_end("no certificate")

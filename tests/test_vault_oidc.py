"""Login by an identity provider: a real OpenBao and a minimal provider over HTTPS (discovery, keys, token endpoint).

The provider is this file's and signs what it is told to. OpenBao's side is real: it reads the discovery document,
trades the code, checks signature, audience, nonce and claims, and gives a token or none.
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from ray_gpu.vault_declaration import Declaration, OidcSpec, PersonSpec
from ray_gpu.vault_server import VaultServer
from ray_gpu.vault_setup import Renew, install, issue, plan
from zones.errors import VaultDeniedError
from zones.keys import loopback_tls
from zones.vault import Vault

POLICIES = Path(__file__).parent.parent / "policies" / "vault"
PEOPLE = (
    PersonSpec(name="dana", zone="clinic", groups=("research",), oidc_subject="u-17"),
    PersonSpec(name="eli", zone="trading", oidc_subject="u-18"),
    PersonSpec(name="fay", zone="clinic"),
)
REDIRECT = "http://localhost:8250/oidc/callback"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


class Provider:
    """An OpenID provider of one client, at 127.0.0.1. Who logs in is :attr:`subject`."""

    def __init__(self, directory: Path) -> None:
        tls = loopback_tls(datetime.now(UTC), 1)
        self.ca_pem = tls.ca_pem.decode("ascii")
        (directory / "provider.pem").write_bytes(tls.certificate_pem + tls.key_pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "provider.pem")
        self._key = rsa.generate_private_key(65537, 2048)
        #: The key that signs; a test may put a stranger's in its place.
        self.signing_key = self._key
        self.subject = ""
        self.nonce = ""
        #: Client secrets that the token endpoint was shown.
        self.shown: list[str] = []
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(provider.document(self.path))

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                basic = base64.b64decode(self.headers["Authorization"].removeprefix("Basic "))
                provider.shown.append(basic.decode("ascii").partition(":")[2])
                self._answer({"access_token": "x", "token_type": "Bearer", "id_token": provider.id_token()})

            def _answer(self, document: dict[str, Any] | None) -> None:
                self.send_response(404 if document is None else 200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(document).encode("ascii"))

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def document(self, path: str) -> dict[str, Any] | None:
        """Return the discovery document or the keys."""
        if path == "/keys":
            numbers = self._key.public_key().public_numbers()
            n, e = (_encoded(value.to_bytes((value.bit_length() + 7) // 8, "big")) for value in (numbers.n, numbers.e))
            return {"keys": [{"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "1", "n": n, "e": e}]}
        if path != "/.well-known/openid-configuration":
            return None
        ends = {name: f"{self.url}/{name}" for name in ("authorization", "token")}
        return {
            "issuer": self.url,
            "authorization_endpoint": ends["authorization"],
            "token_endpoint": ends["token"],
            "jwks_uri": f"{self.url}/keys",
            "id_token_signing_alg_values_supported": ["RS256"],
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
        }

    def id_token(self) -> str:
        """Return what says, signed, who logged in (RFC 7519, OpenID Connect Core section 2)."""
        now = int(time.time())
        claims = {"iss": self.url, "sub": self.subject, "aud": "ray-gpu", "nonce": self.nonce}
        parts = [{"alg": "RS256", "kid": "1"}, {**claims, "iat": now, "exp": now + 60}]
        text = ".".join(_encoded(json.dumps(part).encode("ascii")) for part in parts)
        signature = self.signing_key.sign(text.encode("ascii"), padding.PKCS1v15(), hashes.SHA256())
        return f"{text}.{_encoded(signature)}"

    def login(self, server: VaultServer, zone: str, subject: str) -> Vault:
        """Log somebody in as a person of *zone*, as a browser and Vault's own login program do between them."""
        vault = server.client()
        asked = vault.call("POST", "auth/oidc/oidc/auth_url", role=f"person-{zone}", redirect_uri=REDIRECT)
        query = {name: values[0] for name, values in parse_qs(urlsplit(asked["data"]["auth_url"]).query).items()}
        if not query:
            raise VaultDeniedError("no such role; name another")
        self.subject, self.nonce = subject, query["nonce"]
        done = vault.call("GET", f"auth/oidc/oidc/callback?state={query['state']}&code=any")
        return vault.with_token(done["auth"]["client_token"])


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A short private directory."""
    with TemporaryDirectory(prefix="rgo") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def provider(directory: Path) -> Iterator[Provider]:
    """A provider that serves."""
    made = Provider(directory)
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[VaultServer]:
    """A real Vault."""
    made = VaultServer.start(directory / "vault")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def root(server: VaultServer) -> Vault:
    """Who may do all."""
    return server.root_client()


@pytest.fixture(scope="module")
def declaration(provider: Provider) -> Declaration:
    """Two zones whose people log in with the provider."""
    oidc = OidcSpec(discovery_url=provider.url, client_id="ray-gpu", client_secret="s3cret", ca_pem=provider.ca_pem)
    return Declaration(zones=("clinic", "trading", "empty"), people=PEOPLE, oidc=oidc)


@pytest.fixture(scope="module")
def gateway(server: VaultServer, root: Vault, declaration: Declaration) -> Vault:
    """The clinic's gateway, after set-up."""
    install(root, declaration, policies=POLICIES)
    made = issue(root, zones=["clinic"]).gateways["clinic"]
    return server.client().login_approle(made.role_id, made.secret_id)


def test_a_person_is_one_person(server: VaultServer, provider: Provider, root: Vault, gateway: Vault) -> None:
    """Logged in by the provider or by password, a person is the same to the gateway, and may do as little."""
    by_provider = provider.login(server, "clinic", "u-17")
    by_password = server.client().login_userpass("dana", issue(root, people=["dana"]).people["dana"])

    found = gateway.whoami(by_provider.token, "clinic")
    assert (found.name, found.groups) == ("dana", frozenset({"research"}))
    assert found == gateway.whoami(by_password.token, "clinic")
    assert by_provider.call("GET", "auth/token/lookup-self")["data"]["policies"] == ["person-clinic"]
    with pytest.raises(VaultDeniedError):
        by_provider.call("GET", "kv-ray/data/token")


@pytest.mark.parametrize(
    ("zone", "subject"),
    [("trading", "u-17"), ("clinic", "u-18"), ("clinic", "u-99"), ("clinic", "fay"), ("empty", "u-17")],
    ids=["another zone", "another zone's person", "a stranger", "no subject declared", "a zone without people"],
)
@pytest.mark.usefixtures("gateway")
def test_others_are_refused(server: VaultServer, provider: Provider, zone: str, subject: str) -> None:
    """Whom the provider knows is no person of a zone for that: only the subjects declared for it are."""
    with pytest.raises(VaultDeniedError):
        provider.login(server, zone, subject)
    assert provider.login(server, "clinic", "u-17").token


@pytest.mark.usefixtures("gateway")
def test_another_signature_is_refused(server: VaultServer, provider: Provider) -> None:
    """A token that the provider's published key did not sign logs nobody in; the same with that key does."""
    own = provider.signing_key
    provider.signing_key = rsa.generate_private_key(65537, 2048)
    with pytest.raises(VaultDeniedError):
        provider.login(server, "clinic", "u-17")
    provider.signing_key = own
    assert provider.login(server, "clinic", "u-17").token


@pytest.mark.usefixtures("gateway")
def test_second_run_changes_nothing(root: Vault, declaration: Declaration) -> None:
    """Nothing differs after set-up, although the client secret cannot be read; asked for, it is written again."""
    assert plan(root, declaration, policies=POLICIES) == []
    again = plan(root, declaration, policies=POLICIES, renew=Renew(oidc_secret=True))
    assert [str(change) for change in again] == ["change identity provider (oidc_client_secret)"]


@pytest.mark.usefixtures("gateway")
def test_client_secret_is_the_providers_alone(
    server: VaultServer, provider: Provider, root: Vault, declaration: Declaration
) -> None:
    """The secret reaches the provider, and stands neither in the audit log nor in what is printed."""
    provider.login(server, "clinic", "u-17")

    assert set(provider.shown) == {"s3cret"}
    assert "s3cret" not in repr(declaration)
    log = (server.state_dir / "audit.log").read_text()
    assert '"path":"auth/oidc/config"' in log
    assert "s3cret" not in log
    assert "oidc_client_secret" not in root.call("GET", "auth/oidc/config")["data"]


@pytest.mark.usefixtures("gateway")
def test_people_who_leave_the_zone(
    server: VaultServer, provider: Provider, root: Vault, declaration: Declaration
) -> None:
    """A zone none of whose people has a subject any more loses its role: without bound claims it would admit all."""
    assert provider.login(server, "trading", "u-18").token
    left = Declaration(zones=declaration.zones, people=PEOPLE[:1], oidc=declaration.oidc)

    changes = install(root, left, policies=POLICIES)

    assert "remove OIDC role person-trading" in [str(change) for change in changes]
    with pytest.raises(VaultDeniedError):
        provider.login(server, "trading", "u-18")
    install(root, declaration, policies=POLICIES)
    assert provider.login(server, "trading", "u-18").token

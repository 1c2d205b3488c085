"""A server on a bed's host that says what a real Vault cannot be made to say on a machine with one clock."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from testbed import Host
from zones.keys import loopback_tls

SERVER = Path(__file__).parents[1] / "doctor/tls_vault.py"


@contextmanager
def stand_in(
    host: Host, ca: str, *, says: dict[str, Any], advance_s: int = 0, days: int = 30, ago: int = 0
) -> Iterator[str]:
    """Serve on a host; yield ``https://host:port``.

    Args:
        host: Where.
        ca: The host's file of Vault's CA; the server's own meanwhile.
        says: Its answer to everything.
        advance_s: How far its clock is ahead, seconds.
        days: How long its certificate lasts, from *ago* days ago on.
        ago: See *days*.
    """
    tls, before = loopback_tls(datetime.now(UTC) - timedelta(days=ago), days), host.read(ca)
    host.write("/tmp/tls.pem", tls.certificate_pem.decode())
    host.write("/tmp/tls.key", tls.key_pem.decode(), mode=0o600)
    command = ["python", str(SERVER), "/tmp/tls.pem", "/tmp/tls.key", str(advance_s), json.dumps(says)]
    with host.popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            host.write(ca, tls.ca_pem.decode())
            yield f"https://127.0.0.1:{port}"
        finally:
            server.kill()
            host.write(ca, before)

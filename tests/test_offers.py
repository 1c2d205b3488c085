"""What a custodian says of its node before anything is granted."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_gpu.custodian import Custodian, NodeSettings
from ray_gpu.sandbox import boundary
from zones.keys import NodeIdentity
from zones.policy import PoolPolicy
from zones.vault import Vault

POLICIES = Path(__file__).parents[1] / "policies"


class Anybody:
    """Certifies without a look; nobody here checks certificates."""

    def sign_node_certificate(self, node: str, csr_pem: str) -> tuple[str, str]:
        """Return two texts."""
        return csr_pem, node


@pytest.mark.parametrize("devices", [(), (Path("/dev/nvidia0"),)], ids=["none", "one"])
def test_offer_says_what_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, devices: tuple[Path, ...]) -> None:
    """An offer names NumPy's standing in where the host has no GPU, and does not where it has one."""
    monkeypatch.setattr(boundary, "gpu_devices", lambda: devices)
    settings = NodeSettings(
        node="gpu-1", pool="shared", gpu_milli=1000, socket_path=tmp_path / "s", uid_base=61200, uid_count=2,
        actor_uid=61001, address="192.0.2.11", endpoint_ports=range(1, 2), environments=tmp_path / "environments",
    )  # fmt: skip
    identity = NodeIdentity.enrol("gpu-1", Anybody())
    custodian = Custodian(
        settings, identity=identity, vault=Vault("https://127.0.0.1:1"), policy=PoolPolicy.load(POLICIES, "shared")
    )

    missing = custodian.offer("lease-1")["offer"]["degradations"]

    assert ("numpy-stand-in" in missing) == (not devices)
    assert set(missing) >= set(boundary.degradations())

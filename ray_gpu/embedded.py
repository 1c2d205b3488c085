"""The embedded default: Vault, a Ray cluster, custodians, a gateway and a relay on one machine.

One supervisor process starts all of it, in order, and ends all of it; whatever it started dies with it.
``ray-gpu up`` starts the supervisor in the background, ``ray-gpu down`` ends it, the demo and the tests
do both. This module does I/O and starts processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray_gpu import nodes
from ray_gpu.ports import GATEWAY_UID
from ray_gpu.sandbox import boundary
from ray_gpu.sandbox import profile as profiles
from ray_gpu.state import Layout
from ray_gpu.vault_server import VaultServer
from ray_gpu.vault_setup import AppRole, PersonSpec, setup
from zones.config import zone_names
from zones.errors import ClusterError, UnknownNameError
from zones.model import check_id

#: Uids as root: gateway, Ray cages, then two for each lease. Below 65534: a container may have no more.
CAGE_UID, LEASE_UID, LEASE_UIDS_PER_NODE = 61001, 62000, 1600
POOL = "shared"
GPU_NODES = ("gpu-1", "gpu-2")
#: All processes are up by then, seconds.
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1
_MAX_SOCKET_PATH_BYTES = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to start."""

    state: str
    zone: str = "clinic"
    policies: str
    #: First port; 0 chooses a free range.
    base_port: int = 0
    #: Second-to-last byte of the nodes' loopback addresses.
    net: int = 1
    #: Whether to write the shipped data sets.
    data: bool = True


def shipped_policies() -> Path:
    """Return the policies directory of this checkout."""
    return Path(__file__).resolve().parent.parent / "policies"


class Supervisor:
    """Starts and ends every process of an embedded cluster."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._layout = Layout(Path(plan.state))
        self._log_start = self._layout.log.stat().st_size if self._layout.log.exists() else 0
        self._vault: VaultServer | None = None
        self._cluster: nodes.Cluster | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> dict[str, Any]:
        """Start everything; return what others need to know."""
        plan, layout = self._plan, self._layout
        for path in (layout.root, layout.zone(plan.zone), *(layout.node(node) for node in GPU_NODES)):
            path.mkdir(mode=0o711, parents=True, exist_ok=True)
        data = self._start_data()
        self._say("starting Vault (OpenBao, embedded)")
        self._stop_vault()  # One that outlived a supervisor that was killed.
        self._vault = VaultServer.start(layout.vault)
        layout.vault_ca.write_bytes(self._vault.ca_file.read_bytes())
        layout.vault_ca.chmod(0o644)
        self._say("setting up keys, identities and policies; revoking the root token")
        roles = self._setup_vault(self._vault)
        self._say("starting three raylets, two custodians, the gateway and its relay")
        for index, node in enumerate(GPU_NODES):
            self._start_custodian(index, node, roles["custodians"][node])
        self._start_gateway(roles["gateway"])
        self._start_cluster()
        self._await_sockets()
        if data is not None and data.wait() != 0:
            raise ClusterError(f"the data sets could not be written; see {layout.log}", node="", reason="data")
        self._publish()
        return self.document()

    def lock(self) -> None:
        """Keep the state directory for this process, as long as it lives.

        Raises:
            ClusterError: Another supervisor has it.
        """
        self._lock = os.open(self._layout.root, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _in_use(self._layout) from None

    def document(self) -> dict[str, Any]:
        """Return the condition of the cluster, as JSON types."""
        assert self._cluster is not None
        return {
            "pid": os.getpid(),
            "zone": self._plan.zone,
            "degradations": list(self._degradations()),
            "sandbox_degradations": list(boundary.degradations()),
            "address": self._cluster.address,
            "processes": {name: process.pid for name, process in self._processes.items()},
            "nodes": {node.spec.name: node.process.pid for node in self._cluster.nodes},
        }

    def _degradations(self) -> tuple[str, ...]:
        own = () if os.geteuid() == 0 else ("self-enforced",)
        # Known before the cluster runs: the gateway is started first, and must refuse what is not accepted.
        cage = nodes.degradations()
        return ("embedded-vault", *own, *cage)

    def _start_data(self) -> subprocess.Popen[bytes] | None:
        directory = self._layout.data(self._plan.zone)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._plan.data:
            return None
        return self._spawn("data", [sys.executable, "-m", "ray_gpu.demo_data", self._plan.zone, str(directory)])

    def _setup_vault(self, server: VaultServer) -> dict[str, Any]:
        root = server.root_client()
        person = PersonSpec(name="dana", zone=self._plan.zone, groups=("research",))
        try:
            made = setup(
                root,
                zones=[self._plan.zone],
                nodes=list(GPU_NODES),
                people=[person],
                policies=Path(self._plan.policies) / "vault",
            )
        finally:
            root.revoke()
        _write_private(self._layout.person, {"user": person.name, "password": made.people[person.name]})
        return {"gateway": made.gateways[self._plan.zone], "custodians": made.custodians}

    def _start_custodian(self, index: int, node: str, role: AppRole) -> None:
        directory = self._layout.custodian_dir(node)
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        settings = self._layout.node(node) / "settings.json"
        assert self._vault is not None
        _write_private(
            settings,
            {
                "node": node,
                "pool": POOL,
                "gpu_milli": 1000,
                "socket": str(directory / nodes.CUSTODIAN_SOCKET),
                "uid_base": LEASE_UID + index * LEASE_UIDS_PER_NODE,
                "uid_count": LEASE_UIDS_PER_NODE,
                "actor_uid": CAGE_UID + index,
                "vault": self._vault.address,
                "vault_ca": str(self._layout.vault_ca),
                "policies": self._plan.policies,
                "role_id": role.role_id,
                "secret_id": role.secret_id,
            },
        )
        self._processes[f"custodian-{node}"] = self._spawn(
            f"custodian-{node}", [sys.executable, "-m", "ray_gpu.custodian", str(settings)]
        )

    def _start_gateway(self, role: AppRole) -> None:
        """Start the gateway, under its own uid when root: it alone can read the zone's data and ledger."""
        layout, zone = self._layout, self._plan.zone
        uid = GATEWAY_UID if os.geteuid() == 0 else None
        settings = layout.zone(zone) / "settings.json"
        assert self._vault is not None
        owned = [
            layout.data(zone),
            layout.ledger(zone).parent,
            layout.gateway_socket(zone).parent,
            layout.relay_dir(zone),
        ]
        for path, mode in zip(owned, (0o700, 0o700, 0o711, 0o711), strict=True):
            path.mkdir(mode=mode, parents=True, exist_ok=True)
            _give(path, uid)
        _write_private(
            settings,
            {
                "zone": zone,
                "policies": self._plan.policies,
                "data_dir": str(layout.data(zone)),
                "ledger": str(layout.ledger(zone)),
                "socket_path": str(layout.gateway_socket(zone)),
                "relay_socket": str(layout.relay_dir(zone) / nodes.RELAY_SOCKET),
                "relay_uid": CAGE_UID + len(GPU_NODES),
                "vault": self._vault.address,
                "vault_ca": str(layout.vault_ca),
                "role_id": role.role_id,
                "secret_id": role.secret_id,
                "degradations": list(self._degradations()),
            },
        )
        _give(settings, uid)
        profile = profiles.gateway(
            f"gateway-{zone}",
            uid=uid,
            bind_ro=(settings, layout.vault_ca, Path(self._plan.policies)),
            bind_rw=tuple((path, path) for path in owned),
            caged=boundary.survey().mode != "none",
        )
        with layout.log.open("ab") as log:
            self._processes["gateway"] = boundary.launch(
                [sys.executable, "-P", "-m", "ray_gpu.gateway", str(settings)], profile, stdout=log, stderr=log
            )

    def _start_cluster(self) -> None:
        plan, layout = self._plan, self._layout
        specs = [
            nodes.NodeSpec(
                name=node,
                address=f"127.0.{plan.net}.{index + 1}",
                role="gpu",
                num_gpus=1,
                labels={"ray-gpu-pool": POOL},
                socket_dir=layout.custodian_dir(node),
            )
            for index, node in enumerate(GPU_NODES)
        ]
        specs.append(
            nodes.NodeSpec(
                name=f"zone-{plan.zone}",
                address=f"127.0.{plan.net}.{len(specs) + 1}",
                role="zone",
                zone=plan.zone,
                labels={},
                socket_dir=layout.relay_dir(plan.zone),
            )
        )
        self._cluster = nodes.Cluster.start(
            layout.root / "ray", specs, uid_base=CAGE_UID, base_port=plan.base_port or nodes.free_base_port()
        )

    def _await_sockets(self) -> None:
        """Wait until custodians and gateway listen; whatever ended meanwhile is named."""
        layout = self._layout
        sockets = [layout.custodian_dir(node) / nodes.CUSTODIAN_SOCKET for node in GPU_NODES]
        sockets.append(layout.gateway_socket(self._plan.zone))
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(_listens(path) for path in sockets):
            self.check()
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the cluster did not come up in {START_TIMEOUT_S:.0f} s; see {layout.log}",
                    node="",
                    reason="timed out",
                )
            time.sleep(0.02)

    def _publish(self) -> None:
        """Write what notebooks on this host may know of the zone."""
        assert self._vault is not None
        public = {
            "socket": str(self._layout.gateway_socket(self._plan.zone)),
            "vault": self._vault.address,
            "vault_ca": str(self._layout.vault_ca),
            "ledger": str(self._layout.ledger(self._plan.zone)),
        }
        path = self._layout.zone(self._plan.zone) / "zone.json"
        path.write_text(json.dumps(public), encoding="utf-8")
        path.chmod(0o644)

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with self._layout.log.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_plain_environment(),
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def check(self) -> None:
        """Raise if a process that should run has ended.

        Raises:
            ClusterError: Names it.
        """
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise ClusterError(
                    f"{name} ended (status {process.returncode}){self._last_words()}; see {self._layout.log}",
                    node=name,
                    reason=f"status {process.returncode}",
                )
        if self._cluster and not self._cluster.alive():
            raise ClusterError(f"a Ray node ended; see {self._layout.log}", node="", reason="raylet")

    def _last_words(self) -> str:
        """Return why a process says that it did not start, if one said so since this supervisor started."""
        with self._layout.log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read(1 << 20).decode("utf-8", "replace").splitlines()
        return next((f": {line}" for line in reversed(lines) if " did not start: " in line), "")

    def stop(self) -> None:
        """End everything: the gateway first, so that it ends its leases and shreds their keys."""
        gateway = self._processes.pop("gateway", None)
        if gateway is not None:
            _end(gateway, first_child=True)
        for process in self._processes.values():
            _end(process)
        self._processes.clear()
        if self._cluster is not None:
            self._cluster.stop()
        self._stop_vault()
        with contextlib.suppress(FileNotFoundError):
            (self._layout.zone(self._plan.zone) / "zone.json").unlink()

    def _stop_vault(self) -> None:
        if server := self._vault or VaultServer.find(self._layout.vault):
            server.stop()


def _end(process: subprocess.Popen[bytes], *, first_child: bool = False) -> None:
    """Ask a process to end, then make it. Behind bubblewrap the program is its child's child."""
    pids = _descendants(process.pid) if first_child else [process.pid]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S / 2)
    boundary.kill(process)


def _descendants(pid: int) -> list[int]:
    """Return the innermost processes below *pid*, or itself."""
    try:
        children = [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    except OSError:
        children = []
    return [found for child in children for found in _descendants(child)] or [pid]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _plain_environment() -> dict[str, str]:
    """Return the environment of our own unconfined processes: nothing of the caller's but its time zone and PATH."""
    return {**profiles.python_env(), **{name: os.environ[name] for name in ("PATH", "TZ") if name in os.environ}}


def _give(path: Path, uid: int | None) -> None:
    if uid is None:
        return
    for item in [path, *(path.iterdir() if path.is_dir() else ())]:
        os.chown(item, uid, uid)


def _write_private(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(document, file)
    os.replace(partial, path)


def _listens(path: Path) -> bool:
    import socket  # noqa: PLC0415 - the one place that probes

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


# -- starting and ending the supervisor from another process ------------------------------------

#: Supervisors that this process started and must reap.
_started: dict[int, subprocess.Popen[bytes]] = {}


def running(layout: Layout) -> dict[str, Any] | None:
    """Return the condition of the cluster in a state directory, if its supervisor runs."""
    try:
        document: dict[str, Any] = json.loads(layout.supervisor.read_text(encoding="utf-8"))
        command = Path(f"/proc/{document['pid']}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError):
        return None
    return document if b"ray_gpu.embedded" in command else None


def _in_use(layout: Layout) -> ClusterError:
    return ClusterError(
        f"a cluster runs in {layout.root} already; use it, or stop it with `ray-gpu down`", node="", reason="running"
    )


def up(plan: Plan, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Start an embedded cluster in the background and return when it serves.

    Raises:
        UnknownNameError: No such zone in the policies.
        ClusterError: It did not come up; nothing is left running.
    """
    check_id(plan.zone, what="zone")
    known = zone_names(Path(plan.policies))
    if plan.zone not in known:
        raise UnknownNameError.of("zone", plan.zone, known)
    # The supervisor runs elsewhere, so its paths are whole ones.
    plan = replace(plan, state=str(Path(plan.state).absolute()), policies=str(Path(plan.policies).absolute()))
    layout = Layout(Path(plan.state))
    _check_length(layout, plan.zone)
    if running(layout):
        raise _in_use(layout)
    layout.root.mkdir(mode=0o711, parents=True, exist_ok=True)
    layout.supervisor.unlink(missing_ok=True)
    read_fd, write_fd = os.pipe()
    with layout.log.open("ab") as log:
        layout.log.chmod(0o600)
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_gpu.embedded", json.dumps(asdict(plan)), str(write_fd)],
            pass_fds=(write_fd,),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_plain_environment(),
            start_new_session=True,
        )
    os.close(write_fd)
    try:
        with os.fdopen(read_fd, encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                if "say" in message:
                    say(message["say"])
                elif "ready" in message:
                    ready: dict[str, Any] = message["ready"]
                    _started[process.pid] = process
                    return ready
                else:
                    raise ClusterError(message["failed"], node="", reason="start")
    except BaseException:
        _started[process.pid] = process
        _terminate(process.pid)
        raise
    process.wait()
    raise ClusterError(f"the supervisor ended while starting; see {layout.log}", node="", reason="ended")


def _check_length(layout: Layout, zone: str) -> None:
    sockets = [layout.gateway_socket(zone), layout.relay_dir(zone) / nodes.RELAY_SOCKET]
    sockets += [layout.custodian_dir(node) / nodes.CUSTODIAN_SOCKET for node in GPU_NODES]
    excess = max(len(os.fsencode(path)) for path in sockets) - _MAX_SOCKET_PATH_BYTES
    if excess > 0:
        raise ClusterError(
            f"{layout.root} is {excess} bytes too long: it holds Unix sockets, whose paths end at "
            f"{_MAX_SOCKET_PATH_BYTES}. Choose a shorter one with --state or RAY_GPU_STATE",
            node="",
            reason="path too long",
        )


def down(layout: Layout) -> bool:
    """End the cluster of a state directory; tell whether there was one. Returns when everything is gone."""
    for pid in [pid for pid, child in _started.items() if child.poll() is not None]:
        del _started[pid]  # Ended by somebody else; now reaped.
    document = running(layout)
    if document is None:
        return False
    _terminate(int(document["pid"]))
    layout.supervisor.unlink(missing_ok=True)
    return True


def _terminate(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not select.select([handle], [], [], STOP_TIMEOUT_S)[0]:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], STOP_TIMEOUT_S)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)
        if child := _started.pop(pid, None):
            child.wait(STOP_TIMEOUT_S)


class _Told(BaseException):
    """SIGTERM came."""


def main(argv: list[str]) -> int:
    """Be the supervisor. ``argv``: the plan as JSON, and the descriptor to report on."""
    plan = Plan(**json.loads(argv[0]))
    report = os.fdopen(int(argv[1]), "w", encoding="utf-8")

    def tell(message: dict[str, Any]) -> None:
        try:
            report.write(json.dumps(message) + "\n")
            report.flush()
        except OSError:
            # Whoever wanted this cluster is gone before it is up, and knows nothing of it.
            raise _Told from None

    def told(*_: object) -> None:
        raise _Told

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    supervisor = Supervisor(plan, lambda text: tell({"say": text}))
    try:
        supervisor.lock()
    except ClusterError as error:
        tell({"failed": error.message})
        return 1
    try:
        _write_private(Layout(Path(plan.state)).supervisor, {"pid": os.getpid(), "zone": plan.zone})
        document = supervisor.start()
        _write_private(Layout(Path(plan.state)).supervisor, document)
        tell({"ready": document})
        report.close()
        while True:
            signal.pause()
    except _Told:
        return 0
    except Exception as error:  # noqa: BLE001 - told to whoever started this, and logged
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        traceback.print_exc()
        with contextlib.suppress(_Told):
            tell({"failed": str(error)})
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        supervisor.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

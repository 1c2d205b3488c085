"""Embedded clusters for every test that needs one; and what cannot run is listed at the end, so that nothing is silent.

A cluster takes some eight seconds to start, so ``cluster`` is shared by the whole run and must not be broken; tests
that kill processes or change policies take ``fresh_cluster``, or ``start_cluster`` for a fixture of wider scope.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

ROOT = Path(__file__).parents[1]
#: Rows of the volume data set in tests: 30 columns, about 10 MB, some ten shards of 1 MiB.
RESAMPLED_ROWS = 40_000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the whole suite run with one carrier or the other."""
    parser.addoption("--most-minutes", type=float, help="say when a run takes longer")
    parser.addoption("--carrier", choices=["edge", "client"], help="how the zones of embedded clusters reach Ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running embedded cluster."""

    #: Its state directory; ``ray_gpu.state.Layout(state)`` knows the paths below.
    state: Path
    #: What the supervisor says of it: process ids, degradations.
    document: dict[str, Any]
    policies: Path
    zone: str = "clinic"

    def attach(self, purpose: str = "test", **options: Any) -> Any:
        """Return a ``ray_gpu.Session`` of the shipped person; use it as a context manager."""
        import ray_gpu

        return ray_gpu.attach(self.zone, purpose=purpose, state_dir=self.state, **options)

    @property
    def ledger(self) -> Path:
        """The zone's ledger."""
        from ray_gpu.state import Layout

        return Layout(self.state).ledger(self.zone)

    def entries(self, kind: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """Return the ledger's entries, oldest first: of one kind, and with these values, where given."""
        from zones.ledger import read

        return [
            entry
            for entry in read(self.ledger)
            if kind in (None, entry["kind"]) and all(entry.get(name) == value for name, value in fields.items())
        ]


@pytest.fixture(scope="session")
def small_data() -> dict[str, Any]:
    """The shipped data sets as tables; the volume data set has fewer rows."""
    from ray_gpu import demo_data

    cancer = demo_data.breast_cancer()
    return {
        "randhie": demo_data.randhie(),
        "breast_cancer": cancer,
        "breast_cancer_resampled": demo_data.resampled(cancer, RESAMPLED_ROWS),
    }


@pytest.fixture(scope="session")
def small_state(small_data: dict[str, Any]) -> Callable[[], AbstractContextManager[Path]]:
    """Return what makes a state directory with small data sets in it, which ``up`` and ``demo`` then use."""

    @contextlib.contextmanager
    def make() -> Iterator[Path]:
        from ray_gpu.state import Layout

        with _short_directory() as root:
            _write_data(Layout(root / "s").data("clinic"), small_data)
            yield root / "s"

    return make


@pytest.fixture(scope="session")
def copy_policies() -> Iterator[Callable[..., Path]]:
    """Return a function that copies the shipped policies and edits them.

    ``copy_policies({"clinic/zone.yaml": ("old text", "new text")})`` returns the new directory; every edit must match.
    """
    from ray_gpu import embedded

    with _short_directory() as root:

        def copy(edits: dict[str, tuple[str, str]] | None = None) -> Path:
            target = Path(tempfile.mkdtemp(dir=root)) / "policies"
            shutil.copytree(embedded.shipped_policies(), target)
            target.parent.chmod(0o755)
            for name, (old, new) in (edits or {}).items():
                text = (target / name).read_text(encoding="utf-8")
                assert old in text, f"{name} has no {old!r} any more"
                (target / name).write_text(text.replace(old, new), encoding="utf-8")
            return target

        yield copy


@pytest.fixture(scope="session")
def start_cluster(
    small_data: dict[str, Any], request: pytest.FixtureRequest
) -> Callable[..., AbstractContextManager[Cluster]]:
    """Return what runs a cluster inside a ``with`` statement.

    Options: ``data=False`` for a zone without files, ``policies`` from ``copy_policies``, ``zone``, ``prepare``,
    which gets the cluster's ``Layout`` before anything starts, ``carrier``, by default that of ``--carrier``, and
    ``gateway_memory_bytes``.
    """
    chosen = request.config.getoption("--carrier")

    @contextlib.contextmanager
    def start(
        *,
        data: bool = True,
        policies: Path | None = None,
        zone: str = "clinic",
        prepare: Callable[[Any], None] = lambda layout: None,
        carrier: str | None = chosen,
        gateway_memory_bytes: int | None = None,
    ) -> Iterator[Cluster]:
        from ray_gpu import embedded
        from ray_gpu.state import Layout
        from zones.model import Carrier

        with _short_directory() as root:
            layout = Layout(root / "s")
            if data and zone == "clinic":
                _write_data(layout.data(zone), small_data)
            prepare(layout)
            plan = embedded.Plan(
                state=str(layout.root),
                zone=zone,
                data=data and zone != "clinic",
                policies=str(policies or embedded.shipped_policies()),
                carrier=Carrier(carrier) if carrier else None,
                gateway_memory_bytes=gateway_memory_bytes,
            )
            document = embedded.up(plan)
            started = _descendants(document["pid"])
            try:
                yield Cluster(state=layout.root, document=document, policies=Path(plan.policies), zone=zone)
            finally:
                embedded.down(layout)
                left = sorted(_identities(started) & started | _mentioning(layout.root))
                for pid, _, _ in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, 9)
            assert not left, f"processes outlived their cluster: {[name for _, _, name in left]}"

    return start


@pytest.fixture(scope="session")
def cluster(start_cluster: Callable[..., AbstractContextManager[Cluster]]) -> Iterator[Cluster]:
    """A cluster of the shipped clinic zone with small data, shared by all tests of the run."""
    with start_cluster() as running:
        yield running


@pytest.fixture(scope="session")
def built_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the small environment of :mod:`tests.published`, built by the command."""
    from click.testing import CliRunner

    from ray_gpu.cli.main import cli
    from ray_gpu.state import Layout
    from tests.published import lock

    state = tmp_path_factory.mktemp("published")
    done = CliRunner().invoke(cli, ["env", "build", str(lock(state / "lock.txt")), "--state", str(state)])
    assert done.exit_code == 0, done.output
    assert [done.output.split()[1]] == [path.name for path in Layout(state).environments.iterdir()]
    return Layout(state).environments


@pytest.fixture(scope="session")
def full_ray() -> Iterator[Path]:
    """A directory with what ``make head`` adds to an environment, for ray[default]; thrown away afterwards.

    It is in the environment's own, of which hosts of a test bed see everything.
    """
    locked = [
        re.split(r"^(?=\w)", (ROOT / name).read_text(), flags=re.M)
        for name in ("constraints-head.txt", "constraints.txt")
    ]
    brought = [pin for pin in locked[0] if pin.partition("==")[0] not in {pin.partition("==")[0] for pin in locked[1]}]
    with tempfile.TemporaryDirectory(prefix="full-ray-", dir=sys.prefix) as directory:
        wanted = Path(directory, "wanted.txt")
        wanted.write_text("".join(brought))
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-input", "--no-deps", "--require-hashes"]
        command += ["--target", f"{directory}/packages", "-r", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
        if done.returncode != 0:
            pytest.skip(f"pip cannot get what ray[default] brings: {done.stderr.strip()[-200:]}")
        yield Path(directory, "packages")


@pytest.fixture(scope="session")
def head_packages(request: pytest.FixtureRequest) -> Path | None:
    """What the head of a test bed has and no other host; ``None`` where pip cannot get it, which ``full_ray`` says."""
    try:
        found: Path = request.getfixturevalue("full_ray")
    except pytest.skip.Exception:
        return None
    return found


@pytest.fixture(scope="session")
def client_cluster(start_cluster: Callable[..., AbstractContextManager[Cluster]]) -> Iterator[Cluster]:
    """The same with carrier client: no node of it is in the zone, and its relay has no network."""
    with start_cluster(carrier="client") as running:
        yield running


@pytest.fixture
def fresh_cluster(start_cluster: Callable[..., AbstractContextManager[Cluster]]) -> Iterator[Callable[..., Cluster]]:
    """Return a function that starts a cluster of the test's own; it is stopped when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(start_cluster(**options))


@contextlib.contextmanager
def _short_directory() -> Iterator[Path]:
    """Make a directory whose sockets stay below 107 bytes, and whose contents other uids can reach."""
    path = Path(tempfile.mkdtemp(prefix="rg"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _write_data(directory: Path, tables: dict[str, Any]) -> None:
    directory.mkdir(mode=0o700, parents=True)
    for name, table in tables.items():
        with pa.OSFile(str(directory / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


#: A process: id, start time (ids are used again), command.
Identity = tuple[int, str, str]


def _identity(pid: int) -> Identity | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return None
    return None if fields[0] in "ZX" else (pid, fields[19], command)


def _identities(among: set[Identity]) -> set[Identity]:
    return {found for pid, _, _ in among if (found := _identity(pid))}


def _descendants(pid: int) -> set[Identity]:
    """Return a process and everything below it."""
    own = _identity(pid)
    if own is None:
        return set()
    found = {own}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text("ascii").split():
                found |= _descendants(int(child))
    return found


def _mentioning(directory: Path) -> set[Identity]:
    """Return processes whose command names a path below *directory*."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {found for pid in pids if (found := _identity(pid)) and f"{directory}/" in found[2] and pid != os.getpid()}


# -- what did not run -------------------------------------------------------------------------------


_STARTED = time.monotonic()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """List every skipped test with its reason, and say when a run took longer than it may."""
    most, took = config.getoption("--most-minutes"), (time.monotonic() - _STARTED) / 60
    if most is not None and took > most:
        terminalreporter.section(f"TOO LONG: {took:.0f} minutes, {most:.0f} are allowed", red=True)
        terminalreporter.write_line("on 2 idle cores: mark repeats `heavy` or `chaos`, see CONTRIBUTING.md")
    skipped: list[pytest.TestReport | pytest.CollectReport] = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section(f"did not run here: {len(skipped)}")
    for report in skipped:
        terminalreporter.write_line(f"{report.nodeid}: {_reason(report)}")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)

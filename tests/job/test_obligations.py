"""Obligations are enforced where they bind: each is broken by a real call, refused, and written down."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ray_gpu import environment, gpu_remote
from ray_gpu.cli.main import cli
from ray_gpu.state import Layout
from tests.published import publish
from zones.environments import Environment
from zones.errors import EgressDeniedError, LeaseLostError, PlacementError, UnknownNameError
from zones.ledger import read
from zones.replaying import replay

TIMEOUT_S = 30.0
#: Where the obligations of a test stand in zone.yaml.
PLACE = "# obligations of the test"
FACTOR = 2


@gpu_remote(columns=["mdvis"], concurrency=1)
def total(batch: Any) -> float:
    """Return a sum."""
    return float(batch["mdvis"].sum())


@gpu_remote
def twice(x: int) -> int:
    """Return twice."""
    return FACTOR * x


class World:
    """A cluster whose zone.yaml a test changes while it runs."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.file = cluster.policies / "clinic/zone.yaml"
        self._text = self.file.read_text()

    def demand(self, *lines: str) -> None:
        """Put obligations in force; what other tests approved is not any more."""
        if (approved := self.file.parent / "approved").exists():
            self._change(lambda: shutil.rmtree(approved))
        self._change(lambda: self.file.write_text(self._text.replace(PLACE, "\n".join(lines))))

    def shuffle(self, how: str) -> None:
        """Put another shuffle in force."""
        self._change(lambda: self.file.write_text(self._text.replace("shuffle: rows", f"shuffle: {how}", 1)))

    def _change(self, change: Callable[[], Any]) -> None:
        before = self._digest()
        change()
        deadline = time.monotonic() + TIMEOUT_S
        while self._digest() == before:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def _digest(self) -> str:
        with self.cluster.attach() as session:
            status: dict[str, Any] = session.status()
        assert not status["policy_problem"], status["policy_problem"]
        return str(status["policy_digest"])

    def call(self, *, purpose: str = "test", rows: int | None = None, whole: bool = False, **options: Any) -> float:
        """Sum a column of the real data set."""
        with self.cluster.attach(purpose=purpose) as session:
            data = session.read("randhie", columns=["mdvis"])
            if rows is not None:
                data, _ = data.split(rows / 20190)
            function = total.options(session=session, **options)
            return float(function.remote(data).result()) if whole else float(function.map_reduce(data, sum))


@pytest.fixture(scope="module")
def world(start_cluster: Callable[..., Any], copy_policies: Callable[..., Path]) -> Iterator[World]:
    """A cluster with a place for obligations in its zone.yaml."""
    policies = copy_policies({"clinic/zone.yaml": ("shuffle: rows", f"shuffle: rows\n{PLACE}")})
    with start_cluster(policies=policies) as cluster:
        yield World(cluster)


def now_excluded() -> str:
    """Return working hours on another day than today's, wherever this runs."""
    day = (datetime.now(UTC) + timedelta(days=3)).strftime("%a").lower()
    return f"hours: {day} 07:00-19:00 UTC"


#: Obligation that the call in the second place breaks, and that in the third fulfils.
BROKEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "max_rows": ("max_rows: 20000", {}, {"rows": 19000}),
    "min_shards": ("min_shards: 3", {"whole": True}, {}),
    "exclusive_gpu": ("exclusive_gpu: true", {"num_gpus": 0.5}, {"num_gpus": 1}),
    "purposes": ("purposes: [care]", {"purpose": "marketing"}, {"purpose": "care"}),
}


@pytest.mark.parametrize("key", BROKEN)
def test_broken(world: World, key: str) -> None:
    """A call that breaks an obligation is refused by its key, and the ledger says so; one that fulfils it is made."""
    line, breaks, fulfils = BROKEN[key]
    world.demand(line)

    with pytest.raises(EgressDeniedError, match=rf"\(obligation {key}\); .*clinic/zone\.yaml") as caught:
        world.call(**breaks)

    refusal = world.cluster.entries("refusal")[-1]
    assert (caught.value.rules, refusal["obligations"]) == ([key], [key])
    decision = world.cluster.entries("decision", seq=refusal["decision_entry"])[0]
    assert (decision["decision"], decision["obligations"][key]) == ("allowed", world_value(line))
    assert not [entry for entry in world.cluster.entries("intent") if entry["seq"] > refusal["seq"]]
    assert np.isfinite(world.call(**fulfils))


def world_value(line: str) -> str:
    """Return what a decision says of an obligation's line."""
    value = line.partition(": ")[2].strip("[]")
    return "yes" if value == "true" else value


@gpu_remote(columns=["mdvis", "lncoins", "lpi"], shard_bytes=64 << 10)
def given(batch: Any) -> Any:
    """Return the rows as they came."""
    return batch.matrix()


@pytest.mark.parametrize("how", ["blocks(16)", "none", "rows"])
def test_order_where_policy_permits_it(world: World, how: str) -> None:
    """Rows come in the source's order, in shards and from shard to shard, with `none` alone; the ledger says which."""
    world.shuffle(how)
    with world.cluster.attach() as session:
        function, data = given.options(session=session), session.read("randhie")
        source = function.map(data)
        came = np.concatenate(function.map_reduce(data, list))

    assert sorted(map(tuple, came)) == sorted(map(tuple, source))
    assert np.array_equal(came, source) is (how == "none")
    assert world.cluster.entries("decision")[-1]["obligations"]["shuffle"] == how


def test_hours(world: World) -> None:
    """Outside of working hours no call is made, also in a session that made some before; within them they are."""
    world.demand("hours: mon-sun 00:00-24:00 UTC")
    with world.cluster.attach() as session:
        data = session.read("randhie", columns=["mdvis"])
        function = total.options(session=session)
        assert function.map_reduce(data, sum) > 0
        world.demand(now_excluded())
        with pytest.raises(EgressDeniedError, match=r"calls are made \w{3} 07:00-19:00 UTC \(obligation hours\)"):
            function.map_reduce(data, sum)
    world.demand("hours: mon-sun 00:00-24:00 UTC")
    assert world.call() > 0


def test_session_length(world: World) -> None:
    """A session's calls, and its leases, end when it has lasted so long; a new one goes on."""
    world.demand("max_session_s: 9")
    with world.cluster.attach() as session:
        began = time.monotonic()
        data = session.read("randhie", columns=["mdvis"])
        function = total.options(session=session)
        assert function.map_reduce(data, sum) > 0
        with pytest.raises(LeaseLostError):
            gpu_remote(wait).options(session=session).remote(60.0).result()
        assert time.monotonic() - began < TIMEOUT_S
        with pytest.raises(EgressDeniedError, match=r"lasts 9 s at most \(obligation max_session_s\); attach again"):
            function.map_reduce(data, sum)
    assert world.call() > 0


def wait(seconds: float) -> None:
    """Wait."""
    time.sleep(seconds)


def test_gpu_kinds(world: World) -> None:
    """Only nodes whose device policy names get a lease; the error says which device each has."""
    world.demand('gpu_kinds: ["NVIDIA H100*"]')
    before = world.cluster.entries()[-1]["seq"]
    with pytest.raises(PlacementError, match=r"gpu-\d: its device is numpy stand-in.*policy asks for NVIDIA H100\*"):
        world.call()
    assert not [entry for entry in world.cluster.entries("intent") if entry["seq"] > before]
    world.demand('gpu_kinds: ["NVIDIA H100*", "numpy *"]')
    assert world.call() > 0


def test_environments(world: World) -> None:
    """Only nodes whose environment policy names by its digest get a lease; ledger and receipt have the digest."""
    here = environment.current().digest
    world.demand(f'environments: ["{"0" * 64}"]')
    with pytest.raises(PlacementError, match=rf"its environment {here[:12]} is none that policy names"):
        world.call()
    world.demand(f'environments: ["{"0" * 64}", "{here}"]')
    assert world.call() > 0
    assert world.cluster.entries("intent")[-1]["environment_digest"] == here
    assert world.cluster.entries("lease-end")[-1]["receipt"]["receipt"]["environment"] == here


@gpu_remote
def first_of(rows: list[int]) -> int:
    """Use a package that the nodes' own Python has not."""
    import toolz  # type: ignore[import-not-found]  # published by the test

    return int(toolz.first(rows))


@pytest.fixture(scope="module")
def published(world: World, built_environment: Path) -> Environment:
    """An environment that the operator publishes while the cluster runs."""
    return publish(built_environment, world.cluster)


def test_environments_by_name(world: World, published: Environment) -> None:
    """The zone gives environments names; a session shows them, and how they differ, before anything leaves."""
    folder = world.file.parent / "environments"
    folder.mkdir()
    shutil.copy(Layout(world.cluster.state).environments / published.digest / "environment.json", folder / "small.json")
    try:
        world.demand("max_rows: 1000000")
        with world.cluster.attach() as session:
            found = {one["name"]: one for one in session.status()["environments"]}
            assert (found["small"]["digest"], found["small"]["differs"]) == (published.digest, [])
            assert "small" in session._repr_html_()
            assert first_of.options(session=session, environment="small").remote([7]).result() == 7
            assert world.cluster.entries("decision")[-1]["environment_digest"] == published.digest
            with pytest.raises(UnknownNameError, match=r"no environment 'smal' \(did you mean 'small'\?\)"):
                first_of.options(session=session, environment="smal").remote([7]).result()
    finally:
        shutil.rmtree(folder)


def test_other_environments(world: World, published: Environment) -> None:
    """Where policy names environments, asking for another one is refused, and the one that it names is taken."""
    world.demand(f'environments: ["{"0" * 64}"]')
    with world.cluster.attach() as session:
        asks = first_of.options(session=session, environment=published.digest)
        with pytest.raises(EgressDeniedError, match=rf"{published.digest[:12]} is none of them"):
            asks.remote([1]).result()
        assert world.cluster.entries("refusal")[-1]["obligations"] == ["environments"]
    world.demand(f'environments: ["{"0" * 64}", "{published.digest}"]')
    with world.cluster.attach() as session:
        # Of those that a node has, the one that policy names, whatever its own Python has.
        assert first_of.options(session=session).remote([1]).result() == 1
    world.demand("max_rows: 1000000")


def test_padding(world: World) -> None:
    """Coarse padding makes a data set's messages powers of two, both ways; as fine ones they are not."""

    def sent() -> tuple[int, int]:
        with world.cluster.attach() as session:
            function = gpu_remote(columns=["mdvis"], concurrency=1, session=session)(same)
            function.map(session.read("randhie", columns=["mdvis"]))
        receipt = world.cluster.entries("lease-end")[-1]["receipt"]["receipt"]
        return receipt["received_bytes"], receipt["sent_bytes"]

    world.demand("padding: fine")
    fine = sent()
    world.demand("padding: coarse")
    coarse = sent()

    # 80 KiB of a shard are 80 KiB in eighths, and 128 KiB as a power of two.
    assert coarse[0] > 1.2 * fine[0]
    assert coarse[1] > 1.2 * fine[1]


def same(batch: Any) -> Any:
    """Return the column."""
    return batch["mdvis"]


def test_reviewed(world: World, tmp_path: Path) -> None:
    """Where functions must be approved, the officer's signature lets one through, as it was when it was signed."""
    key, line = tmp_path / "olga.key", "reviewed_functions_only: true"
    made = CliRunner().invoke(cli, ["policy", "officer", "olga", "--out", str(key)])
    assert made.exit_code == 0, made.output
    officers = f"officers: [{made.output.split()[-1]}]"
    world.demand(line, officers)

    def call(function: Any, number: int) -> int:
        with world.cluster.attach() as session:
            return int(function.options(session=session).remote(number).result())

    with pytest.raises(EgressDeniedError, match=r"must be approved.*\(obligation reviewed_functions_only\)"):
        call(twice, 4)
    proposal = tmp_path / "twice.json"
    proposal.write_text(twice.proposal())
    policies = str(world.cluster.policies)
    command = ["policy", "approve", "clinic", str(proposal), "--key", str(key), "--policies", policies]
    said = CliRunner().invoke(cli, command, input="y\n")
    assert said.exit_code == 0, said.output
    assert "return FACTOR * x" in said.output
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            assert call(twice, 4) == 8
            break
        except EgressDeniedError:
            assert time.monotonic() < deadline
    globals()["FACTOR"] = 3
    try:
        with pytest.raises(EgressDeniedError, match="this one, as it is now, is not"):
            call(twice, 4)
    finally:
        globals()["FACTOR"] = 2
    decisions = world.cluster.entries("decision")
    assert [entry["function_reviewed"] for entry in decisions[-2:]] == [True, False]


@gpu_remote
def poison(value: int) -> str:
    """Leave something behind in the sandbox, and say what was there."""
    import sys

    library = sys.modules["ray_gpu.arrays"].__dict__
    return str(library.setdefault("left_behind", value))


def test_approved_functions_do_not_share_a_sandbox(world: World, tmp_path: Path) -> None:
    """What a function that nobody approved left in a sandbox is not there for one that is; among others it is."""
    key, proposal = tmp_path / "olga.key", tmp_path / "look.json"
    made = CliRunner().invoke(cli, ["policy", "officer", "olga", "--out", str(key)])
    world.demand(f"officers: [{made.output.split()[-1]}]")
    proposal.write_text(poison.proposal())

    def look(value: int, session: Any) -> str:
        return str(poison.options(session=session, concurrency=1).remote(value).result())

    with world.cluster.attach() as session:
        assert look(1, session) == "1"
        # Control: the same sandbox, and what was left there.
        assert look(2, session) == "1"
        before = session.status()["leases"]
    policies = str(world.cluster.policies)
    command = ["policy", "approve", "clinic", str(proposal), "--key", str(key), "--policies", policies, "--yes"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        with world.cluster.attach() as session:
            if session.approved:
                # This captures what is not approved.
                assert gpu_remote(session=session, concurrency=1)(lambda: poison(3)).remote().result() == "3"
                approved = look(4, session)
                break
        assert time.monotonic() < deadline
    assert before
    assert approved == "4"
    assert [entry["function_reviewed"] for entry in world.cluster.entries("decision")[-2:]] == [False, True]


def test_replayed(world: World) -> None:
    """Everything that was decided here is decided the same again, with what it demanded."""
    again = list(replay(read(world.cluster.ledger)))

    assert len(again) > 10
    assert all(one.same for one in again)

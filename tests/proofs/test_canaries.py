"""P1 and P2: no process of Ray ever holds plaintext, and outside the zone nobody does but a lease's keeper and sandbox.

Canaries stand in every kind of plaintext. The same search finds those that plain Ray was given in the same cage.
"""

from __future__ import annotations

import base64
import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pyarrow as pa
import pytest

import ray_gpu
from tests.proofs import visits
from tests.proofs.attacked import Attacked, command
from tests.proofs.canary import ARGUMENT, CHANNELS, as_float64, as_int64, canaries, new_mark
from tests.proofs.memory_search import PIECE, Search, search
from tests.proofs.places import (
    NODES,
    PLACES,
    TRUSTED,
    found_of_the_trusted,
    obstacle,
    planted_for_the_trusted,
    search_ray,
    search_trusted,
)
from tests.proofs.plain_ray import DRIVER, PLANTED, PlainRay, run_plain_ray

#: The custodian learns of a session's end from the keeper or the actor, whichever is first; seconds.
GONE_TIMEOUT_S = 5.0
#: What must be among the processes that were searched, or the search proves nothing.
RAY = {
    "edge": {"raylet": 3, "gcs_server": 1, "ray::RuntimeEnvAgent": 3, "ray::GpuActor": 2, "ray_gpu.relay": 1},
    "client": {
        "raylet": 2, "gcs_server": 1, "ray::RuntimeEnvAgent": 2, "ray::GpuActor": 2, "ray_gpu.relay": 1,
        "ray.util.client.server": 1,
    },
}  # fmt: skip
#: Values of a category column never leave the zone; what a sandbox sees is all else.
LEAVING = {*CHANNELS, ARGUMENT} - {"category"}

#: A global of a function that is sent.
GLOBAL = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A session that sent canaries in every way there is, and what was found while it lasted and after it."""

    result: pa.Table
    printed: str
    error: str
    nodes: list[str]
    #: Command lines of the processes that were searched, in one text.
    searched: str
    ray: Search
    trusted: Search
    leases: Search
    gateway: Search
    #: Of keepers and sandboxes that were there, those that outlived the session.
    left: list[int]
    ray_after: Search
    trusted_after: Search


@pytest.fixture(scope="module")
def run(attacked: Attacked) -> Run:
    """Plant, search, end the session, search again."""
    if reason := obstacle(attacked):
        pytest.skip(reason)
    since, mark = time.time() - 1.0, attacked.mark
    with pytest.MonkeyPatch.context() as patch, attacked.attach() as session:
        patch.setattr(sys.modules[__name__], "GLOBAL", canaries(mark)["global"])
        came_back = plant(session, mark)
        pids = [pid for node in NODES for pid in attacked.leases(node)]
        found: dict[str, Any] = {
            "nodes": [lease["node"] for lease in session.status()["leases"]],
            "searched": "\n".join(" ".join(command(pid)) for pids in attacked.caged().values() for pid in pids),
            "ray": search_ray(attacked, mark, since),
            "trusted": search_trusted(attacked, mark, since),
            "leases": search(mark, pids, since=since),
            "gateway": search(mark, [attacked.gateway()], since=since),
        }
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while any(command(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return Run(
        **came_back,
        **found,
        left=[pid for pid in pids if command(pid)],
        ray_after=search_ray(attacked, mark, since),
        trusted_after=search_trusted(attacked, mark, since),
    )


def plant(session: ray_gpu.Session, mark: str) -> dict[str, Any]:
    """Send canaries out in every way and bring others back, on both nodes; return what came back."""
    captured, name = canaries(mark)["closure"], canaries(mark)["name"]

    def show(batch: Any, argument: str, default: str = canaries(mark)["default"]) -> Any:
        import logging

        print(argument.replace("argument", "print"))  # noqa: T201 - it is what is tested
        logging.getLogger("theirs").warning(argument.replace("argument", "logging"))
        kept = (captured, GLOBAL, default, batch[name])
        return pa.table({"result": [argument.replace("argument", "result") + str(len(kept))] * len(batch)})

    def fail(argument: str) -> None:
        raise KeyError(argument.replace("argument", "exception"))

    options = {"session": session, "columns": visits.leaving(mark), "shard_bytes": 1 << 16}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = ray_gpu.gpu_remote(**options)(show).map(session.read("visits"), canaries(mark)[ARGUMENT])
        with pytest.raises(KeyError) as error:
            ray_gpu.gpu_remote(session=session)(fail).remote(canaries(mark)[ARGUMENT]).result()
    return {"result": result, "printed": printed.getvalue(), "error": str(error.value)}


def test_the_job_ran(run: Run, attacked: Attacked) -> None:
    """Result, prints, log lines and the exception came back with their canaries, from both nodes."""
    text = canaries(attacked.mark)

    assert set(run.result["result"].to_pylist()) == {f"{text['result']}4"}
    assert text["print"] in run.printed
    assert text["logging"] in run.printed
    assert text["exception"] in run.error
    assert sorted(run.nodes) == list(NODES)


def test_ray_sees_nothing(run: Run, attacked: Attacked) -> None:
    """No canary in any form, in the memory, files, shared memory or session directories of any Ray process."""
    assert run.ray.hits == []
    assert run.ray_after.hits == []
    wanted = RAY[attacked.document["carrier"]]
    assert {name: run.searched.count(name) >= least for name, least in wanted.items()} == dict.fromkeys(wanted, True)
    assert run.ray.searched_bytes > 256 << 20


def test_trusted_see_nothing(run: Run) -> None:
    """Custodians, Vault with its audit log, and what every process was started with hold no plaintext either."""
    assert run.trusted.hits == []
    assert run.trusted_after.hits == []


def test_keeper_and_sandbox_hold_it(run: Run) -> None:
    """The search finds every canary where it must be while the lease lives, numbers too, as Arrow lays them."""
    assert run.leases.channels() == LEAVING
    assert ("arrow", "value") in {(hit.form, hit.channel) for hit in run.leases.hits}


def test_gateway_holds_it(run: Run) -> None:
    """The zone's own gateway has seen what goes out and what comes back. Freed memory may lose any one of them."""
    found = run.gateway.channels()

    assert len(found & {"name", "value", "closure", "global", "default", ARGUMENT}) > 2
    assert len(found & {"print", "logging", "exception", "result"}) > 1


def test_category_values_stay(run: Run, attacked: Attacked) -> None:
    """Values of a category column never leave the zone: not even the sandbox has them, only their codes."""
    zone_has = pa.ipc.open_file(pa.memory_map(str(attacked.layout.data(attacked.zone) / "visits.arrow"))).read_all()

    assert canaries(attacked.mark)["category"] in zone_has["kind"].to_pylist()
    assert "category" not in run.leases.channels()


def test_gone_with_the_lease(run: Run) -> None:
    """Once the session ended there is soon no keeper and no sandbox any more."""
    assert run.left == []


@pytest.fixture(scope="module")
def plain_ray(run: Run, attacked: Attacked) -> Iterator[PlainRay]:
    """Use plain Ray from inside the zone's cage, beside the relay, and keep it there."""
    with run_plain_ray(attacked, NODES[0]) as plain:
        yield plain


def test_plain_ray_is_found(plain_ray: PlainRay, attacked: Attacked) -> None:
    """The same search of the same cages finds what plain Ray was given, in each of the ten channels."""
    found = search_ray(attacked, plain_ray.mark, time.time() - 60.0, leave_out=DRIVER)

    assert found.channels() >= set(CHANNELS)


def test_gcs_tells_nothing(run: Run, plain_ray: PlainRay, attacked: Attacked) -> None:
    """Who holds the cluster's token reads plain Ray's code and what it captured from the GCS, and nothing of ours."""
    found = Search(texts=(attacked.mark, plain_ray.mark), since=0)
    found.data(plain_ray.readable(), "GCS")

    assert found.of(attacked.mark) == []
    assert found.channels(plain_ray.mark) >= {"closure", "global", "default"}


def test_each_place_is_searched(plain_ray: PlainRay, attacked: Attacked) -> None:
    """What lies in one place is found by the search of that place alone: were it left out, this would fail."""
    since = time.time() - 60.0
    found = {
        place: search_ray(attacked, plain_ray.mark, since, leave_out=DRIVER, places={place}).channels()
        for place in PLACES
    }

    words = set().union(*PLANTED.values())
    assert {place: channels & words for place, channels in found.items()} == PLANTED


def test_each_place_of_the_trusted_is_searched(run: Run, attacked: Attacked) -> None:
    """The same search finds what is written to a node's directory, the log, Vault, or what anybody is started with."""
    mark, since = new_mark(), time.time() - 60.0
    before = search_trusted(attacked, mark, since)
    with planted_for_the_trusted(attacked, mark):
        found = search_trusted(attacked, mark, since)

    assert before.hits == []
    assert found_of_the_trusted(found, mark) == set(TRUSTED)


def test_memory_of_the_custodians_is_searched(run: Run, attacked: Attacked) -> None:
    """It finds what a custodian must know: the role that it logs in to Vault with."""
    roles = {node: attacked.settings(node)["role_id"] for node in NODES}
    found = search_trusted(attacked, roles.values(), time.time())

    for node, role in roles.items():
        assert f"[{attacked.custodian(node)}] memory" in " ".join(hit.where for hit in found.of(role))


def arrow(schema: dict[str, pa.Array[Any]]) -> bytes:
    """Return a stream as Arrow writes it."""
    sink, table = io.BytesIO(), pa.table(schema)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


#: How a canary is spelled, and the forms that it is then found in.
FORMS: dict[str, tuple[Callable[[str], bytes], set[str]]] = {
    "raw": (str.encode, {"raw"}),
    "utf-16-le": (lambda text: text.encode("utf-16-le"), {"utf-16"}),
    "utf-16-be": (lambda text: text.encode("utf-16-be"), {"utf-16"}),
    "hex": (lambda text: text.encode().hex().encode(), {"hex"}),
    "HEX": (lambda text: text.encode().hex().upper().encode(), {"hex"}),
    **{
        f"base64, {shift} before": ((lambda text, x=b"x" * shift: base64.b64encode(x + text.encode())), {"base64"})  # type: ignore[misc]  # its own shift
        for shift in range(3)
    },
    "URL's base64": (lambda text: base64.urlsafe_b64encode(text.encode() + b"\xff\xfe"), {"base64"}),
    "Arrow's strings": (lambda text: arrow({"x": pa.array(["", text, "y"])}), {"raw"}),
    "Arrow's dictionary": (lambda text: arrow({"x": pa.array([text, "y"]).dictionary_encode()}), {"raw"}),
    "Arrow's schema": (lambda text: arrow({text: pa.array([1])}), {"raw"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, form: str) -> None:
    """Each channel's canary is found in every form, says which it is, and nothing else is found."""
    mark = new_mark()
    spell, forms = FORMS[form]
    for channel, text in canaries(mark).items():
        (tmp_path / channel).write_bytes(bytes(5000) + spell(text) + bytes(5000))

    hits = search(mark, (), since=0, trees=[tmp_path]).hits
    assert {(hit.where, hit.channel) for hit in hits} == {(str(tmp_path / name), name) for name in canaries(mark)}
    assert {hit.form for hit in hits} == forms
    assert search(new_mark(), (), since=0, trees=[tmp_path]).hits == []


@pytest.mark.parametrize(
    ("number", "form"), [(as_int64, "arrow"), (as_float64, "arrow"), (as_int64, "decimal"), (as_float64, "decimal")]
)
def test_numbers(tmp_path: Path, number: Callable[[str], Any], form: str) -> None:
    """A number is found in Arrow's buffers and in what prints it; the lone one that msgpack writes, too."""
    mark = new_mark()
    column = pa.array([number(mark)] * 3)
    (tmp_path / "x").write_bytes(arrow({"x": column}) if form == "arrow" else str(column[0]).encode())
    found = search(mark, (), since=0, trees=[tmp_path]).hits
    (tmp_path / "x").write_bytes(msgpack.packb(number(mark)))
    lone = search(mark, (), since=0, trees=[tmp_path]).hits

    assert (form, "value") in {(hit.form, hit.channel) for hit in found}
    assert [hit.form for hit in lone] == ["big-endian"]


@pytest.mark.parametrize("before", [0, PIECE - 4, PIECE - 300, PIECE + 1])
def test_between_two_pieces(tmp_path: Path, before: int) -> None:
    """A canary is found once or twice, whole, wherever a file is cut for the search."""
    mark = new_mark()
    with (tmp_path / "x").open("wb") as file:
        file.write(b"x" * before + canaries(mark)["closure"].encode() + b"x" * 3)

    found = search(mark, (), since=0, trees=[tmp_path])
    assert [hit.channel for hit in found.hits] in (["closure"], ["closure"] * 2)

"""Section 5 of the attack suite, out of the zone: what a hostile notebook makes leave is what the ledger says.

The attacker has the relay as well, so every byte that the gateway sends to nodes, or tells the relay, is recorded. Each
attack hides the same secret in another place. Then: what left is what the ledger has, to the byte; the relay heard
nothing of it; and it is counted as what it is, data of a class, so that a zone that forbids that class sends nothing.
"""

from __future__ import annotations

import base64
import functools
import os
import secrets
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import cloudpickle
import msgpack
import numpy as np
import pyarrow as pa
import pytest

from tests.attack.relay import AttackersRelay, Wire
from tests.proofs.attacked import Attacked, all_powerful
from tests.proofs.notebook import Notebook, encoded, memory_file
from zones.envelope import HEADER_BYTES, MIN_PADDED_BYTES, Header, header_for, sealed_size
from zones.errors import EgressDeniedError, ZoneError
from zones.model import Direction, Kind, Slot

SECRET = secrets.token_hex(16)
#: Messages that say nothing of a notebook's, and have one size whatever happens.
WITHOUT_CONTENT = (Kind.HELLO, Kind.CONTROL)
DATASET = {"dataset": "breast_cancer", "columns": ["mean_radius"]}
#: No class of its own for functions and arguments: they count as the highest, which no rule of the clinic lets out.
NOTHING_SMALL = {
    "clinic/zone.yaml": (
        "small_bytes:\n  classification: internal\n  max_bytes: 65536\n  max_session_bytes: 4194304\n", ""
    )
}  # fmt: skip


class Spied:
    """A cluster, its relay in the attacker's hands, and what the attacker recorded."""

    def __init__(self, attacked: Attacked, relay: AttackersRelay) -> None:
        self.attacked, self.relay = attacked, relay

    def notebook(self, purpose: str = "attack") -> Notebook:
        """Open a hostile notebook's session."""
        return Notebook(self.attacked, purpose)

    def messages(self, wire: Wire) -> list[Header]:
        """Return the messages on a wire; every byte of it belongs to one."""
        found, at, data = [], 0, bytes(wire.sent)
        while at < len(data):
            header = Header.decode(data[at : at + HEADER_BYTES])
            found.append(header)
            at += HEADER_BYTES + sealed_size(header.padded_bytes)
        assert at == len(data)
        return found

    def check(self) -> int:
        """Assert for each lease that its wire carried what the ledger says was drawn; return how many bytes that is.

        The rest of it are messages without content, of one size.
        """
        total = 0
        for lease in {wire.lease for wire in self.relay.wires}:
            headers = [header for wire in self.relay.wires if wire.lease == lease for header in self.messages(wire)]
            sizes = Counter(dict.fromkeys(Kind, 0))
            for header in headers:
                sizes[header.kind] += HEADER_BYTES + sealed_size(header.padded_bytes)
                assert header.kind not in WITHOUT_CONTENT or header.padded_bytes == MIN_PADDED_BYTES
            drawn = sum(entry["bytes"] for entry in self.attacked.entries("completion", lease=lease))
            content = sum(size for kind, size in sizes.items() if kind not in WITHOUT_CONTENT)
            assert content == drawn
            total += content
        return total

    def overheard(self) -> bytes:
        """Return all that the relay was told and all that passed the wires, in one piece."""
        return msgpack.packb(self.relay.heard) + b"".join(bytes(wire.sent) for wire in self.relay.wires)  # type: ignore[no-any-return]


def _running(start_cluster: Callable[..., AbstractContextManager[Any]], **options: Any) -> Iterator[Spied]:
    with start_cluster(**options) as cluster:
        attacked = Attacked(state=cluster.state, document=cluster.document, mark="")
        with AttackersRelay(attacked) as relay:
            yield Spied(attacked, relay)


@pytest.fixture(scope="module")
def permissive(start_cluster: Callable[..., AbstractContextManager[Any]]) -> Iterator[Spied]:
    """The shipped clinic, which lets small functions and arguments leave as internal data."""
    yield from _running(start_cluster)


@pytest.fixture(scope="module")
def strict(
    start_cluster: Callable[..., AbstractContextManager[Any]], copy_policies: Callable[..., Path]
) -> Iterator[Spied]:
    """The clinic without a class for small bytes: what the catalog does not name is of the highest class."""
    yield from _running(start_cluster, policies=copy_policies(NOTHING_SMALL))


# -- where a function can carry something -----------------------------------------------------------


def _closure() -> Any:
    secret = SECRET
    return lambda *_: len(secret)


def _global() -> Any:
    module = types.ModuleType("mine")
    exec("def carrier(*_):\n    return len(KEPT)", module.__dict__)
    module.__dict__["KEPT"] = SECRET
    return module.__dict__["carrier"]


def _default() -> Any:
    return lambda *_, kept=SECRET: len(kept)


def _docstring() -> Any:
    def carrier(*_: Any) -> int:
        return 0

    carrier.__doc__ = SECRET
    return carrier


def _annotation() -> Any:
    def carrier(*_: Any) -> int:
        return 0

    carrier.__annotations__ = {"return": SECRET}
    return carrier


def _name() -> Any:
    def carrier(*_: Any) -> int:
        return 0

    carrier.__name__ = carrier.__qualname__ = SECRET
    carrier.__code__ = carrier.__code__.replace(co_name=SECRET)
    return carrier


def _constant() -> Any:
    def carrier(*_: Any) -> int:
        return 0

    carrier.__code__ = carrier.__code__.replace(co_consts=(*carrier.__code__.co_consts, SECRET))
    return carrier


def _line_table() -> Any:
    def carrier(*_: Any) -> int:
        return 0

    carrier.__code__ = carrier.__code__.replace(co_linetable=SECRET.encode())
    return carrier


def _file_name() -> Any:
    def carrier(*_: Any) -> int:
        return 0

    carrier.__code__ = carrier.__code__.replace(co_filename=SECRET)
    return carrier


def _attribute_of_a_class() -> Any:
    held = type("Held", (), {f"a{SECRET}": 1})
    return lambda *_: len(vars(held))


def _attribute_of_the_function() -> Any:
    def carrier(*_: Any) -> int:
        return 0

    carrier.__dict__["kept"] = SECRET
    return carrier


def _reducer() -> Any:
    class Carrier:
        def __reduce__(self) -> Any:
            return str, (SECRET,)

    held = Carrier()
    return lambda *_: len(str(held))


FUNCTIONS: dict[str, Callable[[], Any]] = {
    "closure": _closure, "global": _global, "default": _default, "docstring": _docstring, "annotation": _annotation,
    "function name": _name, "constant": _constant, "line table": _line_table, "file name": _file_name,
    "attribute of a class": _attribute_of_a_class, "attribute of the function": _attribute_of_the_function,
    "pickled reducer": _reducer,
}  # fmt: skip


def _calls(function: Any, **changes: Any) -> dict[str, Any]:
    """Return a call on arguments alone, whose function is pickled without any check of the client's."""
    work = {"name": "f", "function": cloudpickle.dumps(function), "options": {"concurrency": 1, "gpu_milli": 100}}
    work |= {name: changes.pop(name) for name in work if name in changes}
    return {"op": "call", "mode": "call", "arguments": encoded(), "data": None, "work": msgpack.packb(work), **changes}


def _made(name: str) -> dict[str, Any]:
    return _calls(FUNCTIONS[name]())


#: Places for the secret that are no function: what of a request holds it.
REQUESTS: dict[str, Callable[[], dict[str, Any]]] = {
    "argument": lambda: _calls(lambda *_: 0, arguments=encoded(SECRET)),
    "name that the client gives": lambda: _calls(lambda *_: 0, name=SECRET),
    "unknown field": lambda: _calls(lambda *_: 0, note=SECRET),
}
PLACES: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: functools.partial(_made, name) for name in FUNCTIONS}, **REQUESTS
}  # fmt: skip
#: What the gateway keeps to itself, though the request holds it.
STAYS = ("name that the client gives", "unknown field")


@pytest.mark.parametrize("place", PLACES)
def test_counted_and_written_down(permissive: Spied, place: str) -> None:
    """Where policy lets small bytes out, the hidden secret leaves sealed, counted to the byte, and to nobody else."""
    with permissive.notebook() as notebook:
        assert notebook.ask(PLACES[place]())["ok"] is True
        notebook.close()

    assert permissive.check() > 0
    assert SECRET.encode() not in permissive.overheard()


@pytest.mark.heavy
@pytest.mark.parametrize("place", PLACES)
def test_forbidden_class(strict: Spied, place: str) -> None:
    """Where policy lets none of that class out, no lease is even placed, and the ledger has the refusal."""
    before = len(strict.relay.wires), len([said for said in strict.relay.heard if said["op"] == "place"])
    with strict.notebook() as notebook, pytest.raises(EgressDeniedError):
        notebook.ask(PLACES[place]())

    assert (len(strict.relay.wires), len([said for said in strict.relay.heard if said["op"] == "place"])) == before
    refused = strict.attacked.entries("decision", decision="refused", session=notebook.session)[-1]
    assert "direct-identifier" in refused["classes"]


@pytest.mark.parametrize("place", [name for name in PLACES if name not in STAYS])
def test_secret_is_in_what_is_sent(place: str) -> None:
    """Each of these requests does hold the secret: what is sealed, and sent where policy allows, has it."""
    assert _holds(msgpack.packb(PLACES[place]()))


def _holds(data: bytes) -> bool:
    return any(
        form in data for form in (SECRET.encode(), SECRET.encode("utf-16-le"), base64.b64encode(SECRET.encode()))
    )


# -- purpose, options, columns ----------------------------------------------------------------------


def test_purpose_stays(permissive: Spied) -> None:
    """The purpose's text is for policy and ledger: neither the relay nor a node hears of it."""
    with permissive.notebook(f"for {SECRET}") as notebook:
        assert notebook.ask(_calls(lambda *_: 0))["ok"] is True
        notebook.close()

    assert permissive.attacked.entries("intent", session=notebook.session)[-1]["purpose"] == f"for {SECRET}"
    assert SECRET.encode() not in permissive.overheard()
    permissive.check()


def _values(document: Any) -> list[Any]:
    """Return every value in a document, however deep."""
    if isinstance(document, (dict, list)):
        inside = document.values() if isinstance(document, dict) else document
        return [value for item in inside for value in _values(item)]
    return [document]


OPTIONS = {
    "placement_timeout_s": 17.123456789,
    "timeout_s": 171.987654321,
    "shard_bytes": 7_654_321,
    "concurrency": 53,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_value_stays(permissive: Spied, option: str) -> None:
    """What a notebook writes into an option's digits does not arrive at the relay; times come in a few lengths."""
    before = len(permissive.relay.heard)
    with permissive.notebook() as notebook:
        options = {"concurrency": 1, "gpu_milli": 100, option: OPTIONS[option]}
        assert notebook.ask(_calls(lambda *_: 0, options=options))["ok"] is True
        notebook.close()

    told = permissive.relay.heard[before:]
    assert {said["timeout_s"] for said in told if said["op"] == "place"} <= {
        1.0,
        2.0,
        5.0,
        15.0,
        30.0,
        60.0,
        300.0,
        3600.0,
    }
    assert not [said for said in told if OPTIONS[option] in _values(said)]
    assert len([said for said in told if said["op"] == "place"]) == 1
    permissive.check()


def test_share_is_written_down(permissive: Spied) -> None:
    """The one option that nodes are told, the share of a GPU, is in the ledger before they are."""
    shares = (137, 251, 313)
    with permissive.notebook() as notebook:
        for share in shares:
            assert notebook.ask(_calls(lambda *_: 0, options={"concurrency": 1, "gpu_milli": share}))["ok"] is True
        notebook.close()

    for kind in ("decision", "intent"):
        written = permissive.attacked.entries(kind, session=notebook.session)
        assert {entry["gpu_milli"] for entry in written} == set(shares)
    permissive.check()


def test_what_the_relay_is_told(permissive: Spied) -> None:
    """Every field that the relay hears is one of these: none that a notebook fills with what it likes."""
    with permissive.notebook() as notebook:
        assert notebook.ask(_calls(lambda *_: 0))["ok"] is True
        notebook.close()
    fields = {
        "place": {"op", "id", "lease", "pool", "gpus", "timeout_s", "labels"},
        "grant": {"op", "id", "lease", "grant", "wrapped"},
        "release": {"op", "id", "lease"},
        "nodes": {"op", "id"},
    }

    assert {said["op"] for said in permissive.relay.heard} <= set(fields)
    assert all(set(said) == fields[said["op"]] for said in permissive.relay.heard)


@pytest.mark.parametrize("name", ["renamed", "secret as the name", "derived"])
def test_columns_of_its_own(permissive: Spied, name: str) -> None:
    """Renamed or derived columns, or names that are data, are of the highest class: refused, and nothing leaves."""
    columns = {"renamed": "mean_radius", "secret as the name": SECRET, "derived": "score"}
    table = pa.table({columns[name]: pa.array(np.arange(9.0))})
    before = len(permissive.relay.wires)
    with permissive.notebook() as notebook:
        fd = memory_file(table)
        with pytest.raises(EgressDeniedError):
            notebook.ask({**_calls(lambda *_: 0), "mode": "shards", "data": {"memory": True}}, [fd])
        os.close(fd)

    refused = permissive.attacked.entries("decision", decision="refused", session=notebook.session)[-1]
    assert refused["columns"] == [columns[name]]
    assert len(permissive.relay.wires) == before


def test_catalog_rows(permissive: Spied) -> None:
    """Rows of the catalog, shard by shard, are what the ledger says as well."""
    with permissive.notebook() as notebook:
        assert notebook.ask({**_calls(lambda batch: len(batch)), "mode": "shards", "data": DATASET})["ok"] is True
        notebook.close()

    assert permissive.check() > 0


def test_control_bytes_that_the_ledger_lacks(permissive: Spied) -> None:
    """The same measure finds one message more on the wire than the ledger has, whichever lease it is of."""
    with permissive.notebook() as notebook:
        assert notebook.ask(_calls(lambda *_: 0))["ok"] is True
        notebook.close()
    permissive.check()
    wire = permissive.relay.wires[-1]
    slot = Slot(lease=wire.lease, direction=Direction.OUT, kind=Kind.SHARD, call=9, shard=9, attempt=0)
    smuggled = header_for(slot, MIN_PADDED_BYTES).encode() + bytes(sealed_size(MIN_PADDED_BYTES))
    wire.sent += smuggled
    try:
        with pytest.raises(AssertionError):
            permissive.check()
    finally:
        del wire.sent[-len(smuggled) :]


# -- around the gateway -----------------------------------------------------------------------------

#: Run as the person's uid: what it says is what it got at.
PRYING = """
import ctypes, os, sys
pid = int(sys.argv[1])
got = []
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(16, pid, 0, 0) == 0:
    got.append("ptrace")
start = 0
for name in ("maps", "mem", "environ", "root/etc/hostname"):
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            file.seek(start if name == "mem" else 0)
            data = file.read(1 << 12)
        if name == "maps":
            start = int(data.split(b"-")[0], 16)
        got.append(name)
    except OSError:
        pass
class Span(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
here = ctypes.create_string_buffer(16)
near, far = Span(ctypes.addressof(here), 16), Span(start, 16)
if libc.process_vm_readv(pid, ctypes.byref(near), 1, ctypes.byref(far), 1, 0) == 16:
    got.append("process_vm_readv")
print(",".join(got))
"""
PERSON_UID = 54321


def _pry(pid: int, uid: int) -> str:
    ran = subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-c", PRYING, str(pid)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return ran.stdout.strip()


@pytest.mark.skipif(not all_powerful(), reason="runs as another uid, which needs root with all capabilities")
def test_gateway_cannot_be_pried_into(permissive: Spied) -> None:
    """A person's process neither traces the gateway nor reads its memory, environment or files."""
    assert _pry(permissive.attacked.gateway(), PERSON_UID) == ""


@pytest.mark.skipif(not all_powerful(), reason="runs as another uid, which needs root with all capabilities")
def test_control_shared_uid_can_be_pried_into() -> None:
    """Where notebook and gateway share a uid, as in a demo without root, the same look gets at its memory."""
    victim = subprocess.Popen(
        ["setpriv", f"--reuid={PERSON_UID}", f"--regid={PERSON_UID}", "--clear-groups", "sleep", "60"]
    )
    try:
        while Path(f"/proc/{victim.pid}/comm").read_text(encoding="ascii") != "sleep\n":
            assert victim.poll() is None
        got = _pry(victim.pid, PERSON_UID).split(",")
        assert {"ptrace", "maps", "mem", "environ", "process_vm_readv"} <= set(got)
    finally:
        victim.kill()
        victim.wait()


def test_person_cannot_use_vault_for_keys(permissive: Spied) -> None:
    """A person's own login at Vault makes no lease key, wraps no data key, and opens none."""
    from tests.proofs.notebook import token
    from zones.vault import Vault

    settings = permissive.attacked.settings("gateway")
    vault = Vault(settings["vault"], ca_file=settings["vault_ca"]).with_token(token(permissive.attacked))
    try:
        for attempt in (
            lambda: vault.create_lease_key("clinic", "gpu-1", "mine-1"),
            lambda: vault.data_key("clinic", "gpu-1", "mine-1", "0" * 64),
            lambda: vault.lease_keys("clinic"),
        ):
            with pytest.raises(ZoneError):
                attempt()
    finally:
        vault.close()

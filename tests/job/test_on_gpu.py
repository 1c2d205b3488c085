"""The callable class for Ray Data, without Ray: what is pickled, what is kept back, and who may log in."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest

from ray_gpu import Batch, OnGpu, attach, gpu_remote, parts
from ray_gpu.state import Layout
from zones.errors import ConfigError, EgressDeniedError, FunctionRefusedError
from zones.vault import Vault

WHERE = {"zone": "clinic", "dataset": "randhie"}


@gpu_remote(columns=["mdvis", "disea"])
def strain(batch: Batch) -> Any:
    """Return one number per row."""
    return batch["mdvis"] / (1 + batch["disea"])


@pytest.fixture(scope="module")
def made(cluster: Any) -> Iterator[Any]:
    """What an actor of Ray Data's makes of what was pickled for it."""
    kind, function = pickle.loads(cloudpickle.dumps((OnGpu, strain)))
    login = Layout(cluster.state).person
    on_gpu = kind(function, **WHERE, keep=["record_number"], login=str(login), state_dir=str(cluster.state))
    yield on_gpu
    on_gpu.session.close()


def test_parts_are_all_rows(made: Any) -> None:
    """The parts of a data set make its rows, each once, with the kept column beside what was computed of the others."""
    whole = made.session.read("randhie").to_arrow()
    wanted = whole["mdvis"].to_numpy() / (1 + whole["disea"].to_numpy())
    rows = pa.table({"record_number": whole["record_number"], "result": wanted})
    batches = parts(5, seed=3).to_batches(max_chunksize=2)

    found = pa.concat_tables([made(pa.Table.from_batches([batch])) for batch in batches])

    order: Any = [("record_number", "ascending")]
    assert found.sort_by(order).equals(rows.sort_by(order))


def test_what_is_kept_stays(cluster: Any, made: Any) -> None:
    """Only the function's own columns left, though its options went through a pickle; those to keep did not."""
    before = len(cluster.entries("intent"))
    made(parts(40).slice(7, 1))
    left = [entry["columns"] for entry in cluster.entries("intent")[before:]]

    assert left
    assert {name for columns in left for name in columns} == {"mdvis", "disea"}
    assert "record_number" in made.session.datasets["randhie"]


def test_a_batch_is_nobodys_data_set(cluster: Any, made: Any) -> None:
    """Rows that come in the batch itself were classified by nobody: the zone's policy keeps them back."""
    rows = made.session.read("randhie").to_arrow().slice(0, 100)
    on_gpu = OnGpu(strain, "clinic", state_dir=cluster.state)
    try:
        with pytest.raises(EgressDeniedError, match="no-direct-identifiers"):
            on_gpu(rows)
    finally:
        on_gpu.session.close()
    assert made(parts(200).slice(0, 1)).num_rows > 0  # the same columns, from the catalog


def test_batches_that_name_no_parts(made: Any) -> None:
    """With a data set, a batch that names no parts of it is refused, and told what does."""
    with pytest.raises(ValueError, match=r"begin with ray_gpu\.parts"):
        made(pa.table({"x": [1]}))


def test_names_that_stand_twice(made: Any) -> None:
    """A result whose column has the name of one to keep is refused, before one of the two is lost."""
    function = gpu_remote(columns=["mdvis"])(lambda batch: pa.table({"record_number": batch["mdvis"]}))
    other = object.__new__(OnGpu)
    other.__dict__ |= made.__dict__ | {"_function": function.options(session=made.session)}

    with pytest.raises(ValueError, match="same names as `keep`: record_number"):
        other(parts(100).slice(0, 1))


@pytest.mark.parametrize("function", [len, lambda batch: batch, OnGpu], ids=["builtin", "function", "class"])
def test_plain_functions(function: Any) -> None:
    """A function without the decorator has no options, such as the columns that leave: it is refused."""
    with pytest.raises(TypeError, match=r"@ray_gpu\.gpu_remote"):
        OnGpu(function, "clinic")


def test_no_token(cluster: Any) -> None:
    """A token would be pickled with the arguments; a file's name is not worth anything."""
    with pytest.raises(TypeError, match="name a file"):
        OnGpu(strain, "clinic", token="s.secret", state_dir=cluster.state)


def test_options_are_pickled() -> None:
    """A remote function is one after a pickle, with its options; with a session it is not pickled, nor is a method."""
    again = pickle.loads(cloudpickle.dumps(strain))

    assert again.__name__ == "strain"
    assert repr(again._options) == repr(strain._options)
    assert again(Batch(pa.table({"mdvis": [2.0], "disea": [1.0]}))).tolist() == [1.0]


def test_sessions_stay(made: Any) -> None:
    """Neither the class's instance nor a function with a session leaves its process."""
    for value in (made, strain.options(session=made.session)):
        with pytest.raises(TypeError, match="does not leave its process"):
            cloudpickle.dumps(value)


def test_sent_as_before(made: Any) -> None:
    """A remote function that another one captures is still sent as the plain function, without options or session."""
    inner = strain.options(session=made.session)

    @gpu_remote(columns=["mdvis", "disea"], session=made.session)
    def outer(batch: Batch) -> Any:
        return inner(batch) + type(inner).__name__.count("function")

    data = made.session.read("randhie")
    np.testing.assert_array_equal(outer.map(data), strain.options(session=made.session).map(data) + 1)
    with pytest.raises(FunctionRefusedError, match="made"):  # the control: a session itself is no part of a function
        gpu_remote(lambda batch: made.session, session=made.session).map(data.select(["mdvis"]))


# -- logins ------------------------------------------------------------------------------------------


def test_login_by_a_file(cluster: Any, tmp_path: Path) -> None:
    """A login is a person's file as it was issued, or a Vault token as `bao login` keeps it."""
    issued = Layout(cluster.state).person
    with attach("clinic", state_dir=cluster.state, login=issued) as session:
        person = session.person
    with pytest.raises(ValueError, match="not both"):
        attach("clinic", state_dir=cluster.state, login=issued, token="x")

    where, secret = (json.loads(path.read_text()) for path in (Layout(cluster.state).public("clinic"), issued))
    vault = Vault(where["vault"], ca_file=where["vault_ca"])
    vault.login_userpass(secret["user"], secret["password"])
    file = tmp_path / "vault-token"
    file.touch(mode=0o600)
    file.write_text(vault.token + "\n")
    with attach("clinic", state_dir=cluster.state, login=file) as session:
        assert session.person == person


@pytest.mark.parametrize(
    ("mode", "text", "said"),
    [
        (0o600, '{"user": "dana"}', "write it anew"),
        (0o600, '{"user": "dana", "password": ', "write it anew"),
        (0o600, "", "holds no secret"),
        (0o640, "s.token", "others can read"),
        (None, "", "No such file"),
    ],
)
def test_wrong_login(cluster: Any, tmp_path: Path, mode: int | None, text: str, said: str) -> None:
    """A file that is missing, open to others or no login is named; what is in it is not."""
    file = tmp_path / "login.json"
    if mode is not None:
        file.write_text(text)
        file.chmod(mode)

    with pytest.raises(ConfigError, match=said) as caught:
        attach("clinic", state_dir=cluster.state, login=file)

    assert str(file) in caught.value.message
    assert "dana" not in caught.value.message

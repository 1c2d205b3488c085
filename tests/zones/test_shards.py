"""Shards say nothing about their place, and what comes back is in order again."""

from __future__ import annotations

import datetime as dt
import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zones.errors import RowCountError, UnknownNameError, ValueRefusedError
from zones.filters import apply_filter, filter_columns, to_expression
from zones.ipc import ipc_size, read_ipc, write_ipc_into
from zones.model import Obligations, Shuffle
from zones.plan import Plan, cut, draw, make_plan, order, parse_shuffle, permutation, plan_of_groups, split_rows
from zones.shards import reassemble, shard_size, shard_table, strip, write_shard_into

SEED = bytes(range(32))
SHUFFLES = ["rows", "none", "blocks(1)", "blocks(3)", "blocks(16)", "blocks(1000)"]


def obligations(shuffle: str) -> Obligations:
    """Return what a decision with this shuffle demands."""
    kind, block_rows = parse_shuffle(shuffle)
    return Obligations(shuffle=kind, block_rows=block_rows)


def plan_for(rows: int, shuffle: str = "rows", *, shard_rows: int = 10, min_shards: int = 1) -> Plan:
    """Plan shards of about *shard_rows* rows."""
    return make_plan(
        rows, 1, obligations=obligations(shuffle), seed=SEED, shard_bytes=shard_rows, min_shards=min_shards
    )


def mixed(rows: int) -> pa.Table:
    """Return a table of every kind of column, with nulls."""
    numbers = list(range(rows))
    return pa.table(
        {
            "f": pa.array(np.arange(rows, dtype=np.float64)),
            "i": pa.array(np.arange(rows), pa.int16()),
            "null": pa.array([None if n % 3 == 0 else n for n in numbers], pa.int64()),
            "bool": pa.array([n % 2 == 0 for n in numbers], pa.bool_()),
            "text": pa.array([f"row {n}" for n in numbers], pa.string()),
            "when": pa.array(numbers, pa.timestamp("ms")),
            "dec": pa.array(numbers, pa.int64()).cast(pa.decimal128(30, 2)),
            "list": pa.array([[n] * (n % 3) for n in numbers], pa.list_(pa.int32())),
            "struct": pa.array(
                [{"x": n} for n in numbers], pa.struct([("x", pa.int8() if rows < 100 else pa.int64())])
            ),
        }
    )


def written(table: pa.Table, plan: Plan, shard: int) -> bytes:
    """Serialise one shard."""
    out = bytearray(b"\xaa" * shard_size(table, plan, shard))
    assert write_shard_into(table, plan, shard, memoryview(out)) == len(out)
    return bytes(out)


@pytest.mark.parametrize("shuffle", SHUFFLES)
@given(rows=st.integers(0, 90), shard_rows=st.integers(1, 40), min_shards=st.integers(1, 9), split=st.booleans())
@settings(max_examples=25, deadline=None)
def test_order_returns(shuffle: str, rows: int, shard_rows: int, min_shards: int, split: bool) -> None:
    """Tables and arrays come back in the source's order for any rows, shuffle, cut and chunks."""
    source = mixed(rows)
    chunked = pa.concat_tables([source.slice(0, rows // 3), source.slice(rows // 3)]) if split else source
    table = strip(chunked)
    plan = plan_for(rows, shuffle, shard_rows=shard_rows, min_shards=min_shards)

    shards = {i: read_ipc(written(table, plan, i), trusted=False) for i in range(len(plan))}

    assert reassemble(shards, plan).equals(strip(source))
    arrays = {i: np.stack([shard["f"].to_numpy()] * 2, axis=1) for i, shard in shards.items()}
    assert reassemble(arrays, plan)[:, 1].tolist() == list(range(rows))
    for i, shard in shards.items():
        shard.validate(full=True)
        assert shard["f"].to_pylist() == plan.row_index(i).tolist()
        assert shard.equals(shard_table(table, plan, i))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_numbers_alone(shuffle: str) -> None:
    """A table of fixed-width columns, which goes straight into the buffer, reads the same as the slow way."""
    table = strip(mixed(101).select(["f", "i", "when", "dec"]))
    plan = plan_for(101, shuffle, shard_rows=33)

    for i in range(len(plan)):
        expected = bytearray(shard_size(table, plan, i))
        write_ipc_into(shard_table(table, plan, i), memoryview(expected))
        assert written(table, plan, i) == expected


def test_shuffles_move_rows() -> None:
    """Rows and blocks move, blocks stay whole, and none keeps the order."""
    rows, blocks, none = (
        np.concatenate([plan.row_index(i) for i in range(len(plan))])
        for plan in (plan_for(1000, shuffle, shard_rows=100) for shuffle in ("rows", "blocks(10)", "none"))
    )

    assert none.tolist() == list(range(1000))
    assert (np.diff(rows) == 1).sum() < 20
    assert (np.diff(blocks).reshape(-1)[:9] == 1).all()
    assert 895 <= (np.diff(blocks) == 1).sum() < 920


def test_order_depends_on_every_bit_of_the_seed() -> None:
    """Any changed bit of the seed draws another order; the same seed draws the same."""
    drawn = {permutation(50, (1 << bit).to_bytes(32, "big")).tobytes() for bit in range(256)}

    assert len(drawn) == 256
    assert permutation(50, SEED).tolist() == permutation(50, SEED).tolist()


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 300_000])
def test_order_is_that_of_what_was_drawn(count: int) -> None:
    """Units stand in the order of what was drawn for them, all of it: of 300,000, some ten pairs begin alike."""
    drawn = draw(count, SEED)
    alike = count - len(np.unique(drawn >> np.uint64(32)))

    assert permutation(count, SEED).tolist() == np.argsort(drawn, kind="stable").tolist()
    assert count < 300_000 or alike > 0


def test_order_is_uniform() -> None:
    """Over many seeds each row reaches each place equally often (chi-squared, p about 1e-6)."""
    counts = np.zeros((8, 8), int)
    for seed in range(4000):
        counts[np.arange(8), permutation(8, seed.to_bytes(32, "big"))] += 1

    assert ((counts - 500.0) ** 2 / 500).sum() < 110


def test_short_seed() -> None:
    """A seed that is not 32 bytes is refused."""
    with pytest.raises(ValueError, match="32 bytes"):
        order(10, Obligations(), b"short")


def test_plan_does_not_print_its_order() -> None:
    """The secret order is not in the plan's text."""
    assert "order" not in repr(plan_for(20))
    assert "cuts" not in repr(plan_for(20))


@given(st.integers(0, 5000), st.integers(1, 500), st.integers(1, 20_000), st.integers(1, 20))
@settings(deadline=None)
def test_cut(rows: int, row_bytes: int, shard_bytes: int, min_shards: int) -> None:
    """Cuts cover all rows without gaps, differ by one row at most, and keep to the sizes asked for."""
    cuts = cut(rows, row_bytes, shard_bytes, min_shards)
    lengths = [stop - start for start, stop in cuts]

    assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
    assert cuts[-1][1] == rows
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= max(1, shard_bytes // row_bytes)
    assert len(cuts) >= min(min_shards, max(rows, 1))


@pytest.mark.parametrize("text", ["", "row", "blocks", "blocks(0)", "blocks(-1)", "blocks(1.5)", "blocks(01)", "ROWS"])
def test_bad_shuffle(text: str) -> None:
    """A misspelt shuffle is refused, never taken for a weaker one."""
    with pytest.raises(ValueError, match="shuffle"):
        parse_shuffle(text)


# --- what a shard does not say -------------------------------------------------------------------------------------

_SECRETS = (b"INDEXNAME", b"SECRETCITY", b"FIELDNOTE", b"INNERNOTE", b"pandas")


def told() -> pa.Table:
    """Return a table whose schema says more than its rows."""
    frame = pd.DataFrame(
        {"age": np.arange(60.0), "city": pd.Categorical(["SECRETCITY", "other"] * 30)},
        index=pd.RangeIndex(60, name="INDEXNAME"),
    )
    table = pa.Table.from_pandas(frame)
    inner = pa.struct([pa.field("x", pa.int64(), metadata={"note": "INNERNOTE"})])
    table = table.append_column("s", pa.array([{"x": n} for n in range(60)], inner))
    return table.set_column(0, pa.field("age", pa.float64(), metadata={"note": "FIELDNOTE"}), table["age"])


def test_strip_hides_metadata_and_categories() -> None:
    """No serialised shard holds index names, notes or category values; unstripped, the same search finds each."""
    table = told()
    plan = plan_for(60, shard_rows=20)
    bare = b"".join(written(strip(table), plan, i) for i in range(len(plan)))
    control = b"".join(written(table, plan, i) for i in range(len(plan)))

    assert [secret for secret in _SECRETS if secret in bare] == []
    assert [secret for secret in _SECRETS if secret not in control] == []


def test_strip_keeps_codes() -> None:
    """A category column becomes its integer codes, the same category the same code in all chunks; others stay."""
    kind = pa.dictionary(pa.int8(), pa.string())
    chunks = [pa.array(["a", "b"]).dictionary_encode().cast(kind), pa.array(["b", None]).dictionary_encode().cast(kind)]
    columns: Any = {"c": pa.chunked_array(chunks), "n": [1, 2, 3, 4]}
    table = pa.table(columns)

    assert strip(table).to_pydict() == {"c": [0, 1, 1, None], "n": [1, 2, 3, 4]}
    assert strip(table).schema.metadata is None
    assert strip(table, keep_categories={"c"})["c"].to_pylist() == ["a", "b", "b", None]


@pytest.mark.parametrize(("ordered", "left"), [(False, ["a", "d"]), (True, ["d", "a"])])
def test_strip_keeps_used_categories(ordered: bool, left: list[str]) -> None:
    """Categories that a function asks for are those that its rows have, sorted unless their order means something."""
    kind: Any = pa.dictionary(pa.int8(), pa.string(), ordered=ordered)
    categories: Any = pa.DictionaryArray.from_arrays(
        pa.array([3, 0, 3, None], pa.int8()), pa.array(["d", "c", "b", "a"]), ordered=ordered
    )
    kept: Any = strip(pa.table({"c": categories.cast(kind)}), keep_categories=["c"])["c"]

    assert kept.type == kind
    assert kept.to_pylist() == ["a", "d", "a", None]
    assert kept.chunk(0).dictionary.to_pylist() == left


def test_strip_without_categories() -> None:
    """Asking for categories of a column that has none, or is not there, is refused."""
    table = pa.table({"n": [1, 2]})

    with pytest.raises(ValueRefusedError, match="column 'n' has no categories"):
        strip(table, keep_categories=["n"])
    with pytest.raises(UnknownNameError):
        strip(table, keep_categories=["m"])


def test_strip_copies_nothing_large() -> None:
    """Columns in one piece keep their memory."""
    numbers: Any = np.arange(1000.0)
    before: Any = pa.table({"a": numbers})["a"].chunk(0)
    after: Any = strip(pa.table({"a": before}))["a"].chunk(0)

    assert after.buffers()[1].address == before.buffers()[1].address


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"x" * 16], pa.uuid()),
        pa.UnionArray.from_dense(pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]),
        pa.StructArray.from_arrays([pa.array(["a"]).dictionary_encode()], ["x"]),
        pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array([1])),
    ],
    ids=["extension", "union", "inner dictionary", "runs"],
)
def test_strip_refuses(column: Any) -> None:
    """Types that can carry more than their rows are refused by name."""
    with pytest.raises(ValueRefusedError, match="column 'c'"):
        strip(pa.table([column], ["c"]))


@pytest.mark.parametrize("shuffle", ["rows", "blocks(4)", "none"])
def test_no_neighbour_in_a_shard(shuffle: str) -> None:
    """A shard's bytes hold no text of another shard's rows, not even of rows that a filter removed."""
    text = [f"<{n:04}>" for n in range(100)]
    view = pa.array(["a longer text in a view " + t for t in text]).cast(pa.string_view())
    columns: Any = {"t": text, "o": [None if n % 7 == 0 else t for n, t in enumerate(text)], "v": view}
    table = strip(pa.table(columns)).slice(0, 80)
    plan = plan_for(80, shuffle)

    for i in range(len(plan)):
        found = {n for n, t in enumerate(text) if t.encode() in written(table, plan, i)}
        assert found == set(plan.row_index(i).tolist())


@pytest.mark.parametrize("shuffle", ["rows", "blocks(4)", "none"])
def test_nothing_beneath_a_null(shuffle: str) -> None:
    """Values that are masked as null do not leave; without the shard step, Arrow would write them."""
    hidden = np.full(80, 0x53454352, np.int64)
    mask = pa.py_buffer(bytes(10))
    masked: Any = pa.Array.from_buffers(pa.int64(), 80, [mask, pa.py_buffer(hidden.tobytes())])
    struct = pa.StructArray.from_arrays([pa.array(hidden)], ["x"], mask=pa.array([True] * 80))
    table = pa.table([masked, struct], ["m", "s"])
    control = bytearray(ipc_size(table))
    write_ipc_into(table, memoryview(control))
    plan = plan_for(80, shuffle)

    assert control.count(b"RCES") == 160
    assert all(b"RCES" not in written(strip(table), plan, i) for i in range(len(plan)))


@pytest.mark.parametrize("names", [["f", "i"], ["f", "bool", "text", "null", "list", "struct"]])
@pytest.mark.parametrize("split", [False, True], ids=["one chunk", "two chunks"])
def test_no_position(names: list[str], split: bool) -> None:
    """The same rows at another place, or behind a chunk's border, make the same bytes."""
    part = mixed(60).select(names)
    whole = pa.concat_tables([part, part.slice(0, 25), part.slice(25), part])
    table = strip(whole if split else whole.combine_chunks())
    plan = plan_for(180, "none", shard_rows=60)

    assert written(table, plan, 0) == written(table, plan, 1) == written(table, plan, 2)


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [np.zeros(9), np.zeros((11, 2)), pa.table({"a": [1] * 9})])
def test_row_count(result: Any) -> None:
    """A part with another number of rows than its shard is refused with both counts."""
    plan = plan_for(20)

    with pytest.raises(RowCountError) as caught:
        reassemble({0: result, 1: result}, plan)

    assert caught.value.expected == 10
    assert caught.value.got == result.shape[0]


@pytest.mark.parametrize(
    "parts",
    [
        {0: np.zeros(10), 1: pa.table({"a": [1] * 10})},
        {0: np.zeros(10), 1: np.zeros((10, 2))},
        {0: np.zeros(10), 1: np.zeros(10, "<M8[s]")},
        {0: np.zeros(10), 1: np.float64(1)},
        {0: np.zeros(10), 1: [0] * 10},
        {0: pa.table({"a": [1] * 10}), 1: pa.table({"b": [1] * 10})},
        {0: pa.table({"a": [1] * 10}), 1: pa.table({"a": ["1"] * 10})},
    ],
)
def test_parts_that_do_not_fit(parts: Any) -> None:
    """Parts of different kinds are refused, not converted."""
    with pytest.raises(ValueRefusedError):
        reassemble(parts, plan_for(20))


def test_parts_that_fit() -> None:
    """Text of different lengths and a shard of nulls alone are the same kind."""
    plan = plan_for(20, "none")

    texts = reassemble({0: np.array(["a"] * 10), 1: np.array(["long"] * 10)}, plan)
    table = reassemble({0: pa.table({"a": [1] * 10}), 1: pa.table({"a": pa.nulls(10)})}, plan)

    assert texts.tolist() == ["a"] * 10 + ["long"] * 10
    assert table["a"].to_pylist() == [1] * 10 + [None] * 10


def test_missing_part() -> None:
    """A shard that did not come back is not passed over."""
    with pytest.raises(ValueError, match="2 shards"):
        reassemble({0: np.zeros(10)}, plan_for(20))


def test_wrong_table() -> None:
    """A table with another number of rows than the plan is a mistake of the caller."""
    with pytest.raises(ValueError, match="plan"):
        shard_table(mixed(21), plan_for(20), 0)


def test_short_buffer() -> None:
    """A buffer that is one byte short is refused on both ways."""
    for names in (["f"], ["text"]):
        table = mixed(20).select(names)
        out = memoryview(bytearray(shard_size(table, plan_for(20), 0) - 1))
        with pytest.raises(ValueError, match="fit"):
            write_shard_into(table, plan_for(20), 0, out)


@given(st.integers(0, 300), st.lists(st.floats(0.01, 0.3), min_size=1, max_size=3), st.binary(max_size=8))
@settings(deadline=None)
def test_split_rows(rows: int, fractions: list[float], seed: bytes) -> None:
    """A split is deterministic, disjoint, complete, sorted, and as large as asked for."""
    parts = split_rows(rows, fractions, seed)

    assert [part.tolist() for part in parts] == [part.tolist() for part in split_rows(rows, fractions, seed)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(abs(len(part) - rows * share) <= 1.01 for part, share in zip(parts, fractions, strict=False))


@pytest.mark.parametrize("fractions", [[], [0.0, 1.0], [0.7, 0.7], [-1.0], [float("nan")]])
def test_bad_fractions(fractions: list[float]) -> None:
    """Fractions that make no split are refused."""
    with pytest.raises(ValueError, match="fractions"):
        split_rows(10, fractions, b"")


# --- filters ---------------------------------------------------------------------------------------------------------

_PEOPLE = pa.table(
    {
        "age": [30, 40, None, 60],
        "name": ["a", "b", "c", "d"],
        "born": [dt.date(1990, 1, 1), dt.date(1980, 1, 1), None, dt.date(1960, 1, 1)],
        "and": [1, 2, 3, 4],
    }
)


@pytest.mark.parametrize(
    ("doc", "names"),
    [
        (None, "abcd"),
        (["age", ">", 35], "bd"),
        (["age", ">=", 40], "bd"),
        (["age", "<", 35], "a"),
        (["age", "<=", 40], "ab"),
        (["name", "==", "c"], "c"),
        (["name", "!=", "c"], "abd"),
        (["name", "in", ["a", "d", "z"]], "ad"),
        (["name", "not in", ["a", "d"]], "bc"),
        (["age", "is null"], "c"),
        (["age", "is null", None], "c"),
        (["age", "is not null"], "abd"),
        (["born", "<", "1985-01-01"], "bd"),
        (["and", "==", 2], "b"),
        (["and", ["age", ">", 35], ["name", "==", "d"]], "d"),
        (["or", ["age", "<", 35], ["name", "==", "d"], ["name", "==", "c"]], "acd"),
        (["not", ["name", "==", "d"]], "abc"),
    ],
)
def test_filter(doc: Any, names: str) -> None:
    """Each operator keeps the rows it says, on tables and on data sets."""
    for source in (_PEOPLE, ds.dataset(_PEOPLE)):
        found = apply_filter(source, doc, columns=["name"])
        assert found.to_pydict() == {"name": list(names)}


@pytest.mark.parametrize(
    "doc",
    [
        "age > 3", [], ["age"], ["age", ">"], ["age", ">", 3, 4], ["age", "~", 3], ["age", ">", None],
        ["age", ">", {"a": 1}], ["age", "in", 3], ["and"], ["xor", ["age", ">", 3]], [["age", ">", 3]],
        ["not", ["age", ">", 3], ["age", ">", 3]], ["age", ">", "three"], ["born", ">", "someday"],
        ["name", "in", ["a", 3]], ["age", "in", [[1]]], 3, {"age": 3}, ["age", ["<"], 3],
        ["age", "==", 10**400],
    ],
)  # fmt: skip
def test_bad_filter(doc: Any) -> None:
    """A malformed filter, or one that compares unlike types, is a ValueError."""
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own message
        apply_filter(_PEOPLE, doc)


def test_deep_filter() -> None:
    """Nesting is bounded."""
    doc: Any = ["age", ">", 3]
    for _ in range(5000):
        doc = ["not", doc]

    with pytest.raises(ValueError, match="deep"):
        to_expression(doc, ["age"])


def test_unknown_columns() -> None:
    """A column that does not exist is named, with those that do."""
    for attempt in (
        lambda: to_expression(["salary", ">", 3], ["age"]),
        lambda: apply_filter(_PEOPLE, None, columns=["x"]),
    ):
        with pytest.raises(UnknownNameError) as caught:
            attempt()
        assert caught.value.kind == "column"
        assert "age" in caught.value.known


def test_filter_columns() -> None:
    """The columns that a filter reads can be asked for, since which rows leave depends on them."""
    doc = ["and", ["age", ">", 35], ["not", ["name", "in", ["d"]]]]

    assert filter_columns(doc, _PEOPLE.schema) == {"age", "name"}


def test_none_is_a_choice() -> None:
    """Without an order nothing is drawn."""
    assert order(10, Obligations(shuffle=Shuffle.NONE), SEED) is None


@pytest.mark.parametrize("kind", ["rows", "window", "groups"])
def test_memory_of_an_order(kind: str) -> None:
    """An order takes 8 bytes a row, and up to 60 while it is drawn: what docs/operations.md says."""
    rows = 200_000
    how: dict[str, Any] = {"seed": bytes(32), "shard_bytes": 1 << 20}
    groups = np.arange(rows) // 8
    tracemalloc.start()
    try:
        if kind == "groups":
            made = plan_of_groups(groups, 100, obligations=Obligations(), **how)
        else:
            window = Obligations(shuffle_window=1000 if kind == "window" else None)
            made = make_plan(rows, 100, obligations=window, **how)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert made.order is not None
    assert 8 * rows <= kept < 9 * rows
    assert 16 * rows < most < 62 * rows

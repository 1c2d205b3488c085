"""zones.merkle: the tree of RFC 9162 as other implementations have it, and proofs that hold for nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zones.merkle import (
    EMPTY_ROOT,
    Frontier,
    consistency_proof,
    inclusion_proof,
    is_consistent,
    leaf_hash,
    node_hash,
    root,
    root_from_inclusion,
)

#: Leaves and roots that Certificate Transparency's own implementations are tested with.
INPUTS = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
LEAVES = [leaf_hash(bytes.fromhex(text)) for text in INPUTS]
#: Every size up to here is tried with every index.
SIZES = range(1, 26)


def leaves(count: int) -> list[bytes]:
    """Return leaf hashes."""
    return [leaf_hash(str(number).encode()) for number in range(count)]


def test_known_roots() -> None:
    """The roots of trees of 0 to 8 leaves are those of Certificate Transparency."""
    assert hashlib.sha256(b"").digest() == EMPTY_ROOT == root([])
    assert [root(LEAVES[: size + 1]).hex() for size in range(8)] == ROOTS


def test_known_proofs() -> None:
    """So are an inclusion and a consistency proof, written out."""
    one, two = node_hash(*LEAVES[0:2]), node_hash(*LEAVES[2:4])
    right = node_hash(node_hash(*LEAVES[4:6]), node_hash(*LEAVES[6:8]))

    assert inclusion_proof(5, LEAVES) == [LEAVES[4], node_hash(*LEAVES[6:8]), node_hash(one, two)]
    assert consistency_proof(6, LEAVES) == [node_hash(*LEAVES[4:6]), node_hash(*LEAVES[6:8]), node_hash(one, two)]
    assert consistency_proof(3, LEAVES) == [LEAVES[2], LEAVES[3], one, right]


def test_frontier() -> None:
    """A tree that grows leaf by leaf has the root of the whole at each size, also when it is taken up again."""
    frontier = Frontier()
    for size in SIZES:
        frontier = Frontier(frontier.size, frontier.nodes)
        frontier.append(leaves(size)[-1])
        assert frontier.root() == root(leaves(size))
    other = frontier.copy()
    other.append(LEAVES[0])
    assert frontier.size == len(SIZES)
    assert len(other.nodes) == other.size.bit_count()


@pytest.mark.parametrize(("size", "nodes"), [(1, []), (2, [b"x" * 32] * 2), (1, [b"x"]), (-1, [])])
def test_frontier_of_another_size(size: int, nodes: list[bytes]) -> None:
    """Hashes that are not those of a tree of that size are refused."""
    with pytest.raises(ValueError, match="one hash of 32 bytes for each bit"):
        Frontier(size, nodes)


@pytest.mark.parametrize("size", SIZES)
def test_every_inclusion_proof(size: int) -> None:
    """Each leaf's proof leads to the root, from its own place alone."""
    tree = leaves(size)
    for index in range(size):
        proof = inclusion_proof(index, tree)
        assert root_from_inclusion(tree[index], index, size, proof) == root(tree)
        for other in range(size):
            if other != index:
                try:
                    assert root_from_inclusion(tree[index], other, size, proof) != root(tree)
                except ValueError as error:
                    assert "too" in str(error)  # noqa: PT017 - either is a refusal
        for wrong, message in (([*proof, bytes(32)], "too long"), (proof[:-1], "too short")):
            if wrong != proof:
                with pytest.raises(ValueError, match=message):
                    root_from_inclusion(tree[index], index, size, wrong)


@pytest.mark.parametrize("size", SIZES)
def test_every_consistency_proof(size: int) -> None:
    """Each beginning of a tree is proven to be one, and no other tree is."""
    tree, whole = leaves(size), root(leaves(size))
    for old in range(1, size + 1):
        proof = consistency_proof(old, tree)
        assert is_consistent(old, root(tree[:old]), size, whole, proof)
        assert not is_consistent(old, bytes(32), size, whole, proof)
        assert not is_consistent(old, root(tree[:old]), size, bytes(32), proof)
        assert not is_consistent(old, root(tree[:old]), size, whole, [*proof, bytes(32)])
        if proof:
            assert not is_consistent(old, root(tree[:old]), size, whole, proof[:-1])
            assert not is_consistent(old, root(tree[:old]), size, whole, [bytes(32), *proof[1:]])
    for one, other in pairwise(range(1, size + 1)):
        assert not is_consistent(other, root(tree[:one]), size, whole, consistency_proof(one, tree))


def test_no_such_leaf() -> None:
    """A place outside the tree has no proof, and none is accepted for it."""
    for call in (
        lambda: inclusion_proof(3, leaves(3)),
        lambda: inclusion_proof(-1, leaves(3)),
        lambda: root_from_inclusion(LEAVES[0], 3, 3, []),
        lambda: consistency_proof(0, leaves(3)),
        lambda: consistency_proof(4, leaves(3)),
    ):
        with pytest.raises(ValueError, match=r"no leaf|no beginning"):
            call()
    assert not is_consistent(0, EMPTY_ROOT, 3, root(leaves(3)), [])
    assert not is_consistent(4, bytes(32), 3, root(leaves(3)), [])
    assert not is_consistent(3, bytes(32), 4, root(leaves(4)), [])


@settings(max_examples=50, deadline=None)
@given(data=st.data(), size=st.integers(2, 200))
def test_a_changed_byte(data: st.DataObject, size: int) -> None:
    """A proof with any one bit flipped leads to another root."""
    tree = leaves(size)
    index = data.draw(st.integers(0, size - 1))
    proof = inclusion_proof(index, tree)
    place, bit = data.draw(st.integers(0, len(proof) - 1)), data.draw(st.integers(0, 255))
    changed = int.from_bytes(proof[place]) ^ (1 << bit)
    proof[place] = changed.to_bytes(32)

    assert root_from_inclusion(tree[index], index, size, proof) != root(tree)


# -- vectors of other implementations ---------------------------------------------------------------

VECTORS = Path(__file__).parents[1] / "vectors"


def cases(name: str) -> list[dict[str, Any]]:
    """Return the vectors in a file."""
    found: list[dict[str, Any]] = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def decoded(text: str | None) -> bytes:
    """Return bytes from base64; what is not there is empty."""
    return base64.b64decode(text or "")


@pytest.mark.parametrize("case", cases("merkle_inclusion"), ids=lambda case: case["case"])
def test_public_inclusion_vector(case: dict[str, Any]) -> None:
    """A vector is accepted or refused as its makers say."""
    proof = [decoded(node) for node in case["proof"] or ()]
    try:
        found = root_from_inclusion(decoded(case["leafHash"]), case["leafIdx"], case["treeSize"], proof)
        refused = found != decoded(case["root"])
    except ValueError:
        refused = True

    assert refused is case["wantErr"], case["desc"]


@pytest.mark.parametrize("case", cases("merkle_consistency"), ids=lambda case: case["case"])
def test_public_consistency_vector(case: dict[str, Any]) -> None:
    """A vector is accepted or refused as its makers say."""
    proof = [decoded(node) for node in case["proof"] or ()]
    held = is_consistent(case["size1"], decoded(case["root1"]), case["size2"], decoded(case["root2"]), proof)

    assert held is not case["wantErr"], case["desc"]


def test_number_of_vectors() -> None:
    """None of them was lost."""
    assert [len(cases(f"merkle_{name}")) for name in ("inclusion", "consistency")] == [98, 98]

"""The Merkle tree of RFC 9162, section 2.1, with SHA-256: roots, inclusion and consistency proofs. Pure.

Leaves are bytes, numbered from 0. A :class:`Frontier` grows a tree of any size in the memory of its logarithm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Bytes of a hash.
HASH_BYTES = 32
#: The root of a tree without leaves.
EMPTY_ROOT = hashlib.sha256().digest()


def leaf_hash(data: bytes) -> bytes:
    """Return the hash of a leaf, 32 bytes."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node, 32 bytes, from those of its children."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(slots=True)
class Frontier:
    """A tree that grows at its end: the roots of its perfect subtrees, the largest first.

    Args:
        size: Number of leaves.
        nodes: One hash of 32 bytes for each bit that is set in *size*, the highest first.

    Raises:
        ValueError: *nodes* are not those of a tree of this size.
    """

    size: int = 0
    nodes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.size < 0 or len(self.nodes) != self.size.bit_count() or any(len(n) != HASH_BYTES for n in self.nodes):
            raise ValueError(f"a tree of {self.size} leaves has one hash of 32 bytes for each bit of its size")

    def append(self, leaf: bytes) -> None:
        """Add a leaf, given its hash (:func:`leaf_hash`)."""
        node, size = leaf, self.size
        while size & 1:
            node, size = node_hash(self.nodes.pop(), node), size >> 1
        self.nodes.append(node)
        self.size += 1

    def copy(self) -> Frontier:
        """Return another one of the same tree, that grows by itself."""
        return Frontier(self.size, list(self.nodes))

    def root(self) -> bytes:
        """Return the root of the tree, 32 bytes."""
        if not self.nodes:
            return EMPTY_ROOT
        node = self.nodes[-1]
        for left in reversed(self.nodes[:-1]):
            node = node_hash(left, node)
        return node


def root(leaves: Sequence[bytes]) -> bytes:
    """Return the root of the tree over leaf hashes."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf)
    return frontier.root()


def _split(size: int) -> int:
    """Return the largest power of two below *size*, which is at least 2."""
    return 1 << ((size - 1).bit_length() - 1)


def inclusion_proof(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    """Return the hashes beside the way from a leaf to the root, the leaf's neighbour first (PATH of the RFC).

    Raises:
        ValueError: There is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise ValueError(f"there is no leaf {index} among {len(leaves)}")
    if len(leaves) == 1:
        return []
    half = _split(len(leaves))
    if index < half:
        return [*inclusion_proof(index, leaves[:half]), root(leaves[half:])]
    return [*inclusion_proof(index - half, leaves[half:]), root(leaves[:half])]


def consistency_proof(old_size: int, leaves: Sequence[bytes]) -> list[bytes]:
    """Return what shows that the first *old_size* leaves are the beginning of the tree (PROOF of the RFC).

    Raises:
        ValueError: *old_size* is not from 1 to the number of leaves.
    """
    if not 0 < old_size <= len(leaves):
        raise ValueError(f"a tree of {old_size} leaves is no beginning of one of {len(leaves)}")
    return _subproof(old_size, leaves, whole=True)


def _subproof(old_size: int, leaves: Sequence[bytes], *, whole: bool) -> list[bytes]:
    if old_size == len(leaves):
        return [] if whole else [root(leaves)]
    half = _split(len(leaves))
    if old_size <= half:
        return [*_subproof(old_size, leaves[:half], whole=whole), root(leaves[half:])]
    return [*_subproof(old_size - half, leaves[half:], whole=False), root(leaves[:half])]


def root_from_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> bytes:
    """Return the root of the tree of *size* leaves that *proof* leads to from leaf hash number *index*.

    The leaf is in the tree if this is its root (RFC 9162, section 2.1.3.2).

    Raises:
        ValueError: No proof for this place has so many hashes, or one is not 32 bytes.
    """
    if not 0 <= index < size:
        raise ValueError(f"there is no leaf {index} among {size}")
    if any(len(one) != HASH_BYTES for one in (leaf, *proof)):
        raise ValueError("a hash has 32 bytes")
    node, place, last = leaf, index, size - 1
    for sibling in proof:
        if last == 0:
            raise ValueError("the proof is too long")
        if place & 1 or place == last:
            node = node_hash(sibling, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        place, last = place >> 1, last >> 1
    if last:
        raise ValueError("the proof is too short")
    return node


def is_consistent(old_size: int, old_root: bytes, size: int, new_root: bytes, proof: Sequence[bytes]) -> bool:
    """Say whether *proof* shows that the tree of *size* leaves begins with that of *old_size* (section 2.1.4.2)."""
    if not 0 < old_size <= size or any(len(node) != HASH_BYTES for node in proof):
        return False
    if old_size == size:
        return not proof and old_root == new_root
    path = list(proof)
    if old_size & (old_size - 1) == 0:
        path.insert(0, old_root)
    if not path:
        return False
    place, last = old_size - 1, size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    older = newer = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            older, newer = node_hash(sibling, older), node_hash(sibling, newer)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            newer = node_hash(newer, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and older == old_root and newer == new_root

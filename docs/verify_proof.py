"""Check a proof from a ray-gpu ledger with nothing of ray-gpu: Python 3.9 or later, and the package cryptography.

    python verify_proof.py PROOF.json KEY                   an entry is in the ledger: prints the fields that are opened
    python verify_proof.py PROOF.json KEY OLD_CHECKPOINT    the ledger has only grown since OLD_CHECKPOINT (a file)

KEY is the zone's, as `ray-gpu vault ledger-key` prints it; get it from the zone by another way than the proof.
Exit status 0: it holds. 1: it does not. ledger.md describes every byte; tests/zones/test_proof.py runs this file.
"""

import base64
import hashlib
import json
import sys

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def sha256(data):
    """Return 32 bytes."""
    return hashlib.sha256(data).digest()


def need(holds, otherwise):
    """Stop unless something holds. Not `assert`, which `python -O` leaves out."""
    if not holds:
        raise ValueError(otherwise)


def open_note(note, key):
    """Return origin, size and root of a signed checkpoint (C2SP tlog-checkpoint); fail unless the key signed it."""
    name, number, encoded = key.split("+", 2)
    public = base64.b64decode(encoded)
    identity = sha256(name.encode() + b"\n" + public)[:4]
    need(public[0] == 1 and identity.hex() == number, "the key does not belong to its id")
    text, _, signatures = note.rpartition("\n\n")
    origin, size, root = text.split("\n")[:3]
    need(origin == name, "the checkpoint is of another ledger than the key")
    for line in signatures.splitlines():
        dash, signer, signature = line.split(" ")
        data = base64.b64decode(signature)
        if (dash, signer, data[:4]) == ("—", name, identity):
            Ed25519PublicKey.from_public_bytes(public[1:]).verify(data[4:], (text + "\n").encode())
            return origin, int(size), base64.b64decode(root)
    raise ValueError("the key has not signed the checkpoint")


def climb(path, place, last, nodes):
    """Walk up the tree of RFC 9162, sections 2.1.3.2 and 2.1.4.2; `nodes` are (hash, whether what is right counts)."""
    for sibling in path:
        need(last > 0 and len(sibling) == 32, "the path is too long, or has something that is no hash")
        if place & 1 or place == last:
            nodes = [(sha256(b"\x01" + sibling + node), counts) for node, counts in nodes]
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            nodes = [(sha256(b"\x01" + node + sibling) if counts else node, counts) for node, counts in nodes]
        place, last = place >> 1, last >> 1
    need(last == 0, "the path is too short")
    return [node for node, _ in nodes]


def check_inclusion(proof, size, root):
    """Print the opened fields of an entry that is in the ledger."""
    commitments = [bytes.fromhex(one) for one in proof["commitments"]]
    for field in proof["opened"]:
        text = json.dumps([field["name"], field["value"]], sort_keys=True, separators=(",", ":")).encode("ascii")
        opened = sha256(b"ray-gpu ledger v2 field\n" + bytes.fromhex(field["salt"]) + text)
        need(opened in commitments, f"the value of {field['name']} is not the one in the ledger")
        need(field["name"] != "seq" or field["value"] == proof["index"] + 1, "the entry has another number")
    leaf = sha256(b"\x00" + sha256(b"ray-gpu ledger v2 entry\n" + b"".join(commitments)))
    need(0 <= proof["index"] < size and commitments == sorted(commitments), "this is no inclusion proof")
    path = [bytes.fromhex(node) for node in proof["path"]]
    need(climb(path, proof["index"], size - 1, [(leaf, True)]) == [root], "the entry is not in the ledger")
    print(json.dumps({"entry": proof["index"] + 1, **{f["name"]: f["value"] for f in proof["opened"]}}, indent=2))


def check_growth(proof, size, root, old_size, old_root):
    """Say that the ledger of the older checkpoint is the beginning of the newer one's."""
    need(proof["old_size"] == old_size and 0 < old_size <= size, "the proof is about another checkpoint")
    path = [bytes.fromhex(node) for node in proof["path"]]
    if old_size == size:
        need(not path and root == old_root, "the ledger was rewritten")
    else:
        if old_size & (old_size - 1) == 0:
            path.insert(0, old_root)
        place, last = old_size - 1, size - 1
        while place & 1:
            place, last = place >> 1, last >> 1
        found = climb(path[1:], place, last, [(path[0], False), (path[0], True)])
        need(found == [old_root, root], "the ledger was rewritten")
    print(f"the ledger of {old_size} entries has grown to {size}; none of them changed")


def main(proof_file, key, old_file=None):
    """Check a proof; with an older checkpoint, that the ledger only grew."""
    with open(proof_file, encoding="utf-8") as file:
        proof = json.load(file)
    origin, size, root = open_note(proof["checkpoint"], key)
    if old_file is None:
        need(proof["format"] == "ray-gpu ledger inclusion v1", "this is no inclusion proof")
        return check_inclusion(proof, size, root)
    need(proof["format"] == "ray-gpu ledger growth v1", "this is no growth proof")
    with open(old_file, encoding="utf-8") as file:
        old_origin, old_size, old_root = open_note(file.read(), key)
    need(old_origin == origin, "the checkpoints are of two ledgers")
    return check_growth(proof, size, root, old_size, old_root)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as problem:
        sys.exit(f"does not hold: {problem or type(problem).__name__}")

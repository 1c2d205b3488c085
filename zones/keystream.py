"""Random bytes that follow from a seed, as many as wanted, in little time. Pure."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

#: What the cipher's output buffer has to be longer than its input.
_ROOM_BYTES = 16


def keystream(seed: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Return ``uint8[size]`` that nobody without *seed* can tell from random bytes.

    AES-256 in counter mode (FIPS 197, NIST SP 800-38A) under the SHA-256 of *seed*. The first bytes are the same
    whatever *size* is.
    """
    cipher = Cipher(algorithms.AES(hashlib.sha256(seed).digest()), modes.CTR(bytes(16)))
    stream = np.empty(size + _ROOM_BYTES, np.uint8)
    cipher.encryptor().update_into(np.zeros(size, np.uint8).data, stream.data)
    return stream[:size]

"""The identity of a full KV block: a SHA-256 chain over token ids.

`h_i = SHA256(h_{i-1} || extra || tokens_i)`; the first block chains from a root of zeros. `extra` holds whatever else
decides what is in the block (a tenant's salt, an adapter's digest). The same chain names a block in every tier, on the
wire, and in a router's index.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

ROOT = bytes(32)


def block_hash(parent: bytes, token_ids: Sequence[int], extra: bytes = b"") -> bytes:
    """Hash of one full block. Token ids are packed as little-endian unsigned 32-bit, `extra` is length-prefixed."""
    digest = hashlib.sha256(parent)
    digest.update(struct.pack("<I", len(extra)))
    digest.update(extra)
    digest.update(struct.pack(f"<{len(token_ids)}I", *token_ids))
    return digest.digest()


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int, extra: bytes = b"") -> None:
    """Append to `hashes` the chain for every block of `token_ids` that is full and not hashed yet."""
    for index in range(len(hashes), len(token_ids) // block_size):
        parent = hashes[-1] if hashes else ROOT
        hashes.append(block_hash(parent, token_ids[index * block_size : (index + 1) * block_size], extra))

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from quire.core.prefix import ROOT, block_hash, extend_hashes

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def by_hand(tokens, block_size, extra):
    chain, parent = [], ROOT
    for first in range(0, len(tokens) - block_size + 1, block_size):
        body = len(extra).to_bytes(4, "little") + extra
        body += b"".join(token.to_bytes(4, "little") for token in tokens[first : first + block_size])
        parent = hashlib.sha256(parent + body).digest()
        chain.append(parent)
    return chain


@given(tokens=TOKENS, block_size=st.integers(1, 8), extra=st.binary(max_size=5), cut=st.integers(0, 40))
def test_the_chain_is_the_same_however_it_grew(tokens, block_size, extra, cut):
    grown: list[bytes] = []
    extend_hashes(grown, tokens[:cut], block_size, extra)
    extend_hashes(grown, tokens, block_size, extra)
    assert grown == by_hand(tokens, block_size, extra)


@given(tokens=st.lists(st.integers(0, 99), min_size=4, max_size=4), extra=st.binary(min_size=1, max_size=5))
def test_a_salt_or_another_parent_gives_another_identity(tokens, extra):
    plain = block_hash(ROOT, tokens)
    assert block_hash(ROOT, tokens, extra) != plain
    assert block_hash(plain, tokens) != plain

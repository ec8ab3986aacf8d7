"""The sparse block by Triton where the common tests do not reach: tiles of pairs, and who is in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quire.ops.moe import MoeWeights, moe, route
from quire.ops.target import Target
from quire.ops.triton.library import TRITON, interprets
from quire.ops.triton.linear import TritonLinear
from quire.ops.triton.moe import TritonMoe, TritonMoeWeights
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, pack_nibbles, split

pytestmark = pytest.mark.skipif(not interprets(), reason="needs Triton's interpreter")
BF16 = torch.bfloat16
E, I = 64, 48  # noqa: E741


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(shape[-1] ** -0.5).to(BF16)


def block(n: int, top_k: int, *, renormalize: bool = True) -> MoeWeights:
    return MoeWeights(
        router=random(n, E, seed=1) * 30,
        gate=list(random(n, I, E, seed=2)),
        up=list(random(n, I, E, seed=3)),
        down=list(random(n, E, I, seed=4)),
        top_k=top_k,
        renormalize=renormalize,
    )


def kernel() -> TritonMoe:
    return TritonMoe(Target("cpu", BF16, isa=TRITON))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("renormalize", [False, True])
def test_routing_is_the_definitions_with_ties_and_what_is_no_number(renormalize):
    weights = block(7, 3, renormalize=renormalize)
    logits = torch.randint(-2, 3, (20, 7), generator=torch.Generator().manual_seed(0)).to(BF16)
    probabilities, experts = kernel()._route(logits, weights)
    expected, expected_experts = route(logits, weights)
    order = expected_experts.argsort(dim=-1)
    assert torch.equal(experts.long(), expected_experts.gather(1, order))
    torch.testing.assert_close(probabilities, expected.gather(1, order))
    logits[0], logits[1, 2], logits[2] = torch.nan, torch.nan, -torch.inf
    _, experts = kernel()._route(logits, weights)
    assert all(0 <= row[0] < row[1] < row[2] < 7 for row in experts.tolist())


@pytest.mark.parametrize(("pairs", "n", "tile"), [(1, 1, 16), (5, 40, 16), (300, 3, 32), (1500, 9, 64)])
def test_each_pair_has_a_place_in_a_tile_of_its_expert(pairs, n, tile):
    """Counted in one piece and in several, with experts that nobody sees."""
    experts = torch.randint(0, n, (pairs, 1), generator=torch.Generator().manual_seed(pairs)).int()
    experts[experts == 2] = 0
    found = kernel()._arrange(experts, n, tile)
    num_tiles = int(found.num_tiles)
    assert num_tiles <= found.most_tiles
    assert num_tiles == sum(-(-int(count) // tile) for count in experts.flatten().bincount())
    places = found.places.view(-1, tile)[:num_tiles]
    for row, expert in zip(places.tolist(), found.tile_experts.tolist()):
        assert all(int(experts[pair, 0]) == expert for pair in row if pair >= 0)
    assert sorted(places[places >= 0].tolist()) == list(range(pairs))


def test_rows_are_alone_in_tiles_of_any_width():
    x, weights = random(60, E, seed=6) * 5, block(3, 2)
    moe_kernel = kernel()
    joined = moe_kernel.join(weights)
    assert isinstance(joined, TritonMoeWeights)
    whole = moe_kernel(x, joined)
    near = torch.isclose(whole.float(), moe(x, weights).float(), rtol=2e-2, atol=2e-2).all(-1)
    assert near.float().mean() >= 0.9  # a logit may round the other way and the row see another expert
    for rows in (slice(5, 6), slice(40, 60)):
        assert torch.equal(moe_kernel(x[rows], joined), whole[rows])


def test_experts_of_several_formats_are_computed_one_by_one():
    weights = block(3, 2)
    scale = torch.full((E,), 0.002)
    int8 = Int8Weight(values_nk=(weights.down[1].float() * 500).round().clamp(-127, 127).to(torch.int8), scale_n=scale)
    nibbles = torch.randint(0, 16, (I, E), generator=torch.Generator().manual_seed(0))
    int4 = Int4Weight(nibbles_nk2=pack_nibbles(nibbles), scale_ng=torch.full((I, 2), 0.02), zero_ng=None, group_size=32)
    mixed = replace(weights, gate=[weights.gate[0], int4, int4], down=[weights.down[0], int8, weights.down[2]])
    moe_kernel = kernel()
    packed_int4 = moe_kernel._int4.pack(int4)
    joined = moe_kernel.join(replace(mixed, gate=[weights.gate[0], packed_int4, packed_int4]))
    x = torch.randint(-2, 3, (4, E), generator=torch.Generator().manual_seed(5)).to(BF16) / 2
    found = moe_kernel(x, joined)
    torch.testing.assert_close(found, moe(x, mixed), rtol=5e-2, atol=5e-2)
    assert torch.equal(moe_kernel(x[1:2], joined), found[1:2])


def test_experts_are_read_where_they_lie():
    """Unaligned and scattered ones as well: no weight is copied."""
    weights = block(2, 1)
    room = torch.zeros(1 + I * E, dtype=BF16)
    room[1:] = weights.gate[1].flatten()
    scattered = replace(weights, gate=[weights.gate[0], room[1:].view(I, E)])
    x = random(3, E, seed=8)
    moe_kernel = kernel()
    assert torch.equal(moe_kernel(x, moe_kernel.join(scattered)), moe_kernel(x, moe_kernel.join(weights)))
    router = TritonLinear(Target("cpu", BF16, isa=TRITON)).pack(weights.router)
    assert router.data_ptr() == weights.router.data_ptr()


@pytest.mark.parametrize(("zeros", "span"), [(False, False), (True, False), (False, True)])
def test_experts_in_4_bits_take_one_call(zeros, span):
    """Of free scales, with zero points, and of scales that are multiples of a step."""
    generator = torch.Generator().manual_seed(zeros + 2 * span)

    def int4(n: int, k: int) -> Int4Weight:
        multiples = torch.randint(1, 16, (n, k // 32), generator=generator)
        weight = Int4Weight(
            nibbles_nk2=pack_nibbles(torch.randint(0, 16, (n, k), generator=generator)),
            scale_ng=multiples / 1024.0,
            zero_ng=torch.randint(0, 16, multiples.shape, generator=generator).to(torch.uint8) if zeros else None,
            group_size=32,
        )
        return split(weight) if span else weight

    wide = 64
    weights = replace(
        block(3, 2),
        gate=[int4(wide, E) for _ in range(3)],
        up=[int4(wide, E) for _ in range(3)],
        down=[int4(E, wide) for _ in range(3)],
        router=torch.randint(-2, 3, (3, E), generator=generator).to(BF16),
    )
    moe_kernel = kernel()
    packed = {
        name: [moe_kernel._int4.pack(weight) for weight in getattr(weights, name)] for name in ("gate", "up", "down")
    }
    joined = moe_kernel.join(replace(weights, **packed))
    assert isinstance(joined, TritonMoeWeights)
    x = torch.randint(-2, 3, (20, E), generator=generator).to(BF16) / 2
    found = moe_kernel(x, joined)
    torch.testing.assert_close(found, moe(x, weights), rtol=3e-2, atol=3e-2)
    assert torch.equal(moe_kernel(x[7:8], joined), found[7:8])


def test_experts_of_8_bit_floats_take_rows_of_such():
    generator = torch.Generator().manual_seed(3)

    def fp8(n: int, k: int) -> Fp8Weight:
        values = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
        return Fp8Weight(values_nk=values, scale_n=torch.full((n,), k**-0.5), rounds_rows=True)

    weights = replace(
        block(2, 1),
        gate=[fp8(I, E) for _ in range(2)],
        up=[fp8(I, E) for _ in range(2)],
        down=[fp8(E, I) for _ in range(2)],
        router=torch.randint(-2, 3, (2, E), generator=generator).to(BF16),
    )
    moe_kernel = kernel()
    joined = moe_kernel.join(weights)
    assert isinstance(joined, TritonMoeWeights)
    x = torch.randint(-2, 3, (20, E), generator=generator).to(BF16) / 2
    found = moe_kernel(x, joined)
    # A value between two steps of the rows may go to either: a sixteenth of it, of one in many.
    torch.testing.assert_close(found, moe(x, weights), rtol=5e-2, atol=5e-2)
    assert torch.equal(moe_kernel(x[7:8], joined), found[7:8])


def test_a_choice_of_another_router_is_computed_as_the_blocks_own():
    """In any order of a row's experts; and experts of several formats one by one."""
    x, weights = random(20, E, seed=6) * 5, block(5, 3)
    moe_kernel = kernel()
    joined = moe_kernel.join(weights)
    shares, experts = moe_kernel._route(moe_kernel._linear(x, weights.router), weights)
    order = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    mixed = (shares.gather(1, order), experts.long().gather(1, order))
    assert torch.equal(moe_kernel.mix(x, joined, *mixed), moe_kernel(x, joined))
    one_by_one = moe_kernel.mix(x, weights, *mixed)
    torch.testing.assert_close(one_by_one, moe_kernel(x, joined), rtol=2e-2, atol=2e-2)
    assert moe_kernel.mix(x[:0], joined, *(each[:0] for each in mixed)).shape == (0, E)

"""The sparse feed-forward block where the common test of implementations does not reach."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from quire.ops.cpu.library import REFERENCE, usable_isas
from quire.ops.kernels import Kernels, select
from quire.ops.moe import MoeWeights, moe, route
from quire.ops.target import Target

BF16 = torch.bfloat16
ISAS = pytest.mark.parametrize("isa", usable_isas())
E, I, N = 96, 64, 16  # noqa: E741


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(shape[-1] ** -0.5).to(BF16)


def block(top_k: int = 4, *, renormalize: bool = True, num_experts: int = N) -> MoeWeights:
    return MoeWeights(
        router=random(num_experts, E, seed=1) * 30,
        gate=list(random(num_experts, I, E, seed=2)),
        up=list(random(num_experts, I, E, seed=3)),
        down=list(random(num_experts, E, I, seed=4)),
        top_k=top_k,
        renormalize=renormalize,
    )


def kernels(isa: str, threads: int = 1) -> Kernels:
    return select(Target("cpu", BF16, isa=isa, threads=threads))


def join(kernels: Kernels, weights: MoeWeights):
    gate, up, down = (list(map(kernels.linear.pack, each)) for each in (weights.gate, weights.up, weights.down))
    packed = replace(weights, router=kernels.linear.pack(weights.router), gate=gate, up=up, down=down)
    return kernels.moe.join(packed)


def test_routing_is_that_of_transformers():
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    for renormalize in (False, True):
        weights = block(3, renormalize=renormalize)
        config = Qwen3MoeConfig(hidden_size=E, num_experts=N, num_experts_per_tok=3, norm_topk_prob=renormalize)
        router = Qwen3MoeTopKRouter(config)
        router.weight.data = weights.router.float()
        logits, probabilities, experts = router(random(50, E, seed=5).float())
        found, found_experts = route(logits, weights)
        assert torch.equal(found_experts, experts)
        torch.testing.assert_close(found, probabilities)


def test_of_equally_likely_experts_the_first_are_taken():
    weights = block(3, renormalize=True)
    probabilities, experts = route(torch.zeros(2, N), weights)
    assert experts.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(probabilities, torch.full((2, 3), 1 / 3))


@ISAS
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 70])
def test_it_is_near_the_definition_and_the_same_on_two_threads(isa, rows, renormalize):
    weights = block(renormalize=renormalize)
    x = random(rows, E, seed=6) * 5
    one, two = kernels(isa, 1), kernels(isa, 2)
    found = one.moe(x, join(one, weights))
    assert torch.equal(found, two.moe(x, join(two, weights)))
    expected = moe(x, weights)
    # A logit may round the other way and the row see another expert: rare, and no fault.
    near = torch.isclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2).all(-1)
    assert near.float().mean() >= 0.9


@ISAS
def test_a_row_has_the_same_bits_in_any_company(isa):
    """Enough rows for experts to see many of them and few."""
    chosen = kernels(isa, 2)
    kernel, weights = chosen.moe, join(chosen, block())
    x = random(500, E, seed=7) * 5
    whole = kernel(x, weights)
    for start, stop in ((0, 1), (7, 9), (100, 165), (3, 499), (499, 500)):
        assert torch.equal(kernel(x[start:stop], weights), whole[start:stop])
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernel(x[order], weights), whole[order])


@pytest.mark.parametrize("isa", [REFERENCE, *usable_isas()])
def test_a_broken_row_harms_no_other(isa):
    chosen = kernels(isa)
    kernel, weights = chosen.moe, join(chosen, block())
    x = random(9, E, seed=8)
    healthy = kernel(x, weights)
    x[4, 5] = math.nan
    found = kernel(x, weights)
    assert not found[4].isfinite().any()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(found[others], healthy[others])
    assert kernel(x[:0], weights).shape == (0, E)


@ISAS
def test_two_blocks_share_memory_and_differ_in_size(isa):
    chosen = kernels(isa)
    kernel, small, large = chosen.moe, join(chosen, block(2, num_experts=4)), join(chosen, block(8))
    x = random(20, E, seed=9)
    alone = kernel(x, small)
    kernel(random(200, E, seed=10), large)
    assert torch.equal(kernel(x, small), alone)


@ISAS
def test_shapes_that_do_not_go_together(isa):
    plain = block()
    with pytest.raises(ValueError, match="shape"):
        join(kernels(isa), replace(plain, down=plain.up))
    with pytest.raises(ValueError, match="number of experts"):
        join(kernels(isa), replace(plain, top_k=N + 1))
    with pytest.raises(ValueError, match="number of experts"):
        join(kernels(isa), replace(plain, gate=plain.gate[:-1]))

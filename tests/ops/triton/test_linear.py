"""Linear layers by Triton where the common test of implementations does not reach: how products are cut up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire.ops.linear import LINEAR_INT4, linear, linear_fp8, linear_int8
from quire.ops.target import Target
from quire.ops.triton import int4 as int4_module
from quire.ops.triton import tiles as tiles_module
from quire.ops.triton.int4 import TritonInt4Linear
from quire.ops.triton.launch import run
from quire.ops.triton.library import TRITON, interprets
from quire.ops.triton.linear import TritonLinear
from quire.ops.triton.tiles import MOST_PARTS, PROGRAMS, parts_of
from quire.ops.weight import Fp8Weight, Int8Weight

pytestmark = pytest.mark.skipif(not interprets(), reason="needs Triton's interpreter")
BF16 = torch.bfloat16


class Recorder:
    """Launches, and remembers what."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.seen.append({"grid": grid, **options})
        run(kernel, grid, *args, **options)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(shape[-1] ** -0.5).to(dtype)


def kernel(launch: Any = run) -> TritonLinear:
    return TritonLinear(Target("cpu", BF16, isa=TRITON, launch=launch))


def int8_weight(n: int, k: int) -> Int8Weight:
    return Int8Weight(values_nk=random(n, k).mul(127 * k**0.5 / 4).clamp(-127, 127).to(torch.int8), scale_n=scale(n))


def fp8_weight(n: int, k: int) -> Fp8Weight:
    return Fp8Weight(values_nk=random(n, k).float().mul(k**0.5).to(torch.float8_e4m3fn), scale_n=scale(n))


def scale(n: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(n)).add_(0.5).div_(100)


@pytest.mark.parametrize(
    ("n", "k", "counts", "tiles"),
    [
        (70, 528, (1, 17, 33, 65), {("split", 64, rows) for rows in (16, 32, 64, 128)}),  # tails everywhere
        (130, 512, (1, 300), {("split", 64, 16), ("loop", 128, 128)}),
        (100, 512, (1, 300), {("split", 64, 16), ("loop", 64, 128)}),
        (300, 64, (1, 130, 300), {("one", 64, 16), ("one", 128, 128), ("one", 128, 256)}),
    ],
)
def test_a_row_has_the_same_bits_however_the_product_is_cut(n, k, counts, tiles, monkeypatch):
    monkeypatch.setattr(tiles_module, "PROGRAMS", 128 if n == 70 else 4)  # as if the machine were small
    x, weight, recorder = random(counts[-1], k) * 10, random(n, k, seed=1), Recorder()
    results = [kernel(recorder)(x[-count:], weight) for count in counts]
    for count, result in zip(counts, results, strict=True):
        assert torch.equal(result, results[-1][-count:])
    assert {(launch["FORM"], launch["BLOCK_F"], launch["BLOCK_T"]) for launch in recorder.seen} >= tiles
    torch.testing.assert_close(results[0], linear(x[-1:], weight), rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize("make", [random, int8_weight, fp8_weight])
@pytest.mark.parametrize("biased", [False, True])
def test_a_group_has_the_bits_of_single_calls(make, biased):
    x, recorder = random(5, 520) * 10, Recorder()
    weights = [make(n, 520) for n in (150, 40, 33, 20)]
    biases = [random(n) if biased else None for n in (150, 40, 33, 20)]
    grouped = kernel(recorder).group(x, weights, biases)
    assert [launch["COUNT"] for launch in recorder.seen if "COUNT" in launch] == [3, 1]
    for weight, bias, result in zip(weights, biases, grouped, strict=True):
        assert torch.equal(kernel()(x, weight, bias), result)


def test_weights_of_which_only_some_have_a_bias_are_grouped_as_well():
    x, weights = random(3, 64), [random(n, 64) for n in (20, 30)]
    grouped = kernel().group(x, weights, [None, random(30)])
    assert torch.equal(grouped[0], kernel()(x, weights[0], None))
    assert torch.equal(grouped[1], kernel()(x, weights[1], random(30)))


@pytest.mark.parametrize(
    ("make", "definition"), [(random, linear), (int8_weight, linear_int8), (fp8_weight, linear_fp8)]
)
def test_logits_are_wide(make, definition):
    """And of float32 precision, with k in parts, and rows that are views of any shape and stride."""
    x, weight, bias = random(2, 3, 1040)[..., ::2] * 10, make(70, 520), random(70)
    found = kernel().wide(x, kernel().pack(weight), bias)
    assert found.dtype == torch.float32
    expected = definition(x.reshape(6, 520).float(), weight, bias)
    torch.testing.assert_close(found, expected.view(2, 3, 70), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("seed", "rows", "programs", "forms"),
    [
        (1, 18, 128, {"split"}),  # zero points
        (6, 70, 2, {"loop", "split"}),  # a scale per group
        (33, 18, 128, {"one"}),  # spans of groups, in pieces
        (112, 18, 128, {"split"}),  # spans
    ],
)
def test_4_bit_rows_are_alone_and_near_the_definition(seed, rows, programs, forms, monkeypatch):
    inputs = LINEAR_INT4.inputs(rows, torch.float32, torch.Generator().manual_seed(seed))
    x, bias, recorder = inputs["x_tk"], inputs["bias_n"], Recorder()
    monkeypatch.setattr(tiles_module, "PROGRAMS", programs)
    monkeypatch.setattr(int4_module, "PROGRAMS", programs)
    kernel = TritonInt4Linear(Target("cpu", torch.float32, isa=TRITON, launch=recorder))
    weight = kernel.pack(inputs["weight"])
    whole = kernel.wide(x, weight, bias)
    torch.testing.assert_close(whole, LINEAR_INT4.definition(**inputs), rtol=1e-5, atol=1e-5)
    assert torch.equal(kernel.wide(x[3:4], weight, bias), whole[3:4])
    assert {launch["FORM"] for launch in recorder.seen if "FORM" in launch} == forms
    assert not kernel._tickets.any()


def test_tickets_are_as_they_were():
    linear_kernel = kernel()
    for _ in range(2):
        linear_kernel.group(random(3, 1024), [random(100, 1024), random(70, 1024)], [None, None])
    assert not linear_kernel._tickets.any()


def test_no_rows_are_no_results():
    weights = [random(20, 64), random(30, 64)]
    assert [each.shape for each in kernel().group(random(0, 64), weights, [None, None])] == [(0, 20), (0, 30)]
    assert kernel().wide(random(0, 64), int8_weight(20, 64), None).shape == (0, 20)


@pytest.mark.parametrize("k", [1, 63, 64, 576, 1000, 1024, 4096, 12288, 28672])
@pytest.mark.parametrize("n", [1, 64, 576, 1024, 4096, 12288, 151936])
@pytest.mark.parametrize("step", [32, 64, 128])
def test_parts_cover_k_and_are_neither_many_nor_short(n, k, step):
    parts, steps = parts_of(n, k, step)
    assert (parts - 1) * steps * step < k <= parts * steps * step
    assert parts <= MOST_PARTS
    assert parts == 1 or (steps * step >= 256 and -(-n // 64) < PROGRAMS)

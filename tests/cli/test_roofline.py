"""The machine's own limits: the arithmetic around the measurement."""

from __future__ import annotations

import json

import pytest
import torch

from quire.cli.bench.roofline import CACHE_MULTIPLE, LEAST_BUFFER_BYTES, MOST_BUFFER_BYTES, buffer_bytes
from quire.cli.main import main


def test_the_buffer_exceeds_the_cache_but_not_the_memory():
    mib = 1024**2
    assert buffer_bytes(1 * mib) <= LEAST_BUFFER_BYTES
    assert buffer_bytes(10**15) <= MOST_BUFFER_BYTES
    assert buffer_bytes(200 * mib) <= max(CACHE_MULTIPLE * 200 * mib, LEAST_BUFFER_BYTES)


def test_figures_are_positive(capsys, monkeypatch):
    monkeypatch.setattr("quire.cli.bench.roofline.buffer_bytes", lambda cache: 16 * 1024**2)
    assert main(["bench", "roofline", "--json", "--seconds", "0.01", "--matmul-size", "128", "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["threads"] == 1
    assert set(result["memory_gb_per_s"]) == {"read", "copy"}
    assert set(result["matmul_gflop_per_s"]) == {"bf16", "fp32"}
    assert set(result["kernels_gop_per_s"]) == ({"bf16", "int8", "fp32"} if result["isa"] else set())
    assert all(figure > 0 for figure in (*result["kernels_gb_per_s"].values(), *result["kernels_gop_per_s"].values()))
    assert all(figure > 0 for figure in (*result["memory_gb_per_s"].values(), *result["matmul_gflop_per_s"].values()))


def test_sizes_without_meaning_are_refused(capsys):
    assert main(["bench", "roofline", "--matmul-size", "0"]) == 2
    assert "--matmul-size" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cuda:x", "tpu"])
def test_a_gpu_that_is_not_there_is_told(capsys, device):
    assert main(["bench", "roofline", "--device", device]) == 2
    told = capsys.readouterr().err
    assert device in told
    assert "--device cpu" in told or "cuda:N" in told

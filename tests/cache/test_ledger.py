from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.cache.groups import ALL_OF_THE_PAST, group_layers
from quire.cache.ledger import GIB, HEAD_ROWS, KVLedger, activation_bytes, available_memory
from quire.core.errors import NotEnoughMemory

MIB = 2**20

LEDGER = KVLedger(
    memory_available=8 * GIB,
    weight_bytes=2 * GIB,
    activation_bytes=GIB,
    kv_bytes_per_block=MIB,
    groups=group_layers({ALL_OF_THE_PAST: 4}, 32768),
    step_tokens=2048,
    block_size=16,
    longest=32768,
    max_num_seqs=64,
)


def test_pool_is_its_share_of_what_is_left():
    assert LEDGER.memory_left == 5 * GIB
    assert LEDGER.num_blocks == 2560
    assert LEDGER.max_model_len == 32768
    LEDGER.check()


def test_explicit_size_wins_over_the_share():
    assert replace(LEDGER, kv_cache_memory=GIB).num_blocks == 1024


def test_pool_is_no_larger_than_sequences_can_use():
    small = replace(LEDGER, longest=64, max_num_seqs=3)
    assert small.num_blocks == 2 * 3 * 4 + 1


def test_captured_steps_take_from_the_pool_and_are_told():
    captured = replace(LEDGER, captured_bytes=GIB)
    assert captured.memory_left == 4 * GIB
    assert ("captured steps, kernels", GIB) in captured.rows()
    assert not any(name.startswith("captured") for name, _ in LEDGER.rows())


def test_context_shrinks_to_what_fits():
    tight = replace(LEDGER, kv_cache_memory=101 * MIB)
    assert tight.max_model_len == 100 * 16
    tight.check()


def test_a_length_that_was_asked_for_must_fit():
    tight = replace(LEDGER, kv_cache_memory=101 * MIB, required_len=1601)
    with pytest.raises(NotEnoughMemory, match="hold 1600 tokens; one sequence needs 1601") as caught:
        tight.check()
    assert caught.value.param == "max_model_len"
    replace(tight, required_len=1600).check()


def test_refusal_shows_the_whole_ledger():
    with pytest.raises(NotEnoughMemory) as caught:
        replace(LEDGER, memory_available=3 * GIB).check()
    for name, _value in LEDGER.rows():
        assert name in caught.value.message
    with pytest.raises(NotEnoughMemory, match=r"6\.00 GiB does not fit"):
        replace(LEDGER, kv_cache_memory=6 * GIB).check()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    available=st.integers(0, 1 << 34),
    weights=st.integers(0, 1 << 33),
    activations=st.integers(0, 1 << 30),
    share=st.floats(0.01, 1.0),
    per_block=st.integers(1, 1 << 22),
    longest=st.integers(1, 1 << 17),
)
def test_what_passes_the_check_fits(available, weights, activations, share, per_block, longest):
    ledger = replace(
        LEDGER,
        memory_available=available,
        weight_bytes=weights,
        activation_bytes=activations,
        memory_utilization=share,
        kv_bytes_per_block=per_block,
        longest=longest,
    )
    try:
        ledger.check()
    except NotEnoughMemory:
        assert ledger.kv_budget < (min(longest, 256) // 16 + 2) * per_block
    else:
        assert weights + activations + ledger.kv_bytes <= available
        assert 0 < ledger.max_model_len <= min(longest, (ledger.num_blocks - 1) * 16)


def test_activations_grow_with_tokens_and_vocabulary():
    shapes = {
        "max_num_batched_tokens": 1024,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "attention_size": 2048,
        "kv_size": 1024,
        "vocab_size": 151936,
        "dtype_bytes": 2,
    }
    base = activation_bytes(**shapes)
    assert base > HEAD_ROWS * 151936 * (2 + 4)
    for name in ("max_num_batched_tokens", "hidden_size", "intermediate_size", "vocab_size"):
        assert activation_bytes(**{**shapes, name: 2 * shapes[name]}) > base


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".", 1)).write_text(text)


def test_cgroup_v2_tightest_ancestor_counts(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("0::/outer/inner\n")
    write(root / "outer", memory__max=f"{90 * MIB}\n", memory__current=f"{60 * MIB}\n", memory__stat="anon 1\n")
    write(root / "outer/inner", memory__max="max\n", memory__current=f"{50 * MIB}\n")
    assert available_memory(root, membership) == 30 * MIB
    write(root / "outer", memory__stat=f"anon 1\ninactive_file {5 * MIB}\n")
    assert available_memory(root, membership) == 35 * MIB
    write(root / "outer/inner", memory__max=f"{60 * MIB}\n")
    assert available_memory(root, membership) == 10 * MIB


def test_cgroup_v1_memory_controller(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    write(
        root / "memory",
        memory__limit_in_bytes="9223372036854771712\n",
        memory__usage_in_bytes="100\n",
    )
    assert available_memory(root, membership) > 30 * MIB
    (root / "memory/memory.limit_in_bytes").unlink()
    write(root / "memory/job")
    (root / "memory/job/memory.limit_in_bytes").write_text(f"{40 * MIB}")
    (root / "memory/job/memory.usage_in_bytes").write_text(f"{25 * MIB}")
    (root / "memory/job/memory.stat").write_text(f"inactive_file 0\ntotal_inactive_file {2 * MIB}\n")
    assert available_memory(root, membership) == 17 * MIB


def test_no_cgroup_means_the_machine(tmp_path):
    available = available_memory(tmp_path / "none", tmp_path / "nothing")
    assert 0 < available <= psutil.virtual_memory().total


def test_this_machine_has_memory():
    assert 0 < available_memory() <= psutil.virtual_memory().total
